"""The errors a user can meet, in one small hierarchy.

Every message says what is wrong, where, and what to do about it. The command line prints the message and
exits with `exit_code`; anything that is not a RetentionOpsError is a bug and keeps its traceback.
"""

from __future__ import annotations


class RetentionOpsError(Exception):
    """Base of all expected failures."""

    exit_code = 1


class SettingsError(RetentionOpsError):
    """A setting is missing or cannot be used."""


class UsageError(RetentionOpsError):
    """The command was called in a way that cannot work."""

    exit_code = 2


class InputRefused(RetentionOpsError):
    """A file was refused whole; nothing was written."""


class SourceError(RetentionOpsError):
    """The source of the orders cannot be reached, or it refused the SELECT; nothing was written."""


class NewerSchema(RetentionOpsError):
    """Stored state was written by a newer release than this one; nothing is read from it or written to it."""


class NoOrders(RetentionOpsError):
    """Nothing was ingested yet, so there is nothing to compute."""


class QualityError(RetentionOpsError):
    """A computed table broke one of its own rules; the old partition stays."""


class WarehouseError(RetentionOpsError):
    """The warehouse refused a statement, stayed unreachable or would cost more than allowed; names the query and the job."""


class PackError(RetentionOpsError):
    """An Action Pack is missing, incomplete or names another result than the one at hand."""


class LogError(RetentionOpsError):
    """The audit log could not be written or its hash chain is broken."""


class LedgerError(RetentionOpsError):
    """An action, incident or approval is not in a state that allows what was asked."""
