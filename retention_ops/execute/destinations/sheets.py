"""Google Sheets: a publish puts lists on worksheets of one spreadsheet, all of them or none.

A withdraw deletes worksheets of an earlier publish, found by its key, and nothing else.

Rows are written to staging worksheets (`~<title> <key8>`) first; one atomic batchUpdate then deletes what bears the real titles,
renames the staging worksheets and marks them with the action's key. A reader never sees half a list under its real title.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import urlsplit

import requests
from google.auth import exceptions as google_errors
from google.auth.transport.requests import Request as TokenRequest
from google.oauth2.service_account import Credentials
from gspread.http_client import HTTPClient
from gspread.urls import SPREADSHEET_URL
from gspread.utils import absolute_range_name, rowcol_to_a1

from retention_ops.errors import SettingsError
from retention_ops.execute.destinations.http import Http, content
from retention_ops.execute.destinations.seam import (
    Ambiguous,
    CannotTell,
    DestinationError,
    Finding,
    Lookup,
    Outgoing,
    Receipt,
    Rejected,
    Table,
    Throttled,
)
from retention_ops.settings import TEST_MODES, Secrets, Settings

SCOPES = ["https://www.googleapis.com/auth/spreadsheets"]
GOOGLE = "https://sheets.googleapis.com"
NAME = "Google Sheets"
CELLS_PER_SPREADSHEET = 10_000_000
CHARACTERS_PER_CELL = 50_000
TITLE_CHARACTERS = 90
"""Google allows 100; a staging title is 10 longer than the real one"""
CHUNK_BYTES = 1_500_000
"""Google advises at most 2 MB per request"""
QUOTA_SECONDS = 60.0
"""the quota is refilled each minute"""
KEY, ROWS, SHA256 = "retention_ops_key", "retention_ops_rows", "retention_ops_sha256"
"""developer metadata on every published worksheet"""
ANSWERED = frozenset({*range(200, 300), *range(400, 600)}) - {429}
"""statuses classified here; the rest is the same for every service"""


@dataclass(frozen=True)
class Worksheet:
    gid: int
    title: str
    cells: int


class ServiceAccount(requests.auth.AuthBase):
    """Signs calls with an access token, fetched when there is none or it is about to expire.

    google-auth's AuthorizedSession is not used: it sends a write again after 401, and from 2.62 it hands the token to
    iamcredentials.googleapis.com in a background thread.
    """

    def __init__(self, credentials: Credentials, timeout: float = 30):
        self.credentials = credentials
        self.email = credentials.service_account_email
        self._fetch = partial(TokenRequest(), timeout=timeout)

    def __call__(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        request.headers["Authorization"] = f"Bearer {self.token()}"
        return request

    def token(self) -> str:
        """Raises Throttled while the token endpoint cannot be used, Rejected when it refuses the key."""
        if not self.credentials.valid:
            try:
                self.credentials.refresh(self._fetch)
            except google_errors.TransportError:
                raise Throttled(f"{NAME}: Google's token endpoint cannot be reached; nothing was sent", QUOTA_SECONDS) from None
            except google_errors.GoogleAuthError as error:
                raise self._refused(error) from None
            except (TypeError, ValueError, AttributeError):  # google-auth's answer to a 200 that is not a token, such as a captive portal
                raise Throttled(f"{NAME}: Google's token endpoint answered with no token; nothing was sent", QUOTA_SECONDS) from None
        return self.credentials.token

    def forget_token(self) -> None:
        self.credentials.token = None

    def _refused(self, error: google_errors.GoogleAuthError) -> DestinationError:
        if error.retryable:
            return Throttled(f"{NAME}: Google's token endpoint is not answering properly; nothing was sent", QUOTA_SECONDS)
        answer = error.args[1] if len(error.args) > 1 and isinstance(error.args[1], Mapping) else {}
        return Rejected(
            f"{NAME}: Google issues no token to {self.email} ({_word(answer.get('error'))}): the key may have been deleted or the clock "
            "of this machine be wrong; create a new key and set RETENTION_OPS_GOOGLE_CREDENTIALS"
        )


class SheetsHttp(HTTPClient):
    """gspread's calls, made once, with the seam's errors.

    gspread's own `request` is not used: its APIError raises TypeError on an error answer that is not Google's usual shape.
    """

    def __init__(self, http: Http, account: ServiceAccount):
        super().__init__(None, session=requests.Session())
        self._http = http
        self._account = account

    def request(self, method: str, endpoint: str, params: Any = None, data: Any = None, json: Any = None, **_: Any) -> requests.Response:
        """The answer, which is a JSON object. Raises Rejected, Throttled or Ambiguous."""
        path = endpoint.removeprefix(GOOGLE)
        try:
            response = self._http.request(method.upper(), path, json=json, data=data, params=params, expect=ANSWERED)
        except Throttled as error:
            raise Throttled(str(error), max(error.retry_after, QUOTA_SECONDS)) from None
        if not response.ok:
            raise self._refused(response)
        if not isinstance(content(response, NAME), dict):
            raise Ambiguous(f"{NAME}: answered {response.status_code} with something that is not a JSON object")
        return response

    def _refused(self, response: requests.Response) -> DestinationError:
        """Google's sentences are not quoted: they may repeat cells."""
        status, word = response.status_code, _status_word(response)
        said = f"{NAME}: answered {status} {word}"
        if status >= 500 or status in (408, 409):
            return Ambiguous(said)
        if status == 401:
            self._account.forget_token()
            return Throttled(f"{said}: the token is no longer accepted, a new one will be asked for", 5)
        if word == "RESOURCE_EXHAUSTED" or b"rateLimitExceeded" in response.content:
            return Throttled(f"{said}: the quota per minute is used up", QUOTA_SECONDS)
        if status == 403 and b"SERVICE_DISABLED" in response.content:
            return Rejected(f"{said}: enable the Google Sheets API in the Cloud project of {self._account.email}")
        if status == 403:
            return Rejected(f"{said}: share the spreadsheet with {self._account.email} as an editor")
        if status == 404:
            return Rejected(
                f"{said}: no such spreadsheet; check RETENTION_OPS_SHEETS_SPREADSHEET (pilot: RETENTION_OPS_SHEETS_TEST_SPREADSHEET) and "
                f"share it with {self._account.email} as an editor"
            )
        return Rejected(f"{said}: a protected worksheet, or a limit of Google Sheets, may be the reason")


