"""One day's list as people write it with pandas, polars and lifetimes: `python rivals.py TASK ORDERS.parquet DAY OUT.parquet`.

Runs in an environment without this project. pandas and polars find the same customers, signals and scores as the rules (the
caller compares), without the sentences of reason and action; lifetimes gives only recency, frequency, age and mean value.
Prints JSON: seconds, megabytes and what was found.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

Found = dict[str, float]


def pandas_one_day(orders: str, day: date, out: str) -> Callable[[], Found]:
    import numpy as np
    import pandas as pd

    def work() -> Found:
        facts = pd.read_parquet(orders, columns=["order_id", "customer_id", "order_date", "order_cents"])
        facts["order_date"] = pd.to_datetime(facts["order_date"])
        facts = facts[facts["order_date"] <= pd.Timestamp(day)]
        by_customer = facts.groupby("customer_id", sort=False)
        c = by_customer.agg(
            first=("order_date", "min"), last=("order_date", "max"), orders=("order_id", "size"), cents=("order_cents", "sum"),
        )
        c["days"] = facts.drop_duplicates(["customer_id", "order_date"]).groupby("customer_id", sort=False).size()
        on_last = facts[facts["order_date"] == facts["customer_id"].map(c["last"])].sort_values("order_id")
        c["last_cents"] = on_last.drop_duplicates("customer_id", keep="last").set_index("customer_id")["order_cents"]
        silent, span, gaps = (pd.Timestamp(day) - c["last"]).dt.days, (c["last"] - c["first"]).dt.days, c["days"] - 1
        late = (gaps > 0) & (100 * silent * gaps > 150 * span)
        less = 100 * c["last_cents"] * c["orders"] < 60 * c["cents"]
        unsettled = (silent <= 30) & ((c["orders"] <= 3) | ((gaps > 0) & (100 * silent * gaps > 70 * span)))
        c["score"] = 50 * late + 30 * less + 20 * unsettled
        high, medium = c["score"] >= 51, c["score"] >= 21
        c["silent"], c["late"], c["less"], c["unsettled"] = silent, late, less, unsettled
        c["tier"] = np.select(
            [(silent <= 30) & high, silent.between(31, 90) & medium, silent.between(91, 180) & high], [1, 2, 3], default=0)
        urgency = np.select([c["tier"] == 1, c["tier"] == 2], [10 * silent / 30, 10 * (silent - 30) / 60], 10 * (silent - 90) / 90)
        value = np.minimum(20.0, 2 * np.log(1 + c["cents"] / 100))
        c["priority"] = np.where(c["tier"] > 0, np.minimum(100.0, 90 - 20 * c["tier"] + value + urgency).round(4), np.nan)
        c["average"] = ((2 * c["cents"] + c["orders"]) // (2 * c["orders"])) / 100
        c["usual_gap"] = span / gaps.where(gaps > 0)
        c.reset_index().to_parquet(out, compression="zstd")
        return {"customers": len(c), **{f"P{n}": int((c["tier"] == n).sum()) for n in (1, 2, 3)}, "points": float(c["priority"].sum())}

    return work


def polars_one_day(orders: str, day: date, out: str) -> Callable[[], Found]:
    import polars as pl

    def work() -> Found:
        silent, gaps, span = pl.col("silent"), pl.col("days") - 1, pl.col("span")
        visits = (
            pl.scan_parquet(orders).filter(pl.col("order_date") <= day).group_by("customer_id", "order_date").agg(
                orders=pl.len().cast(pl.Int64), cents=pl.col("order_cents").sum(),
                last_cents=pl.col("order_cents").sort_by("order_id").last(),
            )
        )
        c = visits.group_by("customer_id").agg(
            first=pl.col("order_date").min(), last=pl.col("order_date").max(), orders=pl.col("orders").sum(), cents=pl.col("cents").sum(),
            days=pl.len().cast(pl.Int64), last_cents=pl.col("last_cents").get(pl.col("order_date").arg_max()),
        ).with_columns(
            silent=(pl.lit(day) - pl.col("last")).dt.total_days(), span=(pl.col("last") - pl.col("first")).dt.total_days(),
        ).with_columns(
            late=(gaps > 0) & (100 * silent * gaps > 150 * span),
            less=100 * pl.col("last_cents") * pl.col("orders") < 60 * pl.col("cents"),
            unsettled=(silent <= 30) & ((pl.col("orders") <= 3) | ((gaps > 0) & (100 * silent * gaps > 70 * span))),
            average=((2 * pl.col("cents") + pl.col("orders")) // (2 * pl.col("orders"))) / 100,
            usual_gap=pl.when(gaps > 0).then(span / gaps),
        ).with_columns(score=50 * pl.col("late") + 30 * pl.col("less") + 20 * pl.col("unsettled")).with_columns(
            tier=pl.when((silent <= 30) & (pl.col("score") >= 51)).then(1)
            .when(silent.is_between(31, 90) & (pl.col("score") >= 21)).then(2)
            .when(silent.is_between(91, 180) & (pl.col("score") >= 51)).then(3).otherwise(0),
        ).with_columns(
            urgency=pl.when(pl.col("tier") == 1).then(10 * silent / 30).when(pl.col("tier") == 2).then(10 * (silent - 30) / 60)
            .otherwise(10 * (silent - 90) / 90),
            value=pl.min_horizontal(20.0, 2 * (1 + pl.col("cents") / 100).log()),
        ).with_columns(
            priority=pl.when(pl.col("tier") > 0).then(
                pl.min_horizontal(100.0, 90 - 20 * pl.col("tier") + pl.col("value") + pl.col("urgency")).round(4)),
        ).collect(engine="streaming")
        c.write_parquet(out, compression="zstd")
        return {"customers": len(c), **{f"P{n}": int((c["tier"] == n).sum()) for n in (1, 2, 3)}, "points": float(c["priority"].sum())}

    return work


def lifetimes_summary(orders: str, day: date, out: str) -> Callable[[], Found]:
    import pandas as pd
    from lifetimes.utils import summary_data_from_transaction_data

    def work() -> Found:
        facts = pd.read_parquet(orders, columns=["customer_id", "order_date", "order_cents"])
        facts["order_date"] = pd.to_datetime(facts["order_date"])
        summary = summary_data_from_transaction_data(
            facts, "customer_id", "order_date", monetary_value_col="order_cents", observation_period_end=day)
        summary.to_parquet(out, compression="zstd")
        return {"customers": len(summary)}

    return work


TASKS = {f.__name__: f for f in (pandas_one_day, polars_one_day, lifetimes_summary)}


def peak_mb() -> float:
    """The most memory this process ever held; ru_maxrss would also count the process it was forked from."""
    status = Path("/proc/self/status")
    if not status.exists():  # not on Linux
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return int(next(line for line in status.read_text().splitlines() if line.startswith("VmHWM")).split()[1]) / 1024


def main() -> None:
    task, orders, day, out = sys.argv[1:]
    work = TASKS[task](orders, date.fromisoformat(day), out)
    wall, cpu = time.perf_counter(), time.process_time()
    found = work()
    print(json.dumps({
        "wall_s": time.perf_counter() - wall, "cpu_s": time.process_time() - cpu,
        "peak_mb": peak_mb(), "found": found,
    }))


if __name__ == "__main__":
    main()
