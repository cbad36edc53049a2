"""Google's token endpoint and the parts of the Sheets API that a publish uses, with their refusals.

A batchUpdate is all or nothing, a worksheet has a grid, values need RAW, a title is taken once, and who is not an editor gets 403.
"""

from __future__ import annotations

import copy
import itertools
import json
import re
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qs

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from google.auth import jwt

from retention_ops_tests.execute.servers.loopback import LoopbackServer, Reply, Request

SCOPE = "https://www.googleapis.com/auth/spreadsheets"
EMAIL = "publisher@shop.iam.gserviceaccount.com"
MAX_BODY = 2_000_000
MAX_CELLS = 10_000_000


class Refused(Exception):
    def __init__(self, status: int, word: str, message: str):
        super().__init__(message)
        self.reply = Reply(status, {"error": {"code": status, "message": message, "status": word}})


@dataclass
class Sheet:
    gid: int
    title: str
    rows: int
    columns: int
    frozen: int = 0
    values: list[list[Any]] = field(default_factory=list)
    metadata: list[dict[str, Any]] = field(default_factory=list)

    def properties(self) -> dict[str, Any]:
        grid = {"rowCount": self.rows, "columnCount": self.columns, "frozenRowCount": self.frozen}
        return {"sheetId": self.gid, "title": self.title, "gridProperties": grid}


