"""Who must not be contacted, by what is known at this moment: refused consent and suppressions."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import date

from retention_ops.warehouse.dialect import parquet_scan
from retention_ops.warehouse.seam import Warehouse


@dataclass(frozen=True)
class NoContact:
    """Ids that must not be contacted for D, and the versions that say so ('' where nothing was ingested)."""

    refused: frozenset[str]
    suppressed: frozenset[str]
    customers_version: str
    suppressions_version: str


def no_contact(lake: Warehouse, day: date) -> NoContact:
    """Who, by what is known at this moment, must not be contacted for D: they refused consent or are suppressed beyond D.

    A list of D is worked from the day after, so a suppression whose last day is D has ended by then.
    """
    customers, suppressions = lake.customers(), lake.suppressions()
    with lake.connection() as connection:

        def ids(version, where: str, *values: object) -> frozenset[str]:
            if version is None:
                return frozenset()
            rows = connection.execute(f"SELECT customer_id FROM {parquet_scan(version.path)} WHERE {where}", list(values)).fetchall()
            return frozenset(row[0] for row in rows)

        return NoContact(
            refused=ids(customers, "consent = false"),
            suppressed=ids(suppressions, "until IS NULL OR until > ?", day),
            customers_version=customers.version if customers else "",
            suppressions_version=suppressions.version if suppressions else "",
        )
