"""One measured task on a shop that stands ready: `python -m retention_ops_tests.bench.tasks TASK HOME MEMORY_LIMIT`.

Prints JSON: wall_s and cpu_s of the work (imports, opening the lake and loading are outside, what the task itself reads and
writes is inside), peak_mb of the whole process, `times` (how often the work would be done; a task that does one date of
many is scaled by the caller) and what was found.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date, timedelta
from pathlib import Path
from typing import Any

from retention_ops.detect import quality
from retention_ops.detect.compute import PRIORITY_ORDER, Workspace, queue_of_range, workspace
from retention_ops.settings import Settings
from retention_ops.warehouse.catalog import RELATIONS
from retention_ops.warehouse.dialect import no_rows
from retention_ops.warehouse.lake import Lake
from retention_ops.warehouse.render import Query, fast_query, query, stacked
from retention_ops_tests.bench.rivals import peak_mb

LAST = date(2025, 12, 31)
"""the shop's last day; every range ends here"""
SAMPLED_DATES = 8
READABLE = ("base_customers", "retention_snapshot", "churn_detection", "customer_priority")
EXPORT = "by_date.parquet"
"""beside the home: the same orders as a shop's export has them, in order of time; ingestion sorts them by customer"""


@dataclass
class Shop:
    """An open workspace, and the settings' values for whatever a query asks for."""

    space: Workspace

    def known(self, rule: Query, **dates: date) -> dict[str, Any]:
        values = {**self.space.settings.rule_parameters(), "complete_through": LAST, **dates}
        return {name: values[name] for name in rule.parameters}

    def run(self, sql: str, values: dict[str, Any] | None = None) -> list[tuple]:
        return self.space.connection.execute(sql, values).fetchall()

    def nothing_learned(self) -> None:
        """There are no return_rates."""
        self.run(f"CREATE TEMP VIEW return_rates AS {no_rows(RELATIONS['return_rates'])}")

    def write(self, table: str, day: date, **options: str) -> None:
        """Stores a partition as the pipeline does, but under a date nobody asks for."""
        self.space.lake.write(self.space.connection, table, day.replace(year=1999), self.space.provenance, **options)


def days(count: int) -> list[date]:
    return [LAST - timedelta(back) for back in reversed(range(count))]


