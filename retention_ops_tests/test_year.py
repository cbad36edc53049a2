"""Every morning for a year: orders arrive by themselves, silence is explained, and in the end everything is as if computed once.

`test_a_year` lives 365 mornings with two real years of retail orders, in London, live, on a real Postgres that is the shop's database and
the ops database: orders that come late, amounts changed, customers re-owned, orders cancelled and gone, two outages of the source, two
changes of the clocks, a broken template, a restart every Sunday, and a machine lost with its home and databases, two mornings after its
backup and in the middle of an incident. `test_twelve_mornings` is the same in small, in the quick suite.

What is decided here where the contract leaves it open:
- A date is answered once for each result it ever had. Where a correction changes a flagged date, its answer is an update; a date that was
  passed over, because a newer one was flagged as well or because it was older than max_alert_age_days when its flag came, is logged.
- A date whose orders were late gets its heartbeat if they come on the same day; of an outage of three days only the last one does.
- After a restore the heartbeat of that morning is called again: the monitor cannot be asked, and the same call says the same.
- What the lost installation told of its own health after its backup stays where it was told; the restored ledger knows nothing of it.
- On most mornings the dates are computed by plain functions; on Mondays and on the mornings of the stories by Dagster's runs and sensors
  (RETENTION_OPS_YEAR_DAGSTER=1: on all). RETENTION_OPS_YEAR_SUMMARY names a file for what was counted, RETENTION_OPS_YEAR_PART
  (2011-06-01:2011-06-12) a part of the year to live, while one works on a story.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Collection, Iterable
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import duckdb
import pytest
import sqlalchemy as sa

from retention_ops.execute import health, ledger
from retention_ops.execute.destinations.choice import DIGEST_SLOT
from retention_ops.execute.gate import ACTED, PASSED
from retention_ops.execute.health import DATA_LATE, NONE_AT_ALL, RUN_FAILED, SILENT_DAYS, SOURCE_OFF
from retention_ops.log import runs
from retention_ops_tests import year
from retention_ops_tests.execute.stage import FakeClock, postgres_url  # noqa: F401
from retention_ops_tests.shops import small_shop
from retention_ops_tests.test_real_orders import FILES

BERLIN, LONDON = ZoneInfo("Europe/Berlin"), ZoneInfo("Europe/London")
CLOSURES = Path(__file__).resolve().parent.parent / "docs" / "online_retail_closures.csv"
SUMMARY = os.environ.get("RETENTION_OPS_YEAR_SUMMARY")
ALWAYS_DAGSTER = bool(os.environ.get("RETENTION_OPS_YEAR_DAGSTER"))

FIRST, LAST = map(date.fromisoformat, os.environ.get("RETENTION_OPS_YEAR_PART", "2010-12-10:2011-12-09").split(":"))
"""the first and the last of 365 mornings; what is before is the first pull's history"""
REFUSED, MISSING, BACK = date(2011, 3, 16), date(2011, 9, 13), date(2011, 9, 16)
"""a morning on which the database refuses the connection; three on which the table is not there, and the one on which it is again"""
BROKEN = date(2011, 8, 10)
"""somebody breaks a template before six, and mends it before seven"""
LOOKED = (date(2011, 2, 2), date(2011, 6, 5))
"""somebody checks the source at noon, an hour after an order was changed"""
SAVED, LOST = date(2011, 6, 4), date(2011, 6, 6)
"""the backup, in an incident; the machine is lost two mornings later, a Monday: with two answers and a digest that it does not know of"""
STORIES = {date(2011, 3, 27), date(2011, 10, 30), REFUSED, MISSING, BACK, BROKEN, *LOOKED, SAVED, SAVED - timedelta(1), LOST + timedelta(1)}

Cause = tuple[str, date, date | None]
"""a health cause, the day it opened and the day it was over"""


# -- in small ----------------------------------------------------------------------------------------------------------


def small_orders(last: date) -> list[tuple[str, str, datetime, int]]:
    """The small shop's orders with their hours, and a customer who comes every day: so each day is seen to be over."""
    visits = [(row.order_id, row.customer_id, row.order_date, row.order_cents) for row in small_shop().itertuples()]
    visits += [(f"daily-{day}", "daily", day, 1000) for day in year.days(min(visit[2] for visit in visits), last)]
    return [(id_, who, year.moment(day, BERLIN, 9 + number % 11), cents) for number, (id_, who, day, cents) in enumerate(visits)]


