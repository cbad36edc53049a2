"""The brief: its numbers are the facts, its sentences fit the day, and nothing in the data can act, break a layout or a limit.

No golden files: each test states one behaviour, so that the wording and the look may be improved freely.
"""

from __future__ import annotations

import dataclasses
import html
import json
import re
from datetime import date, timedelta
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from slack_sdk.models.blocks import Block

from retention_ops.errors import PackError
from retention_ops.package import brief
from retention_ops.package.brief import (
    BriefFacts,
    check_templates,
    fit_slack,
    render_html,
    render_markdown,
    render_slack,
    safeguards,
    template_fingerprint,
)
from retention_ops.package.stakes import Stake
from retention_ops.settings import Settings

D = date(2026, 6, 30)
SETTINGS = Settings(_env_file=None, mode="shadow", shop_name="Northwind")
RULES_IN_FORCE = {**SETTINGS.rule_parameters(), "rank_by": SETTINGS.rank_by}
PNG = b"\x89PNG not really"


# --- facts of a day ------------------------------------------------------------------------------------------------------


def alert_row(day: date = D, current: float | None = 24.1, baseline: float | None = 19.0, *, sample: int = 6_000,
              gate: str | None = None) -> dict[str, Any]:
    """An alert_logic row as the rule writes it."""
    relative = 100 * (current - baseline) / baseline if current is not None and baseline else None
    rise = -1.0 if gate or relative is None else round(relative, 9)
    severity = "CRITICAL" if rise >= 25 else "WARNING" if rise >= 15 else "INFO"
    return {
        "alert_date": day, "alert_type": "retention_status_degradation", "scope": "global", "metric_name": "at_risk_pct",
        "current_value": current, "baseline_value": baseline,
        "delta_pct": None if current is None or baseline is None else current - baseline, "delta_relative_pct": relative,
        "threshold_warning": 15.0, "threshold_critical": 25.0, "severity": severity, "alert_flag": severity != "INFO",
        "sample_size": sample, "gate": gate,
    }


AT_STAKE = "7 of 10 customers this late stayed away; usually spends 412 a quarter: 288 at stake"


def customer(
    customer_id: str = "C-10482", tier: str = "P1", reason: str = "No order for 24 days, usually every 11.",
    at_stake: str | None = AT_STAKE,
) -> dict[str, Any]:
    return {
        "customer_id": customer_id, "priority_tier": tier, "priority_reason": reason, "total_revenue": 3847.0,
        "avg_order_value": 120.22, "recommended_action": "VIP outreach + 10 % loyalty incentive", "priority_score": 94.5106,
        "days_since_last_order": 24, "at_stake_reason": at_stake,
    }


def facts_of(alert: dict[str, Any], *, before: list[dict[str, Any]] | None = None, **changes: Any) -> BriefFacts:
    """Facts around an alert row: a shop of its sample size, three tiers, two customers."""
    sample = alert["sample_size"]
    at_risk = round(sample * (alert["current_value"] or 0) / 100)
    active = (sample - at_risk) // 2
    parts = {"active": active, "at_risk": at_risk, "inactive": sample - at_risk - active}
    rules = RULES_IN_FORCE
    complete = alert["alert_date"] - timedelta(days=2 if alert["gate"] == "data_incomplete" else 0)
    values: dict[str, Any] = {
        "alert": alert,
        "daily": {"as_of_date": alert["alert_date"], "customers": sample, **parts,
                  **{f"{name}_pct": 100 * people / sample if sample else None for name, people in parts.items()}},
        "history": [*(before or []), alert],
        "shortfalls": [], "missing": None,
        "flagged": {row["alert_date"] for row in (*(before or []), alert) if row["alert_flag"]},
        "newly_at_risk": {"customers": 780, "on_p2": 55, "one_order": 532},
        "counts": {"P1": 43, "P2": 1_412, "P3": 1},
        "totals": {"P1": 46, "P2": 1_412, "P3": 1},
        "stakes": {"P1": Stake(4_121.4, 3_306.2, 4_936.6), "P2": Stake(17_888.9, 14_213.7, 21_564.1), "P3": Stake(88.2, 40.49, 135.91)},
        "next_orders": {"P1": 5_000.4, "P2": 71_877.9, "P3": 120.2},
        "top": [customer(), customer("C-931", "P2", "No order for 62 days, usually every 20.")],
        "actions": {"P1": [(rules["action_p1_reminder"], 35), (rules["action_p1_vip"], 8)], "P2": [(rules["action_p2"], 1_412)],
                    "P3": [(rules["action_p3"], 1)]},
        "audiences": {tier: {"file": f"audience_{tier}_2026-06-30.csv", "rows": rows, "excluded": excluded}
                      for tier, rows, excluded in (("P1", 43, {"no consent": 3}), ("P2", 1_412, {}), ("P3", 1, {}))},
        "complete_through": complete, "first_order_date": alert["alert_date"] - timedelta(days=700),
        "currency": "EUR", "shop_name": "Northwind", "mode": "shadow",
        "links": {"run": "https://dagster.example/runs/1", "pack": "action_packs/2026-06-30"},
        "rules": rules,
    }
    values["safeguards"] = safeguards(alert, complete, SETTINGS, changes.get("first_order_date"))
    return BriefFacts(**{**values, **changes})


CRITICAL = facts_of(alert_row())
UNLEARNED = dataclasses.replace(CRITICAL, stakes=None)


def under(rules: dict[str, Any], facts: BriefFacts = CRITICAL) -> BriefFacts:
    """The same day with other settings about who is listed and in which order."""
    return dataclasses.replace(facts, rules={**facts.rules, **rules})