class Sheets:
    """Kind "publish": `action.tables` become worksheets of `action.target`, or of `spreadsheet` where the action names none.

    Kind "withdraw": of the worksheets published with payload `key`, those of payload `worksheets` ({title, gid or None}) are deleted.
    """

    name = "sheets"
    lookups: ClassVar[Mapping[str, Lookup]] = {
        "publish": Lookup(wait_seconds=0, times=1, absent="resend"), "withdraw": Lookup(repeatable=True),
    }

    def __init__(self, account: ServiceAccount, spreadsheet: str, api_url: str = GOOGLE, timeout: tuple[float, float] = (5, 30)):
        self.spreadsheet = spreadsheet
        self._account = account
        self._google = SheetsHttp(Http(api_url, auth=account, timeout=timeout, name=NAME), account)

    @classmethod
    def connect(cls, settings: Settings, secrets: Secrets, mode: str, timeout: tuple[float, float] = (5, 30)) -> Sheets:
        """Nothing is asked yet. Raises SettingsError naming what is missing."""
        spreadsheet = settings.target("sheets_spreadsheet", mode)
        if not spreadsheet:
            missing = "RETENTION_OPS_SHEETS_TEST_SPREADSHEET" if mode in TEST_MODES else "RETENTION_OPS_SHEETS_SPREADSHEET"
            raise SettingsError(f"{missing} is not set: the id in the spreadsheet's address, docs.google.com/spreadsheets/d/<id>")
        if not _safe_address(settings.sheets_api_url):
            raise SettingsError("RETENTION_OPS_SHEETS_API_URL must begin with https:// (http:// only on a loopback address)")
        return cls(ServiceAccount(_credentials(secrets), timeout[1]), spreadsheet, settings.sheets_api_url, timeout)

    def send(self, action: Outgoing) -> Receipt:
        """Publishes every table. Run again with the same key, it leaves the same worksheets."""
        if action.kind == "withdraw":
            return self._withdraw(action)
        _refuse_unfit(action)
        spreadsheet = action.target or self.spreadsheet
        staged = self._stage(spreadsheet, action)
        for body in _values(action):
            self._google.values_batch_update(spreadsheet, body)
        self._put_in_place(spreadsheet, action, staged)
        return _receipt(spreadsheet, staged, sum(len(table.rows) for table in action.tables.values()))

    def update(self, action: Outgoing) -> Receipt:
        raise Rejected(f"{NAME}: a published list is replaced by another publish, never updated")

    def find_by_key(self, action: Outgoing) -> Receipt | None:
        """The worksheets an earlier attempt left, if all are there under their titles.

        A look-up has no tables, so the titles come from the payload's `worksheets`; where it names none, one worksheet is enough.
        """
        spreadsheet = action.target or self.spreadsheet
        try:
            found = self._marked(spreadsheet, action.key)
            titles = {sheet.gid: sheet.title for sheet in self._worksheets(spreadsheet)} if found else {}
        except Rejected as error:
            raise CannotTell(str(error)) from None
        published = {titles[gid]: gid for gid in found if gid in titles}
        titles_wanted = _titles(action) or list(published)
        if not published or not set(titles_wanted) <= set(published):
            return None
        gids = {title: published[title] for title in titles_wanted}
        return _receipt(spreadsheet, gids, sum(found[gid] for gid in gids.values()))

    def _withdraw(self, action: Outgoing) -> Receipt:
        """Deletes worksheets that bear our mark. People may have renamed one: then its gid names it; a copy of theirs has no mark."""
        spreadsheet = action.target or self.spreadsheet
        marked, wanted = self._marked(spreadsheet, action.payload["key"]), action.payload["worksheets"]
        titles, gids = {sheet["title"] for sheet in wanted}, {sheet["gid"] for sheet in wanted}
        there = self._worksheets(spreadsheet)
        old = [sheet for sheet in there if sheet.gid in marked and (sheet.gid in gids or sheet.title in titles)]
        if old:
            calls: list[dict[str, Any]] = []
            if len(old) == len(there):  # a spreadsheet cannot be without a worksheet
                grid = {"rowCount": 2, "columnCount": 1}
                calls.append({"addSheet": {"properties": {"title": f"~empty {action.key[:8]}", "gridProperties": grid}}})
            calls += [{"deleteSheet": {"sheetId": sheet.gid}} for sheet in old]
            self._google.batch_update(spreadsheet, {"requests": calls})
        return Receipt(f"withdrawn:{action.key}", None, {"deleted": len(old)})

    def check(self) -> list[Finding]:
        """Whether the key works and the spreadsheet can be read; writes nothing."""
        findings = [_finding("google credentials", self._check_token, "create a new key, set RETENTION_OPS_GOOGLE_CREDENTIALS")]
        if findings[0].ok:
            findings.append(_finding("spreadsheet", self._check_spreadsheet, f"share it with {self._account.email} as an editor"))
            findings.append(Finding(
                "right to edit", None, f"whether {self._account.email} may edit cannot be read with the scope spreadsheets",
                f"make sure the spreadsheet is shared with {self._account.email} as an editor, not a viewer",
            ))
        findings.append(Finding(
            "google quota", None, "Google allows 300 writes a minute per project and 60 per user; this service account is one user",
        ))
        return findings

    def _check_token(self) -> str:
        self._account.forget_token()
        self._account.token()
        return f"a token is issued to {self._account.email} for the scope spreadsheets"

    def _check_spreadsheet(self) -> str:
        sheets = self._worksheets(self.spreadsheet)
        used = sum(sheet.cells for sheet in sheets)
        return f"can be read: {len(sheets)} worksheets, {used:,} of {CELLS_PER_SPREADSHEET:,} cells used"

    def _worksheets(self, spreadsheet: str) -> list[Worksheet]:
        fields = "sheets.properties(sheetId,title,gridProperties(rowCount,columnCount))"
        found = []
        for sheet in self._google.fetch_sheet_metadata(spreadsheet, {"fields": fields}).get("sheets", []):
            properties = sheet["properties"]
            grid = properties.get("gridProperties", {})  # a chart on its own worksheet has no grid
            cells = grid.get("rowCount", 0) * grid.get("columnCount", 0)
            found.append(Worksheet(properties.get("sheetId", 0), properties["title"], cells))
        return found

    def _marked(self, spreadsheet: str, key: str) -> dict[int, int]:
        """gid -> rows of the worksheets published with `key`."""
        wanted = [{"metadataKey": KEY, "metadataValue": key}, {"metadataKey": ROWS}]
        url = SPREADSHEET_URL % spreadsheet + "/developerMetadata:search"
        answer = self._google.request("post", url, json={"dataFilters": [{"developerMetadataLookup": mark} for mark in wanted]}).json()
        marks: dict[str, dict[int, str]] = {KEY: {}, ROWS: {}}  # name -> gid -> value
        for match in answer.get("matchedDeveloperMetadata", []):
            mark = match["developerMetadata"]
            marks[mark["metadataKey"]][mark.get("location", {}).get("sheetId", 0)] = mark.get("metadataValue", "")
        return {gid: int(marks[ROWS].get(gid) or 0) for gid, value in marks[KEY].items() if value == key}

    def _stage(self, spreadsheet: str, action: Outgoing) -> dict[str, int]:
        """Adds an empty staging worksheet per title; returns title -> gid.

        What a crashed attempt left for these titles is deleted in the same call and not reused: should that attempt's last
        call still be under way, it finds its worksheet gone and fails whole instead of naming one we are filling.
        """
        sheets = self._worksheets(spreadsheet)
        stale = [sheet for sheet in sheets if any(_is_staging(sheet.title, title) for title in action.tables)]
        kept = sum(sheet.cells for sheet in sheets if sheet not in stale)
        new = sum(_grid(table)[0] * _grid(table)[1] for table in action.tables.values())
        if kept + new > CELLS_PER_SPREADSHEET:
            raise Rejected(
                f"{NAME}: {kept:,} cells are used and {new:,} would be added, above {CELLS_PER_SPREADSHEET:,}; delete old worksheets "
                "or set another spreadsheet"
            )
        calls = [{"deleteSheet": {"sheetId": sheet.gid}} for sheet in stale]
        calls += [{"addSheet": {"properties": _properties(title, action.key, table)}} for title, table in action.tables.items()]
        replies = self._google.batch_update(spreadsheet, {"requests": calls}).get("replies", [])
        added = [reply["addSheet"]["properties"]["sheetId"] for reply in replies if "addSheet" in reply]
        if len(added) != len(action.tables):
            raise Ambiguous(f"{NAME}: did not say which worksheets it added")
        return dict(zip(action.tables, added, strict=True))

    def _put_in_place(self, spreadsheet: str, action: Outgoing, staged: Mapping[str, int]) -> None:
        taken = {title.casefold() for title in staged}
        old = [sheet for sheet in self._worksheets(spreadsheet) if sheet.title.casefold() in taken]
        calls: list[dict[str, Any]] = [{"deleteSheet": {"sheetId": sheet.gid}} for sheet in old]
        for title, gid in staged.items():
            calls.append({"updateSheetProperties": {"properties": {"sheetId": gid, "title": title}, "fields": "title"}})
            table = action.tables[title]
            marks = {KEY: action.key, ROWS: str(len(table.rows)), SHA256: _digest(table)}
            calls += [_mark(gid, name, value) for name, value in marks.items()]
        self._google.batch_update(spreadsheet, {"requests": calls})


