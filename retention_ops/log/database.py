"""The ops database: what was ingested and what was answered. SQLite by default, Postgres by URL.

SQLAlchemy Core, schema by alembic. Opening it brings the schema up to date; two processes may open it at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from datetime import UTC, datetime
from pathlib import Path

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine

from retention_ops.errors import LogError
from retention_ops.settings import Settings
from retention_ops.warehouse.catalog import TABLES
from retention_ops.warehouse.files import locked

HEAD = "0001"
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


def _engine(settings: Settings) -> Engine:
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
    # alembic is imported only where a schema is missing or old: it costs more than the query that finds out
    from alembic import command
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    sqlite = engine.dialect.name == "sqlite"
    with locked(settings.home / ".ops.lock") if sqlite else nullcontext():
        if _revision(engine) != HEAD:
            with engine.begin() as connection:
                if not sqlite:
                    connection.execute(sa.text("SELECT pg_advisory_xact_lock(7382461)"))
                config.attributes["connection"] = connection
                command.upgrade(config, "head")


def _revision(engine: Engine) -> str | None:
    with engine.connect() as connection:
        if not sa.inspect(connection).has_table("alembic_version"):
            return None
        return connection.execute(sa.text("SELECT version_num FROM alembic_version")).scalar()


@contextmanager
def ops_database(settings: Settings) -> Iterator[Engine]:
    """An engine on an up-to-date ops database. Raises LogError naming the database (never its password)."""
    engine = _engine(settings)
    try:
        if _revision(engine) != HEAD:
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
