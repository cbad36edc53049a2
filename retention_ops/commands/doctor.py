"""`retention-ops doctor`: could a response go out, and if not, which variable, scope or switch is in the way? Sends nothing."""

from __future__ import annotations

import re
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Literal
from zoneinfo import ZoneInfo

import sqlalchemy as sa
import typer
from rich.markup import escape

from retention_ops.clock import system_clock
from retention_ops.commands import shared
from retention_ops.commands.shared import MARKS, Json, count, examples, moment, say, say_next
from retention_ops.errors import RetentionOpsError
from retention_ops.installation import ui_runs
from retention_ops.settings import Secrets, Settings

app = typer.Typer()

NEEDED: dict[str, tuple[str, ...]] = {
    "slack": ("slack_channel", "slack_token"),
    "jira": ("ticket_url", "ticket_user", "ticket_project", "ticket_token"),
    "asana": ("ticket_project", "ticket_token"),
    "roundup": ("ticket_url", "ticket_user", "ticket_token"),
    "sheets": ("sheets_spreadsheet", "google_credentials"),
    "webhook": ("webhook_url", "webhook_secret"),
    "mail": ("smtp_host", "mail_from", "mail_to"),
}
"""destination -> settings and secrets without which it cannot be asked anything"""
TESTED = ("slack_channel", "ticket_project", "sheets_spreadsheet")
"""settings that have a twin for pilot"""
RIGHTS = {
    "ops database": "a role that owns this one database (CREATE on its schema for migrations; SELECT, INSERT, UPDATE, DELETE on its own "
                    "tables); no superuser, CREATEDB or CREATEROLE",
    "postgres source": "a role with CONNECT, USAGE on the schema and SELECT on the tables that sql/sources/orders.sql reads; "
                       "ALTER ROLE ... SET default_transaction_read_only = on",
    "bigquery": "roles/bigquery.jobUser on the project, roles/bigquery.dataEditor on the dataset, and roles/bigquery.dataViewer on "
                "the source table, where one is set",
    "slack": "a bot token with chat:write, files:write and channels:history (groups:history for a private channel); channels:read lets "
             "doctor see the channel; member of that channel only",
    "jira": "in this one project: browse projects, create, edit and transition issues, add comments",
    "asana": "a token of a user who is a member of this one project: read and write tasks, write comments",
    "roundup": "a user who may create, edit and view issues and messages over REST",
    "sheets": "a service account without any project role, editor of this one spreadsheet; scope spreadsheets, not drive",
    "webhook": "none here; the receiver checks the signature",
    "mail": "to send as this one address",
}
"""the least a credential needs; `doctor` lists those in use"""


