"""Our own Dagster, asked over its webserver's GraphQL to start a run. The action's key is a tag of the run, by which it is found again.

The run itself is what acts; starting one changes nothing outside this installation.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, ClassVar

from retention_ops.execute.destinations.choice import BUILD, EXPORT, RESPOND
from retention_ops.execute.destinations.http import Http, content
from retention_ops.execute.destinations.seam import (
    Ambiguous,
    DestinationError,
    Finding,
    Lookup,
    Outgoing,
    Receipt,
    Rejected,
    Unreachable,
)
from retention_ops.installation import METADATA, installation
from retention_ops.settings import Settings

NAME = "Dagster"
KEY_TAG = "retention_ops/idempotency_key"
ENDED = ("SUCCESS", "FAILURE", "CANCELED")
ATTEMPT_SECONDS = 15.0
"""after a launch without an answer the run is in Dagster's storage by then, or never"""
OURS = "daily_loop"
"""the job by which our code location is known, among those one webserver may serve"""

_LOCATIONS = """{ repositoriesOrError { __typename ... on RepositoryConnection { nodes {
    name location { name } jobs { name metadataEntries { label ... on TextMetadataEntry { text } } } } } } }"""
_LAUNCH = """mutation($p: ExecutionParams!) { launchPipelineExecution(executionParams: $p) {
    __typename ... on LaunchRunSuccess { run { runId } } ... on RunConfigValidationInvalid { errors { message } }
    ... on PythonError { message } ... on PipelineNotFoundError { message } ... on InvalidSubsetError { message }
    ... on UnauthorizedError { message } ... on NoModeProvidedError { message } } }"""
_RUN = "runId status jobName startTime endTime tags { key value }"
_BY_ID = f"query($id: ID!) {{ runOrError(runId: $id) {{ __typename ... on Run {{ {_RUN} }} }} }}"
_BY_KEY = f"query($f: RunsFilter!) {{ runsOrError(filter: $f, limit: 2) {{ __typename ... on Runs {{ results {{ {_RUN} }} }} }} }}"


@dataclass(frozen=True)
class Run:
    """A run as Dagster tells of it."""

    run_id: str
    status: str
    job: str
    tags: Mapping[str, str]
    started_at: datetime | None
    ended_at: datetime | None

    @property
    def ended(self) -> bool:
        return self.status in ENDED