def _credentials(secrets: Secrets) -> Credentials:
    """From JSON text or a path. No error quotes either: both may hold the private key."""
    variable = "RETENTION_OPS_GOOGLE_CREDENTIALS"
    if secrets.google_credentials is None:
        raise SettingsError(f"{variable} is not set: the JSON of a service account's key, or the path of that file")
    text = secrets.google_credentials.get_secret_value().strip()
    try:
        info = json.loads(text if text.startswith("{") else Path(text).expanduser().read_text(encoding="utf-8"))
        return Credentials.from_service_account_info(info, scopes=SCOPES)
    except OSError:
        raise SettingsError(f"{variable}: the file it names cannot be read") from None
    except Exception:  # cryptography and pyasn1 have many ways to refuse a key
        raise SettingsError(f"{variable}: not the JSON of a service account's key; download it again from the Cloud console") from None


def _refuse_unfit(action: Outgoing) -> None:
    """Everything that can be known before the first call."""
    if action.kind != "publish":
        raise Rejected(f"{NAME}: cannot do {action.kind!r}, only publish")
    if not action.tables:
        raise Rejected(f"{NAME}: no list to publish")
    if len({title.casefold() for title in action.tables}) < len(action.tables):
        raise Rejected(f"{NAME}: two lists differ only in the case of their titles")
    for title, table in action.tables.items():
        if not 0 < len(title) <= TITLE_CHARACTERS or not title.isprintable() or title.startswith("~"):
            allowed = f"1 to {TITLE_CHARACTERS} characters, not beginning with ~"
            raise Rejected(f"{NAME}: {title[:20]!r} cannot be a worksheet's title ({allowed})")
        if not table.columns:
            raise Rejected(f"{NAME}: the list {title!r} has no columns")
        for number, row in enumerate(table.rows, 1):
            if len(row) != len(table.columns) or not all(_fits(cell) for cell in row):
                raise Rejected(
                    f"{NAME}: row {number} of {title!r} does not fit: {len(table.columns)} cells, each a number or at most "
                    f"{CHARACTERS_PER_CELL:,} characters"
                )