def test_twelve_mornings(tmp_path, monkeypatch):
    first, last, down = date(2024, 2, 18), date(2024, 2, 29), date(2024, 2, 24)
    clock = FakeClock(year.moment(first, BERLIN, 5))
    shop = year.Shop(year.life(small_orders(last), BERLIN, first, last, seed=27), tmp_path / "shop", BERLIN, "EUR")
    shop.outage(year.moment(down, BERLIN, 5), year.moment(down, BERLIN, 9, 30), "gone")
    with year.world(clock, monkeypatch) as (messages, monitor):
        installation = year.Quick(
            tmp_path / "home", shop, clock, **year.outside(messages), shop_timezone="Europe/Berlin", min_sample=10, currency="EUR",
            shortfall_pilot_days=0, duckdb_threads=1)
        mornings = list(year.days(first, last))
        for day in mornings:
            installation.morning(day)
            if day.weekday() == 6:
                installation.restart()
        installation.advised()
        told = installation.told
        assert "late" in told.corrections and told.late_mornings == [down]
        assert told.failed_pulls >= 10, "eight quarters, 8:00 and 9:00"
        assert year.flagged(installation) == [date(2024, 2, day) for day in (19, 20, 21, 22)]
        assert causes(installation) == [(DATA_LATE, down, down)]
        judge(installation, messages, monitor, mornings, tmp_path / "fresh")


@pytest.mark.slow
def test_a_laptop_sleeps_for_a_week_and_for_a_month(tmp_path, monkeypatch):
    """It wakes at six and at half past eleven, and the clocks change while it sleeps. Both times alerts began and some are over."""
    first, last = date(2024, 2, 18), date(2024, 4, 7)
    naps = {date(2024, 2, 27): 7, date(2024, 4, 4): 31}
    asleep = {day - timedelta(back) for day, nights in naps.items() for back in range(1, nights + 1)}
    assert date(2024, 3, 31) in asleep
    clock = FakeClock(year.moment(first, BERLIN, 5))
    shop = year.Shop(year.life(small_orders(last), BERLIN, first, last, seed=31), tmp_path / "shop", BERLIN, "EUR")
    with year.world(clock, monkeypatch) as (messages, monitor):
        installation = year.Quick(
            tmp_path / "home", shop, clock, **year.outside(messages), shop_timezone="Europe/Berlin", min_sample=10, currency="EUR",
            shortfall_pilot_days=0, duckdb_threads=1, lookback_days=60)  # gone orders are looked for that far back
        computed: list[list[date]] = []
        monkeypatch.setattr(installation, "compute", lambda first, last: (
            computed.append(list(year.days(first, last))), year.Quick.compute(installation, first, last)))
        mornings = [day for day in year.days(first, last) if day not in asleep]
        for day in mornings:
            if day in naps:
                installation.sleep_until(day, *((6, 0) if naps[day] == 7 else (11, 30)))
                computed.clear()
            installation.morning(day)
            if day in naps:
                missed = list(year.days(day - timedelta(naps[day] + 1), day - timedelta(1)))
                assert computed[0][-len(missed):] == missed and len(computed) == 1, "one run, with what corrections made stale"
        installation.advised()
        assert installation.told.late_mornings == [] and installation.told.failed_pulls == 0
        assert installation.told.good_days == [day - timedelta(1) for day in mornings], "of the dates it slept through only the newest"
        assert causes(installation) == [], "when it looks for the first time, the orders are in"
        judge(installation, messages, monitor, mornings, tmp_path / "fresh", asleep=asleep)
        with installation.engine() as engine:
            verdicts = {day: [row["verdict"] for row in found] for day, found in year.answered(engine).items()}
        calm = {day: verdicts.pop(day) for day in set(verdicts) - set(year.flagged(installation))}
        assert calm == {date(2024, 3, 1): ["resolve"]}
        assert verdicts.pop(date(2024, 2, 19)) == ["history"], "older than max_alert_age_days"
        assert verdicts.pop(date(2024, 2, 22)) == ["open"]
        assert verdicts.pop(date(2024, 4, 3)) == ["open"] and verdicts.pop(date(2024, 4, 4)) == ["update"]
        assert {verdict for found in verdicts.values() for verdict in found} <= set(PASSED), "logged; the newest one's message names them"