BY_STAKE, RANKED = {"membership": "at_stake"}, {"rank_by": "spend_at_stake"}
WARNING = facts_of(alert_row(current=22.3))
QUIET = facts_of(alert_row(current=19.2))
GATED = facts_of(alert_row(gate="data_incomplete"))


# --- reading a rendered brief --------------------------------------------------------------------------------------------


class _Text(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.hidden = False

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.hidden = tag in ("style", "title")

    def handle_endtag(self, tag):
        self.hidden = False

    def handle_data(self, data):
        if not self.hidden:
            self.parts.append(data)


def parsed_html(source: str) -> _Text:
    parser = _Text()
    parser.feed(source)
    return parser


def slack_strings(message: dict[str, Any]) -> list[str]:
    return [message["text"], *(item["text"] for item in brief._texts(message["blocks"]))]


def rendered_markdown(facts: BriefFacts) -> str:
    return MarkdownIt("commonmark").enable("table").render(render_markdown(facts, SETTINGS))


def words(form: str, facts: BriefFacts) -> str:
    """The brief as a reader sees it: one line of words, markup gone."""
    if form == "markdown":
        text = html.unescape(re.sub(r"<[^>]+>", " ", rendered_markdown(facts)))
    elif form == "slack":
        text = html.unescape(re.sub(r"[*`\u200b]", "", "\n".join(slack_strings(render_slack(facts, SETTINGS)))))
    else:
        text = " ".join(parsed_html(render_html(facts, SETTINGS, chart_png=None)).parts)
    return re.sub(r" ([:.,;])", r"\1", re.sub(r"\s+", " ", text))


every_format = pytest.mark.parametrize("form", ["markdown", "slack", "html"])


# --- what it says --------------------------------------------------------------------------------------------------------


@every_format
def test_the_headline_holds_share_customers_rise_and_baseline(form):
    headline = "AT_RISK customers rose to 24.1 % of 6,000, 26.8 % above the mean of the 7 days before (19.0 %)."
    assert headline in words(form, CRITICAL)


@every_format
def test_the_rise_is_also_told_in_people(form):
    assert "In people: 1,446 AT_RISK, 306 more than the 7-day mean would give (1,140)." in words(form, CRITICAL)


@every_format
def test_severity_date_and_shop_are_there(form):
    text = words(form, CRITICAL)
    assert "CRITICAL" in text and "Tue 30 June 2026" in text and "Northwind" in text


@every_format
def test_each_tier_shows_its_people_and_spend_at_stake(form):
    text = words(form, CRITICAL).replace("\N{NO-BREAK SPACE}", " ")
    for shown in ("43", "1,412", "EUR 4,121", "EUR 17,889", "EUR 88", "(3,300 to 4,940)", "(14,200 to 21,600)", "(40 to 136)"):
        assert shown in text
    assert "next orders" not in text.lower() and "EUR 71,878" not in text
    for meaning in ("Last order up to 30 days ago", "No order for 31 to 90 days", "No order for 91 to 180 days"):
        assert meaning in text


@every_format
def test_before_anything_was_learned_next_orders_are_shown(form):
    text = words(form, UNLEARNED)
    assert "EUR 5,000" in text and "EUR 71,878" in text and "at stake (" not in text and "EUR 17,889" not in text
    assert "next orders" in text.lower() and "spend at stake" not in text.lower() and "not a forecast" in text


@every_format
def test_a_list_without_anybody_has_no_range(form):
    nobody = dict.fromkeys(("P1", "P2", "P3"), 0)
    text = words(form, dataclasses.replace(CRITICAL, counts=nobody, totals=nobody, stakes={}, top=[], actions={}))
    assert text.count("EUR 0") == 3 and "0 to 0" not in text


@every_format
def test_the_money_is_said_to_be_an_expectation(form):
    text = words(form, CRITICAL)
    assert ("what these customers usually spend in 90 days times the share of customers like them who stayed away for 90 days" in text
            and "an expectation, not a promise that a contact saves it." in text)
    assert ("In each tier those with most at stake stand first." in words(form, under(RANKED))) and "stand first" not in text
    assert "stand first" not in words(form, under(RANKED, UNLEARNED))


RULES = ("late or spending less by their own rhythm", "HIGH means", "revenue at or above the median", "LOW risk by their own rhythm",
         "ordered only once")
STAKES = ("Last order up to 30 days ago, and among the highest spend at stake", "No order for 31 to 90 days, and among the highest spend",
          "No order for 91 to 180 days, and among the highest spend", "of all customers silent for at most 180 days",
          "725 are not among the highest spend at stake, and on no list")


@every_format
@pytest.mark.parametrize("facts", [CRITICAL, UNLEARNED], ids=["learned", "unlearned"])
@pytest.mark.parametrize("rank", [{}, RANKED], ids=["score", "spend_at_stake"])
@pytest.mark.parametrize("membership", [{}, BY_STAKE], ids=["rules", "at_stake"])
def test_who_is_listed_is_said_as_it_was_decided(form, facts, rank, membership):
    """Where nothing was learned yet the rules decide, whatever is set."""
    text = words(form, under({"p1_needs_median_revenue": True, **rank, **membership}, facts))
    by_stake = bool(membership) and facts is CRITICAL
    assert [phrase in text for phrase in RULES] == [not by_stake] * len(RULES)
    assert [phrase in text for phrase in STAKES] == [by_stake] * len(STAKES)


@every_format
@pytest.mark.parametrize(("rules", "shown"), [({}, False), (RANKED, True), (BY_STAKE, True), ({**RANKED, **BY_STAKE}, True)], ids=str)
def test_the_first_customers_say_what_is_at_stake_where_it_decides(form, rules, shown):
    assert (f"usually every 11.; {AT_STAKE}" in words(form, under(rules))) == shown
    only = dataclasses.replace(under(rules), top=[customer(reason=AT_STAKE)])
    assert words(form, only).count("7 of 10") == 1, "nothing is said twice"
    none = dataclasses.replace(under(rules), top=[customer(at_stake=None)])
    assert "usually every 11." in words(form, none) and "None" not in words(form, none)


@pytest.mark.parametrize(("low", "high", "shown"), [
    (0, 0, (0, 0)), (0.4, 99.01, (0, 100)), (987.6, 987.6, (987, 988)), (999.5, 1000.01, (999, 1010)),
    (14_213.7, 21_564.1, (14_200, 21_600)), (100_000, 9_995_000.5, (100_000, 10_000_000)),
])
def test_an_interval_is_shown_in_three_figures_and_never_narrower(low, high, shown):
    told = brief._stake(Stake((low + high) / 2, low, high))
    assert (told["low"], told["high"]) == shown


@every_format
def test_the_meaning_of_a_tier_follows_the_profile_in_force(form):
    luxury = {**RULES_IN_FORCE, **Settings(_env_file=None, profile="luxury").rule_parameters()}
    text = words(form, dataclasses.replace(CRITICAL, rules=luxury))
    assert "Last order up to 60 days ago" in text and "No order for 61 to 180 days" in text and "181 to 360 days" in text


@every_format
def test_the_first_customers_are_named_by_id_with_their_reason(form):
    text = words(form, CRITICAL)
    assert "C-10482" in text and "No order for 24 days, usually every 11." in text and "C-931" in text


@every_format
def test_the_steps_are_the_actions_the_most_valuable_first(form):
    text = words(form, CRITICAL)
    steps = [text.index(step) for step in (
        "VIP outreach + 10 % loyalty incentive: 8 customers in P1", "Personal email + reminder: 35 customers in P1",
        "free shipping: 1,412 customers in P2", "20 % comeback offer + survey: 1 customer in P3")]
    assert steps == sorted(steps)


@every_format
def test_win_back_waits_on_a_warning_day(form):
    text = words(form, WARNING)
    assert "P3 (1 customer) can wait" in text and "comeback offer + survey: " not in text
    assert "can wait" not in words(form, CRITICAL)


@every_format
def test_a_quiet_day_is_calm(form):
    text = words(form, QUIET)
    assert "No alert: AT_RISK customers are 19.2 % of 6,000, 1.1 % above the mean" in text
    assert "The ordinary queue" in text and "Where to look" not in text


ORDINARY = "The lists below are the ordinary queue; work them in your usual rhythm, nothing extra is needed today."


@every_format
def test_a_quiet_day_says_once_what_to_do_with_its_lists(form):
    text = words(form, QUIET)
    assert text.count(ORDINARY) == 1 and "What to do today" not in text and "Nothing to act on" not in text


@every_format
def test_a_quiet_day_after_an_alert_carries_on_with_it(form):
    before = [alert_row(D - timedelta(days=back), 24.0) for back in range(7, 0, -1)]
    text = words(form, facts_of(alert_row(current=24.0, baseline=24.0), before=before))
    assert "work them in your usual rhythm and carry on with what the last alert started, nothing extra is needed today." in text


@every_format
def test_a_quiet_day_with_empty_lists_speaks_of_none(form):
    nobody = dict.fromkeys(("P1", "P2", "P3"), 0)
    text = words(form, dataclasses.replace(QUIET, counts=nobody, totals=nobody, top=[], actions={}))
    assert "Nobody is on the lists; nothing extra is needed today." in text and ORDINARY not in text


@every_format
@pytest.mark.parametrize("gate", ["history_warmup", "baseline_warmup", "min_sample"])
def test_a_safeguard_that_holds_the_alarm_leaves_the_queue_as_it_is(form, gate):
    text = words(form, facts_of(alert_row(sample=64, gate=gate)))
    assert f"Only the alarm is held back, not the queue. {ORDINARY}" in text
    assert "What to do today" not in text and "not to be acted on" not in text


@pytest.mark.parametrize("form", ["markdown", "html"])
def test_a_day_that_is_not_judged_tells_nobody_what_to_do_with_a_customer(form):
    action = CRITICAL.top[0]["recommended_action"]
    gated = words(form, facts_of(alert_row(gate="history_warmup")))
    assert "C-10482" in gated and action not in gated and " Do " not in gated
    assert action in words(form, QUIET)


@every_format
def test_a_gated_day_names_the_safeguard_and_still_shows_the_numbers(form):
    text = words(form, GATED)
    assert "Not judged: orders are not all in yet." in text
    assert "Orders are all in only through Sun 28 June 2026" in text
    assert "24.1 % of 6,000" in text and "Without the safeguard this would have been CRITICAL." in text


@every_format
def test_with_orders_missing_nobody_is_to_be_contacted(form):
    text = words(form, GATED)
    assert "The queue, not to be acted on" in text and "Do not contact from this queue" in text
    assert "C-10482" not in text and "load them" in text and "ordinary queue" not in text


@every_format
@pytest.mark.parametrize("gate", ["history_warmup", "baseline_warmup", "min_sample", "a_gate_of_next_year"])
def test_every_gate_has_its_sentence(form, gate):
    facts = facts_of(alert_row(current=3.0, baseline=0.0 if gate == "baseline_warmup" else 2.0, sample=64, gate=gate))
    assert "Not judged: " in words(form, facts) and "held the alert back" in words(form, facts)


@every_format
def test_it_says_what_it_is_not(form):
    text = words(form, CRITICAL)
    assert "It is not a probability of leaving" in text and "not a promise" in text
    assert "may come back without any contact; some of them do." in words(form, under(BY_STAKE))


@every_format
def test_a_shop_without_customers_has_a_brief(form):
    empty = facts_of(alert_row(current=None, baseline=None, sample=0, gate="history_warmup"), history=[], top=[], actions={},
                     counts={}, totals={}, newly_at_risk=None, first_order_date=None, stakes=None, next_orders={}, audiences={}, links={})
    assert "no customer has an order by Tue 30 June 2026" in words(form, empty)


@every_format
def test_one_of_a_kind_is_singular(form):
    text = words(form, facts_of(alert_row(current=100.0, baseline=50.0, sample=1), top=[customer()],
                                counts={"P1": 1, "P2": 0, "P3": 0}, totals={"P1": 1, "P2": 0, "P3": 0}, audiences={},
                                newly_at_risk={"customers": 1, "on_p2": 0, "one_order": 1}, actions={"P1": [("Call", 1)]}))
    assert "Call: 1 customer in P1" in text and "The first customer" in text
    assert "1 customer who last ordered between" in text and "1 has ordered only once, so there is no rhythm" in text
    assert "Of all 1 AT_RISK customer, 1 is in no tier" in text
    assert not re.search(r"\b1 (customers|days|have|are)\b", text)


@every_format
@pytest.mark.parametrize(("relative", "shown"), [
    (14.96, "14.96 %"), (15.0, "15.0 %"), (24.999999, "24.999999 %"), (25.04, "25.0 %"),
])
def test_a_rise_is_never_rounded_across_a_threshold(form, relative, shown):
    assert f"{shown} above the mean" in words(form, facts_of(alert_row(current=20.0 * (1 + relative / 100), baseline=20.0)))


@every_format
def test_days_flagged_in_a_row_are_counted(form):
    before = [alert_row(D - timedelta(days=back), 24.0 if back < 3 else 19.0) for back in range(20, 0, -1)]
    text = words(form, facts_of(alert_row(), before=before))
    assert "It is the 3rd flagged day in a row, since Sun 28 June 2026." in text
    assert "highest of the 21 days shown" in text
    assert "2 of the 7 days in that mean were flagged too, so the rise is understated." in text


@every_format
def test_calm_after_flagged_days_is_not_called_recovery(form):
    before = [alert_row(D - timedelta(days=back), 24.0) for back in range(7, 0, -1)]
    text = words(form, facts_of(alert_row(current=24.0, baseline=24.0), before=before))
    assert "No new alert" in text
    assert "7 of the 7 days in that mean were flagged too" in text and "calm does not yet mean recovered" in text


@every_format
def test_the_list_says_who_was_left_out_and_why(form):
    text = words(form, CRITICAL)
    assert "audience_P1_2026-06-30.csv" in text and "3 left out: without consent" in text
    assert "43 of the tier's 46 customers" in text and "1,412 customers" in text
    excluded = {"no consent": 1, "holdout": 8, "handed over in the last 14 days": 4}
    p1 = {**CRITICAL.audiences["P1"], "excluded": excluded}
    text = words(form, dataclasses.replace(CRITICAL, audiences={**CRITICAL.audiences, "P1": p1}))
    assert "13 left out: 1 without consent, 8 in the holdout, 4 handed over in the last 14 days" in text
    assert "The holdout (8 customers of these tiers) is drawn by chance" in text


@every_format
def test_a_day_without_holdout_does_not_speak_of_one(form):
    assert "holdout" not in words(form, CRITICAL)


@every_format
def test_the_brief_leads_to_the_people_behind_the_alarm(form):
    text = words(form, CRITICAL)
    assert ("Where to look: 780 customers who last ordered between Sun 24 May 2026 and Sat 30 May 2026 became AT_RISK in the last "
            "7 days.") in text
    assert "Of these 780, 55 are in P2; 532 have ordered only once, so they have no rhythm to be late by, and are on no list" in text
    assert "193 are LOW risk by their own rhythm, and on no list." in text
    assert "Of all 1,446 AT_RISK customers, 34 are in no tier, so on no list." in text


@every_format
def test_groups_nobody_is_in_are_left_out_of_the_people_behind_the_alarm(form):
    text = words(form, dataclasses.replace(CRITICAL, newly_at_risk={"customers": 9, "on_p2": 9, "one_order": 0},
                                           totals={"P1": 46, "P2": 1_446, "P3": 1}))
    assert "Of these 9, 9 are in P2." in text and "ordered only once" not in text and "in no tier" not in text
    nobody = {"customers": 0, "on_p2": 0, "one_order": 0}
    assert "last ordered between Sun 24 May 2026" in words(form, dataclasses.replace(CRITICAL, newly_at_risk=nobody))


def test_the_window_to_look_at_ends_where_at_risk_ends():
    short = {**RULES_IN_FORCE, **Settings(_env_file=None, active_days=30, at_risk_days=33).rule_parameters()}
    assert "between Thu 28 May 2026 and Sat 30 May 2026" in words("markdown", dataclasses.replace(CRITICAL, rules=short))


@pytest.mark.parametrize("form", ["markdown", "html"])
@pytest.mark.parametrize(("current", "baseline", "shown"), [
    (27.07, 20.42, "+6.7 points"), (19.04, 19.06, "-0.1 points"), (19.0, 19.0, "0.0 points"),
])
def test_the_difference_is_that_of_the_shares_beside_it(form, current, baseline, shown):
    text = words(form, facts_of(alert_row(current=current, baseline=baseline)))
    assert shown in text


@every_format
def test_shares_that_look_different_are_not_called_level(form):
    assert "0.04 % above the mean of the 7 days before (20.0 %)" in words(form, facts_of(alert_row(current=20.054, baseline=20.046)))
    assert "level with the mean" in words(form, facts_of(alert_row(current=20.03, baseline=20.025)))


@every_format
def test_a_history_too_short_says_from_when_the_alarm_judges(form):
    text = words(form, facts_of(alert_row(current=0.0, baseline=0.0, gate="history_warmup"), first_order_date=date(2026, 6, 20)))
    assert "The alarm judges from Fri 25 September 2026 on." in text
    assert "The first order was on Sat 20 June 2026; the alarm judges from Fri 25 September 2026 on." in text
    assert "judges from" not in words(form, GATED)


def test_the_chart_is_described_by_the_lines_it_has():
    def described(**rows: Any) -> str:
        return words("slack", facts_of(alert_row(gate="history_warmup", **rows)))

    assert "against its 7-day mean and the WARNING and CRITICAL lines" in described()
    assert "in %, against its 7-day mean; last value 0.0 %" in described(current=0.0, baseline=0.0)
    assert "on Tue 30 June 2026, in %; last value 0.0 %" in described(current=0.0, baseline=None)


@every_format
@pytest.mark.parametrize("mode", ["off", "shadow", "pilot", "live"])
def test_every_mode_is_named(form, mode):
    assert f"Mode {mode}" in words(form, dataclasses.replace(QUIET, mode=mode)).replace("Mode response off", "Mode off")


@hypothesis_settings(max_examples=25, deadline=None)
@given(st.floats(0.5, 100), st.floats(0.5, 80), st.integers(1, 3_000_000))
def test_the_numbers_shown_are_the_facts(current, baseline, sample):
    facts = facts_of(alert_row(current=current, baseline=baseline, sample=sample))
    text = words("markdown", facts)
    at_risk, expected = facts.daily["at_risk"], round(sample * baseline / 100)
    assert f"{current:.1f} % of {sample:,}" in text and f"({baseline:.1f} %)" in text
    assert f"In people: {at_risk:,} AT_RISK" in text and f"({expected:,})" in text
    if at_risk != expected:
        assert f"{abs(at_risk - expected):,} {'more' if at_risk > expected else 'fewer'} than" in text


# --- safeguards ----------------------------------------------------------------------------------------------------------

GATES = ["data_incomplete", "history_warmup", "baseline_warmup", "min_sample"]


def test_all_safeguards_passed_are_listed_in_order_then_the_mode():
    rows = safeguards(alert_row(), D, SETTINGS)
    assert [(name, passed) for name, passed, _ in rows] == [
        ("data complete", True), ("history long enough", True), ("baseline above zero", True), ("enough customers", True),
        ("mode", False)]


@pytest.mark.parametrize("gate", GATES)
def test_nothing_is_claimed_about_safeguards_behind_the_one_that_held(gate):
    rows = safeguards(alert_row(gate=gate), D - timedelta(days=1), SETTINGS)
    assert [passed for _, passed, _ in rows[:-1]] == [True] * GATES.index(gate) + [False]


def test_a_safeguard_names_the_setting_in_force():
    small = Settings(_env_file=None, min_sample=500, profile="luxury", mode="live")
    rows = safeguards(alert_row(gate="min_sample", sample=64), D, small)
    assert "187 days" in rows[1][2] and "64 customers" in rows[3][2] and "500" in rows[3][2]
    assert rows[-1][:2] == ("mode", True)


# --- nothing in the data can act -----------------------------------------------------------------------------------------

NASTY = [
    "<!channel>", "<!here|x>", "<@U123>", "<#C1>", "<http://evil.example|click>", "&lt;!channel&gt;",
    "*b*", "_i_", "~s~", "`c`", "```", ":tada:", "::divider", "\n::header\n", "|", "\\|", "\\",
    "[x](http://evil.example)", "![x](http://evil.example/p.png)", "https://evil.example", "www.evil.example", "a@evil.example",
    "<img src=x onerror=alert(1)>", "<script>alert(1)</script>", "</td>", "<!--", "\"'", "javascript:alert(1)",
    "{{ 7*7 }}", "{% raw %}", "# h", "- l", "1. x", "=1+1", "$x$", "~~~", "---", "    ",
    "\r\n", "\u2028", "\x00", "\u202e", "\ufeff", "\ud800", "😀", "日本",
]
pieces = st.sampled_from(NASTY) | st.text(min_size=1, max_size=9)
nasty = st.lists(pieces, max_size=6).map("".join) | st.builds(
    lambda piece, times: (piece * times)[:10_000], pieces, st.integers(1, 10_000))


@st.composite
def nasty_facts(draw: st.DrawFn) -> BriefFacts:
    """A flagged or gated day whose every text comes from someone hostile."""
    gate = draw(st.none() | st.sampled_from(GATES) | nasty)
    top = draw(st.lists(st.builds(lambda *texts: {**customer(*texts[:4]), "recommended_action": texts[4]},
                                  nasty, nasty, nasty, st.none() | nasty, nasty), max_size=5))
    rules = draw(st.sampled_from([{}, RANKED, BY_STAKE]))

    def text() -> str:
        return draw(nasty)

    return facts_of(
        alert_row(gate=gate or None),
        rules={**RULES_IN_FORCE, **rules},
        top=top,
        actions={tier: [(text(), 1) for _ in range(draw(st.integers(0, 12)))] for tier in ("P1", "P2")},
        audiences={"P1": {"file": text(), "rows": 1, "excluded": {text(): 1 for _ in range(3)}}},
        currency=text(), shop_name=text(), mode=text(),
        links={"run": text(), text(): "https://x.example/" + text(), "pack": text()},
        safeguards=[(text(), draw(st.booleans()), text()) for _ in range(draw(st.integers(0, 6)))],
    )


fuzz = hypothesis_settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))


