"""Small shops that stand on every line the rules draw, and both engines' answers about them.

Used by the tier that compares GoogleSQL's reference implementation, DuckDB and the naive oracle, and by the mutations.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import date, timedelta
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd

from retention_ops.detect.closures import CalendarDay
from retention_ops.detect.compute import BASELINE_DAYS, RETURN_DAYS, priority_order, queue_of_range, workspace
from retention_ops.settings import load_settings
from retention_ops.warehouse.catalog import RELATIONS, TABLES
from retention_ops.warehouse.dialect import no_rows
from retention_ops.warehouse.lake import Lake
from retention_ops.warehouse.render import Query, fast_query, query
from retention_ops_tests import oracle
from retention_ops_tests.oracle_returns import Returns
from retention_ops_tests.shops import lake_with, orders_frame, seasonal_shop, shop_with_at_risk_counts, with_refunds
from retention_ops_tests.warehouse.google_sql import Statement, engine, type_of

LEAP_DAY = date(2024, 2, 29)
PER_CUSTOMER = ("base_customers", "retention_snapshot", "churn_detection", "customer_priority")
RANGES = ("retention_daily", "alert_logic")
CATALOG = {table.name: {column.name: column.type for column in table.columns} for table in RELATIONS.values()}


@dataclass(frozen=True)
class Case:
    """Orders in a lake, and the days asked about; every result is compared on each of them."""

    name: str
    orders: pd.DataFrame
    lake: Lake
    days: tuple[date, ...]
    customers: pd.DataFrame | None = None
    tables: tuple[str, ...] = (*PER_CUSTOMER, *RANGES)
    scores: bool = False
    """only other scores; DuckDB is asked about it each time, the reference implementation, at ten times the cost, by `make test-all`"""

    learns: bool = False
    """return_rates are learned from its orders, which costs the reference implementation seconds; else there are none yet"""

    @property
    def complete_through(self) -> date:
        return self.lake.orders().complete_through

    @cached_property
    def returns(self) -> Returns:
        return Returns(self.orders if self.learns else self.orders.head(0), self.lake.settings)


def _visits(customer: str, days: int, gaps: Sequence[int], cents: Sequence[int] | int) -> list[tuple[str, date, int]]:
    """Shopping days `gaps` apart, the last one `days` before the leap day; cents from the latest visit back."""
    back = [days]
    for gap in gaps:
        back.append(back[-1] + gap)
    amounts = [cents] * len(back) if isinstance(cents, int) else list(cents)
    return [(customer, LEAP_DAY - timedelta(ago), amount) for ago, amount in zip(back, amounts, strict=True)]


def customers_on_lines() -> pd.DataFrame:
    """Single orders, ties, month ends and customers exactly on, just below and just above each line."""
    rows: list[tuple] = []
    for days in (0, 1, 30, 31, 60, 90, 91, 180, 181, 400):
        rows += _visits(f"single{days}", days, [], 1000)
    for days in (14, 15, 16):  # 1.5 x the usual gap of 10
        rows += _visits(f"gap{days}", days, [10, 10, 10, 10], 5000)
    for days in (6, 7, 8):  # 0.7 x the usual gap of 10
        rows += _visits(f"unsettled{days}", days, [10, 10, 10, 10], 5000)
    for last in (299, 300, 301):  # 0.6 x the average of 300 and 700
        rows += _visits(f"value{last}", 20, [9], [last, 700])
        rows += _visits(f"quiet{last}", 45, [9], [last, 700])
    for orders in (2, 3, 4, 5):  # few_orders is 3
        rows += _visits(f"few{orders}", 4, [12] * (orders - 1), 2500)
    for total in (99_999, 100_000, 100_001, 200_000, 200_001):  # revenue bands, late and unsettled: P1
        rows += _visits(f"band{total}", 8, [2, 2, 2], [total - 3, 1, 1, 1])
    for days in (89, 90, 91, 180, 181):  # HIGH by rhythm and value: P2 and P3 windows
        rows += _visits(f"gone{days}", days, [5, 5], [100, 900, 900])
    for silence in (30, 31, 90, 91, 180, 181):  # came back on the day itself, after a silence of exactly that
        rows += _visits(f"back{silence}", 0, [silence], 1500)
    for days, gap in ((16, 10), (40, 26)):  # late on the leap day, back the day after: in a tier for one day
        rows += [*_visits(f"once{days}", days, [gap] * 4, 5000), (f"once{days}", LEAP_DAY + timedelta(1), 5000)]
    for days, gap in ((45, 40), (95, 100)):  # spends less, but is not late by a slow rhythm
        rows += _visits(f"slow{days}", days, [gap], [100, 900])
    rows += _visits("daily", 3, [1, 1, 1, 1], 1200)  # usually every day
    rows += _visits("yesterday", 1, [4, 4, 4], [100, 900, 900, 900])
    for gap in ((2, 3), (1, 2), (3, 3)):  # usual gaps of 2.5, 1.5 and 3 days
        rows += _visits(f"half{gap[0]}{gap[1]}", 40, gap, [100, 333, 333])
    for number, cents in enumerate((100, 400, 250)):  # one day, several invoices: the last by id decides
        rows.append(("oneday", LEAP_DAY - timedelta(33), cents, f"z{number}"))
    rows += [("tie1", LEAP_DAY - timedelta(35), 500, "t2"), ("tie1", LEAP_DAY - timedelta(40), 900, "t1"),
             ("tie2", LEAP_DAY - timedelta(35), 500, "t4"), ("tie2", LEAP_DAY - timedelta(40), 900, "t3")]
    for month_end in (date(2023, 12, 31), date(2024, 1, 31), LEAP_DAY):
        rows.append(("monthend", month_end, 800))
    rows.append(("tomorrow", LEAP_DAY + timedelta(1), 999))  # nobody knows of it yet on the leap day
    rows += [("gap15", LEAP_DAY + timedelta(5), 100), ("median", LEAP_DAY - timedelta(2), 100)]
    return orders_frame(rows)


def refunds_on_lines() -> pd.DataFrame:
    """Customers whom a refund puts on a line or moves over it: on the leap day, the day before and after, of each kind of order."""
    rows: list[tuple] = []
    refunds: dict[str, list[tuple[date, int]]] = {}
    yesterday, tomorrow = LEAP_DAY - timedelta(1), LEAP_DAY + timedelta(1)

    def customer(name: str, days: int, gaps: Sequence[int], cents: Sequence[int], *back: tuple[int, date, int]) -> None:
        """`back`: (which visit, 0 the latest, refund_date, cents)"""
        for place, (who, day, amount) in enumerate(_visits(name, days, gaps, cents)):
            rows.append((who, day, amount, f"{name}-{place}"))
        for place, day, amount in back:
            refunds.setdefault(f"{name}-{place}", []).append((day, amount))

    for day in (LEAP_DAY, tomorrow):
        for cents in (99, 100, 101):  # the latest order falls to 60 % of the average, or a cent to either side
            for silence in (20, 45):
                customer(f"last{cents}-{silence}-{day.day}", silence, [9], [400, 700], (0, day, cents))
                # an older one makes the latest no longer small: the average falls
                customer(f"older{cents}-{silence}-{day.day}", silence, [9], [300, 800], (1, day, cents))
        customer(f"parts{day.day}", 20, [9], [400, 700], (0, yesterday, 50), (0, day, 50))
        customer(f"whole{day.day}", 40, [], [500], (0, day, 500))  # worth nothing, and still a visit
        customer(f"all{day.day}", 50, [9, 9], [500, 600, 700], *((place, day, 500 + 100 * place) for place in range(3)))
        customer(f"late{day.day}", 32, [2, 2], [900, 900, 900], (0, day, 899))  # nearly nothing left of the latest
        for band in (100_000, 200_000):
            for more in (-1, 0, 1):
                customer(f"band{band}{more}-{day.day}", 8, [2, 2, 2], [band + 697, 1, 1, 1], (0, day, 700 - more))
    customer("sameday", 20, [9], [400, 700], (0, LEAP_DAY - timedelta(20), 101))
    customer("back", -1, [21, 9], [500, 400, 700], (1, tomorrow, 101), (1, yesterday, 1))  # refunded on the day of the next order
    customer("before", -1, [21, 9], [500, 400, 700], (1, LEAP_DAY, 101))  # and on the day before it
    customer("long", 181, [5], [400, 700], (0, LEAP_DAY, 101))
    for name, number in (("first", 0), ("second", 1)):  # of a day's orders the last by id is the latest
        rows += [(name, LEAP_DAY - timedelta(33), 500, f"{name}-a"), (name, LEAP_DAY - timedelta(33), 500, f"{name}-b"),
                 (name, LEAP_DAY - timedelta(40), 500, f"{name}-c")]
        refunds[f"{name}-{'ab'[number]}"] = [(LEAP_DAY, 400)]
    return with_refunds(orders_frame(rows), refunds)


def attributes() -> pd.DataFrame:
    """Attributes of some customers, with gaps."""
    return pd.DataFrame({
        "customer_id": ["single30", "gap15", "nobody"], "country": ["FR", "", "DE"], "segment": ["", "new", "old"],
        "loyalty_tier": ["gold", "", ""], "acquisition_channel": ["", "ads", "mail"],
        "signup_date": ["2024-02-29", "", "2024-01-01"], "consent": ["true", "", "false"],
    })


def _known(given: pd.DataFrame) -> pd.DataFrame:
    """The attributes as the oracle takes them: nulls where a cell is empty."""
    known = given.replace("", None)
    known["signup_date"] = [value and date.fromisoformat(value) for value in known["signup_date"]]
    return known


def cases(folder: Path) -> Iterator[Case]:
    """Every shop of this tier, each in a lake of its own."""
    lines, given = customers_on_lines(), attributes()
    days = (LEAP_DAY, LEAP_DAY + timedelta(1), date(2024, 1, 31), date(2023, 12, 31))
    yield Case("customers on every line", lines, lake_with(lines, folder / "lines", customers=given), days, _known(given))
    refunded = refunds_on_lines()
    yield Case("refunds on every line", refunded, lake_with(refunded, folder / "refunds"),
               (LEAP_DAY, LEAP_DAY + timedelta(1)), tables=PER_CUSTOMER)
    other = {"medium_risk_score": 30, "high_risk_score": 50, "few_orders": 1, "profile": "fast_fashion", "value_proxy_pct": 15}
    yield Case("levels a score hits exactly", lines, lake_with(lines, folder / "other", **other), days[:2])
    for place, (medium, high) in enumerate(((20, 30), (50, 70), (50, 80))):  # sums of one, two and three signals
        exact = {"medium_risk_score": medium, "high_risk_score": high}
        yield Case(f"levels {medium} and {high}", lines, lake_with(lines, folder / f"levels{place}", **exact), days[:2], scores=True)
    for place, (name, exact) in enumerate((  # 50 points are HIGH: which signals are just enough, and which comes first
        ("late or unsettled is P1, late comes first", {"inconsistent_score": 50, "inconsistent_gap_pct": 200}),
        ("only late is P1, unsettled comes later", {"inconsistent_gap_pct": 200}),
        ("only unsettled is P1", {"inconsistent_score": 50, "frequency_drop_score": 40}),
    )):
        yield Case(name, lines, lake_with(lines, folder / f"first{place}", high_risk_score=50, **exact), days[:2], scores=True)
    alone = {"inconsistent_score": 60, "min_sample": 0, "p1_min_revenue": "median"}
    yield Case("unsettled alone is P1", lines, lake_with(lines, folder / "alone", **alone), days[:1])
    newcomers = {"inconsistent_score": 60, "few_orders": 1}
    yield Case("one order is enough for P1", lines, lake_with(lines, folder / "newcomers", **newcomers), days[:1])
    three = orders_frame([*_visits("poor", 5, [], 50), *_visits("middle", 8, [2, 2, 2], 100), *_visits("rich", 5, [], 90_000)])
    yield Case("P1 with exactly the median revenue", three, lake_with(three, folder / "three", p1_min_revenue="median"), days[:1])
    stake = {"membership": "at_stake", "rank_by": "spend_at_stake"}
    yield Case("who has most at stake", lines, lake_with(lines, folder / "stake", **stake), days[:2], learns=True)
    sized = {"at_stake_size": 12, "profile": "fast_fashion", **stake}
    yield Case("the twelve who have most at stake", lines, lake_with(lines, folder / "twelve", **sized), days[:1], learns=True)
    seasons, latest = seasonal_shop(customers=10), date(2025, 7, 20)
    yield Case("a season is known", seasons, lake_with(seasons, folder / "seasons", rank_by="spend_at_stake"),
               (latest - timedelta(150), latest), tables=PER_CUSTOMER, learns=True)
    end = date(2024, 6, 30)
    for place, (name, counts, customers, more) in enumerate((
        ("an increase of exactly 15 %", [20] * 7 + [23], 137, {}),
        ("an increase of exactly 25 %", [20] * 7 + [25], 137, {}),
        ("just below 15 %", [40] * 7 + [45], 150, {}),
        ("just below 25 %", [40] * 7 + [49], 150, {}),
        ("a sample of exactly min_sample", [20] * 7 + [30], 100, {}),
        ("a sample below min_sample", [20] * 7 + [30], 99, {}),
        ("nobody AT_RISK before", [0] * 7 + [30], 120, {}),
        ("history of exactly 97 days, and of 96", [20] * 7 + [30, 31], 120, {"history": 97 + 1}),
    )):
        orders = shop_with_at_risk_counts(counts, customers, end, **more)
        asked = tuple(end - timedelta(back) for back in range(len(counts) - BASELINE_DAYS + 1))
        yield Case(name, orders, lake_with(orders, folder / f"alert{place}", end), asked, tables=RANGES)
    orders = shop_with_at_risk_counts([20] * 7 + [30, 31, 32], 120, end)
    yield Case("orders complete a day before the last", orders, lake_with(orders, folder / "late", end - timedelta(1)),
               (end - timedelta(1), end), tables=RANGES)


def analyzed(rule: Query) -> Statement:
    """What GoogleSQL's analyzer says of a rule over the declared catalog. Raises its error where the rule is not GoogleSQL."""
    dates = dict.fromkeys(("complete_through", "reference_date", "from_date", "to_date"), LEAP_DAY)
    known = {**load_settings().rule_parameters(), **dates}
    return engine().analyze(rule.google_sql, CATALOG, {name: type_of(known[name]) for name in rule.parameters})


