"""Incidents: deadlines in business time, what people say about them, when one is over."""

from __future__ import annotations

from datetime import UTC, date, datetime, time, timedelta
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from retention_ops.detect.alerts import AT_RISK, SHORTFALL, alert_of
from retention_ops.errors import LedgerError
from retention_ops.execute import incidents
from retention_ops.execute.incidents import WORKDAYS, business_deadline, calm_since
from retention_ops_tests.conftest import settings_for

NOW = datetime(2024, 2, 20, 10, 0, tzinfo=UTC)  # a Tuesday
SETTINGS = settings_for(".", owner="Ada", backup_owner="Grace")


def utc(text: str) -> datetime:
    return datetime.fromisoformat(text).replace(tzinfo=UTC)


@pytest.mark.parametrize(("start", "hours", "changes", "deadline"), [
    ("2024-02-20 10:00", 4, {}, "2024-02-20 14:00"),
    ("2024-02-20 14:00", 4, {}, "2024-02-20 18:00"),  # not a minute later
    ("2024-02-20 16:00", 4, {}, "2024-02-21 11:00"),
    ("2024-02-20 06:30", 4, {}, "2024-02-20 13:00"),  # before opening: counted from nine
    ("2024-02-20 18:00", 4, {}, "2024-02-21 13:00"),
    ("2024-02-23 17:00", 4, {}, "2024-02-26 12:00"),  # Friday evening, weekend between
    ("2024-02-24 12:00", 24, {}, "2024-02-28 15:00"),  # Saturday; 9 + 9 + 6 hours
    ("2024-02-23 17:00", 4, {"business_days": "mon-sat"}, "2024-02-24 12:00"),
    ("2024-02-24 17:00", 4, {"business_days": "mon-sun"}, "2024-02-25 12:00"),
    ("2024-02-20 01:00", 4, {"shop_timezone": "Pacific/Auckland"}, "2024-02-20 05:00"),  # 14:00 there
    ("2024-02-20 05:00", 4, {"shop_timezone": "Pacific/Auckland"}, "2024-02-21 00:00"),  # closed there since 18:00
    # the night of 2024-03-31 has no 02:00 in Berlin: the shift of that night is seven hours long
    ("2024-03-30 21:00", 8, {"shop_timezone": "Europe/Berlin", "business_hours": "22:00-06:00", "business_days": "mon-sun"},
     "2024-03-31 21:00"),
    # in the night of 2024-10-27 it is 02:00 twice: nine hours
    ("2024-10-26 20:00", 9, {"shop_timezone": "Europe/Berlin", "business_hours": "22:00-06:00", "business_days": "mon-sun"},
     "2024-10-27 05:00"),
    ("2024-02-20 23:00", 10, {"business_hours": "22:00-06:00"}, "2024-02-22 01:00"),
    ("2024-02-24 03:00", 4, {"business_hours": "22:00-06:00"}, "2024-02-26 23:00"),  # Friday's shift ends on Saturday morning
])
def test_the_deadline_counts_business_hours_only(start, hours, changes, deadline):
    assert business_deadline(utc(start), hours, settings_for(".", **changes)) == utc(deadline)


def minute_by_minute(start: datetime, minutes: int, settings) -> datetime:
    """Naive: walks through UTC minutes and asks of each what the wall clock and the calendar of the shop say."""
    zone = ZoneInfo(settings.shop_timezone)
    opens, closes = (time.fromisoformat(text) for text in settings.business_hours.split("-"))
    days = WORKDAYS[settings.business_days]
    moment = start
    while minutes:
        local = moment.astimezone(zone)
        today, yesterday = local.weekday() < days, (local.date() - timedelta(1)).weekday() < days
        wall = local.time()
        begun, not_over = today and wall >= opens, wall < closes
        is_open = begun and not_over if opens < closes else begun or (yesterday and not_over)
        minutes -= is_open
        moment += timedelta(minutes=1)
    return moment


@hypothesis_settings(max_examples=60, deadline=None)
@given(
    start=st.datetimes(datetime(2024, 1, 1), datetime(2024, 12, 31)).map(lambda at: at.replace(second=0, microsecond=0, tzinfo=UTC)),
    quarters=st.integers(1, 80),
    # opening and closing outside the hours in which clocks change: what such a shop means by 02:30 is not ours to say
    hours=st.tuples(st.integers(4, 23), st.integers(4, 23)).filter(lambda pair: pair[0] != pair[1]),
    days=st.sampled_from(list(WORKDAYS)),
    zone=st.sampled_from(["UTC", "Europe/Berlin", "America/New_York", "Asia/Kolkata", "Pacific/Auckland", "Australia/Lord_Howe"]),
)
def test_the_deadline_is_what_counting_minutes_gives(start, quarters, hours, days, zone):
    settings = settings_for(".", business_hours=f"{hours[0]:02d}:00-{hours[1]:02d}:00", business_days=days, shop_timezone=zone)
    assert business_deadline(start, quarters / 4, settings) == minute_by_minute(start, quarters * 15, settings)