@app.command(epilog=examples("doctor", "doctor --mode pilot", "doctor --json"))
def doctor(
    mode: Annotated[
        Literal["pilot", "live"] | None, typer.Option("--mode", help="As if in this mode; default: the mode in force, or live.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Check destinations, credentials, scopes, targets and switches. Sends nothing; exits 1 if something is missing."""
    settings = shared.settings()
    mode = mode or (settings.mode if settings.mode in ("pilot", "live") else "live")
    with shared.err.status("asking") if not as_json else shared.nothing():
        groups = {
            "this installation": list(_installation(settings)), "source of orders": list(_source(settings)),
            "least rights": list(_rights(settings, mode)), **_destinations(settings, Secrets(), mode),
        }
    ready = all(finding.ok is not False for findings in groups.values() for finding in findings)
    if as_json:
        shared.print_json({"mode": mode, "ready": ready, "findings": [
            {"group": name, **shared.plain(finding)} for name, findings in groups.items() for finding in findings]})
    else:
        _show(settings, mode, groups, ready)
    if not ready:
        raise typer.Exit(1)


def _show(settings: Settings, mode: str, groups: dict[str, list[Any]], ready: bool) -> None:
    say(f"As in mode {mode}. Nothing was sent.")
    for name, findings in groups.items():
        say(f"\n[bold]{escape(name)}[/bold]")
        for finding in findings:
            say(f"  {MARKS[finding.ok]} {escape(finding.subject)}: {escape(finding.sentence)}")
            if finding.cure and not finding.ok:
                say(f"      [dim]cure:[/dim] {escape(finding.cure)}")
    say("")
    again = shared.command(settings, f"doctor --mode {mode}")
    say_next(again if not ready else shared.command(settings, "status"))


# -- this installation -------------------------------------------------------------------------------------------------


def _installation(settings: Settings) -> Iterator[Any]:
    yield from _database(settings)
    yield _mode(settings)
    yield _daemon(settings)
    yield from _webserver(settings)
    yield from _people(settings)
    yield _data_owner(settings)
    yield from _secrets_in_env_file()
    yield _lists(settings)
    yield _chances(settings)
    yield _customer_ids(settings)
    yield _calendar(settings)
    yield _clock(settings)


def _finding(subject: str, ok: bool | None, sentence: str, cure: str = "") -> Any:
    from retention_ops.execute.destinations.seam import Finding

    return Finding(subject, ok, sentence, cure)


def _database(settings: Settings) -> Iterator[Any]:
    """Reachable, at its newest schema, and whether the kill switch is on."""
    from retention_ops.execute import ledger
    from retention_ops.execute.door import HALTED
    from retention_ops.execute.hold import why_held
    from retention_ops.log.database import HEAD, ops_database

    if not shared.has_database(settings):
        yield _finding("ops database", True, f"not there yet; the first run makes {settings.home / 'ops.sqlite'}")
        return
    try:
        with ops_database(settings) as engine:
            with engine.connect() as connection:
                head = connection.execute(sa.text("SELECT version_num FROM alembic_version")).scalar()
            halted, held = ledger.read_state(engine, HALTED), why_held(engine)
            where = engine.url.render_as_string(hide_password=True)
    except (RetentionOpsError, sa.exc.SQLAlchemyError, OSError) as error:
        text = str(error) if isinstance(error, RetentionOpsError) else type(error).__name__
        yield _finding("ops database", False, f"cannot be used: {text}", "check RETENTION_OPS_OPS_DATABASE_URL and RETENTION_OPS_HOME")
        return
    yield _finding("ops database", head == HEAD, f"{where}, schema {head}", "" if head == HEAD else f"this version knows schema {HEAD}")
    if halted and halted["value"] == "yes":
        yield _finding("kill switch", False, f"halted by {halted['by']} at {moment(halted['at'])}: {halted['why']}",
                       "retention-ops actions resume --by NAME --why TEXT")
    else:
        yield _finding("kill switch", True, "not pulled")
    if held:
        said, _, cure = held.partition("; ")
        yield _finding("ledger", False, said, cure)


def _source(settings: Settings) -> Iterator[Any]:
    """Whether the orders' source answers, what it is, and which rights it takes to read it."""
    from retention_ops.sources.pull import last_pull
    from retention_ops.sources.reader import dialect_of, open_reader
    from retention_ops.sources.select import check_columns, read_select

    if not settings.source:
        yield _finding("source", None, "none: orders come by `retention-ops ingest`", "retention-ops init, then set RETENTION_OPS_SOURCE")
        return
    try:
        select = read_select(settings.source_sql, dialect_of(settings.source))
        with open_reader(shared.lake(settings, writes=False)) as reader:
            yield _finding("source", True, f"{settings.source} answers")
            columns = check_columns(select, list(reader.columns(select)))
            yield _finding("select", True, f"{select.path} gives {', '.join(columns)}")
            for found in reader.findings(select):
                yield _finding("rights", found.ok, found.sentence, found.cure)
    except RetentionOpsError as error:
        yield _finding("source", False, str(error), "retention-ops source check")
    last = last_pull(settings)
    told = f"{last['pulled_at'][:16].replace('T', ' ')} UTC: {last['complete_note']}" if last else "none yet"
    yield _finding("last pull", True if last else None, told, "retention-ops source pull")


def _mode(settings: Settings) -> Any:
    from retention_ops.execute.destinations import SLOTS, chosen

    means = {
        "off": "nothing is answered", "shadow": "answers are rehearsed, nothing leaves this machine",
        "pilot": "WARNING only, to the test channel, project and spreadsheet", "live": "answers go out",
    }
    if settings.mode in ("pilot", "live") and all(chosen(slot, settings, settings.mode) == "local" for slot in SLOTS):
        return _finding("mode", None, f"{settings.mode}, but every destination is local: nothing leaves this machine",
                        "choose where answers go: RETENTION_OPS_MESSAGES_TO, _TICKETS_TO, _LISTS_TO, _WEBHOOK_TO")
    return _finding("mode", True, f"{settings.mode}: {means[settings.mode]} (RETENTION_OPS_MODE)")


def _webserver(settings: Settings) -> Iterator[Any]:
    """What the MCP server's write tools need: Dagster's own address, serving this very home."""
    from retention_ops.execute.destinations.dagster import Dagster

    if shared.has_database(settings):
        yield from Dagster.connect(settings).check()


def _daemon(settings: Settings) -> Any:
    """Sensors and schedule run only inside `retention-ops ui`; its lock says whether that runs on this machine."""
    when = f"the daily run from {settings.schedule_time} {settings.shop_timezone} and the sensors"
    if ui_runs(settings):
        return _finding("daemon", True, f"`retention-ops ui` runs here: {when} are on")
    return _finding("daemon", None, f"not seen on this machine: {when} wait for it",
                    "keep `retention-ops ui` running, or call `morning` and `actions work` from your own scheduler")


def _chances(settings: Settings) -> Any:
    """Whether the queue's chances come from the table or from the learned model, and why."""
    from retention_ops.detect.verdict import state

    ok, sentence = state(settings)
    cure = "pip install 'retention-ops[models]', or set RETENTION_OPS_RETURN_MODEL=table" if ok is False else \
        "`retention-ops backtest targeting --model`, or set RETENTION_OPS_RETURN_MODEL=table"
    return _finding("chances", ok, sentence, cure)


def _people(settings: Settings) -> Iterator[Any]:
    owner = settings.owner
    yield _finding("owner", bool(owner), owner or "nobody owns incidents", "set RETENTION_OPS_OWNER to a name or a Slack member id")
    backup = settings.backup_owner
    yield _finding("backup owner", True if backup else None, backup or "a missed acknowledgement is told to the owner only",
                   "set RETENTION_OPS_BACKUP_OWNER")
    yield _finding("acknowledgement", True, f"CRITICAL within {settings.ack_hours_critical}, WARNING within "
                   f"{settings.ack_hours_warning} hours of {settings.business_days} {settings.business_hours} {settings.shop_timezone}")


def _data_owner(settings: Settings) -> Any:
    """Who hears that the installation itself is not well."""
    from retention_ops.execute.destinations import chosen
    from retention_ops.execute.destinations.choice import HEALTH_SLOT

    if chosen(HEALTH_SLOT, settings, "live") == "local":
        return _finding("health alerts", None, f"nobody is told of a failed run or late data; they stay in {settings.outbox}",
                        "set RETENTION_OPS_HEALTH_CHANNEL, or RETENTION_OPS_HEALTH_EMAIL and RETENTION_OPS_SMTP_HOST")
    name = chosen(HEALTH_SLOT, settings, "live")
    missing = {"slack": not Secrets().slack_token and "SLACK_TOKEN", "mail": not settings.mail_from and "MAIL_FROM"}[name]
    if missing:
        return _finding("health alerts", False, f"go by {name}, but RETENTION_OPS_{missing} is not set", "set it")
    beat = "a heartbeat after each good day" if Secrets().heartbeat_url else "no heartbeat (RETENTION_OPS_HEARTBEAT_URL)"
    return _finding("health alerts", True, f"go by {name} in live; {beat}")


def _secrets_in_env_file() -> Iterator[Any]:
    """.env is for settings: a secret written there is not used, and lies around."""
    file = Path(".env")
    if not file.is_file():
        return
    names = {f"RETENTION_OPS_{name.upper()}" for name in Secrets.model_fields}
    text = file.read_text(encoding="utf-8", errors="replace")
    for name in re.findall(r"^\s*(?:export\s+)?(\w+)\s*=\s*\S", text, flags=re.M):
        if name.upper() in names:
            yield _finding(".env", None, f"{name.upper()} stands in {file.absolute()} and is not read from there",
                           "take it out and set it in the environment of the service")


def _lists(settings: Settings) -> Any:
    above = settings.approval_above
    asks = f"a CRITICAL list of more than {above:,} customers waits for approval" if above is not None else "no list waits for approval"
    return _finding("lists", True, f"{asks}; {settings.holdout_pct} % held out in live; nobody twice in "
                    f"{settings.handover_cooldown_days} days; at most {settings.max_messages_per_day} actions per destination and "
                    f"{settings.max_incidents_per_day} incidents in 24 hours")


def _customer_ids(settings: Settings) -> Any:
    """Whether ids that are e-mail addresses can be hashed, and forgotten customers recognised."""
    from retention_ops.log.database import ops_database
    from retention_ops.log.forgotten import find, has_database
    from retention_ops.sources.identity import identity_of, versions_in_force

    kept = {"emails": "e-mail addresses are kept as keyed hashes", "all": "all are kept as keyed hashes", "off": "kept as they come"}
    try:
        identity = identity_of(settings)
        needed = {version.id_key for version in versions_in_force(settings) if version.id_key}
        if has_database(settings):
            with ops_database(settings) as engine:
                rows = find(engine)
            needed |= {row["key_fingerprint"] for row in rows}
            if any(row["finished_at"] is None for row in rows):
                return _finding("customer ids", False, "an erasure was begun and not finished",
                                "run `retention-ops forget` again with the same ids")
    except RetentionOpsError as error:
        return _finding("customer ids", False, str(error), "see docs/personal_data.md")
    if needed - {identity.fingerprint}:
        return _finding("customer ids", False, "the data here needs another RETENTION_OPS_ID_KEY (fingerprint "
                        f"{', '.join(sorted(needed))}): no file can be taken in", "set the key that was in force")
    if not identity.key:
        return _finding("customer ids", None, f"{kept[settings.hash_customer_ids]}, but there is no key: a file with addresses is refused, "
                        "and nobody can be forgotten", "export RETENTION_OPS_ID_KEY=$(openssl rand -hex 32), and keep it")
    return _finding("customer ids", True, f"{kept[settings.hash_customer_ids]}; key {identity.fingerprint}")


def _calendar(settings: Settings) -> Any:
    """Which days may be days without trade."""
    from retention_ops.detect.closures import planned_closures, public_holidays

    try:
        closures = planned_closures(settings)
    except RetentionOpsError as error:
        return _finding("calendar", False, str(error), "correct the file, then see `retention-ops closures`")
    if not settings.holiday_country and not settings.closures_file:
        return _finding("calendar", None, "no public holidays, no planned closures: a day on which the shop was shut looks like an outage",
                        "set RETENTION_OPS_HOLIDAY_COUNTRY, such as GB-ENG, or RETENTION_OPS_CLOSURES_FILE")
    year = system_clock().astimezone(ZoneInfo(settings.shop_timezone)).year
    country = settings.holiday_country
    holidays = len([day for day in public_holidays(country) if day.year == year])
    known = f"{count(holidays, 'public holiday')} of {country} in {year}" if country else "no public holidays"
    planned = (f"{count(len(closures), 'planned closure')}, {count(sum(len(closure.days) for closure in closures), 'day')}, in "
               f"{settings.closures_file}" if settings.closures_file else "no planned closures")
    return _finding("calendar", True, f"{known}; {planned}")


def _clock(settings: Settings) -> Any:
    now = system_clock()
    local: datetime = now.astimezone(ZoneInfo(settings.shop_timezone))
    return _finding("clock", True, f"{moment(now)} is {local:%Y-%m-%d %H:%M} in the shop ({settings.shop_timezone}); "
                    "compare it with your watch")


# -- least rights ------------------------------------------------------------------------------------------------------


def _rights(settings: Settings, mode: str) -> Iterator[Any]:
    """What each credential in use needs, and of a Postgres role whether it has more."""
    from retention_ops.execute.destinations import SLOTS, chosen
    from retention_ops.execute.destinations.choice import HEALTH_SLOT

    if sa.make_url(settings.database_url).get_backend_name() == "postgresql":
        yield _finding("ops database", *_role(settings))
    if settings.source == "postgres":  # what its user has is asked of the source itself, above
        yield _finding("postgres source", True, f"needs {RIGHTS['postgres source']}")
    if settings.warehouse == "bigquery":
        yield _finding("bigquery", True, f"needs {RIGHTS['bigquery']}")
    used = dict.fromkeys(chosen(slot, settings, mode) for slot in (*SLOTS, "mail", HEALTH_SLOT))
    for name in used:
        if name in RIGHTS:
            yield _finding(name, True, f"needs {RIGHTS[name]}")
    if settings.warehouse == "lake" and set(used) == {"local"} and not settings.ops_database_url and not settings.source:
        yield _finding("files", True, f"only {settings.home} is read and written; its owner needs no other right")


def _role(settings: Settings) -> tuple[bool | None, str, str]:
    from retention_ops.log.database import open_engine

    engine = open_engine(settings)
    try:
        with engine.connect() as connection:
            row = connection.execute(sa.text(
                "SELECT rolname, rolsuper, rolcreatedb, rolcreaterole FROM pg_roles WHERE rolname = current_user")).mappings().one()
    except sa.exc.SQLAlchemyError:
        return None, f"needs {RIGHTS['ops database']}", ""
    finally:
        engine.dispose()
    names = {"rolsuper": "superuser", "rolcreatedb": "CREATEDB", "rolcreaterole": "CREATEROLE"}
    more = [name for column, name in names.items() if row[column]]
    if more:
        return None, f"the role {row['rolname']} is {', '.join(more)}; it needs {RIGHTS['ops database']}", \
            "make it a role of its own: deploy/postgres-init.sh shows how"
    return True, f"the role {row['rolname']} has no more than it needs: {RIGHTS['ops database']}", ""


# -- destinations ------------------------------------------------------------------------------------------------------


def _destinations(settings: Settings, secrets: Secrets, mode: str) -> dict[str, list[Any]]:
    from retention_ops.execute.destinations import SLOTS, chosen

    slots = [*SLOTS, "mail"] if chosen("webhook", settings, mode) != "local" else SLOTS
    return {f"{slot}: {chosen(slot, settings, mode)}": _destination(slot, settings, secrets, mode) for slot in slots}


def _destination(slot: str, settings: Settings, secrets: Secrets, mode: str) -> list[Any]:
    """What the slot's destination says about itself, or every variable it lacks."""
    from retention_ops.execute.destinations import chosen, connect
    from retention_ops.execute.redact import redact

    name = chosen(slot, settings, mode)
    if slot == "mail" and name == "local":
        return [_finding("mail", None, "no backup for a webhook that fails", "set RETENTION_OPS_SMTP_HOST and RETENTION_OPS_MAIL_TO")]
    missing = list(_missing(name, settings, secrets, mode))
    if missing:
        return missing
    try:
        return connect(name, settings, secrets, mode).check()
    except RetentionOpsError as error:
        return [_finding(name, False, redact(str(error), secrets.values()))]


def _missing(name: str, settings: Settings, secrets: Secrets, mode: str) -> Iterator[Any]:
    for field in NEEDED.get(name, ()):
        if field in Secrets.model_fields:
            known, description, variable = getattr(secrets, field), Secrets.model_fields[field].description, field
        else:
            variable = field.replace("_", "_test_", 1) if mode == "pilot" and field in TESTED else field
            known, description = getattr(settings, variable).strip(), Settings.model_fields[field].description
        if not known:
            yield _finding(name, False, f"RETENTION_OPS_{variable.upper()} is not set", f"set it: {description}")
