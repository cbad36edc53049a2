"""The ops database: what was ingested, answered, planned, sent and approved. SQLite by default, Postgres by URL.

SQLAlchemy Core, schema by alembic. Opening it brings the schema up to date; two processes may open it at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from datetime import UTC, datetime
from pathlib import Path

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine

from retention_ops.errors import LogError, NewerSchema
from retention_ops.settings import Settings
from retention_ops.warehouse.catalog import TABLES
from retention_ops.warehouse.files import locked

HEAD = "0006"
MIGRATIONS = Path(__file__).parent / "migrations"


class UtcDateTime(sa.types.TypeDecorator):
    """An aware UTC time, stored without zone so that SQLite and Postgres give back the same value."""

    impl = sa.DateTime
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: sa.Dialect) -> datetime | None:
        return None if value is None else value.astimezone(UTC).replace(tzinfo=None)

    def process_result_value(self, value: datetime | None, dialect: sa.Dialect) -> datetime | None:
        return None if value is None else value.replace(tzinfo=UTC)


COLUMN_TYPES: dict[str, sa.types.TypeEngine] = {
    "STRING": sa.Text(), "DATE": sa.Date(), "INT64": sa.BigInteger(), "FLOAT64": sa.Double(), "BOOL": sa.Boolean(),
    "TIMESTAMP": UtcDateTime(),
}

metadata = sa.MetaData()

ops_runs_log = sa.Table(
    "ops_runs_log", metadata,
    sa.Column("position", sa.Integer, primary_key=True, autoincrement=True),
    *(sa.Column(c.name, COLUMN_TYPES[c.type], nullable=c.nullable) for c in TABLES["ops_runs_log"].columns),
    sa.UniqueConstraint(*TABLES["ops_runs_log"].key, name="ops_runs_log_key"),
)

ingestions = sa.Table(
    "ingestions", metadata,
    sa.Column("dataset", sa.Text, primary_key=True),
    sa.Column("version", sa.Text, primary_key=True),
    sa.Column("ingested_at", UtcDateTime(), nullable=False),
    sa.Column("preset", sa.Text, nullable=False),
    sa.Column("rows", sa.BigInteger, nullable=False),
    sa.Column("complete_through", sa.Date),
    sa.Column("stale_from", sa.Date),
    sa.Column("content_sha256", sa.Text, nullable=False),
)

incidents = sa.Table(
    "incidents", metadata,
    sa.Column("id", sa.Integer, primary_key=True, autoincrement=True),
    sa.Column("alert_type", sa.Text, nullable=False),
    sa.Column("scope", sa.Text, nullable=False),
    sa.Column("mode", sa.Text, nullable=False),  # shadow, pilot, trial, live: a rehearsal never uses up the real answer
    sa.Column("state", sa.Text, nullable=False),  # open, resolved, retracted, closed
    sa.Column("severity", sa.Text, nullable=False),  # the highest so far
    sa.Column("opened_on", sa.Date, nullable=False),  # first flagged alert_date
    sa.Column("last_flagged_on", sa.Date, nullable=False),
    sa.Column("frozen_baseline", sa.Double, nullable=False),  # AT_RISK %, or returns of 100 by half-year habit
    sa.Column("frozen_warning_pct", sa.Double, nullable=False),
    sa.Column("owner", sa.Text, nullable=False),
    sa.Column("backup_owner", sa.Text, nullable=False),
    sa.Column("ack_by", UtcDateTime(), nullable=False),
    sa.Column("acked_at", UtcDateTime()),
    sa.Column("acked_by", sa.Text),
    sa.Column("escalated_at", UtcDateTime()),  # the missed acknowledgement, told once
    sa.Column("snoozed_until", UtcDateTime()),
    sa.Column("verdict", sa.Text),  # real, expected, data, false
    sa.Column("closed_at", UtcDateTime()),
    sa.Column("closed_by", sa.Text),
    sa.Column("created_at", UtcDateTime(), nullable=False),
    sa.Column("updated_at", UtcDateTime(), nullable=False),
    sa.Index("incidents_one_open", "scope", "mode", unique=True,  # whichever rule opened it
             sqlite_where=sa.text("state = 'open'"), postgresql_where=sa.text("state = 'open'")),
)

answers = sa.Table(
    "answers", metadata,
    sa.Column("id", sa.Integer, primary_key=True, autoincrement=True),
    sa.Column("alert_type", sa.Text, nullable=False),
    sa.Column("scope", sa.Text, nullable=False),
    sa.Column("alert_date", sa.Date, nullable=False),
    sa.Column("mode", sa.Text, nullable=False),
    sa.Column("seq", sa.Integer, nullable=False),  # 1 for the first answer of this date, then one per changed result
    sa.Column("version", sa.Text, nullable=False),  # alert_version of the result answered
    sa.Column("severity", sa.Text, nullable=False),
    sa.Column("verdict", sa.Text, nullable=False),  # open, update, escalate, retract, resolve, history, covered, snoozed
    sa.Column("reason", sa.Text, nullable=False),
    sa.Column("incident_id", sa.Integer, sa.ForeignKey("incidents.id")),
    sa.Column("run_id", sa.Text, nullable=False),
    sa.Column("answered_at", UtcDateTime(), nullable=False),
    sa.Column("facts_sha256", sa.Text),
    sa.Column("audience_sha256", sa.Text),
    sa.Column("made_from", sa.JSON),  # provenance of the alert rows answered: orders version, rules, SQL, settings
    sa.UniqueConstraint("alert_type", "scope", "alert_date", "mode", "seq", name="answers_identity"),
)

actions = sa.Table(
    "actions", metadata,
    sa.Column("key", sa.Text, primary_key=True),
    sa.Column("position", sa.Integer, nullable=False),  # the order in which actions were planned
    sa.Column("answer_id", sa.Integer, sa.ForeignKey("answers.id"), index=True),
    sa.Column("incident_id", sa.Integer, sa.ForeignKey("incidents.id"), index=True),
    sa.Column("alert_date", sa.Date, nullable=False),
    sa.Column("mode", sa.Text, nullable=False),
    sa.Column("slot", sa.Text, nullable=False),  # destinations/choice.py, EVERY_SLOT
    sa.Column("destination", sa.Text, nullable=False),  # the name of a class in destinations/
    sa.Column("kind", sa.Text, nullable=False),
    sa.Column("target", sa.Text, nullable=False),
    sa.Column("parent_key", sa.Text),  # must be sent first; its external_id is what this one builds on
    sa.Column("payload", sa.JSON, nullable=False),
    sa.Column("bound", sa.Boolean, nullable=False),  # false: links of earlier actions are filled in before the first attempt
    sa.Column("payload_sha256", sa.Text, nullable=False),
    sa.Column("state", sa.Text, nullable=False, index=True),
    sa.Column("attempts", sa.Integer, nullable=False),
    sa.Column("looked_up", sa.Integer, nullable=False),  # look-ups in a row that found nothing
    sa.Column("lease_owner", sa.Text),
    sa.Column("lease_until", UtcDateTime()),
    sa.Column("not_before", UtcDateTime()),
    sa.Column("first_attempt_at", UtcDateTime()),
    sa.Column("last_attempt_at", UtcDateTime()),
    sa.Column("looked_at", UtcDateTime()),  # when its destination was last asked about it and had nothing
    sa.Column("external_id", sa.Text),
    sa.Column("external_url", sa.Text),
    sa.Column("detail", sa.JSON),
    sa.Column("last_error", sa.Text),
    sa.Column("created_at", UtcDateTime(), nullable=False),
    sa.Column("updated_at", UtcDateTime(), nullable=False),
)

reservations = sa.Table(
    "reservations", metadata,
    sa.Column("id", sa.Integer, primary_key=True, autoincrement=True),
    sa.Column("guardrail", sa.Text, nullable=False),
    sa.Column("action_key", sa.Text, sa.ForeignKey("actions.key"), nullable=False),
    sa.Column("at", UtcDateTime(), nullable=False),
    sa.UniqueConstraint("guardrail", "action_key", name="reservations_once"),
)

approvals = sa.Table(
    "approvals", metadata,
    sa.Column("id", sa.Integer, primary_key=True, autoincrement=True),
    sa.Column("action_key", sa.Text, sa.ForeignKey("actions.key"), nullable=False, index=True),
    sa.Column("audience_sha256", sa.Text, nullable=False),
    sa.Column("customers", sa.BigInteger, nullable=False),
    sa.Column("state", sa.Text, nullable=False),  # pending, approved, refused, void
    sa.Column("requested_at", UtcDateTime(), nullable=False),
    sa.Column("decided_at", UtcDateTime()),
    sa.Column("decided_by", sa.Text),
    sa.Column("why", sa.Text),
)

exposures = sa.Table(
    "exposures", metadata,
    sa.Column("incident_id", sa.Integer, sa.ForeignKey("incidents.id"), primary_key=True),
    sa.Column("alert_date", sa.Date, primary_key=True),
    sa.Column("customer_id", sa.Text, primary_key=True),
    sa.Column("tier", sa.Text, nullable=False),
    sa.Column("arm", sa.Text, nullable=False),  # treated, holdout
    sa.Column("action_key", sa.Text, sa.ForeignKey("actions.key"), nullable=False),
    sa.Column("at", UtcDateTime(), nullable=False),
    sa.Index("exposures_by_date", "arm", "alert_date"),
)

pending_handovers = sa.Table(
    "pending_handovers", metadata,
    sa.Column("action_key", sa.Text, sa.ForeignKey("actions.key"), primary_key=True),
    sa.Column("arms", sa.JSON, nullable=False),  # tier -> arm -> customer ids, until the hand-over is recorded or given up
)

ops_events = sa.Table(
    "ops_events", metadata,
    sa.Column("id", sa.Integer, primary_key=True, autoincrement=True),
    sa.Column("at", UtcDateTime(), nullable=False),
    sa.Column("incident_id", sa.Integer, index=True),
    sa.Column("action_key", sa.Text, index=True),
    sa.Column("event", sa.Text, nullable=False),
    sa.Column("actor", sa.Text, nullable=False),  # a run, a worker or a person
    sa.Column("detail", sa.Text, nullable=False),
)

response_state = sa.Table(
    "response_state", metadata,
    sa.Column("name", sa.Text, primary_key=True),  # halted; armed, armed:<rule>; restored; upgrading, upgrade:before, upgraded:<date>
    sa.Column("value", sa.Text, nullable=False),
    sa.Column("by", sa.Text, nullable=False),
    sa.Column("why", sa.Text, nullable=False),
    sa.Column("at", UtcDateTime(), nullable=False),
)

erasures = sa.Table(
    "erasures", metadata,
    sa.Column("mark", sa.Text, primary_key=True),  # keyed hash of the customer's id: blocks re-ingestion, says nothing without the key
    sa.Column("key_fingerprint", sa.Text, nullable=False),
    sa.Column("requested_at", UtcDateTime(), nullable=False),
    sa.Column("finished_at", UtcDateTime()),
    sa.Column("progress", sa.JSON, nullable=False),  # step -> what it did; no id
    sa.Column("unreached", sa.JSON, nullable=False),  # what lies where nothing here can delete it
)

loop_runs = sa.Table(
    "loop_runs", metadata,
    sa.Column("id", sa.Integer, primary_key=True, autoincrement=True),  # in the order in which they ended
    sa.Column("run_id", sa.Text, nullable=False, unique=True),
    sa.Column("first_date", sa.Date),
    sa.Column("last_date", sa.Date),
    sa.Column("status", sa.Text, nullable=False),  # success, failure, canceled
    sa.Column("started_at", UtcDateTime()),
    sa.Column("ended_at", UtcDateTime(), nullable=False),
    sa.Column("seen_at", UtcDateTime(), nullable=False),  # by the installation's own clock
)

source_checks = sa.Table(
    "source_checks", metadata,
    sa.Column("id", sa.Integer, primary_key=True, autoincrement=True),
    sa.Column("day", sa.Date, nullable=False),  # the newest date compared
    sa.Column("ok", sa.Boolean, nullable=False),
    sa.Column("differences", sa.JSON, nullable=False),  # counts and sums by date, never a customer
    sa.Column("checked_at", UtcDateTime(), nullable=False),
)

health_causes = sa.Table(
    "health_causes", metadata,
    sa.Column("id", sa.Integer, primary_key=True, autoincrement=True),
    sa.Column("cause", sa.Text, nullable=False),  # run_failed, data_late, source_check_off, action_needs_human, too_many_alerts, no_alerts
    sa.Column("subject", sa.Text, nullable=False),  # tells apart two causes of one kind; an alert date, or empty
    sa.Column("detail", sa.Text, nullable=False),  # as it was when it opened
    sa.Column("opened_at", UtcDateTime(), nullable=False),
    sa.Column("closed_at", UtcDateTime()),
    sa.Column("opened_key", sa.Text),  # the newest action that tells of it, and of its end
    sa.Column("closed_key", sa.Text),
    sa.Index("health_causes_one_open", "cause", "subject", unique=True,
             sqlite_where=sa.text("closed_at IS NULL"), postgresql_where=sa.text("closed_at IS NULL")),
)

settings_history = sa.Table(
    "settings_history", metadata,
    sa.Column("settings_sha256", sa.Text, primary_key=True),
    sa.Column("first_seen", UtcDateTime(), nullable=False),
    sa.Column("values", sa.JSON, nullable=False),  # name -> value, without secrets, addresses of storage and this machine's paths
)


def open_engine(settings: Settings) -> Engine:
    """An engine on the ops database as it is; `ops_database` is the way in that brings it up to date."""
    url = sa.make_url(settings.database_url)
    if url.get_backend_name() != "sqlite":
        return sa.create_engine(url, pool_pre_ping=True)
    if url.database:
        Path(url.database).parent.mkdir(parents=True, exist_ok=True)
    engine = sa.create_engine(url, connect_args={"timeout": 60})

    @sa.event.listens_for(engine, "connect")
    def _durable(connection, _record):
        # the driver's own transaction handling is off so that BEGIN IMMEDIATE below decides when the lock is taken
        connection.isolation_level = None
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")

    @sa.event.listens_for(engine, "begin")
    def _lock_at_begin(connection):
        connection.exec_driver_sql("BEGIN IMMEDIATE")

    return engine


def _upgrade(engine: Engine, settings: Settings) -> None:
    sqlite = engine.dialect.name == "sqlite"
    with locked(settings.home / ".ops.lock") if sqlite else nullcontext():
        if revision(engine) != HEAD:
            with engine.begin() as connection:
                if not sqlite:
                    connection.execute(sa.text("SELECT pg_advisory_xact_lock(7382461)"))
                migrate(connection)


def migrate(connection: Connection, to: str = "head") -> None:
    """Brings the schema up to a revision inside the caller's transaction."""
    # alembic is imported only where a schema is missing or old: it costs more than the query that finds out
    from alembic import command
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    config.attributes["connection"] = connection
    command.upgrade(config, to)


