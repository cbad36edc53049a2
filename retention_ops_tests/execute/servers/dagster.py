"""A Dagster webserver's GraphQL, as far as we use it: one code location, runs that can be launched, found by tag and ended on order."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from uuid import uuid4

from retention_ops_tests.execute.servers.loopback import LoopbackServer, Reply, Request


class DagsterServer(LoopbackServer):
    """`runs` are the runs it started, oldest first. `work`, where set, is done with each run's job and config before it succeeds."""

    def __init__(self, home: str, work: Callable[[dict[str, Any]], None] | None = None):
        super().__init__()
        self.home = home
        self.work = work
        self.runs: list[dict[str, Any]] = []
        self.status = "SUCCESS"

    def _next_fault(self, line: str) -> Any:
        """Faults hit launches: questions change nothing."""
        return super()._next_fault(line) if b"launchPipelineExecution" in self.requests[-1].body else None

    def handle(self, request: Request) -> Reply:
        asked = request.json()
        query, variables = asked["query"], asked["variables"]
        if "launchPipelineExecution" in query:
            return _data("launchPipelineExecution", {"__typename": "LaunchRunSuccess", "run": {"runId": self._launch(variables["p"])}})
        if "runOrError" in query:
            found = [run for run in self.runs if run["runId"] == variables["id"]]
            return _data("runOrError", {"__typename": "Run", **found[0]} if found else {"__typename": "RunNotFoundError"})
        if "runsOrError" in query:
            (tag,) = variables["f"]["tags"]
            return _data("runsOrError", {"__typename": "Runs", "results": [run for run in reversed(self.runs) if tag in run["tags"]]})
        job = {"name": "daily_loop", "metadataEntries": [{"label": "retention_ops/installation", "text": self.home}]}
        node = {"name": "__repository__", "location": {"name": "retention_ops.definitions"}, "jobs": [job]}
        return _data("repositoriesOrError", {"__typename": "RepositoryConnection", "nodes": [node]})

    def _launch(self, params: dict[str, Any]) -> str:
        run = {"runId": str(uuid4()), "status": self.status, "jobName": params["selector"]["jobName"], "startTime": 1.0, "endTime": 2.0,
               "tags": params["executionMetadata"]["tags"]}
        self.runs.append(run)
        if self.work:
            self.work(params)
        return run["runId"]


def _data(name: str, value: Any) -> Reply:
    return Reply(200, {"data": {name: value}})
