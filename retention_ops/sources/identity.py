"""Customer ids as they are kept: an id that is an e-mail address becomes an opaque one before anything is written.

The opaque id is h_ and the first 32 hex digits of HMAC-SHA256(key, address in lower case), so the same person is the same customer in
orders, attributes and suppressions, today and next year, and nobody without the key can tell who it is or try addresses out. The key is
RETENTION_OPS_ID_KEY, from the environment only; versions record its fingerprint, which says only whether two keys are the same one.

Every door that takes a customer's id from a person (`explain`, `forget`, `export-person`, the MCP server) asks `held_as`.
"""

from __future__ import annotations

import hmac
import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

import duckdb

from retention_ops.errors import SettingsError
from retention_ops.settings import Secrets, Settings
from retention_ops.warehouse.dialect import literal, parquet_scan
from retention_ops.warehouse.versions import Version, current_customers, current_orders, current_suppressions

EMAIL = r"[^@\s]+@[^@\s]+\.[^@\s.]+"
_EMAIL = re.compile(EMAIL, re.ASCII)  # \s as DuckDB has it
# contains() first: a pattern over a million ids takes longer than all other checks of them
LOOKS_LIKE_ADDRESS = f"contains(customer_id, '@') AND regexp_full_match(customer_id, {literal(EMAIL)})"
"""SQL"""
_OPAQUE = re.compile(r"h_[0-9a-f]{32}")
KEY_CHARACTERS = 32
"""e-mail addresses can be guessed, so the key must not be"""
MAKE_A_KEY = (
    "Make a key once and keep it where you keep passwords: export RETENTION_OPS_ID_KEY=$(openssl rand -hex 32)\n"
    "Everything that works on this home needs the same one; without it nobody can be found again."
)


@dataclass(frozen=True)
class Identity:
    """How ids are kept in one installation. `key` is empty where the environment has none."""

    hashing: Literal["emails", "all", "off"]
    key: bytes = field(default=b"", repr=False)

    @property
    def fingerprint(self) -> str:
        """16 hex digits that tell two keys apart and nothing else; empty without a key."""
        return self._digest("fingerprint", "")[:16] if self.key else ""

    def hashes(self, given: str) -> bool:
        """Whether this id is not kept as it is. One of ours comes back unchanged: a list handed out here can be taken in again."""
        if self.hashing == "off" or _OPAQUE.fullmatch(given):
            return False
        return self.hashing == "all" or is_email(given)

    def kept(self, given: str) -> str:
        """The id as it is kept. Raises SettingsError where it takes a key and there is none."""
        if not self.hashes(given):
            return given
        # two spellings of one address are one person; any other id is taken letter by letter
        text = unicodedata.normalize("NFC", given).lower() if is_email(given) else given
        return f"h_{self._digest('customer', text)[:32]}"

    def mark(self, kept: str) -> str:
        """What a forgotten customer is recognised by: 64 hex digits that cannot be turned back without the key."""
        return self._digest("forgotten", kept)

    def _digest(self, purpose: str, text: str) -> str:
        if not self.key:
            raise SettingsError(f"RETENTION_OPS_ID_KEY is not set.\n{MAKE_A_KEY}")
        # customer ids must be reproducible in a shop's own SQL: no purpose in front of those
        message = text if purpose == "customer" else f"retention-ops {purpose}\n{text}"
        return hmac.digest(self.key, message.encode(errors="surrogatepass"), "sha256").hex()


def is_email(given: str) -> bool:
    """Whether an id looks like an e-mail address."""
    return "@" in given and _EMAIL.fullmatch(given) is not None


def identity_of(settings: Settings, secrets: Secrets | None = None) -> Identity:
    """What settings and environment say. Raises SettingsError for a key that could be guessed."""
    given = (secrets or Secrets()).id_key
    key = given.get_secret_value().strip() if given else ""
    if key and len(key) < KEY_CHARACTERS:
        raise SettingsError(f"RETENTION_OPS_ID_KEY has {len(key)} characters; at least {KEY_CHARACTERS} are needed.\n{MAKE_A_KEY}")
    return Identity(settings.hash_customer_ids, key.encode())


