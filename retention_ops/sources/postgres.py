"""Orders in a Postgres database: read in one read-only transaction that sees one state, streamed by a cursor on the server."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NoReturn

import sqlalchemy as sa
from sqlalchemy.pool import NullPool

from retention_ops.errors import SettingsError, SourceError
from retention_ops.execute.redact import redact
from retention_ops.settings import Secrets, Settings
from retention_ops.sources.reader import ROWS, Finding
from retention_ops.sources.select import Select, shape

CONNECT_SECONDS = 15
TEXT_OIDS = (25, 1043, 1042, 705, 19)
"""text, varchar, char, unknown, name"""
HARMLESS = ("08", "25", "28", "3D", "3F", "40", "42", "53", "55", "57", "0A")
"""SQLSTATE classes whose messages name tables, columns and limits, never a row's value"""


@contextmanager
def open_postgres(settings: Settings, secrets: Secrets, show_values: bool) -> Iterator[Postgres]:
    """A connection to RETENTION_OPS_SOURCE_URL that cannot write. Raises SourceError where there is none."""
    if not secrets.source_url:
        raise SettingsError("RETENTION_OPS_SOURCE_URL is not set: postgresql://user:password@host:5432/database, in the environment only")
    try:
        url = sa.make_url(secrets.source_url.get_secret_value())
    except (sa.exc.ArgumentError, ValueError):  # its text quotes the URL
        raise SettingsError("RETENTION_OPS_SOURCE_URL is not a URL like postgresql://user:password@host:5432/database "
                            "(special characters of the password must be percent-encoded)") from None
    if url.get_backend_name() not in ("postgresql", "postgres"):
        raise SettingsError("RETENTION_OPS_SOURCE_URL must begin with postgresql://; other databases cannot be read yet")
    hidden = [*secrets.values(), *filter(None, [url.password])]
    try:
        engine = sa.create_engine(
            url.set(drivername="postgresql+psycopg"), poolclass=NullPool, hide_parameters=True,
            connect_args={"connect_timeout": CONNECT_SECONDS, "application_name": "retention-ops"},
        )
    except ModuleNotFoundError:
        raise SettingsError("the Postgres driver is not installed: pip install 'retention-ops[postgres]'") from None
    reader = Postgres(hidden, show_values)
    try:
        # REPEATABLE READ: all statements of one pull see the same orders, also on a standby
        with engine.connect().execution_options(
            isolation_level="REPEATABLE READ", postgresql_readonly=True, no_parameters=True,
        ) as connection:
            for setting in (f"statement_timeout = {settings.source_timeout_seconds * 1000}", "TIME ZONE 'UTC'", "DateStyle = 'ISO, YMD'"):
                connection.exec_driver_sql(f"SET LOCAL {setting}")
            reader.connection = connection
            yield reader
    except sa.exc.SQLAlchemyError as error:
        reader.fail(error)
    finally:
        engine.dispose()


class Postgres:
    """A Reader on one open transaction."""

    dialect = "postgres"
    connection: sa.Connection

    def __init__(self, hidden: Sequence[str], show_values: bool):
        self._hidden, self._show_values = hidden, show_values

    def columns(self, select: Select) -> Mapping[str, bool]:
        text = shape(select)
        try:
            description = self.connection.exec_driver_sql(text).cursor.description
        except sa.exc.SQLAlchemyError as error:
            self.fail(error, f"{select.path}{_line(error, text)}: ")
        names = [column.name for column in description]
        if len(set(names)) < len(names):  # a mapping would hide it
            raise SourceError(f"{select.path} gives a column twice: {', '.join(sorted({n for n in names if names.count(n) > 1}))}")
        return {column.name: column.type_code in TEXT_OIDS for column in description}

    def rows(self, statement: str) -> Iterator[Sequence[Sequence[str | None]]]:
        try:
            result = self.connection.exec_driver_sql(
                statement, execution_options={"stream_results": True, "yield_per": ROWS, "no_parameters": True})
            yield from result.partitions()
        except sa.exc.SQLAlchemyError as error:
            self.fail(error)

    def findings(self, select: Select) -> Iterator[Finding]:
        who, database, superuser, read_only = self.connection.exec_driver_sql(
            "SELECT current_user, current_database(), (SELECT rolsuper FROM pg_roles WHERE rolname = current_user), "
            "current_setting('default_transaction_read_only') = 'on'").one()
        grant = _grants(who, database, select.tables())
        writable = [] if superuser else [
            name for name in select.tables()
            if self.connection.execute(
                sa.text("SELECT coalesce(has_table_privilege(to_regclass(:name), 'INSERT, UPDATE, DELETE, TRUNCATE'), false)"),
                {"name": name}, execution_options={"no_parameters": False},
            ).scalar()
        ]
        if superuser:
            yield Finding(None, f"user {who} is a superuser; we only read, in a read-only transaction", grant)
        elif writable:
            yield Finding(None, f"user {who} may write to {', '.join(writable)}; we only read, in a read-only transaction", grant)
        elif not read_only:
            yield Finding(None, f"user {who} may read and not write what the SELECT names; its transactions are not read-only by default",
                          f"ALTER ROLE {who} SET default_transaction_read_only = on")
        else:
            yield Finding(True, f"user {who} may read and not write what the SELECT names; needed is no more than: {grant}")

    def fail(self, error: Exception, where: str = "") -> NoReturn:
        """Raises SourceError with what the server said, without credentials, and without what may quote a row."""
        original = getattr(error, "orig", None) or error
        state = getattr(original, "sqlstate", None) or ""
        said = getattr(getattr(original, "diag", None), "message_primary", None) or str(original).strip()
        if state[:2] not in HARMLESS and state and not self._show_values:
            said = f"{type(original).__name__} (its text may hold values; see it with --show-values)"
        cure = ("Raise RETENTION_OPS_SOURCE_TIMEOUT_SECONDS, or give ordered_at and updated_at an index." if state == "57014"
                else "Check it with `retention-ops doctor`.")
        told = f"{where}Postgres{f' ({state})' if state else ''}: {redact(said, self._hidden)}"
        raise SourceError(f"{told}\nNothing was written. {cure}") from None


def _line(error: Exception, text: str) -> str:
    """`, line N` of the user's SELECT, where the server tells the place."""
    place = getattr(getattr(getattr(error, "orig", None), "diag", None), "statement_position", None)
    line = text[: int(place)].count("\n") if place else 0
    return f", line {line}" if line else ""


def _grants(who: str, database: str, tables: Sequence[str]) -> str:
    named = ", ".join(tables) or "the tables of the SELECT"
    schemas = ", ".join(sorted({table.rpartition(".")[0].rpartition(".")[2] or "public" for table in tables})) or "public"
    return (f"GRANT CONNECT ON DATABASE {database} TO {who}; GRANT USAGE ON SCHEMA {schemas} TO {who}; "
            f"GRANT SELECT ON {named} TO {who}; ALTER ROLE {who} SET default_transaction_read_only = on")