def assert_within_limits(message: dict[str, Any]) -> None:
    assert len(message["text"]) <= 4_000
    assert len(message["blocks"]) <= 50
    assert len(json.dumps(message["blocks"])) < 12_000
    json.dumps(message, ensure_ascii=False).encode()  # no half of a surrogate pair
    for block in message["blocks"]:
        Block.parse(block).to_dict()
        if block["type"] == "header":
            assert block["text"]["type"] == "plain_text" and 1 <= len(block["text"]["text"]) <= 150
        if "fields" in block:
            assert len(block["fields"]) <= 10 and all(1 <= len(item["text"]) <= 2_000 for item in block["fields"])
        if block["type"] == "section" and "text" in block:
            assert 1 <= len(block["text"]["text"]) <= 3_000
        if block["type"] == "context":
            assert 1 <= len(block["elements"]) <= 10


@fuzz
@given(nasty_facts())
def test_slack_keeps_its_limits_and_escapes_everything(facts):
    message = render_slack(facts, SETTINGS)
    assert_within_limits(message)
    for text in slack_strings(message):
        ours = re.sub(r"<https?://[^<>|\s]+\|[^<>|]*>", "", text)  # the only angle brackets are links we wrote ourselves
        assert "<" not in ours and ">" not in ours
        assert re.sub(r"&(amp|lt|gt);", "", text).count("&") == 0


