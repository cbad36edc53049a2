"""Publishing lists to Google Sheets: whole or not at all, once, as text, and never with a secret in an error."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace

import pytest
import requests
from gspread.http_client import HTTPClient

from retention_ops.errors import SettingsError
from retention_ops.execute.destinations import sheets as module
from retention_ops.execute.destinations.seam import Ambiguous, CannotTell, Outgoing, Rejected, Table, Throttled
from retention_ops.execute.destinations.sheets import Sheets
from retention_ops.settings import Secrets, load_settings
from retention_ops_tests.execute.servers.loopback import Reply, patient
from retention_ops_tests.execute.servers.sheets import EMAIL, Sheet, SheetsServer

KEY, OTHER_KEY = "0123456789abcdef" * 2, "fedcba9876543210" * 2
P1, P2 = "P1 2026-11-21", "P2 2026-11-21"
TABLES = {
    P1: Table(("customer_id", "revenue", "action"), [("c-1", 1200.5, "=1+1"), ("c-2", -3, "Zoë's call")]),
    P2: Table(("customer_id", "revenue", "action"), [("c-3", 40, "+49 30")]),
}
PUBLISH = Outgoing(KEY, "publish", "book", {"worksheets": [{"title": P1}, {"title": P2}]}, tables=TABLES)
STEPS = ("read", "staging", "values", "final")


@pytest.fixture(scope="module")
def running():
    with SheetsServer() as server:
        server.delay = 3
        yield server


@pytest.fixture
def server(running):
    """One server (its RSA key takes a while), emptied for every test."""
    running.sheets = {"book": [Sheet(0, "Sheet1", 1000, 26)]}
    running.editors = {"book": {EMAIL}}
    running.tokens, running.requests, running.faults = set(), [], []
    return running


@pytest.fixture
def sheets(server):
    return connect(server)


def connect(server, mode="live", **changes):
    settings = load_settings(sheets_spreadsheet="book", sheets_api_url=server.url, **changes)
    sheets = Sheets.connect(settings, Secrets(google_credentials=server.credentials()), mode)
    patient(sheets._google._http, server)
    fetch = sheets._account._fetch
    sheets._account._fetch = lambda *args, **options: fetch(*args, timeout=server.patience("POST", "/token"), **options)
    return sheets


def rows_of(table):
    return [list(table.columns), *(list(row) for row in table.rows)]


def calls(server, ending):
    return [request for request in server.requests if request.path.endswith(ending)]


def assert_published(server, tables=TABLES):
    assert sorted(server.titles()) == sorted(["Sheet1", *tables])
    for title, table in tables.items():
        assert server.sheet(title).values == rows_of(table)


def assert_nothing_half_written(server, tables=TABLES):
    """What bears a real title is complete."""
    for sheet in server.sheets["book"]:
        if sheet.title in tables:
            assert sheet.values == rows_of(tables[sheet.title])


def fail_step(server, step, fault, **options):
    if step == "final":
        server.fail_final(fault, **options)
    else:
        server.fail(fault, {"read": "GET /v4", "staging": "book:batchUpdate", "values": "values:batchUpdate"}[step], **options)


def reconciled(sheets, action=PUBLISH):
    """What the door does after an ambiguous call: look, and send again only when nothing is there."""
    return sheets.find_by_key(action) or sheets.send(action)


def test_a_publish_puts_every_list_in_place_and_says_where(server, sheets):
    receipt = sheets.send(PUBLISH)
    assert_published(server)
    gids = [server.sheet(title).gid for title in (P1, P2)]
    assert receipt.external_id == f"book#{gids[0]},{gids[1]}"
    assert receipt.url == f"https://docs.google.com/spreadsheets/d/book/edit#gid={gids[0]}"
    assert receipt.detail["rows"] == 3 and list(receipt.detail["links"]) == [P1, P2]
    assert sheets.find_by_key(PUBLISH) == receipt
    assert sheets.find_by_key(replace(PUBLISH, tables={})) == receipt
    assert sheets.find_by_key(replace(PUBLISH, tables={}, payload={})) == receipt
    assert sheets.find_by_key(replace(PUBLISH, key=OTHER_KEY)) is None


def test_every_worksheet_carries_key_rows_and_hash(server, sheets):
    sheets.send(PUBLISH)
    marks = {mark["metadataKey"]: mark["metadataValue"] for mark in server.sheet(P1).metadata}
    assert marks["retention_ops_key"] == KEY and marks["retention_ops_rows"] == "2" and len(marks["retention_ops_sha256"]) == 64


def test_values_go_out_raw_with_the_scope_of_spreadsheets_only(server, sheets):
    sheets.send(PUBLISH)
    (values,) = calls(server, "values:batchUpdate")
    assert values.json()["valueInputOption"] == "RAW"
    assert values.json()["data"][0]["range"] == f"'~{P1} {KEY[:8]}'!A1:C3"
    assert server.sheet(P1).values[1] == ["c-1", 1200.5, "=1+1"]  # the fake asserts the scope when it issues the token


def test_two_publishes_of_one_key_leave_the_same_as_one(server, sheets):
    sheets.send(PUBLISH)
    sheets.send(PUBLISH)
    assert_published(server)
    assert sheets.find_by_key(PUBLISH).detail["rows"] == 3


def test_changed_content_under_a_new_key_replaces_the_old(server, sheets):
    sheets.send(PUBLISH)
    changed = {P1: Table(("customer_id",), [("c-9",)]), P2: TABLES[P2]}
    sheets.send(replace(PUBLISH, key=OTHER_KEY, tables=changed))
    assert_published(server, changed)
    assert sheets.find_by_key(PUBLISH) is None


def test_an_empty_list_is_published_with_its_header(server, sheets):
    tables = {P1: Table(("customer_id",), [])}
    sheets.send(replace(PUBLISH, tables=tables))
    assert server.sheet(P1).values == [["customer_id"]]


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("fault", ["lost_before", "lost_after", "slow_before", "slow_after", "500_before", "500_after", "503"])
def test_an_unanswered_step_is_ambiguous_and_ends_with_one_whole_list(server, sheets, step, fault):
    fail_step(server, step, fault)
    with pytest.raises(Ambiguous):
        sheets.send(PUBLISH)
    assert_nothing_half_written(server)
    already = P1 in server.titles()
    assert already == (step == "final" and fault.endswith("_after"))
    writes = len(calls(server, "atchUpdate"))
    receipt = reconciled(sheets)
    assert_published(server)
    assert receipt.detail["rows"] == 3
    assert (len(calls(server, "atchUpdate")) == writes) == already


@pytest.mark.parametrize("step", STEPS)
def test_a_crowded_step_is_throttled_for_at_least_the_minute_of_the_quota(server, sheets, step):
    fail_step(server, step, "429", retry_after="3")
    with pytest.raises(Throttled) as caught:
        sheets.send(PUBLISH)
    assert caught.value.retry_after == 60
    assert_nothing_half_written(server)
    sheets.send(PUBLISH)
    assert_published(server)


@pytest.mark.parametrize("fault", ["lost_before", "429", "500_before", "slow_before"])
def test_a_fault_while_replacing_leaves_the_old_lists_whole(server, sheets, fault):
    sheets.send(PUBLISH)
    new = replace(PUBLISH, key=OTHER_KEY, tables={title: Table(("customer_id",), [("c-9",)]) for title in TABLES})
    fail_step(server, "final", fault)
    with pytest.raises((Ambiguous, Throttled)):
        sheets.send(new)
    assert_nothing_half_written(server)
    assert sheets.find_by_key(PUBLISH) and sheets.find_by_key(new) is None
    sheets.send(new)
    assert_published(server, new.tables)


def test_a_late_final_call_of_a_crashed_attempt_changes_nothing(server, sheets):
    fail_step(server, "final", "lost_before")
    with pytest.raises(Ambiguous):
        sheets.send(PUBLISH)
    late = calls(server, "book:batchUpdate")[-1]
    changed = {P1: Table(("customer_id",), [("c-9",)]), P2: TABLES[P2]}
    sheets.send(replace(PUBLISH, key=OTHER_KEY, tables=changed))
    assert server.handle(late).status == 400
    assert_published(server, changed)


def test_stale_staging_of_the_same_titles_goes_and_that_of_others_stays(server, sheets):
    stale, others = f"~{P1} 99999999", ["~P1 2026-11-20 99999999", f"~{P1} notes", f"{P1} 99999999"]
    server.sheets["book"] += [Sheet(7 + number, title, 2, 1) for number, title in enumerate([stale, *others])]
    sheets.send(PUBLISH)
    assert sorted(server.titles()) == sorted(["Sheet1", P1, P2, *others])


def test_a_write_is_sent_once_whatever_happens(server, sheets):
    for fault in ("lost_after", "500_after", "slow_after"):
        server.requests.clear()
        server.fail(fault, "values:batchUpdate")
        with pytest.raises(Ambiguous):
            sheets.send(PUBLISH)
        assert len(calls(server, "values:batchUpdate")) == 1


def test_a_token_no_longer_accepted_is_fetched_anew_by_the_next_attempt_only(server, sheets):
    sheets.send(PUBLISH)
    server.tokens.clear()
    server.requests.clear()
    with pytest.raises(Throttled, match="401"):
        sheets.send(PUBLISH)
    assert len(server.requests) == 1
    sheets.send(PUBLISH)
    assert_published(server)


def test_only_the_spreadsheet_and_token_addresses_are_called(server, sheets):
    sheets.send(PUBLISH)
    assert {request.path.split(":")[0] for request in server.requests} <= {
        "/token", "/v4/spreadsheets/book", "/v4/spreadsheets/book/values",
    }
    assert len(calls(server, "/token")) == 1


def test_a_large_list_goes_out_in_chunks_and_arrives_whole(server, sheets):
    table = Table(("customer_id", "note"), [(f"c-{number}", "é" * 600) for number in range(1200)])
    sheets.send(replace(PUBLISH, tables={P1: table, P2: TABLES[P2]}))
    assert len(calls(server, "values:batchUpdate")) == 3
    assert max(len(request.body) for request in server.requests) < 1_510_000
    assert_published(server, {P1: table, P2: TABLES[P2]})


def test_a_full_spreadsheet_is_refused_before_anything_is_written(server, sheets):
    server.sheets["book"].append(Sheet(5, "Archive", 99_740, 100))
    with pytest.raises(Rejected, match="10,000,000"):
        sheets.send(PUBLISH)
    assert calls(server, "atchUpdate") == []


@pytest.mark.parametrize("tables", [
    {}, {P1: Table((), [])}, {P1: Table(("a",), [("x" * 50_001,)])}, {P1: Table(("a",), [(float("nan"),)])},
    {P1: Table(("a",), [(b"bytes",)])}, {P1: Table(("a",), [("one", "two")])}, {"": TABLES[P1]}, {"x" * 91: TABLES[P1]},
    {"a": TABLES[P1], "A": TABLES[P1]},
], ids=["none", "no-columns", "long-cell", "nan", "bytes", "ragged", "no-title", "long-title", "same-title"])
def test_what_cannot_be_a_worksheet_is_refused_without_a_call(server, sheets, tables):
    with pytest.raises(Rejected):
        sheets.send(replace(PUBLISH, tables=tables))
    assert server.requests == []


def test_a_spreadsheet_not_shared_names_the_account_to_share_it_with(server, sheets):
    server.editors["book"].clear()
    with pytest.raises(Rejected, match=f"share the spreadsheet with {EMAIL} as an editor"):
        sheets.send(PUBLISH)
    with pytest.raises(CannotTell):
        sheets.find_by_key(PUBLISH)
    with pytest.raises(Rejected, match="RETENTION_OPS_SHEETS_SPREADSHEET"):
        sheets.send(replace(PUBLISH, target="elsewhere"))


def test_a_look_up_that_fails_is_asked_again_later(server, sheets):
    for fault, error in {"429": Throttled, "500_before": Ambiguous, "lost_before": Ambiguous, "slow_before": Ambiguous}.items():
        server.fail(fault, "developerMetadata:search")
        with pytest.raises(error):
            sheets.find_by_key(PUBLISH)


def test_one_list_missing_counts_as_not_found(server, sheets):
    sheets.send(PUBLISH)
    server.sheets["book"].remove(server.sheet(P2))
    for action in (PUBLISH, replace(PUBLISH, tables={})):
        assert sheets.find_by_key(action) is None
    sheets.send(PUBLISH)
    assert_published(server)


def test_two_workers_publishing_at_once_leave_one_whole_list_each(server):
    """The slower one finds its staging worksheets gone, or replaces a whole list by the same."""
    big = replace(PUBLISH, tables={title: Table(("customer_id", "note"), [(f"c-{n}", "x" * 900) for n in range(2500)]) for title in TABLES})

    def publish(_):
        with suppress(Rejected):
            settings = load_settings(sheets_spreadsheet="book", sheets_api_url=server.url)
            Sheets.connect(settings, Secrets(google_credentials=server.credentials()), "live").send(big)

    with ThreadPoolExecutor(4) as workers:
        list(workers.map(publish, range(4)))
    assert_published(server, big.tables)


def test_a_server_that_is_down_was_not_written_to(server):
    settings = load_settings(sheets_spreadsheet="book", sheets_api_url="http://127.0.0.1:9")
    sheets = Sheets.connect(settings, Secrets(google_credentials=server.credentials()), "live", timeout=(1, 1))
    with pytest.raises(Throttled):
        sheets.send(PUBLISH)


def test_an_answer_that_is_not_googles_is_ambiguous(server, sheets, monkeypatch):
    sheets.check()
    monkeypatch.setattr(server, "handle", lambda request: Reply(200, ["a captive portal"]))
    with pytest.raises(Ambiguous, match="not a JSON object"):
        sheets.send(PUBLISH)


def test_a_token_endpoint_that_is_not_googles_is_throttled(server, sheets, monkeypatch):
    for reply in (Reply(200, b"<html>"), Reply(200, [1]), Reply(200, {"access_token": "ya29.x", "expires_in": "soon"})):
        monkeypatch.setattr(server, "handle", lambda request, reply=reply: reply)
        with pytest.raises((Throttled, Rejected)) as caught:
            sheets.send(PUBLISH)
        assert "token" in str(caught.value) and len(calls(server, "book")) == 0


def test_pilot_uses_the_test_spreadsheet(server):
    server.sheets["trial"], server.editors["trial"] = [Sheet(0, "Sheet1", 10, 3)], {EMAIL}
    sheets = connect(server, "pilot", sheets_test_spreadsheet="trial")
    sheets.send(replace(PUBLISH, target=""))
    assert P1 in server.titles("trial") and P1 not in server.titles("book")
    with pytest.raises(SettingsError, match="RETENTION_OPS_SHEETS_TEST_SPREADSHEET"):
        connect(server, "pilot")


def test_credentials_may_be_a_path_and_bad_ones_are_never_quoted(server, tmp_path, monkeypatch):
    monkeypatch.delenv("RETENTION_OPS_GOOGLE_CREDENTIALS", raising=False)
    settings = load_settings(sheets_spreadsheet="book", sheets_api_url=server.url)
    path = tmp_path / "key.json"
    path.write_text(server.credentials())
    Sheets.connect(settings, Secrets(google_credentials=str(path)), "live").send(PUBLISH)
    assert_published(server)
    broken = json.loads(server.credentials())
    broken["private_key"] = "-----BEGIN PRIVATE KEY-----\ncanary-of-the-key\n-----END PRIVATE KEY-----\n"
    for text in (json.dumps(broken), '{"private_key": "canary', "/no/such/canary.json", "[1]"):
        with pytest.raises(SettingsError, match="RETENTION_OPS_GOOGLE_CREDENTIALS") as caught:
            Sheets.connect(settings, Secrets(google_credentials=text), "live")
        assert "canary" not in str(caught.value)
    with pytest.raises(SettingsError, match="RETENTION_OPS_GOOGLE_CREDENTIALS"):
        Sheets.connect(settings, Secrets(), "live")
    with pytest.raises(SettingsError, match="RETENTION_OPS_SHEETS_API_URL"):
        Sheets.connect(load_settings(sheets_spreadsheet="book", sheets_api_url="http://sheets.example"), Secrets(), "live")


def test_no_error_or_finding_holds_the_key_the_token_or_a_cell(server, sheets):
    texts = []
    for fault in ("lost_before", "500_before", "429", "503", "slow_before"):
        for step in ("token", "book:batchUpdate", "values:batchUpdate"):
            if (fault, step) in {("500_before", "token"), ("503", "token"), ("429", "token")}:
                continue  # google-auth asks the token endpoint three times in 3 s
            fresh = connect(server)
            server.fail(fault, step)
            with pytest.raises((Ambiguous, Throttled)) as caught:
                fresh.send(PUBLISH)
            texts.append(str(caught.value))
            server.faults.clear()
    server.fail("500_before", r"GET /v4")
    texts += [finding.sentence + finding.cure for finding in sheets.check()]
    key_line = server.private_key.splitlines()[1]
    for text in texts:
        assert not any(secret in text for secret in (key_line, "ya29", "c-1", "Zoë", "PRIVATE"))


def test_a_key_google_refuses_is_rejected_with_the_cure(server):
    info = json.loads(server.credentials())
    with SheetsServer() as other:
        info["private_key"] = other.private_key
    settings = load_settings(sheets_spreadsheet="book", sheets_api_url=server.url)
    sheets = Sheets.connect(settings, Secrets(google_credentials=json.dumps(info)), "live")
    with pytest.raises(Rejected, match=r"invalid_grant.*new key"):
        sheets.send(PUBLISH)
    assert sheets.check()[0].ok is False


def test_check_reads_and_writes_nothing(server, sheets):
    findings = {finding.subject: finding for finding in sheets.check()}
    assert findings["google credentials"].ok and findings["spreadsheet"].ok
    assert findings["right to edit"].ok is None and findings["google quota"].ok is None
    assert "300" in findings["google quota"].sentence and "26,000 of 10,000,000" in findings["spreadsheet"].sentence
    assert calls(server, "atchUpdate") == []
    server.editors["book"].clear()
    findings = {finding.subject: finding for finding in sheets.check()}
    assert findings["spreadsheet"].ok is False and EMAIL in findings["spreadsheet"].cure


def test_gspread_itself_fails_on_an_error_answer_of_another_shape(server):
    """Why SheetsHttp does not use gspread's own request."""
    server.fail("500_before", "book")
    with pytest.raises(TypeError):
        HTTPClient(None, session=requests.Session()).request("get", f"{server.url}/v4/spreadsheets/book")