def sampled(count: int) -> list[date]:
    """SAMPLED_DATES of the last `count`, evenly spread."""
    every = days(count)
    return [every[(2 * number + 1) * count // (2 * SAMPLED_DATES)] for number in range(SAMPLED_DATES)]


def export(shop: Shop) -> str:
    return f"'{shop.space.settings.home.parent / EXPORT}'"


def floor(relation: Callable[[Shop], str]) -> Callable[[Shop], dict]:
    """Each customer's first and last date, count and sum: nobody can know who is late and do less."""
    def work(shop: Shop) -> dict:
        shop.run(f"""
            CREATE TEMP TABLE floor AS SELECT customer_id, MIN(order_date), MAX(order_date), COUNT(*), SUM(order_cents)
            FROM {relation(shop)} GROUP BY customer_id""")
        return {"customers": shop.run("SELECT COUNT(*) FROM floor")[0][0]}

    return work


def derive(shop: Shop) -> dict:
    """customer_days: once per version of the orders."""
    shop.space.run(query("customer_days"))
    shop.write("customer_days", LAST)
    return {"rows": shop.run("SELECT COUNT(*) FROM customer_days")[0][0]}


def one_day(shop: Shop) -> dict:
    """Facts, status and churn risk of every customer in one statement, and the queue out of them; both stored."""
    rule = stacked(fast_query("base_customers"), query("retention_snapshot"), query("churn_detection"))
    shop.space.run(rule, reference_date=LAST, from_date=LAST, to_date=LAST)
    shop.space.build_rates(LAST, LAST)
    shop.space.run(query("customer_priority"), reference_date=LAST, from_date=LAST, to_date=LAST)
    shop.write("churn_detection", LAST)
    shop.write("customer_priority", LAST, order_by=PRIORITY_ORDER)
    tiers = dict(shop.run("SELECT priority_tier, COUNT(*) FROM customer_priority GROUP BY 1 ORDER BY 1"))
    points = shop.run("SELECT SUM(priority_score) FROM customer_priority")[0][0]
    return {"customers": shop.run("SELECT COUNT(*) FROM churn_detection")[0][0], **tiers, "points": points}


def one_day_in_four(shop: Shop) -> dict:
    """The same day as the four assets do it: each table on its own, checked and stored."""
    for table in READABLE:
        shop.space.build(table, LAST)
        quality.check(shop.space.connection, table, shop.space.settings)
        shop.write(table, LAST, **({"order_by": PRIORITY_ORDER} if table == "customer_priority" else {}))
    return {}


def alerts(count: int) -> Callable[[Shop], dict]:
    def work(shop: Shop) -> dict:
        shop.space.build_range("alert_logic", days(count)[0], LAST)
        return {"days": shop.run("SELECT COUNT(DISTINCT alert_date) FROM alert_logic")[0][0]}

    return work


def alerts_per_date(shop: Shop) -> dict:
    """A day's status counts by one query over the export: each date and each day of its baseline asked alone."""
    for day in sampled(365):
        shop.run(f"""
            SELECT COUNT(*), COUNT(*) FILTER (last >= $day - 30), COUNT(*) FILTER (last < $day - 90)
            FROM (SELECT MAX(order_date) AS last FROM {export(shop)} WHERE order_date <= $day GROUP BY customer_id)""", {"day": day})
    return {}


def intervals(count: int) -> Callable[[Shop], dict]:
    def work(shop: Shop) -> dict:
        shop.space.build_intervals(days(count)[0], LAST)
        return {"intervals": shop.run("SELECT COUNT(*) FROM priority_intervals")[0][0]}

    return work


def scores(shop: Shop) -> dict:
    """Who is in which tier with which score on each of 365 days, one row each; neither depends on what is at stake."""
    shop.nothing_learned()
    first = days(365)[0]
    shop.space.build_intervals(first, LAST)
    rule = queue_of_range()
    shop.run(f"CREATE TEMP TABLE scores AS SELECT run_date, customer_id, priority_tier, priority_score FROM ({rule.unordered_sql})",
             shop.known(rule, from_date=first, to_date=LAST))
    return {"rows": shop.run("SELECT COUNT(*) FROM scores")[0][0]}


def scores_per_date(shop: Shop) -> dict:
    """The same by the readable rules, a query per date."""
    shop.nothing_learned()
    rule = stacked(*(query(table) for table in READABLE))
    for day in sampled(365):
        shop.run(f"CREATE OR REPLACE TEMP TABLE scores AS SELECT run_date, customer_id, priority_tier, priority_score "
                 f"FROM ({rule.unordered_sql})", shop.known(rule, reference_date=day, from_date=day, to_date=day))
    return {}


def queue(shop: Shop) -> dict:
    """customer_priority whole, all columns, checked and stored as 365 partitions."""
    rows = 0
    for batch in shop.space.queue_batches(days(365)):
        shop.space.build_range("customer_priority", batch[0], batch[-1])
        quality.check_days(shop.space.connection, "customer_priority", shop.space.settings)
        for day in batch:
            shop.write("customer_priority", day, order_by=PRIORITY_ORDER, where=f"run_date = DATE '{day}'")
        rows += shop.run("SELECT COUNT(*) FROM customer_priority")[0][0]
    return {"rows": rows}


def queue_per_date(shop: Shop) -> dict:
    """The same partitions by the readable rules, a query per date."""
    rule = stacked(*(query(table) for table in READABLE))
    for day in sampled(365):
        shop.space.build_rates(day, day)
        shop.space.run(rule, reference_date=day, from_date=day, to_date=day)
        quality.check(shop.space.connection, "customer_priority", shop.space.settings)
        shop.write("customer_priority", day, order_by=PRIORITY_ORDER)
    return {}


TASKS: dict[str, tuple[Callable[[Shop], dict], float]] = {
    "floor": (floor(export), 1),
    "floor_by_customer": (floor(lambda shop: "orders"), 1),
    "derive": (derive, 1),
    "one_day": (one_day, 1),
    "one_day_in_four": (one_day_in_four, 1),
    "alerts_1": (alerts(1), 1),
    "alerts_30": (alerts(30), 1),
    "alerts_365": (alerts(365), 1),
    "alerts_1000": (alerts(1000), 1),
    "alerts_365_per_date": (alerts_per_date, (365 + 7) / SAMPLED_DATES),
    "intervals_1": (intervals(1), 1),
    "intervals_30": (intervals(30), 1),
    "intervals_365": (intervals(365), 1),
    "intervals_1000": (intervals(1000), 1),
    "scores_365": (scores, 1),
    "scores_365_per_date": (scores_per_date, 365 / SAMPLED_DATES),
    "queue_365": (queue, 1),
    "queue_365_per_date": (queue_per_date, 365 / SAMPLED_DATES),
}
"""name -> (the work, how often it would have to be done)"""


def main() -> None:
    task, home, limit = sys.argv[1:]
    work, times = TASKS[task]
    lake = Lake(Settings(_env_file=None, home=Path(home), duckdb_memory_limit=limit))
    with workspace(lake) as space:
        wall, cpu = time.perf_counter(), time.process_time()
        found = work(Shop(space))
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    print(json.dumps({"wall_s": wall * times, "cpu_s": cpu * times, "peak_mb": peak_mb(), "found": found}))


if __name__ == "__main__":
    main()