@fuzz
@given(nasty_facts())
def test_a_markdown_table_keeps_its_cells_and_no_link_or_image_gets_in(facts):
    tokens = MarkdownIt("commonmark").enable("table").enable("strikethrough").parse(render_markdown(facts, SETTINGS))
    widths = [token.type for token in tokens if token.type in ("tr_open", "th_open", "td_open")]
    rows = " ".join("R" if kind == "tr_open" else "c" for kind in widths).split("R")[1:]
    sizes = [len(row.split()) for row in rows]
    shown = facts.top if facts.alert["gate"] != "data_incomplete" else []
    columns = 5 if facts.alert["gate"] else 6
    assert sizes == [3] * 6 + [5] * 4 + ([columns] * (1 + len(shown)) if shown else [])
    inline = [child for token in tokens if token.type == "inline" for child in token.children]
    assert not [token for token in tokens + inline if token.type.startswith(("html", "code", "fence", "s_open", "em_open", "hr"))]
    assert [child.attrs["src"] for child in inline if child.type == "image"] == ["at_risk_trend.png"]
    targets = [child.attrs["href"] for child in inline if child.type == "link_open"]
    files = [target for target in targets if not target.startswith("https://x.example/")]
    assert len(targets) <= 4 and all(target.startswith("http") or ":" not in target for target in files)