def test_a_shop_open_around_the_clock_counts_every_hour():
    settings = settings_for(".", business_hours="09:00-09:00", business_days="mon-sun")
    assert business_deadline(NOW, 50, settings) == NOW + timedelta(hours=50)


# -- when one is over --------------------------------------------------------------------------------------------------

INCIDENT = {"alert_type": AT_RISK, "last_flagged_on": date(2024, 2, 19), "frozen_baseline": 40.0, "frozen_warning_pct": 15.0}


def days(*readings):
    """alert_logic rows from the day after the last flagged one; a reading is a value, 'gated', 'flagged' or None (no row)."""
    rows = []
    for number, reading in enumerate(readings, start=1):
        if reading is not None:
            rows.append({
                "alert_type": AT_RISK, "alert_date": (date(2024, 2, 19) + timedelta(number)).isoformat(),
                "gate": "min_sample" if reading == "gated" else None,
                "current_value": 41.0 if isinstance(reading, str) else reading, "alert_flag": reading == "flagged"})
    return rows


@pytest.mark.parametrize(("readings", "over"), [
    ((41, 41, 41), 3), ((41, 41), None), ((41, 41, 46), None),
    ((41, 41, 46, 41, 41, 41), 6),  # one day above the line starts the count again
    ((41, 41, "flagged", 41, 41, 41), 6),
    ((41, "gated", 41, "gated", 41), 5),  # gated days neither count nor start again
    ((41, None, None, 41, None, 41), 6), (("gated",) * 9, None),
    ((46, 46, 46), None),  # 40 x 1.15 is the line, and on the line is not below it
    ((45.999999999, 45.9, 45.9), 3),
    ((41, 41, 41, 41, 41), 3),  # the day it was over, not the newest
])
def test_three_calm_days_end_an_incident(readings, over):
    ended = calm_since(INCIDENT, days(*readings))
    assert ended == (date(2024, 2, 19) + timedelta(over) if over else None)


def test_days_up_to_the_last_flagged_one_are_no_calm_days():
    rows = [{**row, "alert_date": (date.fromisoformat(row["alert_date"]) - timedelta(3)).isoformat()} for row in days(41, 41, 41)]
    assert calm_since(INCIDENT, rows) is None


def shortfall(day: int, observed: int, expected: float, level: float, **changes):
    return {"alert_type": SHORTFALL, "alert_date": f"2024-02-{19 + day}", "severity": "INFO", "alert_flag": False, "gate": None,
            "observed": observed, "expected": expected, "level": level, **changes}


@pytest.mark.parametrize(("rows", "over"), [
    # opened at a level of 100 of 100 usual returns, line at 75
    ([shortfall(1, 76, 100, 1.0), shortfall(2, 76, 100, 1.0), shortfall(3, 76, 100, 1.0)], 3),
    ([shortfall(1, 75, 100, 1.0), shortfall(2, 75, 100, 1.0), shortfall(3, 75, 100, 1.0)], None),  # on the line is not above it
    # half the customers stay away for good: the expectation has followed, the half-year habit has not
    ([shortfall(1, 50, 50, 0.5), shortfall(2, 50, 50, 0.5), shortfall(3, 50, 50, 0.5)], None),
    ([shortfall(1, 90, 100, 1.0), shortfall(2, 0, 100, 1.0, gate="partial_day"), shortfall(3, 90, 90, 1.0), shortfall(4, 90, 90, 1.0)], 4),
    ([shortfall(1, 90, None, None), shortfall(2, 90, 90, 1.0), shortfall(3, 90, 90, 1.0)], None),
])
def test_customers_who_stay_away_for_good_are_no_recovery(rows, over):
    incident = {"alert_type": SHORTFALL, "last_flagged_on": date(2024, 2, 19), "frozen_baseline": 100.0, "frozen_warning_pct": -25.0}
    assert calm_since(incident, rows) == (date(2024, 2, 19) + timedelta(over) if over else None)


def test_a_day_flagged_by_the_other_rule_is_not_calm():
    incident = {"alert_type": SHORTFALL, "last_flagged_on": date(2024, 2, 19), "frozen_baseline": 100.0, "frozen_warning_pct": -25.0}
    risen = {"alert_type": AT_RISK, "alert_date": "2024-02-21", "severity": "WARNING", "alert_flag": True, "gate": None,
             "current_value": 9.0}
    rows = [shortfall(day, 90, 90, 1.0) for day in (1, 2, 3)]
    assert calm_since(incident, rows) == date(2024, 2, 22)
    assert calm_since(incident, [rows[0], alert_of([risen, rows[1]]), rows[2]]) is None


# -- what people do ----------------------------------------------------------------------------------------------------


def opened(engine, severity="WARNING", mode="live", now=NOW, alert_type="retention_status_degradation"):
    alert = {"alert_type": alert_type, "scope": "global", "alert_date": "2024-02-19", "severity": severity,
             "baseline_value": 40.0, "threshold_warning": 15.0}
    with engine.begin() as connection:
        return incidents.open_incident(connection, alert, mode, SETTINGS, now, "run-1")["id"]