# -- the year ----------------------------------------------------------------------------------------------------------


def real_orders() -> list[tuple[str, str, Any, int]]:
    """(invoice, customer, moment, cents) of both real years, by the words of the preset uci-online-retail."""
    rows = duckdb.execute(f"""
        WITH lines AS (
            SELECT Invoice AS id, Quantity, InvoiceDate AS placed, Price AS price, "Customer ID" AS customer
            FROM '{FILES[0]}' WHERE InvoiceDate < TIMESTAMP '2010-12-01'
            UNION ALL SELECT InvoiceNo, Quantity, InvoiceDate, UnitPrice, CustomerID FROM '{FILES[1]}')
        SELECT id, any_value(customer), min(placed), CAST(round(sum(Quantity * price) * 100) AS BIGINT) FROM lines
        WHERE id NOT LIKE 'C%' AND customer IS NOT NULL AND Quantity > 0 AND price > 0 GROUP BY id ORDER BY 3, 1
    """).fetchall()
    return [(id_, customer, placed.replace(tzinfo=LONDON).astimezone(UTC), cents) for id_, customer, placed, cents in rows]


class Databases:
    """Databases of their own on the server; nothing of them has to outlive a power cut."""

    def __init__(self, server_url: str):
        self.url = sa.make_url(server_url)
        self.server = sa.create_engine(server_url, isolation_level="AUTOCOMMIT")

    def fresh(self, name: str) -> str:
        with self.server.connect() as connection:
            for statement in (f"DROP DATABASE IF EXISTS {name} WITH (FORCE)", f"CREATE DATABASE {name}",
                              f"ALTER DATABASE {name} SET synchronous_commit = off"):
                connection.execute(sa.text(statement))
        return self.url.set(database=name).render_as_string(hide_password=False)


@pytest.mark.slow
@pytest.mark.skipif(not all(file.exists() for file in FILES), reason="real orders (../shared/data) are not here")
def test_a_year(tmp_path, monkeypatch, postgres_url):  # noqa: F811
    begun, databases = time.process_time(), Databases(postgres_url)
    clock = FakeClock(year.moment(FIRST, LONDON, 5))
    shop = year.PostgresShop(
        year.life(real_orders(), LONDON, FIRST, LAST, seed=2011), tmp_path / "shop", LONDON, "GBP", url=databases.fresh("year_shop"),
        environment=monkeypatch)
    shop.outage(year.moment(REFUSED, LONDON, 5), year.moment(REFUSED, LONDON, 9, 30), "refused")
    shop.outage(year.moment(MISSING, LONDON, 5), year.moment(BACK, LONDON, 5, 30), "missing")
    templates = tmp_path / "templates"
    templates.mkdir()
    with year.world(clock, monkeypatch) as (messages, monitor):
        installation = year.Daemon(
            tmp_path / "home", shop, clock, **year.outside(messages), ops_database_url=databases.fresh("year_ops"), rebuild_days=4,
            through_dagster=lambda day: ALWAYS_DAGSTER or day.weekday() == 0 or day in STORIES, lose=lambda: databases.fresh("year_ops"),
            shop_timezone="Europe/London", currency="GBP", closures_file=CLOSURES, shortfall_pilot_days=0, duckdb_threads=1,
            templates_dir=templates)
        mornings = list(year.days(FIRST, LAST))
        for day in mornings:
            if day == BROKEN:
                (templates / "words.j2").write_text("{% nonsense %}")
                shop.troubles.append((year.moment(day, LONDON, 6, 45), (templates / "words.j2").unlink))
            installation.morning(day)
            if day in LOOKED:
                somebody_looks(installation, day)
            if day == SAVED:
                installation.at(day, 13)
                backup = installation.back_up(tmp_path / "saturday.tar")
            if day == LOST and SAVED in mornings:
                the_machine_is_lost(installation, messages, backup)
            if day.weekday() == 6:
                installation.restart()
            if day.month != 7:  # in July nobody does, and the backup owner is told
                installation.at(day, 10)
                installation.acknowledge()
        installation.take_in()  # what came since six, so that a home that pulls now knows the same
        commands = installation.advised()
        assert {command.split()[0] for command in commands} <= {"backfill"}, commands
        flagged = year.flagged(installation)
        stories = [(SOURCE_OFF, LOOKED[0], LOOKED[0] + timedelta(1)), (DATA_LATE, REFUSED, REFUSED), (DATA_LATE, MISSING, BACK),
                   (RUN_FAILED, BROKEN, BROKEN)]
        expected = [story for story in stories if story[1] in mornings] + silences(flagged, mornings)
        assert causes(installation) == sorted(expected, key=lambda cause: cause[1])
        late = [REFUSED, *year.days(MISSING, BACK - timedelta(1))]
        assert installation.told.late_mornings == [day for day in late if day in mornings]
        assert installation.told.failed_runs == 2 * (BROKEN in mornings), "at six, and once more before it was mended"
        lost = {LOST} & set(mornings)
        judge(installation, messages, monitor, mornings, tmp_path / "fresh", again=lost, gone=2 * len(lost))
        assert len(mornings) < 365 or set(shop.happened) == {"placed", *year.CORRECTIONS}
        if SUMMARY:
            write_summary(Path(SUMMARY), counted(installation, messages, monitor, flagged) | {
                "advised in the end": ", ".join(commands), "CPU seconds": f"{time.process_time() - begun:,.0f}"})