@fuzz
@given(nasty_facts())
def test_html_stays_the_document_the_template_wrote(facts):
    page = parsed_html(render_html(facts, SETTINGS, chart_png=PNG))
    tags = {tag for tag, _ in page.tags}
    assert tags <= {"html", "head", "meta", "title", "style", "body", "div", "table", "tr", "td", "span", "b", "br", "h1", "h2",
                    "p", "img", "code", "a"}
    assert [attrs["src"][:22] for tag, attrs in page.tags if tag == "img"] == ["data:image/png;base64,"]
    assert all(attrs["href"].startswith(("http://", "https://")) for tag, attrs in page.tags if tag == "a")
    assert not [name for _, attrs in page.tags for name in attrs if name.startswith("on")]


HOSTILE = facts_of(alert_row(), shop_name="A&B <!channel> *bold*",
                   top=[customer("a|b`c_d\nx", "P1", "<@U1> says [x](http://evil.example) <b>")])


def test_slack_shows_hostile_text_literally():
    joined = "\n".join(slack_strings(render_slack(HOSTILE, SETTINGS)))
    assert "A&amp;B &lt;!channel&gt; *\u200bbold*\u200b" in joined
    assert "&lt;@U1&gt; says" in joined
    assert "`a|bˋc_d x`" in joined  # an id in code style stays fit for copying; only a backtick could end the style