# -- what each engine says ----------------------------------------------------------------------------------------------

Answers = dict[tuple[str, date | None], pd.DataFrame]
"""(table, day) -> rows by the readable rule, and ("fast/table", day) -> rows by sql/fast"""
Run = Callable[..., pd.DataFrame]
"""run(rule, **dates): a rule's rows, which later rules read under its table's name"""
Keep = Callable[[str, Sequence[date]], None]
"""keep(table, days): leaves only the rows of these reference dates in it"""


def _answers(case: Case, run: Run, keep: Keep) -> Answers:
    """Every rule on every day of a case; the fast ones once, for the range from the first day to the last."""
    found: Answers = {("customer_days", None): run(query("customer_days"))}
    first, last = min(case.days), max(case.days)
    if case.learns:
        # only of the days that are asked about: a row for each day between and cell is too much for the reference implementation
        run(query("return_days"), from_date=first, to_date=last)
        keep("return_days", case.days)
        looked = {"from_date": first - timedelta(RETURN_DAYS[0]), "to_date": last - timedelta(RETURN_DAYS[1])}
        found["fast/return_windows", None] = run(fast_query("return_windows"), **looked)
        found["return_windows", None] = run(query("return_windows"), **looked)
        found["return_rates", None] = run(query("return_rates"), from_date=first, to_date=last)
    for day in case.days:
        for table in case.tables:
            if table == "alert_logic":
                run(query("retention_daily"), from_date=day - timedelta(BASELINE_DAYS), to_date=day)
            found[table, day] = run(query(table), reference_date=day, from_date=day, to_date=day)
        if "base_customers" in case.tables:
            found["fast/base_customers", day] = run(fast_query("base_customers"), reference_date=day)
    found["cohort_retention_evolution", None] = run(query("cohort_retention_evolution"))
    ranges = [fast_query("retention_daily")]
    if "customer_priority" in case.tables and case.lake.settings.p1_min_revenue != "median":
        found["fast/priority_intervals", None] = run(fast_query("priority_intervals"), from_date=first, to_date=last)
        ranges.append(queue_of_range())
    for rule in ranges:
        rows = run(rule, from_date=first, to_date=last)
        for day in case.days:
            of_day = [oracle.plain(value) == day for value in rows[TABLES[rule.table].date_column]]
            found[f"fast/{rule.table}", day] = rows[of_day].reset_index(drop=True)
    return found


