"""Jira, Asana and Roundup behind the seam: every kind under every fault, and what is said afterwards must be what happened.

Jira and Asana are fakes that check what the services check; Roundup is the real tracker.
"""

from __future__ import annotations

import itertools
import threading
import traceback
import uuid
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any, ClassVar

import pytest
import requests

from retention_ops.errors import SettingsError
from retention_ops.execute.destinations.asana import Asana
from retention_ops.execute.destinations.jira import Jira
from retention_ops.execute.destinations.roundup import Roundup
from retention_ops.execute.destinations.seam import Ambiguous, CannotTell, Conflict, DestinationError, Outgoing, Rejected, Throttled
from retention_ops.execute.destinations.tickets import mark
from retention_ops.settings import Secrets, Settings
from retention_ops_tests.execute.servers import asana as asana_server
from retention_ops_tests.execute.servers import jira as jira_server
from retention_ops_tests.execute.servers import roundup as roundup_server
from retention_ops_tests.execute.servers.asana import FakeAsana
from retention_ops_tests.execute.servers.jira import FakeJira
from retention_ops_tests.execute.servers.loopback import LoopbackServer, Reply, Request
from retention_ops_tests.execute.servers.roundup import RoundupServer

SYSTEMS = ("jira", "asana", "roundup")
KINDS = ("create", "comment", "priority", "resolve")
TITLE = "At-risk customers 18.4 %, 23 % above baseline"
DESCRIPTION = "# Brief\n\n**90412** customers\n\n| tier | customers |\n|---|---|\n| P1 | 40 |\n\n- call `P1`\n- [pack](https://pack.test/1)\n"
"""its number is no port, so that an address in an error does not look like it"""
FAULTS = {
    "lost_before": (Ambiguous, False), "lost_after": (Ambiguous, True), "429": (Throttled, False), "503": (Ambiguous, False),
    "500_before": (Ambiguous, False), "500_after": (Ambiguous, True), "slow_after": (Ambiguous, True),
}
"""fault -> the error it must become, and whether the thing happened there"""
UNCERTAIN = {"lost_before": False, "lost_after": True, "500_before": False, "500_after": True}


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


class Rig:
    """What a test asks a system about, besides what our adapter says."""

    connect: Callable[..., Any]
    writes: ClassVar[dict[str, str]]
    """kind -> the request that does it"""
    settings: ClassVar[dict[str, str]]

    def __init__(self, server: Any):
        self.server = server


class JiraRig(Rig):
    connect = Jira.connect
    writes: ClassVar = {
        "create": r"POST /rest/api/3/issue$", "comment": r"POST .*/comment$", "priority": "PUT ", "resolve": r"POST .*/transitions$",
    }
    settings: ClassVar = {"tickets_to": "jira", "ticket_user": jira_server.USER, "ticket_project": "RET"}
    token, low, high = jira_server.TOKEN, "High", "Highest"

    def issues(self, key: str) -> list[str]:
        return [issue for issue, held in self.server.issues.items() if mark(key) in held["fields"]["labels"]]

    def comments(self, issue: str) -> int:
        return len(self.server.issues[issue]["comments"])

    def priority(self, issue: str) -> str:
        return self.server.issues[issue]["fields"]["priority"]["name"]

    def resolved(self, issue: str) -> bool:
        return self.server.issues[issue]["fields"]["status"] == "Done"


class AsanaRig(Rig):
    connect = Asana.connect
    writes: ClassVar = {"create": r"POST /tasks$", "comment": r"POST .*/stories$", "priority": "PUT ", "resolve": "PUT "}
    settings: ClassVar = {"tickets_to": "asana", "ticket_project": asana_server.PROJECT, "ticket_priority_field": asana_server.FIELD}
    token, low, high = asana_server.TOKEN, "High", "Highest"

    def issues(self, key: str) -> list[str]:
        return [gid for gid, task in self.server.tasks.items() if mark(key) in task["notes"]]

    def comments(self, issue: str) -> int:
        return len(self.server.stories[issue])

    def priority(self, issue: str) -> str:
        value = self.server.tasks[issue]["custom_fields"][asana_server.FIELD]
        return next(name for name, option in asana_server.OPTIONS.items() if option == value)

    def resolved(self, issue: str) -> bool:
        return self.server.tasks[issue]["completed"]