def test_markdown_shows_hostile_text_literally():
    rendered = html.unescape(rendered_markdown(HOSTILE))
    assert "<td style=\"text-align:left\">a|b`c_d x</td>" in rendered
    assert "<@U1> says [x](http://evil.example) <b>" in rendered and "A&B <!channel> *bold*" in rendered


def test_html_escapes_hostile_text():
    source = render_html(HOSTILE, SETTINGS, chart_png=None)
    assert "A&amp;B &lt;!channel&gt; *bold*" in source and "&lt;b&gt;" in source


@pytest.mark.parametrize("target", [
    "javascript:alert(1)", "data:text/html,x", "file:///etc/passwd", "//evil.example", "http://", "action_packs/x",
])
@pytest.mark.parametrize("render", [render_markdown, render_html, render_slack])
def test_only_web_addresses_become_links(render, target):
    rendered = str(render(dataclasses.replace(CRITICAL, links={"run": target}), SETTINGS))
    assert not re.search(r"<a |\]\(<(?!audience)|\|Dagster run>", rendered)
    assert re.search(r"<a |\]\(<https://d.example>|\|Dagster run>",
                     str(render(dataclasses.replace(CRITICAL, links={"run": "https://d.example"}), SETTINGS)))


def test_nothing_personal_but_the_opaque_id_reaches_the_message():
    row = {**customer(), "email": "ann@shop.example", "country": "Freedonia", "loyalty_tier": "gold"}
    rendered = json.dumps(render_slack(dataclasses.replace(CRITICAL, top=[row]), SETTINGS))
    assert "C-10482" in rendered and not re.search("ann@|Freedonia|gold", rendered)