def by_duckdb(case: Case) -> Answers:
    """From the renderings on DuckDB."""
    with workspace(case.lake) as space:
        # here alert_logic is its first rule only; second_rule.py is about the other
        for table in ("returning_customers", "return_rates"):
            space.connection.execute(f"CREATE TEMP VIEW {table} AS {no_rows(RELATIONS[table])}")

        def run(rule: Query, **dates: date) -> pd.DataFrame:
            space.run(rule, **dates)
            columns = ", ".join(RELATIONS[rule.table].column_names)
            return space.connection.sql(f"SELECT {columns} FROM {rule.table} ORDER BY {', '.join(_order(case, rule.table))}").df()

        def keep(table: str, days: Sequence[date]) -> None:
            space.connection.execute(f"DELETE FROM {table} WHERE NOT list_contains($days, as_of_date)", {"days": list(days)})

        return _answers(case, run, keep)


def by_google_sql(case: Case) -> Answers:
    """From the files as they are written, executed by GoogleSQL's reference implementation, each on its own results."""
    reference = Reference(case)
    return _answers(case, reference.run, reference.keep)


def _order(case: Case, table: str) -> list[str]:
    if table == "customer_priority":
        return ["run_date", priority_order(case.lake.settings)]
    declared = RELATIONS[table]
    return list(dict.fromkeys(filter(None, [declared.date_column, *declared.key])))