def _titles(action: Outgoing) -> list[str]:
    return list(action.tables) or [sheet["title"] for sheet in action.payload.get("worksheets", [])]


def _fits(cell: Any) -> bool:
    if isinstance(cell, str):
        return len(cell) <= CHARACTERS_PER_CELL
    return cell is None or (isinstance(cell, int | float) and math.isfinite(cell))


def _values(action: Outgoing) -> Iterator[dict[str, Any]]:
    """Bodies of values:batchUpdate, each at most CHUNK_BYTES, in RAW mode: text that begins with = stays text."""
    ranges: list[dict[str, Any]] = []
    size = 0
    for title, table in action.tables.items():
        rows: list[Sequence[Any]] = []
        first = 1
        for number, row in enumerate([table.columns, *table.rows], 1):
            row_size = len(json.dumps(list(row))) + 2
            if size + row_size > CHUNK_BYTES and (rows or ranges):
                yield _body([*ranges, *_range(title, action.key, first, rows)])
                ranges, rows, first, size = [], [], number, 0
            rows.append(list(row))
            size += row_size
        ranges += _range(title, action.key, first, rows)
        size += 200  # the range's own text
    yield _body(ranges)


def _range(title: str, key: str, first: int, rows: Sequence[Sequence[Any]]) -> list[dict[str, Any]]:
    if not rows:
        return []
    cells = f"A{first}:{rowcol_to_a1(first + len(rows) - 1, len(rows[0]))}"
    return [{"range": absolute_range_name(_staging_title(title, key), cells), "majorDimension": "ROWS", "values": rows}]