class SheetsServer(LoopbackServer):
    """`sheets[spreadsheet]` are its worksheets; `editors[spreadsheet]` the accounts it is shared with."""

    def __init__(self) -> None:
        super().__init__()
        key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
        self.private_key = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        ).decode()
        self._public_key = key.public_key().public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )
        self.sheets: dict[str, list[Sheet]] = {"book": [Sheet(0, "Sheet1", 1000, 26)]}
        self.editors: dict[str, set[str]] = {"book": {EMAIL}}
        self.tokens: set[str] = set()
        self._fault_after_values: tuple[str, dict[str, Any]] | None = None
        self._numbers = itertools.count(1)

    def credentials(self) -> str:
        return json.dumps({
            "type": "service_account", "project_id": "shop", "private_key_id": "1", "private_key": self.private_key,
            "client_email": EMAIL, "client_id": "1", "token_uri": f"{self.url}/token",
        })

    def fail_final(self, name: str, **options: Any) -> None:
        """Orders a fault for the batchUpdate that follows the next values (the base class cannot tell it from the staging one)."""
        self._fault_after_values = (name, options)

    def titles(self, spreadsheet: str = "book") -> list[str]:
        return [sheet.title for sheet in self.sheets[spreadsheet]]

    def sheet(self, title: str, spreadsheet: str = "book") -> Sheet:
        (found,) = [sheet for sheet in self.sheets[spreadsheet] if sheet.title == title]
        return found

    def handle(self, request: Request) -> Reply:
        try:
            return Reply(200, self._token(request) if request.path == "/token" else self._api(request))
        except Refused as refused:
            return refused.reply

    def _token(self, request: Request) -> Any:
        form = parse_qs(request.body.decode())
        try:
            claims = jwt.decode(form["assertion"][0], certs=self._public_key, audience="https://oauth2.googleapis.com/token")
        except Exception as error:
            answer = Refused(400, "", "")
            answer.reply = Reply(400, {"error": "invalid_grant", "error_description": f"Invalid JWT: {type(error).__name__}"})
            raise answer from None
        assert form["grant_type"] == ["urn:ietf:params:oauth:grant-type:jwt-bearer"]
        assert (claims["iss"], claims["scope"]) == (EMAIL, SCOPE)
        token = f"ya29.token-{next(self._numbers)}"
        self.tokens.add(token)
        return {"access_token": token, "expires_in": 3599, "token_type": "Bearer"}

    def _api(self, request: Request) -> Any:
        if request.headers.get("authorization", "").removeprefix("Bearer ") not in self.tokens:
            raise Refused(401, "UNAUTHENTICATED", "Request had invalid authentication credentials.")
        found = re.fullmatch(r"/v4/spreadsheets/([^/:]+)(.*)", request.path)
        if not found or found[1] not in self.sheets:
            raise Refused(404, "NOT_FOUND", "Requested entity was not found.")
        if EMAIL not in self.editors[found[1]]:
            raise Refused(403, "PERMISSION_DENIED", "The caller does not have permission")
        if len(request.body) > MAX_BODY:
            raise Refused(413, "INVALID_ARGUMENT", "Request payload size exceeds the limit.")
        calls = {
            ("GET", ""): self._get, ("POST", ":batchUpdate"): self._batch_update,
            ("POST", "/values:batchUpdate"): self._values, ("POST", "/developerMetadata:search"): self._search,
        }
        if (request.method, found[2]) not in calls:
            raise Refused(404, "NOT_FOUND", "No such method")
        return calls[request.method, found[2]](found[1], request)

    def _get(self, spreadsheet: str, request: Request) -> Any:
        assert request.query["fields"] == ["sheets.properties(sheetId,title,gridProperties(rowCount,columnCount))"]
        return {"sheets": [{"properties": sheet.properties()} for sheet in self.sheets[spreadsheet]]}

    def _batch_update(self, spreadsheet: str, request: Request) -> Any:
        sheets = copy.deepcopy(self.sheets[spreadsheet])
        replies = []
        for number, call in enumerate(request.json()["requests"]):
            ((name, body),) = call.items()
            try:
                replies.append({"addSheet": self._add_sheet, "deleteSheet": self._delete_sheet, "updateSheetProperties": self._rename,
                                "createDeveloperMetadata": self._create_metadata}[name](sheets, body))
            except Refused as refused:
                refused.reply.body["error"]["message"] = f"Invalid requests[{number}].{name}: {refused}"
                raise
        if sum(sheet.rows * sheet.columns for sheet in sheets) > MAX_CELLS:
            raise Refused(400, "INVALID_ARGUMENT", "This action would increase the number of cells in the workbook above the limit")
        self.sheets[spreadsheet] = sheets
        return {"spreadsheetId": spreadsheet, "replies": replies}

    def _add_sheet(self, sheets: list[Sheet], body: Any) -> Any:
        grid = body["properties"]["gridProperties"]
        self._free(sheets, body["properties"]["title"])
        if grid.get("frozenRowCount", 0) >= grid["rowCount"]:
            raise Refused(400, "INVALID_ARGUMENT", "You can't freeze all visible rows on the sheet.")
        gid = 1000 + next(self._numbers)
        sheets.append(Sheet(gid, body["properties"]["title"], grid["rowCount"], grid["columnCount"], grid.get("frozenRowCount", 0)))
        return {"addSheet": {"properties": sheets[-1].properties()}}

    def _delete_sheet(self, sheets: list[Sheet], body: Any) -> Any:
        sheets.remove(self._by_gid(sheets, body["sheetId"]))
        if not sheets:
            raise Refused(400, "INVALID_ARGUMENT", "You can't remove all the sheets in a document.")
        return {}

    def _rename(self, sheets: list[Sheet], body: Any) -> Any:
        assert body["fields"] == "title"
        sheet = self._by_gid(sheets, body["properties"]["sheetId"])
        self._free([other for other in sheets if other is not sheet], body["properties"]["title"])
        sheet.title = body["properties"]["title"]
        return {}

    def _create_metadata(self, sheets: list[Sheet], body: Any) -> Any:
        mark = body["developerMetadata"]
        assert mark["visibility"] == "DOCUMENT"
        stored = {**mark, "metadataId": next(self._numbers)}
        self._by_gid(sheets, mark["location"]["sheetId"]).metadata.append(stored)
        return {"createDeveloperMetadata": {"developerMetadata": stored}}

    def _free(self, sheets: list[Sheet], title: str) -> None:
        if any(sheet.title.casefold() == title.casefold() for sheet in sheets):
            raise Refused(400, "INVALID_ARGUMENT", f'A sheet with the name "{title}" already exists. Please enter another name.')

    def _by_gid(self, sheets: list[Sheet], gid: int) -> Sheet:
        for sheet in sheets:
            if sheet.gid == gid:
                return sheet
        raise Refused(400, "INVALID_ARGUMENT", f"No sheet with id: {gid}")

    def _values(self, spreadsheet: str, request: Request) -> Any:
        body = request.json()
        if body.get("valueInputOption") != "RAW":
            raise Refused(400, "INVALID_ARGUMENT", "'valueInputOption' is required but not specified")
        sheets = copy.deepcopy(self.sheets[spreadsheet])
        for item in body["data"]:
            self._write(sheets, item)
        self.sheets[spreadsheet] = sheets
        if self._fault_after_values:
            (name, options), self._fault_after_values = self._fault_after_values, None
            self.fail(name, ":batchUpdate", **options)
        return {"spreadsheetId": spreadsheet, "totalUpdatedRows": sum(len(item["values"]) for item in body["data"])}

    def _write(self, sheets: list[Sheet], item: Any) -> None:
        found = re.fullmatch(r"'((?:[^']|'')+)'!A(\d+):([A-Z]+)(\d+)", item["range"])
        named = [sheet for sheet in sheets if found and sheet.title == found[1].replace("''", "'")]
        if not named:
            raise Refused(400, "INVALID_ARGUMENT", f"Unable to parse range: {item['range']}")
        first, last, columns = int(found[2]), int(found[4]), _column(found[3])
        if last > named[0].rows or columns > named[0].columns:
            raise Refused(400, "INVALID_ARGUMENT", f"Range exceeds grid limits. Max rows: {named[0].rows}, max columns: {named[0].columns}")
        if len(item["values"]) > last - first + 1 or any(len(row) > columns for row in item["values"]):
            raise Refused(400, "INVALID_ARGUMENT", f"Requested writing within range [{item['range']}], but tried writing outside it")
        if any(isinstance(cell, str) and len(cell) > 50_000 for row in item["values"] for cell in row):
            raise Refused(400, "INVALID_ARGUMENT", "Your input contains more than the maximum of 50000 characters in a single cell.")
        values = named[0].values
        values += [[] for _ in range(last - len(values))]
        values[first - 1 : last] = item["values"]

    def _search(self, spreadsheet: str, request: Request) -> Any:
        matches = []
        for sheet in self.sheets[spreadsheet]:
            for mark in sheet.metadata:
                filters = [item["developerMetadataLookup"] for item in request.json()["dataFilters"]]
                if any(all(mark[name] == value for name, value in wanted.items()) for wanted in filters):
                    location = {"locationType": "SHEET", "sheetId": sheet.gid}
                    matches.append({"developerMetadata": {**mark, "location": location}})
        return {"matchedDeveloperMetadata": matches} if matches else {}


def _column(letters: str) -> int:
    number = 0
    for letter in letters:
        number = number * 26 + ord(letter) - 64
    return number