class Reference:
    """One case's tables inside the reference implementation."""

    def __init__(self, case: Case, closed_days: Sequence[date] = (), calendar: Sequence[CalendarDay] = ()):
        self.case = case
        orders = case.orders
        self._rows: dict[str, list[tuple]] = {"orders": list(orders[TABLES["orders"].column_names].itertuples(index=False, name=None))}
        self._rows["closed_days"] = [(day, None) for day in closed_days]
        self._rows["calendar_days"] = [(entry.day, entry.reason, entry.kind == "planned closure") for entry in calendar]
        self._rows["returning_customers"] = self._rows["return_rates"] = []  # until they are run
        self._rows["learned_chances"] = []
        self._rows["refunds"] = [tuple(row) for row in oracle.plain_rows(case.lake.read("refunds", case.lake.orders().version))]
        self._rows["customers"] = [] if case.customers is None else [
            (*(oracle.plain(value) for value in row[:6]), None)
            for row in case.customers[[*TABLES["customers"].column_names]].itertuples(index=False, name=None)
        ]

    def assume(self, table: str, rows: list[tuple]) -> None:
        """Makes `rows` readable as a table that is not run."""
        self._rows[table] = rows

    def keep(self, table: str, days: Sequence[date]) -> None:
        """Leaves only the rows of these reference dates in a table."""
        self._rows[table] = [row for row in self._rows[table] if row[0] in days]

    def run(self, rule: Query, **dates: date) -> pd.DataFrame:
        """Executes a rule and keeps its rows as the table that later rules read."""
        table = rule.table
        known: dict[str, Any] = {
            **self.case.lake.settings.rule_parameters(), "complete_through": self.case.complete_through, **dates}
        read = set(re.findall(r"(?:FROM|JOIN) (\w+)", rule.google_sql))  # handing over a table costs more than reading it
        tables = {
            name: ({column.name: column.type for column in RELATIONS[name].columns if column.type != "TIMESTAMP"}, rows)
            for name, rows in self._rows.items() if name in read
        }
        rows = engine().run(rule.google_sql, tables, {name: known[name] for name in rule.parameters})
        columns = RELATIONS[table].column_names
        frame = pd.DataFrame([list(row) for row in rows], columns=columns, dtype=object).drop(columns="created_at", errors="ignore")
        if table == "customer_priority":  # nothing reads it; its rows stay in the order the rule gives, unless the settings want another
            if self.case.lake.settings.rank_by == "score":
                return frame
            by_stake = frame.assign(stake=-frame["spend_at_stake"].astype(float))  # NaN stands last
            return by_stake.sort_values(["run_date", "priority_tier", "stake"], kind="stable", ignore_index=True).drop(columns="stake")
        frame = frame.sort_values(_order(self.case, table), ignore_index=True)
        self._rows[table] = [tuple(row) for row in frame.itertuples(index=False, name=None)]
        return frame