def test_only_publish_and_withdraw_are_understood(sheets):
    assert set(sheets.lookups) == {"publish", "withdraw"} and not sheets.lookups["publish"].repeatable
    for call in (sheets.update, lambda action: sheets.send(replace(action, kind="post"))):
        with pytest.raises(Rejected):
            call(PUBLISH)
    assert module.SCOPES == ["https://www.googleapis.com/auth/spreadsheets"]


# --- withdrawing ---


def withdrawal(key, *titles, gids=()):
    sheets = [{"title": title, "gid": gid} for title, gid in zip(titles, [*gids, *[None] * len(titles)], strict=False)]
    return Outgoing(key="f" * 32, kind="withdraw", target="book", payload={"key": key, "worksheets": sheets, "why": "sheets_keep_days"})


def test_a_withdraw_deletes_what_was_published_and_nothing_else(server, sheets):
    action = PUBLISH
    receipt = sheets.send(action)
    kept, gone = list(TABLES)[1:], next(iter(TABLES))
    gid = int(receipt.detail["links"][gone].rpartition("=")[2])
    server.sheet(gone).title = "renamed by a person"
    assert sheets.send(withdrawal(action.key, gone, gids=[gid])).detail == {"deleted": 1}
    assert sorted(server.titles()) == sorted(["Sheet1", *kept])
    assert sheets.send(withdrawal(action.key, gone, gids=[gid])).detail == {"deleted": 0}, "twice changes nothing"
    assert sheets.send(withdrawal("another key", *kept)).detail == {"deleted": 0}, "only what bears the mark"


def test_the_last_worksheets_of_a_spreadsheet_can_be_withdrawn(server, sheets):
    action = PUBLISH
    sheets.send(action)
    server.sheets["book"] = [sheet for sheet in server.sheets["book"] if sheet.title != "Sheet1"]
    assert sheets.send(withdrawal(action.key, *TABLES)).detail == {"deleted": len(TABLES)}
    assert server.titles() == ["~empty ffffffff"]