@pytest.mark.parametrize(("severity", "deadline"), [("CRITICAL", "2024-02-20 14:00"), ("WARNING", "2024-02-22 16:00")])
def test_an_incident_says_who_and_until_when(engine, severity, deadline):
    row = incidents.find(engine, id=opened(engine, severity))[0]
    assert (row["owner"], row["backup_owner"], row["ack_by"]) == ("Ada", "Grace", utc(deadline))
    assert (row["frozen_baseline"], row["frozen_warning_pct"], row["state"]) == (40.0, 15.0, "open")


def test_acknowledging_twice_keeps_the_first_name(engine):
    number = opened(engine)
    incidents.acknowledge(engine, number, "Ada", NOW)
    row = incidents.acknowledge(engine, number, "Grace", NOW + timedelta(hours=1))
    assert (row["acked_by"], row["acked_at"]) == ("Ada", NOW)


def test_a_snooze_ends_in_the_future_and_is_recorded(engine):
    number = opened(engine)
    with pytest.raises(LedgerError, match="ends in the future"):
        incidents.snooze(engine, number, NOW, "Ada", "holiday", NOW)
    incidents.snooze(engine, number, NOW + timedelta(days=2), "Ada", "holiday", NOW)
    told = incidents.story(engine, number)["events"][-1]
    assert (told["event"], told["actor"], told["detail"]) == ("snoozed", "Ada", "until 2024-02-22 10:00 UTC: holiday")


def test_a_verdict_closes_and_is_given_once(engine):
    number = opened(engine)
    with pytest.raises(LedgerError, match="real, expected, data, false"):
        incidents.close(engine, number, "maybe", "Ada", "", NOW)
    row = incidents.close(engine, number, "data", "Ada", "double import", NOW)
    assert (row["state"], row["verdict"], row["closed_by"]) == ("closed", "data", "Ada")
    with pytest.raises(LedgerError, match="judged data by Ada already"):
        incidents.close(engine, number, "real", "Grace", "", NOW)


@pytest.mark.parametrize("act", [
    lambda engine, number: incidents.acknowledge(engine, number, " ", NOW),
    lambda engine, number: incidents.snooze(engine, number, NOW + timedelta(1), "", "x", NOW),
    lambda engine, number: incidents.close(engine, number, "real", "", "x", NOW),
])
def test_nobody_decides_nothing(engine, act):
    with pytest.raises(LedgerError, match="--by"):
        act(engine, opened(engine))


def test_an_ended_incident_is_neither_acknowledged_nor_snoozed(engine):
    number = opened(engine)
    incidents.close(engine, number, "real", "Ada", "", NOW)
    for act in (lambda: incidents.acknowledge(engine, number, "Ada", NOW),
                lambda: incidents.snooze(engine, number, NOW + timedelta(1), "Ada", "x", NOW)):
        with pytest.raises(LedgerError, match="is closed, not open"):
            act()


def test_an_unknown_incident_is_named(engine):
    with pytest.raises(LedgerError, match="there is no incident 99"):
        incidents.acknowledge(engine, 99, "Ada", NOW)


def test_one_incident_of_a_rule_and_mode_is_open_at_a_time(engine):
    opened(engine)
    opened(engine, mode="shadow")
    with pytest.raises(Exception, match=r"(?i)unique"):
        opened(engine)


def test_precision_counts_what_people_said_about_real_alarms(engine):
    assert incidents.precision(engine)["share"] is None
    for mode, verdict in [("live", "real"), ("live", "expected"), ("pilot", "false"), ("live", "data"), ("shadow", "false")]:
        incidents.close(engine, opened(engine, mode=mode), verdict, "Ada", "", NOW)
    opened(engine)
    found = incidents.precision(engine)
    assert (found["judged"], found["right"], found["share"]) == (4, 2, 0.5)


@pytest.mark.parametrize(("change", "overdue"), [
    (lambda engine, number: None, True),
    (lambda engine, number: incidents.acknowledge(engine, number, "Ada", NOW), False),
    (lambda engine, number: incidents.close(engine, number, "real", "Ada", "", NOW), False),
    (lambda engine, number: incidents.snooze(engine, number, NOW + timedelta(hours=5), "Ada", "holiday", NOW), False),
    (lambda engine, number: incidents.snooze(engine, number, NOW + timedelta(hours=3), "Ada", "lunch", NOW), True),
])
def test_only_what_nobody_took_is_overdue(engine, change, overdue):
    number = opened(engine, "CRITICAL")
    change(engine, number)
    assert incidents.overdue(engine, "live", NOW + timedelta(hours=3, minutes=59)) == []
    assert [row["id"] for row in incidents.overdue(engine, "live", NOW + timedelta(hours=4))] == ([number] if overdue else [])
    assert incidents.overdue(engine, "pilot", NOW + timedelta(hours=4)) == []