def somebody_looks(installation: year.Installation, day: date) -> None:
    installation.at(day, 11)
    installation.shop.correct_now(installation.clock())
    installation.at(day, 12)
    assert not installation.check()
    installation.look()


def the_machine_is_lost(installation: year.Installation, messages: Any, backup: Path) -> None:
    """Nothing leaves before somebody looked outside, and nothing leaves then that had left before."""
    installation.at(LOST, 15)
    before = year.keys_at_slack(messages)
    installation.lose_and_restore(backup)
    installation.look()
    assert "not reconciled" in installation.held()
    assert year.keys_at_slack(messages) == before
    installation.clock.forward(minutes=20)
    found = installation.reconcile()
    if found.missing:  # corrections came of dates that nobody rebuilds by themselves; the command names them
        assert not found.lifted
        installation.compute(found.missing[0], found.missing[-1])
        assert year.keys_at_slack(messages) == before
        found = installation.reconcile()
    assert found.lifted and set(found.answered) >= {SAVED, SAVED + timedelta(1)} and found.adopted, found
    installation.look()
    installation.advised()  # the tables that are not in a backup
    installation.clock.forward(minutes=20)
    installation.look()
    assert year.keys_at_slack(messages) == before


# -- what must be true in the end --------------------------------------------------------------------------------------


def judge(
    installation: year.Installation, messages: Any, monitor: Any, mornings: list[date], home: Path, again: Iterable[date] = (),
    gone: int = 0, asleep: Collection[date] = (),
) -> None:
    """`again`: mornings whose heartbeat came twice; `gone`: messages that only a lost ledger knew of; `asleep`: days without a morning."""
    fresh = year.rebuilt(installation, home, mornings[0] - timedelta(1), mornings[-1] - timedelta(1))
    assert year.our_orders(installation) == year.our_orders(fresh) == installation.shop.meaning()
    assert year.our_refunds(installation) == year.our_refunds(fresh) == installation.shop.refunds() != {}
    assert year.differences(installation, fresh) == []
    assert len(installation.lake.days("alert_logic")) == len(mornings) + len(asleep)
    with installation.engine() as engine:
        assert runs.first_broken_row(engine) is None
        rows, answered, log = ledger.find(engine), year.answered(engine), runs.rows(engine)
    judge_answers(year.flagged(installation), answered, {row["alert_date"] for row in log})
    judge_messages(rows, messages, gone)
    assert {row["state"] for row in rows} <= {ledger.SENT, ledger.CANCELLED}
    digests = Counter(row["alert_date"] for row in rows if row["slot"] == DIGEST_SLOT and row["destination"] == "slack")
    assert digests == Counter({day - timedelta(day.weekday() + 1) for day in mornings}), "one for each week, on its Monday or when it woke"
    beats = Counter(moment.astimezone(installation.zone).date() - timedelta(1) for moment in monitor.beats)
    assert beats == Counter(installation.told.good_days) + Counter(day - timedelta(1) for day in again)