def versions_in_force(settings: Settings) -> list[Version]:
    """Orders, customers and suppressions in force, where there are any."""
    found = (current_orders(settings), current_customers(settings), current_suppressions(settings))
    return [version for version in found if version is not None]


def held_as(settings: Settings, given: str, secrets: Secrets | None = None) -> str:
    """The id under which a person is held here, from the id or address somebody names.

    What the data was made with decides, not what the setting says now. Raises SettingsError where that takes a key that is not at hand.
    """
    given = given.strip()
    hashed = next((version for version in versions_in_force(settings) if version.id_key), None)
    if hashed is None:
        return given
    identity = Identity(hashed.id_hashing, identity_of(settings, secrets).key)
    if identity.hashes(given):
        _refuse_other_key(identity, hashed)
    return identity.kept(given)


def refuse_change(con: duckdb.DuckDBPyConnection, settings: Settings, identity: Identity) -> None:
    """Raises SettingsError where ids of a new file would not meet those that are here already."""
    for version in versions_in_force(settings):
        if version.id_key:
            if identity.hashing != version.id_hashing:
                raise SettingsError(
                    f"customer ids here were hashed with RETENTION_OPS_HASH_CUSTOMER_IDS={version.id_hashing}, which is {identity.hashing} "
                    f"now: the same customer would come in as another one. Nothing was written.\nSet it back to {version.id_hashing}, or "
                    "begin a new home and ingest everything there.")
            if identity.key:
                _refuse_other_key(identity, version)
        elif identity.hashing == "all":
            raise SettingsError(
                "ids here are kept as they came, and RETENTION_OPS_HASH_CUSTOMER_IDS=all would make every known customer another one. "
                "Nothing was written.\nSet it to emails or off, or begin a new home and ingest everything there.")
        elif identity.hashing == "emails" and version.id_hashing == "off" and (known := _addresses(con, version)):
            raise SettingsError(
                f"{known:,} of the customer ids here are e-mail addresses, kept as they came; new ones would be hashed and not meet them. "
                "Nothing was written.\nSet RETENTION_OPS_HASH_CUSTOMER_IDS=off to go on as before, or, better, begin a new home with "
                f"--home and ingest everything there.\n{MAKE_A_KEY}")


def _refuse_other_key(identity: Identity, version: Version) -> None:
    if not identity.key:
        raise SettingsError(f"customer ids here were hashed, and RETENTION_OPS_ID_KEY is not set: set the key {version.id_key} again")
    if identity.fingerprint != version.id_key:
        raise SettingsError(
            f"RETENTION_OPS_ID_KEY is another key (fingerprint {identity.fingerprint}) than the one customer ids here were hashed with "
            f"({version.id_key}): the same customer would be another one. Nothing was written.\nSet the old key again, or begin a new home "
            "and ingest everything there.")


def _addresses(con: duckdb.DuckDBPyConnection, version: Version) -> int:
    return con.execute(
        f"SELECT count(DISTINCT customer_id) FROM {parquet_scan(version.path)} "
        f"WHERE {LOOKS_LIKE_ADDRESS}"
    ).fetchone()[0]


def as_kept(identity: Identity, ids: Iterable[str], forgotten: frozenset[str]) -> tuple[list[tuple[str, str, bool]], int]:
    """(given, kept, was forgotten) of the ids that change or must stay out, and how many are hashed."""
    changed, hashed = [], 0
    for given in ids:
        kept = identity.kept(given)
        hashed += kept != given
        out = bool(forgotten) and identity.mark(kept) in forgotten
        if out or kept != given:
            changed.append((given, kept, out))
    return changed, hashed