# --- Slack's budget ------------------------------------------------------------------------------------------------------


def section(text: str) -> dict[str, Any]:
    return {"type": "section", "text": {"type": "mrkdwn", "text": text}}


blocks = st.lists(st.one_of(
    st.builds(section, nasty.filter(bool)),
    st.builds(lambda text: {"type": "header", "text": {"type": "plain_text", "text": text}}, nasty.filter(bool)),
    st.builds(lambda texts: {"type": "section", "fields": [{"type": "mrkdwn", "text": text} for text in texts]},
              st.lists(nasty.filter(bool), min_size=1, max_size=14)),
    st.builds(lambda texts: {"type": "context", "elements": [{"type": "mrkdwn", "text": text} for text in texts]},
              st.lists(nasty.filter(bool), min_size=1, max_size=14)),
    st.just({"type": "divider"}),
), max_size=70)


@hypothesis_settings(fuzz, max_examples=30)
@given(nasty, blocks)
def test_any_blocks_are_brought_within_the_limits(text, given_blocks):
    assert_within_limits(fit_slack(text, given_blocks))


def test_a_short_message_is_left_alone():
    assert fit_slack("t", [section("hello")]) == {"text": "t", "blocks": [section("hello")]}


def test_a_cut_says_so_and_never_ends_inside_an_entity_or_a_link():
    fitted = fit_slack("x", [section("&lt;" * 4_000)] * 60)
    assert "Shortened" in fitted["blocks"][-1]["elements"][0]["text"]
    for width in range(20, 60):
        cut = brief._clip("abcdefghijklm &amp; <https://x.example/abc|label> and more of it", width)
        assert len(cut) <= width and cut.count("<") == cut.count(">") and not re.search(r"&[a-z]*…$", cut)


def test_blocks_slack_would_refuse_are_refused_here():
    with pytest.raises(PackError, match="block 1"):
        fit_slack("t", [{"type": "no_such_block"}])


def test_the_chart_description_can_be_given_or_left_out():
    def last(**options: str) -> str:
        return json.dumps(render_slack(CRITICAL, SETTINGS, **options)["blocks"][-1])

    assert "Chart in the Action Pack: AT_RISK share" in last()
    assert "Chart in the Action Pack: a &lt;line&gt;" in last(chart_alt="a <line>")
    assert "Chart" not in last(chart_alt="")


# --- the chart in the mail -----------------------------------------------------------------------------------------------


def test_the_chart_is_embedded_attached_or_absent():
    assert "data:image/png;base64,iVBO" in render_html(CRITICAL, SETTINGS, chart_png=PNG)
    assert 'src="cid:trend@pack"' in render_html(CRITICAL, SETTINGS, chart_cid="trend@pack")
    assert "<img" not in render_html(CRITICAL, SETTINGS, chart_png=None)


# --- a company's own templates -------------------------------------------------------------------------------------------


@pytest.fixture
def own(tmp_path: Path) -> Settings:
    return Settings(_env_file=None, templates_dir=tmp_path)


def write(own: Settings, name: str, text: str) -> None:
    assert own.templates_dir is not None
    (own.templates_dir / name).write_text(text, encoding="utf-8")


def test_a_block_can_be_overridden_and_still_hold_the_shipped_one(own):
    write(own, "briefing.md.j2", '{% extends "shipped/briefing.md.j2" %}\n'
                                 "{% block reading %}\n## Ask {{ brief.shop }}\n{{ super() }}\n{% endblock %}")
    text = render_markdown(dataclasses.replace(CRITICAL, shop_name="*Us*"), own)
    assert r"## Ask \*Us\*" in text and "not a probability" in text and "| **P1** prevention |" in text


def test_other_words_speak_in_every_format(own):
    write(own, "words.j2", (brief.SHIPPED_TEMPLATES / "words.j2").read_text(encoding="utf-8")
          .replace("It is not a probability of leaving", "Keine Wahrscheinlichkeit"))
    for render in (render_markdown, render_html, render_slack):
        assert "Keine Wahrscheinlichkeit" in str(render(CRITICAL, own))


def test_a_whole_format_can_be_replaced_and_data_stays_escaped(own):
    write(own, "briefing.slack.j2", "::text\nhi\n::section\n*{{ brief.shop }}*\n::divider\n")
    message = render_slack(dataclasses.replace(CRITICAL, shop_name="<!channel>"), own)
    assert [block["type"] for block in message["blocks"]] == ["section", "divider"]
    assert message["blocks"][0]["text"]["text"] == "*&lt;!channel&gt;*"


def test_a_macro_of_ones_own_is_escaped_once(own):
    write(own, "briefing.md.j2", "{% macro m(x) %}<b>{{ x }}</b>{% endmacro %}{{ m(brief.shop) }}")
    assert render_markdown(dataclasses.replace(CRITICAL, shop_name="A&B"), own) == "<b>A&amp;B</b>\n"


def test_a_template_changed_while_the_process_lives_is_used_at_once(own):
    shipped = render_markdown(CRITICAL, own)
    write(own, "briefing.md.j2", "one")
    one = render_markdown(CRITICAL, own)
    write(own, "briefing.md.j2", "two")
    assert (one, render_markdown(CRITICAL, own)) == ("one\n", "two\n") and shipped.startswith("# ")