def judge_answers(flagged: list[date], answered: dict[date, list[dict[str, Any]]], logged: set[date]) -> None:
    assert set(flagged) <= set(answered) & logged, "no flagged date is missed"
    for day, found in answered.items():
        acted = [row for row in found if row["verdict"] in ACTED]
        versions = [row["version"] for row in acted]
        assert len(set(versions)) == len(versions), f"{day} was answered twice with the same result"
        if day in flagged:
            assert acted or {row["verdict"] for row in found} <= set(PASSED), day
    assert any(row["verdict"] == "open" for found in answered.values() for row in found) == bool(flagged)


def judge_messages(rows: list[dict[str, Any]], messages: Any, gone: int) -> None:
    """What people can see is what the ledger says was sent, once."""
    there = year.keys_at_slack(messages)
    assert {key for key, number in there.items() if number > 1} == set()
    told = [row for row in rows if row["destination"] == "slack" and row["kind"] in ("post", "reply")]
    sent = {row["key"] for row in told if row["state"] == ledger.SENT}
    assert sent <= set(there)
    others = [message["text"] for message in messages.messages
              if message["metadata"] and message["metadata"]["event_payload"]["key"] not in sent]
    assert len(others) == gone and all("source check" in text for text in others), others


def causes(installation: year.Installation) -> list[Cause]:
    """Every health cause there was, oldest first."""
    def local(moment: Any) -> date | None:
        return moment.astimezone(installation.zone).date() if moment else None

    with installation.engine() as engine:
        return [(row["cause"], local(row["opened_at"]), local(row["closed_at"])) for row in health.causes(engine)]


def silences(flagged: Iterable[date], mornings: list[date]) -> list[Cause]:
    """When nobody heard an alert for so long that it must be told, and when that ended: morning by morning, by counting."""
    alarms, watched, found, since = set(flagged), mornings[0] - timedelta(1), [], None
    for day in mornings:
        last = {day - timedelta(back) for back in range(1, SILENT_DAYS + 1)}
        silent = min(last) >= watched and not last & alarms
        if silent and since is None:
            since = day
        elif since and not silent:
            found.append((NONE_AT_ALL, since, day))
            since = None
    return found + ([(NONE_AT_ALL, since, None)] if since else [])


def counted(installation: year.Installation, messages: Any, monitor: Any, flagged: list[date]) -> dict[str, Any]:
    told, opened = installation.told, Counter(cause for cause, *_ in causes(installation))
    closed = Counter(cause for cause, _, end in causes(installation) if end)
    with installation.engine() as engine:
        rows, answered = ledger.find(engine), year.answered(engine)
    verdicts = Counter(row["verdict"] for found in answered.values() for row in found)
    return {
        "mornings": f"{told.mornings}, looked at {told.looks} times; {told.restarts} restarts, one restore",
        "pulls": f"{told.pulls}, and {told.failed_pulls} that found no source",
        "what befell orders": listed(installation.shop.happened),
        "corrections as pulls told them": listed(told.corrections),
        "runs": f"{told.dagster_runs} by Dagster, {told.plain_runs} plain; {told.failed_runs} failed; {told.dates_computed} dates computed",
        "flagged dates": len(flagged),
        "answers": listed(verdicts),
        "messages at Slack": f"{sum(year.keys_at_slack(messages).values())}, none twice",
        "actions": listed(Counter(f"{row['slot']} {row['kind']} {row['state']}" for row in rows)),
        "health alerts opened": listed(opened), "health alerts closed": listed(closed),
        "digests": sum(row["slot"] == DIGEST_SLOT for row in rows), "heartbeats": len(monitor.beats),
        "orders in the end": f"{len(year.our_orders(installation)):,}, all equal",
        "refunds in the end": f"{len(year.our_refunds(installation)):,}, all equal",
    }


def listed(numbers: Counter[str]) -> str:
    return ", ".join(f"{number:,} {name.replace('_', ' ')}" for name, number in sorted(numbers.items()))


def write_summary(file: Path, numbers: dict[str, Any]) -> None:
    file.write_text("# A simulated year\n\nWritten by `RETENTION_OPS_YEAR_SUMMARY=docs/year.md pytest retention_ops_tests/test_year.py`, "
                    "which says what was checked.\n\n| what | count |\n|---|---|\n"
                    + "".join(f"| {name} | {value} |\n" for name, value in numbers.items()))