def by_oracle(case: Case, table: str, day: date | None) -> pd.DataFrame | None:
    """What the naive oracle expects; None of tables it does not have."""
    settings, orders = case.lake.settings, case.orders
    match table:
        case "customer_days" | "priority_intervals":
            return None
        case "return_windows":
            return case.returns.return_windows(sorted({looked for d in case.days for _, looked in case.returns.days(d)}))
        case "return_rates":
            return pd.concat([case.returns.return_rates(d, d) for d in case.days], ignore_index=True)
        case "customer_priority":
            return oracle.customer_priority(orders, day, settings, case.returns)
        case "cohort_retention_evolution":
            return oracle.cohort_retention_evolution(orders, settings)
        case "alert_logic":
            return oracle.alert_history(orders, day, day, case.complete_through, settings)
        case "base_customers":
            return oracle.base_customers(orders, day, settings, case.customers)
        case _:
            return getattr(oracle, table)(orders, day, settings)


def _may_be_listed(case: Case, day: date) -> pd.DataFrame:
    """Who is in which tier by the oracle; by what is at stake anybody may be, whose silence is not too long."""
    if case.lake.settings.membership == "rules":
        return by_oracle(case, "customer_priority", day)
    everybody = by_oracle(case, "retention_snapshot", day)
    near = everybody[everybody["days_since_last_order"] <= 2 * case.lake.settings.at_risk_limit]
    tiers = dict(zip(oracle.STATUSES, oracle.TIER_BASE, strict=True))
    return near.assign(priority_tier=[tiers[status] for status in near["retention_status"]])