@pytest.mark.parametrize(("source", "line", "what"), [
    ("a\n{{ brief.no_such_number }}\n", 2, "no_such_number"),
    ("a\n\n{{ nobody }}\n", 3, "nobody"),
    ("a\n{% if %}\n", 2, ""),
    ("a\n{{ 1 / 0 }}\n", 2, "division"),
    ("{{ brief.date|no_such_filter }}", 1, "no_such_filter"),
    ('{% extends "nowhere.j2" %}', 1, "nowhere.j2"),
    ('{% extends "briefing.md.j2" %}', None, "shipped/briefing.md.j2"),
])
def test_a_broken_template_is_named_with_its_line(own, source, line, what):
    write(own, "briefing.md.j2", source)
    with pytest.raises(PackError, match=r"briefing\.md\.j2") as caught:
        render_markdown(CRITICAL, own)
    assert what in str(caught.value)
    assert f"template briefing.md.j2 (in {own.templates_dir})" in str(caught.value)
    assert line is None or f"(in {own.templates_dir}), line {line}:" in str(caught.value)
    assert caught.value.__cause__ is None, "the command line shows the innermost cause, which would be Jinja's bare message"


@pytest.mark.parametrize("folder", [".", "sub/.."])
def test_a_broken_template_in_a_relative_folder_is_found_as_well(own, folder):
    (own.templates_dir / "sub").mkdir()
    write(own, "briefing.md.j2", "a\n{{ nosuch.thing }}")
    with pytest.raises(PackError) as caught:
        render_markdown(CRITICAL, Settings(_env_file=None, templates_dir=folder))
    assert str(caught.value).startswith(f"template briefing.md.j2 (in {folder}), line 2: 'nosuch' is undefined")


@pytest.mark.parametrize(("name", "render", "also"), [
    ("briefing.md.j2", render_markdown, "reading"), ("briefing.html.j2", render_html, "style"),
    ("briefing.slack.j2", render_slack, "reading"),
])
def test_a_block_that_nothing_shows_is_refused(own, name, render, also):
    write(own, name, f'{{% extends "shipped/{name}" %}}\n{{% if true %}}\n{{% block heading_typo %}}x{{% endblock %}}{{% endif %}}')
    with pytest.raises(PackError) as caught:
        render(CRITICAL, own)
    message = str(caught.value)
    assert f"template {name} (in {own.templates_dir}), line 3: there is no block 'heading_typo'" in message
    allowed = message.partition("allowed are ")[2].split(", ")
    assert allowed[0] == "open" and {"title", "contact", "close", also} <= set(allowed)
    with pytest.raises(PackError, match="heading_typo"):
        check_templates(own)


def test_blocks_of_ones_own_may_stand_inside_others_or_in_ones_own_parent(own):
    write(own, "briefing.md.j2", '{% extends "ours.j2" %}{% block footer %}ours{% endblock %}')
    write(own, "ours.j2", '{% extends "shipped/briefing.md.j2" %}'
                          "{% block reading %}{% block footer %}{% endblock %}{% endblock %}")
    check_templates(own)
    assert render_markdown(CRITICAL, own).endswith("ours\n")


def test_a_base_of_ones_own_may_leave_parts_out(own):
    write(own, "base.j2", "{% block title %}{% endblock %}")
    check_templates(own)
    assert render_markdown(CRITICAL, own).startswith("# ") and "##" not in render_markdown(CRITICAL, own)


@pytest.mark.parametrize("source", ["{% if %}", "{{ x|nosuch }}"])
def test_what_needs_no_facts_is_found_before_anything_is_built(own, source):
    write(own, "briefing.slack.j2", source)
    with pytest.raises(PackError, match=r"briefing\.slack\.j2 \(in .*\), line 1:"):
        check_templates(own)


def test_the_template_at_fault_is_named_not_the_one_that_uses_it(own):
    write(own, "words.j2", "{% macro title() %}\n\n{{ oops }}{% endmacro %}")
    with pytest.raises(PackError, match=r"template words\.j2 \(in .*\), line 3: 'oops' is undefined"):
        render_markdown(CRITICAL, own)


@pytest.mark.parametrize("source", ["::button\nx", "no part yet\n::section\nx"])
def test_a_slack_template_with_unknown_parts_is_refused(own, source):
    write(own, "briefing.slack.j2", source)
    with pytest.raises(PackError, match=r"briefing\.slack\.j2"):
        render_slack(CRITICAL, own)


def test_a_templates_folder_that_is_not_there_is_an_error(tmp_path):
    with pytest.raises(PackError, match="RETENTION_OPS_TEMPLATES_DIR"):
        render_markdown(CRITICAL, Settings(_env_file=None, templates_dir=tmp_path / "missing"))
    with pytest.raises(PackError, match="not a folder"):
        check_templates(Settings(_env_file=None, templates_dir=tmp_path / "missing"))


# --- the fingerprint -----------------------------------------------------------------------------------------------------


def test_the_fingerprint_follows_every_template_in_use(own):
    assert re.fullmatch("[0-9a-f]{64}", template_fingerprint(own)) and template_fingerprint(own) == template_fingerprint(SETTINGS)
    prints = {template_fingerprint(own)}
    for name, text in (("words.j2", "a"), ("words.j2", "b"), ("extra.j2", "b")):
        write(own, name, text)
        prints.add(template_fingerprint(own))
    assert len(prints) == 4


def test_line_endings_do_not_change_the_fingerprint(own):
    write(own, "words.j2", "a\nb\n")
    unix = template_fingerprint(own)
    (own.templates_dir / "words.j2").write_bytes(b"a\r\nb\r\n")
    assert template_fingerprint(own) == unix


def test_the_same_facts_give_the_same_brief():
    assert render_markdown(CRITICAL, SETTINGS) == render_markdown(CRITICAL, SETTINGS)
    assert render_slack(CRITICAL, SETTINGS) == render_slack(CRITICAL, SETTINGS)