class RoundupRig(Rig):
    connect = Roundup.connect
    writes: ClassVar = {"create": r"POST /rest/data/issue$", "comment": r"PATCH ", "priority": "PATCH ", "resolve": "PATCH "}
    settings: ClassVar = {
        "tickets_to": "roundup", "ticket_user": "admin", "ticket_priority_warning": "urgent", "ticket_priority_critical": "critical",
    }
    token, low, high = roundup_server.PASSWORD, "urgent", "critical"

    def read(self, path: str, **params: str) -> Any:
        answer = requests.get(f"{self.server.url}/rest/data/{path}", params=params, auth=("admin", self.token), timeout=20)
        return answer.json()["data"]

    def issues(self, key: str) -> list[str]:
        return [issue["id"] for issue in self.read("issue", extkey=key)["collection"]]

    def comments(self, issue: str) -> int:
        return len(self.read(f"issue/{issue}")["attributes"]["messages"]) - 1  # the first one is the description

    def priority(self, issue: str) -> str:
        number = self.read(f"issue/{issue}")["attributes"]["priority"]["id"]
        return self.read(f"priority/{number}")["attributes"]["name"]

    def resolved(self, issue: str) -> bool:
        number = self.read(f"issue/{issue}")["attributes"]["status"]["id"]
        return self.read(f"status/{number}")["attributes"]["name"] == "resolved"


@pytest.fixture(scope="session")
def tracker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RoundupServer]:
    with RoundupServer(tmp_path_factory.mktemp("roundup")) as server:
        server.delay = 1.5
        yield server


@pytest.fixture(params=SYSTEMS)
def rig(request: pytest.FixtureRequest) -> Iterator[Any]:
    if request.param == "roundup":
        server = request.getfixturevalue("tracker")
        server.requests.clear()
        server.faults.clear()
        yield RoundupRig(server)
        return
    kind, made = {"jira": (JiraRig, FakeJira), "asana": (AsanaRig, FakeAsana)}[request.param]
    with made() as server:
        server.delay = 1.5
        yield kind(server)


def connected(rig: Any, timeout: tuple[float, float] = (5, 20), token: str | None = None, **settings: object) -> Any:
    given = Settings(_env_file=None, **{**rig.settings, "ticket_url": rig.server.url, **settings})
    return rig.connect(given, Secrets(ticket_token=token or rig.token), "live", timeout)


def action(kind: str, rig: Any, parent: str | None = None, **changes: object) -> Outgoing:
    payloads = {
        "create": {"title": TITLE, "description": DESCRIPTION, "severity": "WARNING", "priority": rig.low, "labels": ["churn signal"]},
        "comment": {"text": "Acknowledged by **Ann**"}, "priority": {"priority": rig.high}, "resolve": {},
    }
    values = {"key": uuid.uuid4().hex, "kind": kind, "target": "", "payload": payloads[kind], "parent": parent,
              "first_attempt_at": datetime.now(UTC)}
    return Outgoing(**{**values, **changes})


def prepared(rig: Any, destination: Any, kind: str) -> Outgoing:
    """An action of `kind`, with the issue it belongs to already there."""
    if kind == "create":
        return action(kind, rig)
    return action(kind, rig, destination.send(action("create", rig)).external_id)


def perform(destination: Any, act: Outgoing) -> Any:
    return destination.send(act) if act.kind in ("create", "comment") else destination.update(act)


def happened(rig: Any, act: Outgoing) -> int:
    """How often the action is seen over there, read past our adapter."""
    match act.kind:
        case "create":
            return len(rig.issues(act.key))
        case "comment":
            return rig.comments(act.parent)
        case "priority":
            return int(rig.priority(act.parent) == rig.high)
        case _:
            return int(rig.resolved(act.parent))


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_happens_once_and_its_receipt_names_it(rig: Any, kind: str) -> None:
    destination = connected(rig)
    act = prepared(rig, destination, kind)
    receipt = perform(destination, act)
    assert happened(rig, act) == 1
    assert receipt.external_id and receipt.url.startswith("http")
    if kind == "create":
        assert rig.issues(act.key) == [receipt.external_id]
        assert rig.priority(receipt.external_id) == rig.low
    if kind in ("create", "comment"):
        assert destination.find_by_key(act).external_id == receipt.external_id
    else:
        assert receipt.external_id == act.parent