def revision(engine: Engine) -> str | None:
    """The schema an ops database is at; None where it is empty."""
    with engine.connect() as connection:
        if not sa.inspect(connection).has_table("alembic_version"):
            return None
        return connection.execute(sa.text("SELECT version_num FROM alembic_version")).scalar()


def check_known(found: str | None, what: str) -> None:
    """Raises NewerSchema where `found` is a revision this program has no migration for."""
    if found is not None and not any((MIGRATIONS / "versions").glob(f"{found}_*.py")):
        raise NewerSchema(f"{what} is at schema {found}; this program knows schemas up to {HEAD}. Install the release that wrote it, or a "
                          "newer one; nothing was changed")


@contextmanager
def ops_database(settings: Settings) -> Iterator[Engine]:
    """An engine on an up-to-date ops database. Raises LogError naming the database (never its password)."""
    engine = open_engine(settings)
    try:
        if (found := revision(engine)) != HEAD:
            check_known(found, f"the ops database {engine.url.render_as_string(hide_password=True)}")
            _upgrade(engine, settings)
        yield engine
    except sa.exc.DatabaseError as error:
        if isinstance(error, sa.exc.IntegrityError):
            raise
        where = engine.url.render_as_string(hide_password=True)
        raise LogError(f"the ops database {where} cannot be used: {error.orig}") from error
    finally:
        engine.dispose()


def lock_chain(connection: Connection) -> None:
    """Lets one writer at a time extend the hash chain; held until the transaction ends."""
    if connection.dialect.name == "postgresql":
        connection.execute(sa.text("LOCK TABLE ops_runs_log IN EXCLUSIVE MODE"))
    # SQLite: BEGIN IMMEDIATE already holds the only write lock


def lock_responses(connection: Connection) -> None:
    """Lets one worker at a time decide and plan; held until the transaction ends."""
    if connection.dialect.name == "postgresql":
        connection.execute(sa.text("SELECT pg_advisory_xact_lock(7382462)"))
