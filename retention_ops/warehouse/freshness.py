"""Which stored dates no longer say what the orders and settings say now. Derived from what is stored, so it cannot go stale."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import date

from retention_ops.warehouse.seam import Warehouse
from retention_ops.warehouse.versions import OrdersVersion

KEPT_FOR_EVER = ("retention_daily", "alert_logic", "customer_priority")


@dataclass(frozen=True)
class Freshness:
    """Dates (oldest first) built from orders that changed since, and dates built under other rules."""

    stale: list[date]
    other_rules: list[date]


class Changes:
    """Answers whether the orders of a date changed after a version; reads the list of versions once."""

    def __init__(self, lake: Warehouse):
        self._versions = lake.orders_versions()
        self._position = {version.version: place for place, version in enumerate(self._versions)}

    def since(self, orders_version: str, day: date) -> bool:
        return bool(self.after(orders_version, day))

    def after(self, orders_version: str, day: date) -> list[OrdersVersion]:
        """Later versions whose changes reach back to D."""
        # a version that is gone from the list counts as older than all of them
        later = self._versions[self._position.get(orders_version, -1) + 1:]
        return [version for version in later if version.stale_from and version.stale_from <= day]


def freshness(lake: Warehouse) -> Freshness:
    """Compares each stored partition's provenance with the CURRENT orders and the settings in force."""
    changed = Changes(lake)
    rules = lake.settings.rules_sha256()
    stale, other_rules = set(), set()
    for day, made_from in lake.provenances(KEPT_FOR_EVER):
        if changed.since(made_from.get("orders_version", ""), day):
            stale.add(day)
        if made_from.get("rules_sha256") != rules:
            other_rules.add(day)
    return Freshness(sorted(stale), sorted(other_rules))


def stored_from(lake: Warehouse, first: date) -> list[date]:
    """Stored dates on or after `first`, over the tables that are kept for ever."""
    return sorted({day for table in KEPT_FOR_EVER for day in lake.days(table) if day >= first})