@pytest.mark.parametrize(("kind", "fault"), itertools.product(KINDS, FAULTS))
def test_a_fault_becomes_the_error_that_tells_what_is_known(rig: Any, kind: str, fault: str) -> None:
    destination = connected(rig, timeout=(5, 0.8) if fault.startswith("slow") else (5, 20))
    act = prepared(rig, destination, kind)
    rig.server.requests.clear()
    rig.server.fail(fault, match=rig.writes[kind], retry_after="17")
    error, done = FAULTS[fault]
    with pytest.raises(error) as caught:
        perform(destination, act)
    if error is Throttled:
        assert caught.value.retry_after == 17
    assert happened(rig, act) == int(done)
    written = [request for request in rig.server.requests if request.method == rig.writes[kind].split()[0]
               and request.path.startswith(("/rest/api/3/issue", "/tasks", "/rest/data/issue"))]
    assert len(written) == 1, "a call is never repeated by the adapter"


@pytest.mark.parametrize(("kind", "fault"), itertools.product(("create", "comment"), UNCERTAIN))
def test_after_an_uncertain_answer_the_look_up_tells_the_truth(rig: Any, kind: str, fault: str) -> None:
    destination = connected(rig)
    act = prepared(rig, destination, kind)
    rig.server.fail(fault, match=rig.writes[kind])
    with pytest.raises(Ambiguous):
        destination.send(act)
    found = destination.find_by_key(act)
    assert (found is not None) == UNCERTAIN[fault]
    if found is None:
        found = destination.send(act)
    assert happened(rig, act) == 1
    assert destination.find_by_key(act).external_id == found.external_id


@pytest.mark.parametrize(("rig", "kind", "step"), [
    ("roundup", "create", "GET /rest/data/issue"), ("roundup", "create", "POST /rest/data/msg"),
    ("roundup", "comment", "POST /rest/data/msg"), ("asana", "create", "GET /custom_fields/"),
], indirect=["rig"])
def test_an_answer_lost_before_anything_was_made_leaves_no_doubt(rig: Any, kind: str, step: str) -> None:
    destination = connected(rig)
    act = prepared(rig, destination, kind)
    rig.server.fail("lost_after", match=step)
    with pytest.raises(Throttled, match="nothing was made"):
        destination.send(act)
    assert happened(rig, act) == 0
    destination.send(act)
    assert happened(rig, act) == 1