def _body(ranges: list[dict[str, Any]]) -> dict[str, Any]:
    return {"valueInputOption": "RAW", "data": ranges}


def _staging_title(title: str, key: str) -> str:
    return f"~{title} {key[:8]}"


def _is_staging(name: str, title: str) -> bool:
    return re.fullmatch(rf"~{re.escape(title)} [0-9a-f]{{8}}", name) is not None


def _properties(title: str, key: str, table: Table) -> dict[str, Any]:
    rows, columns = _grid(table)
    return {"title": _staging_title(title, key), "gridProperties": {"rowCount": rows, "columnCount": columns, "frozenRowCount": 1}}


def _grid(table: Table) -> tuple[int, int]:
    """At least two rows: Google refuses to freeze all there are."""
    return max(len(table.rows) + 1, 2), len(table.columns)


def _mark(gid: int, name: str, value: str) -> dict[str, Any]:
    mark = {"metadataKey": name, "metadataValue": value, "location": {"sheetId": gid}, "visibility": "DOCUMENT"}
    return {"createDeveloperMetadata": {"developerMetadata": mark}}


def _digest(table: Table) -> str:
    text = json.dumps([list(table.columns), *(list(row) for row in table.rows)], ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _receipt(spreadsheet: str, gids: Mapping[str, int], rows: int) -> Receipt:
    links = {title: f"https://docs.google.com/spreadsheets/d/{spreadsheet}/edit#gid={gid}" for title, gid in gids.items()}
    external_id = f"{spreadsheet}#" + ",".join(str(gid) for gid in gids.values())
    return Receipt(external_id, next(iter(links.values())), {"links": links, "rows": rows})


def _finding(subject: str, ask: Callable[[], str], cure: str) -> Finding:
    try:
        return Finding(subject, True, ask())
    except (Throttled, Ambiguous) as error:
        return Finding(subject, None, str(error), "ask again later")
    except DestinationError as error:
        return Finding(subject, False, str(error), cure)
    except Exception as error:  # a check never raises
        return Finding(subject, None, f"{NAME}: could not be asked ({type(error).__name__})")


def _safe_address(url: str) -> bool:
    parts = urlsplit(url)
    return parts.scheme == "https" or (parts.scheme == "http" and parts.hostname in ("127.0.0.1", "localhost", "::1"))


def _status_word(response: requests.Response) -> str:
    try:
        return _word(response.json()["error"]["status"])
    except (ValueError, KeyError, TypeError):
        return "without a reason"


def _word(value: Any) -> str:
    """An error code as it is, anything longer or stranger not at all."""
    return value if isinstance(value, str) and re.fullmatch(r"[A-Za-z_]{1,40}", value) else "without a reason"
