"""`retention-ops audit`: is the record whole, and what does it say last?"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date, datetime
from typing import Annotated, Any

import sqlalchemy as sa
import typer
from rich.markup import escape
from sqlalchemy.engine import Engine

from retention_ops.commands import shared
from retention_ops.commands.shared import MARKS, Json, count, examples, moment, say, say_next
from retention_ops.settings import Settings

app = shared.group("audit", "The append-only record of what was answered: is it whole, and what does it say?")

Row = dict[str, Any]
MOST_NAMED = 5


@dataclass(frozen=True)
class Check:
    """One thing that must hold; `broken` says that it does not, `note` that it cannot be judged now."""

    name: str
    sentence: str
    broken: bool = False
    note: bool = False


@app.command("verify", epilog=examples("audit verify", "audit verify --json"))
def verify(as_json: Json = False) -> None:
    """Recompute the hash chain, compare it with the copies outside the database, and check that ledger and events agree."""
    settings = shared.settings()
    with shared.database(settings) as engine:
        checks = [*_log_checks(engine, settings), *_ledger_checks(engine), _once(engine)]
    whole = not any(check.broken for check in checks)
    if as_json:
        shared.print_json({"whole": whole, "checks": checks})
    else:
        for check in checks:
            say(f"{MARKS[None if check.note else not check.broken]} {check.name}: {escape(check.sentence)}")
        say_next(shared.command(settings, "audit show"))
    if not whole:
        raise typer.Exit(1)


# -- ops_runs_log ------------------------------------------------------------------------------------------------------


def _log_checks(engine: Engine, settings: Settings) -> Iterator[Check]:
    from retention_ops.log import runs

    log = runs.rows(engine)
    broken = runs.first_broken_row(engine)
    if broken:
        position, row = broken
        yield Check("hash chain", f"broken at row {position}, alert date {row['alert_date']}, run {row['run_id']}, written "
                    f"{moment(row['run_timestamp'])}: it was changed, or a row before it was removed or added", broken=True)
    else:
        yield Check("hash chain", f"{count(len(log), 'row')}, each follows from the one before")
    known = {row["row_hash"] for row in log}
    exported = _exported(settings)
    yield _copies("copy in the lake", "the exported table ops_runs_log", exported, known)
    behind = len(known - {row["row_hash"] for row in exported})
    if behind:
        yield Check("copy in the lake", f"{count(behind, 'newest row')} not exported yet; the next run does it", note=True)
    yield _copies("copies in the packs", "ops_run_log.json", _in_packs(settings), known)


def _exported(settings: Settings) -> list[Row]:
    from retention_ops.package.pack import records

    lake = shared.lake(settings)
    if not lake.exists("ops_runs_log"):
        return []
    return [{**row, "alert_date": str(row["alert_date"])[:10]} for row in records(lake.read("ops_runs_log"))]


def _in_packs(settings: Settings) -> list[Row]:
    from retention_ops.package.pack import LOG_FILE, pack_days

    found: list[Row] = []
    for day in pack_days(settings):
        file = settings.packs / day.isoformat() / LOG_FILE
        if file.is_file():
            content = json.loads(file.read_text(encoding="utf-8"))
            found += [row for row in content if isinstance(row, dict) and "row_hash" in row] if isinstance(content, list) else []
    return found


def _copies(name: str, where: str, copies: list[Row], known: set[str]) -> Check:
    """Whether the database still has every row that was once copied: triggers do not stop someone who owns the file."""
    gone = sorted((row for row in copies if row["row_hash"] not in known), key=lambda row: str(row["run_timestamp"]))
    if not gone:
        return Check(name, f"{count(len(copies), 'row')}, all in the database")
    first = gone[0]
    return Check(name, f"{count(len(gone), 'row')} of {where} missing in the database, the first of alert date {first['alert_date']}, "
                 f"run {first['run_id']}, written {first['run_timestamp']}", broken=True)


# -- ledger ------------------------------------------------------------------------------------------------------------


def _ledger_checks(engine: Engine) -> Iterator[Check]:
    with engine.connect() as connection:
        yield _proved(connection)
        yield _unchanged(connection)
        yield _answered(connection)
        yield _unique(connection)


def _proved(connection: sa.Connection) -> Check:
    from retention_ops.log.database import actions, ops_events

    proof = sa.select(ops_events.c.id).where(ops_events.c.action_key == actions.c.key, ops_events.c.event == "sent").exists()
    rows = connection.execute(sa.select(actions.c.key, actions.c.alert_date).where(actions.c.state == "sent", ~proof)).all()
    return _check("sent actions have their event", [f"{key[:12]} ({day})" for key, day in rows])


def _unchanged(connection: sa.Connection) -> Check:
    from retention_ops.execute.ledger import digest
    from retention_ops.log.database import actions

    rows = connection.execute(sa.select(actions.c.key, actions.c.alert_date, actions.c.payload, actions.c.payload_sha256)).all()
    return _check("contents are as planned", [f"{key[:12]} ({day})" for key, day, payload, sha in rows if digest(payload) != sha])


def _answered(connection: sa.Connection) -> Check:
    from retention_ops.log.database import actions, answers

    acting = ("open", "update", "escalate", "retract", "resolve")
    has_action = sa.select(actions.c.key).where(actions.c.answer_id == answers.c.id).exists()
    rows = connection.execute(sa.select(answers.c.alert_date, answers.c.verdict).where(answers.c.verdict.in_(acting), ~has_action)).all()
    return _check("answers have their actions", [f"{verdict} of {day}" for day, verdict in rows])


def _unique(connection: sa.Connection) -> Check:
    """Two creations must not claim the same thing out there; updates share the id of what they update."""
    from retention_ops.log.database import actions

    rows = connection.execute(
        sa.select(actions.c.destination, actions.c.external_id, sa.func.count())
        .where(actions.c.state == "sent", actions.c.destination != "local", actions.c.external_id.is_not(None),
               actions.c.kind.not_in(("update", "priority", "resolve")))
        .group_by(actions.c.destination, actions.c.kind, actions.c.external_id).having(sa.func.count() > 1)
    ).all()
    return _check("external ids are unique", [f"{destination} {external_id} ({number} times)" for destination, external_id, number in rows])


def _once(engine: Engine) -> Check:
    """An action that a late receipt showed to exist a second time: one of the two must be removed by hand."""
    from retention_ops.status import duplicates

    return _check("actions exist once", [
        f"{row['key']} ({row['alert_date']}, {row['destination']}) is {row['external_id']} and {row['detail']}"
        for row in duplicates(engine)
    ])


def _check(name: str, wrong: list[str]) -> Check:
    if not wrong:
        return Check(name, "yes")
    more = f" and {len(wrong) - MOST_NAMED} more" if len(wrong) > MOST_NAMED else ""
    return Check(name, f"no: {', '.join(wrong[:MOST_NAMED])}{more}", broken=True)


# -- reading -----------------------------------------------------------------------------------------------------------


@app.command("show", epilog=examples("audit show", "audit show --last 5 --json"))
def show(
    last: Annotated[int, typer.Option("--last", min=1, max=1_000_000, help="How many rows, newest last.")] = 20, as_json: Json = False,
) -> None:
    """The newest rows of ops_runs_log."""
    from retention_ops.log import runs

    settings = shared.settings()
    with shared.database(settings) as engine:
        rows = runs.rows(engine, newest=last)
    if as_json:
        shared.print_json(rows)
        return
    for row in rows:
        say(f"{moment(row['run_timestamp'])}  {_day(row['alert_date'])}  {shared.severity(row['severity'])}  {row['status']}  "
            f"{row['mode']}  {row['total_exported']:,} handed over  [dim]{row['row_hash'][:12]}[/dim]")
        if row["error_message"]:
            say(f"  [dim]{escape(row['error_message'])}[/dim]")
    if not rows:
        say("No rows yet.")
    say_next(shared.command(settings, "audit verify"))


def _day(value: date | datetime) -> str:
    return value.isoformat()[:10]