def test_an_accepted_create_whose_answer_names_nothing_is_uncertain(rig: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A proxy's or a hotel's page in place of the answer: the ticket may be there."""
    destination, serve = connected(rig), rig.server.handle
    for answer in (b"<html>Welcome</html>", {"data": {}}, []):
        def garbled(request: Request, answer: Any = answer) -> Reply:
            reply = serve(request)
            return Reply(201, answer) if reply.status == 201 and "msg" not in request.path else reply

        monkeypatch.setattr(rig.server, "handle", garbled)
        with pytest.raises(Ambiguous):
            destination.send(action("create", rig))


@pytest.mark.parametrize("kind", ("priority", "resolve"))
def test_an_update_may_be_repeated(rig: Any, kind: str) -> None:
    destination = connected(rig)
    act = prepared(rig, destination, kind)
    assert destination.lookups[kind].repeatable
    assert perform(destination, act) == perform(destination, act)
    assert happened(rig, act) == 1


@pytest.mark.parametrize("fault", ("lost_after", "500_before", "429"))
@pytest.mark.parametrize("kind", ("create", "comment"))
def test_a_look_up_that_fails_says_neither_yes_nor_no(rig: Any, kind: str, fault: str) -> None:
    destination = connected(rig)
    act = prepared(rig, destination, kind)
    destination.send(act)
    rig.server.fail(fault, match=".*", times=1)
    with pytest.raises((Ambiguous, Throttled)):
        destination.find_by_key(act)


def test_a_refused_look_up_cannot_tell(rig: Any) -> None:
    with pytest.raises(CannotTell):
        connected(rig, token="wrong-token").find_by_key(action("create", rig))


@pytest.mark.parametrize("rig", ("asana", "roundup"), indirect=True)
def test_a_second_create_with_the_same_key_is_told_what_is_there(rig: Any) -> None:
    destination = connected(rig)
    act = action("create", rig)
    first = destination.send(act)
    with pytest.raises(Conflict) as caught:
        destination.send(act)
    assert caught.value.existing.external_id == first.external_id
    assert len(rig.issues(act.key)) == 1


@pytest.mark.parametrize("rig", ["roundup"], indirect=True)
def test_eight_racing_creates_make_one_issue(rig: Any) -> None:
    """They meet inside Roundup: its unique key, not our look before the create, decides."""
    act, start, outcomes = action("create", rig), threading.Barrier(8), []

    def create() -> None:
        destination = connected(rig)
        start.wait()
        try:
            outcomes.append(destination.send(act))
        except DestinationError as error:
            outcomes.append(error)

    threads = [threading.Thread(target=create) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    receipts = [outcome for outcome in outcomes if not isinstance(outcome, DestinationError)]
    assert len(receipts) == 1, outcomes
    assert sum(request.path == "/rest/data/issue" and request.method == "POST" for request in rig.server.requests) > 1, "no race"
    assert all(isinstance(outcome, Conflict | Ambiguous) for outcome in outcomes if outcome is not receipts[0]), outcomes
    assert {outcome.existing.external_id for outcome in outcomes if isinstance(outcome, Conflict)} == {receipts[0].external_id}
    assert len(rig.issues(act.key)) == 1


def test_jira_shows_a_new_issue_only_after_its_index_caught_up() -> None:
    clock = Clock()
    with FakeJira(index_delay_seconds=120, now=clock) as server:
        rig = JiraRig(server)
        destination, act = connected(rig), action("create", rig)
        server.fail("lost_after", match=rig.writes["create"])
        with pytest.raises(Ambiguous):
            destination.send(act)
        assert destination.find_by_key(act) is None
        clock.now += destination.lookups["create"].wait_seconds
        assert destination.find_by_key(act).external_id == "RET-1"


def test_jira_names_the_oldest_of_several_and_counts_them() -> None:
    with FakeJira() as server:
        rig = JiraRig(server)
        destination, act = connected(rig), action("create", rig)
        destination.send(act)
        destination.send(act)
        found = destination.find_by_key(act)
        assert (found.external_id, found.detail["duplicates"]) == ("RET-1", 2)


def test_an_asana_personal_token_is_refused_external_ids_and_finds_by_the_mark() -> None:
    with FakeAsana(oauth=False) as server:
        rig = AsanaRig(server)
        with pytest.raises(Rejected, match="OAuth"):
            connected(rig).send(action("create", rig))
        destination, act = connected(rig, ticket_external_ids=False), action("create", rig)
        for _ in range(7):  # more than a page of the fake
            destination.send(action("create", rig))
        receipt = destination.send(act)
        assert destination.find_by_key(act) == receipt
        assert destination.find_by_key(action("create", rig)) is None
        assert (destination.lookups["create"].wait_seconds, destination.lookups["create"].times) == (60, 2)


def test_an_external_id_asana_dropped_in_silence_is_made_up_for_by_the_mark() -> None:
    with FakeAsana() as server:
        rig = AsanaRig(server)
        destination, act = connected(rig), action("create", rig)
        receipt = destination.send(act)
        del server.tasks[receipt.external_id]["external"]
        assert destination.find_by_key(act) == receipt


def test_without_a_priority_field_the_priority_stands_in_asanas_title() -> None:
    with FakeAsana() as server:
        rig = AsanaRig(server)
        destination = connected(rig, ticket_priority_field="")
        task = destination.send(action("create", rig)).external_id
        assert server.tasks[task]["name"] == f"[High] {TITLE}"
        for _ in range(2):
            destination.update(action("priority", rig, task))
            assert server.tasks[task]["name"] == f"[Highest] {TITLE}"


def test_comments_of_a_long_thread_are_all_looked_at(rig: Any) -> None:
    destination = connected(rig)
    issue = destination.send(action("create", rig)).external_id
    comments = [action("comment", rig, issue) for _ in range(7)]
    receipts = [destination.send(comment) for comment in comments]
    assert [destination.find_by_key(comment).external_id for comment in comments] == [receipt.external_id for receipt in receipts]
    assert destination.find_by_key(action("comment", rig, issue)) is None


@pytest.mark.parametrize("kind", ("comment", "priority", "resolve"))
def test_what_belongs_to_an_issue_that_is_gone_is_refused(rig: Any, kind: str) -> None:
    with pytest.raises(Rejected, match="404"):
        perform(connected(rig), action(kind, rig, "999999"))
    with pytest.raises(Rejected, match="needs the ticket"):
        perform(connected(rig), action(kind, rig))


def test_an_unknown_priority_is_refused_by_name(rig: Any) -> None:
    payload = action("create", rig).payload | {"priority": "Blocker!"}
    with pytest.raises(Rejected, match=r"(?i)priority"):
        connected(rig).send(action("create", rig, payload=payload))


def test_an_unknown_kind_is_refused(rig: Any) -> None:
    strange = replace(action("create", rig), kind="delete")
    for call in (connected(rig).send, connected(rig).update):
        with pytest.raises(Rejected, match="delete"):
            call(strange)
    with pytest.raises(CannotTell):
        connected(rig).find_by_key(strange)


def test_a_long_title_and_brief_are_cut_not_refused(rig: Any) -> None:
    long = {"title": "word\nword " * 200, "description": "A paragraph of the brief.\n\n" * 10_000}
    act = action("create", rig, payload=action("create", rig).payload | long)
    receipt = connected(rig).send(act)
    assert rig.issues(act.key) == [receipt.external_id]


def test_jira_without_a_way_to_the_last_status_says_which_ways_there_are() -> None:
    with FakeJira() as server:
        rig = JiraRig(server)
        destination = connected(rig, ticket_resolved_status="Closed")
        issue = destination.send(action("create", rig)).external_id
        with pytest.raises(Rejected, match="In Progress, Done"):
            destination.update(action("resolve", rig, issue))


def test_roundup_reads_again_when_someone_else_changed_the_issue(tracker: RoundupServer, monkeypatch: pytest.MonkeyPatch) -> None:
    rig = RoundupRig(tracker)
    destination = connected(rig)
    act = prepared(rig, destination, "comment")
    serve, interfered = tracker.handle, []

    def someone_was_faster(request: Request) -> Reply:
        if request.method == "PATCH" and not interfered:
            interfered.append(True)
            destination.update(action("priority", rig, act.parent))
        return serve(request)

    monkeypatch.setattr(tracker, "handle", someone_was_faster)
    destination.send(act)
    assert rig.priority(act.parent) == "critical" and rig.comments(act.parent) == 1


class Echo(LoopbackServer):
    """Answers 400 with everything it was told."""

    def handle(self, request: Request) -> Reply:
        said = [*request.headers.values(), request.body.decode(), "plain reason"]
        return Reply(400, {"errorMessages": said, "errors": [{"message": text} for text in said]})


@pytest.mark.parametrize("kind", KINDS)
def test_no_error_repeats_a_token_or_what_was_sent(rig: Any, kind: str) -> None:
    canary = "planted-token-Ä-4711"
    act = action(kind, rig, "RET-1", payload={"title": TITLE, "description": DESCRIPTION, "priority": rig.low, "text": DESCRIPTION})
    with Echo() as echo:
        told = connected(rig, token=canary, ticket_url=echo.url)
        refused = connected(rig, token=canary)
        for call in (told, refused):
            with pytest.raises(DestinationError) as caught:
                perform(call, act)
            text = "".join(traceback.format_exception(caught.value)) + repr(caught.value)
            for secret in (canary, TITLE, "90412", *told.http.secrets):
                assert secret not in text


def test_a_refusal_is_quoted_with_its_reason() -> None:
    with FakeJira() as server, pytest.raises(Rejected, match="issuetype: Specify a valid issue type"):
        connected(JiraRig(server), ticket_issue_type="Story").send(action("create", JiraRig(server)))


@pytest.mark.parametrize(("rig", "variables"), [
    ("jira", ["URL", "USER", "PROJECT", "TOKEN"]), ("asana", ["PROJECT", "TOKEN"]), ("roundup", ["URL", "USER", "TOKEN"]),
], indirect=["rig"])
def test_connecting_names_every_missing_variable(rig: Any, variables: list[str]) -> None:
    with pytest.raises(SettingsError) as caught:
        rig.connect(Settings(_env_file=None), Secrets(), "live")
    assert all(f"RETENTION_OPS_TICKET_{name}" in str(caught.value) for name in variables)


def test_the_pilot_keeps_to_the_test_project() -> None:
    with FakeJira() as server:
        rig = JiraRig(server)
        given = Settings(_env_file=None, **{**rig.settings, "ticket_url": server.url})
        with pytest.raises(SettingsError, match="RETENTION_OPS_TICKET_TEST_PROJECT"):
            Jira.connect(given, Secrets(ticket_token=rig.token), "pilot")
        given = given.model_copy(update={"ticket_test_project": "TEST"})
        assert Jira.connect(given, Secrets(ticket_token=rig.token), "pilot").project == "TEST"


def test_the_doctor_finds_nothing_wrong_with_a_sound_system_and_writes_nothing(rig: Any) -> None:
    findings = connected(rig).check()
    assert len(findings) >= 4
    assert not [finding for finding in findings if finding.ok is False], findings
    assert all(request.method == "GET" for request in rig.server.requests)


def test_the_doctor_names_a_wrong_token(rig: Any) -> None:
    (finding,) = connected(rig, token="wrong-token").check()
    assert finding.ok is False and "401" in finding.sentence and "RETENTION_OPS_TICKET_TOKEN" in finding.cure


@pytest.mark.parametrize("address", ("tracker.invalid", "http://[bad", "https://", "ftp://tracker.invalid"))
def test_connecting_refuses_an_address_nobody_can_be_called_at(rig: Any, address: str) -> None:
    with pytest.raises(SettingsError, match="RETENTION_OPS_TICKET_URL"):
        connected(rig, ticket_url=address)


def test_the_doctor_warns_of_an_unencrypted_address(rig: Any) -> None:
    sentences = [finding.sentence for finding in connected(rig, ticket_url="http://tracker.invalid").check()]
    assert "the credential travels unencrypted" in sentences[0] and "nothing was sent" in sentences[1]


@pytest.mark.parametrize("fault", ("lost_before", "429", "500_before"))
def test_the_doctor_never_breaks(rig: Any, fault: str) -> None:
    rig.server.fail(fault, times=99)
    (finding,) = connected(rig).check()
    assert finding.ok is None


def test_the_doctor_survives_answers_of_another_shape(rig: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rig.server, "handle", lambda request: Reply(200, [1, 2]))
    assert all(finding.ok is None for finding in connected(rig).check())


@pytest.mark.parametrize(("rig", "settings", "said"), [
    ("jira", {"ticket_project": "NOPE"}, "NOPE"), ("jira", {"ticket_issue_type": "Story"}, "Task, Bug"),
    ("jira", {"ticket_priority_critical": "P0"}, "Highest, High, Medium"),
    ("jira", {"ticket_resolved_status": "Closed"}, "In Progress, Done"),
    ("asana", {"ticket_project": "1"}, "project"), ("asana", {"ticket_priority_field": "5"}, "custom_field"),
    ("asana", {"ticket_priority_warning": "Low"}, "High, Highest"),
    ("roundup", {"ticket_priority_warning": "High"}, "critical, urgent"), ("roundup", {"ticket_resolved_status": "Done"}, "resolved"),
], indirect=["rig"])
def test_the_doctor_names_what_does_not_exist(rig: Any, settings: dict[str, str], said: str) -> None:
    wrong = [finding for finding in connected(rig, **settings).check() if finding.ok is False]
    assert len(wrong) == 1 and said in wrong[0].sentence and wrong[0].cure, wrong


def test_the_doctor_names_missing_permissions_and_fields_nobody_fills() -> None:
    with FakeJira() as server:
        server.denied, server.required = {"ADD_COMMENTS"}, ["customfield_10010"]
        wrong = [finding.sentence for finding in connected(JiraRig(server)).check() if finding.ok is False]
        assert wrong == ["missing: ADD_COMMENTS", "required, but never filled by us: customfield_10010"]


def test_the_doctor_tells_a_personal_asana_token_from_an_apps() -> None:
    with FakeAsana(oauth=False) as server:
        (wrong,) = [finding for finding in connected(AsanaRig(server)).check() if finding.ok is False]
        assert "RETENTION_OPS_TICKET_EXTERNAL_IDS=false" in wrong.cure