class Dagster:
    """Kinds name what a run is for; the payload is {'job', 'assets', 'config', 'tags'}, the target the installation's date."""

    name = "dagster"
    lookups: ClassVar[Mapping[str, Lookup]] = dict.fromkeys((BUILD, RESPOND, EXPORT), Lookup(wait_seconds=ATTEMPT_SECONDS))

    def __init__(self, url: str, home: str, timeout: tuple[float, float] = (3, 30)):
        self.url = url.rstrip("/")
        self._home = home
        self._http = Http(self.url, timeout=timeout, name=f"{NAME} at {self.url}")

    @classmethod
    def connect(cls, settings: Settings, timeout: tuple[float, float] = (3, 30)) -> Dagster:
        """Nothing is asked yet."""
        return cls(settings.dagster_url, installation(settings), timeout)

    def run_url(self, run_id: str) -> str:
        return f"{self.url}/runs/{run_id}"

    # -- starting ------------------------------------------------------------------------------------------------------

    def send(self, action: Outgoing) -> Receipt:
        """Starts the run. Raises Unreachable before anything was asked for, Rejected, or Ambiguous when it may have started."""
        location, repository = self._code_location()
        payload = action.payload
        assets = payload.get("assets") or None
        answer = self._ask(_LAUNCH, p={
            "selector": {
                "repositoryLocationName": location, "repositoryName": repository, "jobName": payload["job"],
                "assetSelection": [{"path": [name]} for name in assets] if assets else None,
                **({"assetCheckSelection": None} if assets else {}),
            },
            "runConfigData": json.dumps(payload.get("config") or {}), "mode": "default",
            "executionMetadata": {"tags": [
                {"key": name, "value": value} for name, value in {**payload["tags"], KEY_TAG: action.key}.items()]},
        })["launchPipelineExecution"]
        kind = answer["__typename"]
        if kind == "LaunchRunSuccess":
            return self._receipt(answer["run"]["runId"])
        said = answer.get("message") or "; ".join(error["message"] for error in answer.get("errors", []))
        text = f"{NAME} did not start the run: {kind}" + (f": {' '.join(said.split())[:300]}" if said else "")
        raise Ambiguous(text) if kind == "PythonError" else Rejected(text)

    update = send

    def find_by_key(self, action: Outgoing) -> Receipt | None:
        """The run an earlier attempt started."""
        run = self.run_of(action.key)
        return self._receipt(run.run_id) if run else None

    def check(self) -> list[Finding]:
        try:
            self._code_location()
        except DestinationError as error:
            return [Finding("Dagster's webserver", None, str(error), "retention-ops ui (only asked runs and the MCP server need it)")]
        return [Finding("Dagster's webserver", True, f"answers at {self.url} for this home")]

    # -- asking --------------------------------------------------------------------------------------------------------

    def run(self, run_id: str) -> Run | None:
        """One run, or None. Raises DestinationError."""
        found = self._read(_BY_ID, id=run_id)["runOrError"]
        return _run(found) if found["__typename"] == "Run" else None

    def run_of(self, key: str) -> Run | None:
        """The run that bears an action's key. Raises DestinationError."""
        found = self._read(_BY_KEY, f={"tags": [{"key": KEY_TAG, "value": key}]})["runsOrError"]
        if found["__typename"] != "Runs":
            raise Unreachable(f"{NAME} could not look for runs", ATTEMPT_SECONDS)
        return _run(found["results"][-1]) if found["results"] else None

    def _code_location(self) -> tuple[str, str]:
        """(location, repository) of this very home. Raises Unreachable naming what is there instead."""
        nodes = self._read(_LOCATIONS)["repositoriesOrError"].get("nodes") or []
        others = False
        for node in nodes:
            for job in node["jobs"]:
                names = {entry["label"]: entry.get("text") for entry in job["metadataEntries"]}
                if job["name"] == OURS and names.get(METADATA) == self._home:
                    return node["location"]["name"], node["name"]
                others = others or METADATA in names
        what = "serves another home" if others else "does not serve RetentionOps yet"
        raise Unreachable(f"{NAME} at {self.url} {what}; check RETENTION_OPS_DAGSTER_URL, or start `retention-ops ui`", ATTEMPT_SECONDS)

    def _read(self, query: str, **variables: Any) -> dict[str, Any]:
        """A question that changes nothing: whatever goes wrong, nothing happened."""
        try:
            return self._ask(query, **variables)
        except DestinationError as error:
            raise Unreachable(str(error), ATTEMPT_SECONDS) from None

    def _ask(self, query: str, **variables: Any) -> dict[str, Any]:
        # a PythonError comes as 500, with its data
        answer = self._http.request("POST", "/graphql", json={"query": query, "variables": variables}, expect=(200, 500))
        body = content(answer, NAME)
        if not isinstance(body, dict) or not isinstance(body.get("data"), dict):
            raise Ambiguous(f"{NAME} answered without data")
        return body["data"]

    def _receipt(self, run_id: str) -> Receipt:
        return Receipt(run_id, self.run_url(run_id))


def _run(found: Mapping[str, Any]) -> Run:
    tags = {tag["key"]: tag["value"] for tag in found["tags"]}
    return Run(found["runId"], found["status"], found["jobName"], tags, _moment(found["startTime"]), _moment(found["endTime"]))


def _moment(seconds: float | None) -> datetime | None:
    return datetime.fromtimestamp(seconds, UTC) if seconds else None