def _tiers_apart(case: Case, intervals: pd.DataFrame) -> list[str]:
    """Who is in another tier by the intervals than by the oracle, on each day: an interval too long costs no row of the queue."""
    lines = []
    for day in case.days:
        expected = _may_be_listed(case, day)
        silences = [(day - oracle.plain(last)).days for last in intervals["last_order_date"]]
        inside = [start <= silence <= end for start, silence, end in
                  zip(intervals["from_day"], silences, intervals["to_day"], strict=True)]
        wanted = set(zip(expected["customer_id"], expected["priority_tier"], strict=True))
        got = set(zip(intervals["customer_id"][inside], intervals["priority_tier"][inside], strict=True))
        lines += [f"{case.name}, {day}: fast: priority_intervals {key}: {'missing' if key in wanted else 'not expected'}"
                  for key in sorted(wanted ^ got)]
    return lines


def against_oracle(case: Case, found: Answers) -> list[str]:
    """All differences of an engine's answers to the oracle's, in sentences."""
    lines = []
    for (name, day), frame in found.items():
        table = name.removeprefix("fast/")
        if table == "priority_intervals":
            lines += _tiers_apart(case, frame)
        expected = by_oracle(case, table, day)
        if expected is not None:
            fast = "fast: " if name != table else ""
            lines += [f"{case.name}, {day}: {fast}{line}" for line in oracle.differences(table, expected, frame)]
    return lines
