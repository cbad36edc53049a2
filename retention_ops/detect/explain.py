"""The rules in sentences, with the numbers of one date or one customer. Computed from the orders, stored or not."""

from __future__ import annotations

from datetime import date
from typing import Any

import pandas as pd

from retention_ops.detect.alerts import AT_RISK, SHORTFALL, alert_of, answered_rules
from retention_ops.detect.compute import priority_order, workspace
from retention_ops.detect.missing import Missing, who_is_missing
from retention_ops.detect.since import Records, then_and_now
from retention_ops.errors import RetentionOpsError, UsageError
from retention_ops.settings import Settings
from retention_ops.sources.contact import no_contact
from retention_ops.warehouse.seam import Warehouse


def _row(frame: pd.DataFrame) -> dict[str, Any]:
    return {name: None if pd.isna(value) else value for name, value in frame.iloc[0].items()}


def _days(count: int) -> str:
    return "1 day" if count == 1 else f"{count:,} days"


def _customers(count: int) -> str:
    return "1 customer" if count == 1 else f"{count:,} customers"


def gate_sentence(gate: str, alert: dict[str, Any], complete_through: date, settings: Settings) -> str:
    """Why a safeguard held the alert back."""
    match gate:
        case "data_incomplete":
            return (f"Held back (data_incomplete): orders are complete only through {complete_through}; "
                    "a load that stopped must not look like customers leaving.")
        case "history_warmup":
            return (f"Held back (history_warmup): the alert waits until {settings.at_risk_limit + 7} days after the first order; "
                    "before that nobody can be INACTIVE and the mix is not settled.")
        case "partial_day":
            return ("Held back (partial_day): data may be incomplete. The last day alone has less than a quarter of what was due, and the "
                    "day before was in order; a second such day alerts.")
        case "baseline_warmup" if alert["alert_type"] == SHORTFALL:
            return "Held back (baseline_warmup): nobody came back in the 4 weeks before, so nobody can be said to be due."
        case "min_sample" if alert["alert_type"] == SHORTFALL:
            return (f"Held back (min_sample): {_customers(int(alert['sample_size']))} due in the window, fewer than {settings.min_due}; "
                    "chance decides there.")
        case "baseline_warmup":
            return "Held back (baseline_warmup): in the 7 days before nobody was AT_RISK, so there is nothing to compare with."
        case _:
            return (f"Held back (min_sample): {_customers(int(alert['sample_size']))}, fewer than {settings.min_sample}; "
                    "a few people would move the share too much.")


def explain_date(lake: Warehouse, day: date, known: Records | None = None) -> tuple[dict[str, Any], list[str]]:
    """The alert of D: its row, and what it means in sentences. With `known`, also what was seen then, under the key `then`."""
    settings = lake.settings
    with workspace(lake) as space:
        if day < space.orders.first_date:
            raise UsageError(f"{day} is before the first order on {space.orders.first_date}: there is nothing to explain")
        space.build("alert_logic", day)
        rows = space.rows("alert_logic")
        alert, short = (_row(rows[rows["alert_type"] == rule]) for rule in (AT_RISK, SHORTFALL))
        missing = who_is_missing(space, day, short) if short["alert_flag"] else None
        daily = space.rows("retention_daily")
        daily = _row(daily[daily["as_of_date"].dt.date == day])
        complete_through = space.orders.complete_through
    sentences = [
        f"The rule: AT_RISK customers (last order {settings.active_limit + 1} to {settings.at_risk_limit} days ago) as a share of all "
        f"customers, against the mean of the 7 previous days. WARNING from {alert['threshold_warning']:g} % above that mean, "
        f"CRITICAL from {alert['threshold_critical']:g} %. Only increases alert.",
        f"On {day}: {int(daily['at_risk']):,} of {_customers(int(daily['customers']))} AT_RISK"
        + (f", {alert['current_value']:.2f} %" if alert["current_value"] is not None else "")
        + f" ({int(daily['active']):,} ACTIVE, {int(daily['inactive']):,} INACTIVE).",
    ]
    if alert["delta_relative_pct"] is not None:
        change = "above" if alert["delta_pct"] >= 0 else "below"
        sentences.append(
            f"The 7 days before had {alert['baseline_value']:.2f} % on average: {abs(alert['delta_pct']):.2f} points "
            f"or {abs(alert['delta_relative_pct']):.2f} % {change}."
        )
    if alert["gate"]:
        sentences.append(gate_sentence(alert["gate"], alert, complete_through, settings))
    sentences.append(_verdict(alert))
    sentences += _shortfall(short, missing, complete_through, settings)
    lead = alert_of([alert, short], answered_rules(settings))
    if lead["alert_flag"]:
        by = "both rules" if alert["alert_flag"] and short["alert_flag"] else lead["alert_type"]
        sentences.append(f"The day is {lead['severity']}, by {by}.")
    if known is not None:
        then, told = then_and_now(lake, day, rows, known)
        return {**lead, "then": then}, [*sentences, *told]
    return lead, sentences


def _verdict(row: dict[str, Any]) -> str:
    return f"Verdict: {row['severity']}" + (", the alert fires." if row["alert_flag"] else ", no alert.")


def _shortfall(row: dict[str, Any], missing: Missing | None, complete_through: date, settings: Settings) -> list[str]:
    """The second rule: what was due, how sure, who is missing."""
    sentences = [
        "The second rule: customers who came back, against how many were due by their own rhythm (what customers with the same usual gap "
        "and silence did in the 26 weeks before, on that weekday, at the level of the last 4 weeks), over the 3 to 14 days up to the date "
        f"that fall short most. WARNING from {settings.shortfall_warning:g} times its noise, CRITICAL from "
        f"{settings.shortfall_critical:g}; two thirds of that are enough where it lasts for 8 days running."
    ]
    if row["sentence"]:
        sentences.append(
            f"{row['sentence']}. {row['expected_low']:.0f} to {row['expected_high']:.0f} would be usual; the shortfall is "
            f"{row['score']:.2f} times its noise (days here vary {row['overdispersion']:.1f} times as much as pure chance)"
            + (f", and at least {row['lasting_score']:.2f} times on each of the 8 days up to it." if _lasts(row) else ".")
        )
    if row["gate"]:
        sentences.append(gate_sentence(row["gate"], row, complete_through, settings))
    if missing:
        sentences.append(f"{_customers(missing.overdue)} were due, did not come and are silent for longer than usual; their usual orders, "
                         f"times the chance of each, are {missing.value_due:,.2f}.")
        part = missing.carried_by()
        sentences.append(f"One part stands out: {part['attribute']} {part['value']}, {part['expected']:.0f} due, {part['observed']} came."
                         if part else "No part of the customers stands out: they stay away alike.")
    switched = "" if settings.shortfall_response else " The response to this rule is switched off (shortfall_response)."
    return [*sentences, _verdict(row) + switched]


def _lasts(row: dict[str, Any]) -> bool:
    """Its eight days weigh more than its own."""
    return row["alert_flag"] and row["lasting_score"] is not None and 1.5 * row["lasting_score"] > row["score"]


def explain_customer(lake: Warehouse, customer_id: str, day: date) -> tuple[dict[str, Any], list[str]]:
    """Why a customer is or is not on a list on D: the churn row with its tier, and every signal in a sentence."""
    with workspace(lake) as space:
        space.build("customer_priority", day)
        churn = space.rows("churn_detection")
        churn = churn[churn["customer_id"] == customer_id]
        if churn.empty:
            raise RetentionOpsError(f"customer {customer_id!r} has no order by {day}; check the id, or choose a later --date")
        queue = space.rows("customer_priority", priority_order(lake.settings)).reset_index(drop=True)
        rates = space.rows("return_rates")
        currency = space.orders.currency
        # all of them, because a statement must not name a customer: BigQuery keeps its text
        refunds = space.rows("refunds") if space.orders.refunds else None
    row = _row(churn)
    row["refunded_cents"] = 0 if refunds is None else int(refunds.loc[
        (refunds["customer_id"] == customer_id) & (refunds["refund_date"].dt.date <= day), "refund_cents"].sum())
    queued = queue[queue["customer_id"] == customer_id]
    row["priority"] = _row(queued) if len(queued) else None
    row["rank"] = int(queued.index[0]) + 1 if len(queued) else None
    opted_out = no_contact(lake, day)
    row["refused_consent"], row["suppressed"] = customer_id in opted_out.refused, customer_id in opted_out.suppressed
    row["by_stake"] = lake.settings.membership == "at_stake" and len(rates) > 0
    row["return_rate"] = cell_of(row, rates) if row["days_since_last_order"] <= 2 * lake.settings.at_risk_limit else None
    return row, sentences_for(row, day, currency, len(queue), lake.settings)


def sentences_for(row: dict[str, Any], day: date, currency: str, listed: int, settings: Settings) -> list[str]:
    """Every signal, what is at stake and the tier in sentences. `row` is a churn_detection row with priority (its row of the queue of
    `listed`, or None), rank, refused_consent, suppressed, by_stake (whether what is at stake decides who is listed) and, where the
    orders were asked, return_rate (what `cell_of` found) and refunded_cents (what was paid back by D)."""
    return [*_signals(row, day, currency, settings), *_at_stake(row, day, currency), *_tier(row, listed, settings)]


def cell_of(row: dict[str, Any], rates: pd.DataFrame) -> dict[str, Any] | None:
    """What a customer is compared with: the row of return_rates for a row of churn_detection, and what its cell stays below
    (`visits_below`, `recency_below`, `lateness_below`; None: open). None where there are no rates.

    Cells are named by what they begin with: the customer's has the largest beginnings that are not above the customer's own values.
    """
    gaps, span = int(row["order_days"]) - 1, row["last_order_date"].toordinal() - row["first_order_date"].toordinal()
    late = rates["lateness"] * span <= 100 * row["days_since_last_order"] * gaps if gaps else rates["lateness"] < 0
    own = rates[(rates["visits"] <= row["order_days"]) & (rates["recency"] <= row["days_since_last_order"]) & late]
    if own.empty:
        return None
    cell = _row(own.sort_values(["visits", "recency", "lateness"]).tail(1))
    above = {name: rates.loc[rates[name] > cell[name], name] for name in ("visits", "recency", "lateness")}
    return {**cell, **{f"{name}_below": int(values.min()) if len(values) else None for name, values in above.items()}}


def _signals(row: dict[str, Any], day: date, currency: str, settings: Settings) -> list[str]:
    days, orders = int(row["days_since_last_order"]), int(row["total_orders"])
    late, small, unsettled = row["is_frequency_drop"], row["is_value_drop"], row["is_status_inconsistent"]
    average, back = row["total_revenue_cents"] / orders / 100, row.get("refunded_cents") or 0
    # where everything was refunded there is nothing to compare with
    share = f"{100 * row['last_order_value'] / average:.1f} % of the average" if average else "no less than the average of 0.00"
    sentences = [
        f"Customer {row['customer_id']} as of {day}: {orders:,} order{'s' if orders != 1 else ''} on {_days(int(row['order_days']))} "
        f"from {row['first_order_date']:%Y-%m-%d} to {row['last_order_date']:%Y-%m-%d}, "
        f"{row['total_revenue']:,.2f} {currency} in all, {row['avg_order_value']:,.2f} on average."
        + (f" That is {row['total_revenue'] + back / 100:,.2f} ordered, {back / 100:,.2f} of it refunded by {day}." if back else ""),
        f"Status {row['retention_status']}: the last order was {_days(days)} ago "
        f"(ACTIVE up to {settings.active_limit}, AT_RISK up to {settings.at_risk_limit}).",
    ]
    if row["usual_gap_days"] is None:
        sentences.append("Late by own rhythm: cannot say, all orders are from one day, so there is no rhythm yet. +0")
    else:
        limit = settings.frequency_drop_pct / 100 * row["usual_gap_days"]
        sentences.append(
            f"Late by own rhythm: {'yes' if late else 'no'}. Usually orders every {row['usual_gap_days']:.1f} days; "
            f"late from more than {limit:.1f}, now {days}. +{settings.frequency_drop_score if late else 0}"
        )
    sentences.append(
        f"Spending less: {'yes' if small else 'no'}. The last order of {row['last_order_value']:,.2f} is {share}; "
        f"a drop is below {settings.value_drop_pct} %. +{settings.value_drop_score if small else 0}"
    )
    few = orders <= settings.few_orders
    why = f"only {orders:,} so far (up to {settings.few_orders} counts as too new to tell)" if few else (
        f"past {settings.inconsistent_gap_pct} % of the usual gap" if unsettled else "settled in its rhythm")
    why = why if row["retention_status"] == "ACTIVE" else "only asked of ACTIVE customers"
    sentences.append(f"ACTIVE but not settled: {'yes' if unsettled else 'no'}, {why}. +{settings.inconsistent_score if unsettled else 0}")
    sentences.append(
        f"Churn risk {row['churn_risk_level']}: {int(row['churn_risk_score'])} points (HIGH from {settings.high_risk_score}, "
        f"MEDIUM from {settings.medium_risk_score}). It means late or spending less by their own rhythm, not a probability of leaving."
    )
    return sentences


def _at_stake(row: dict[str, Any], day: date, currency: str) -> list[str]:
    """The amount with what it is made of; then, where it was looked up, who was counted."""
    queued, cell = row["priority"], row.get("return_rate")
    known_for = max(30, day.toordinal() - row["first_order_date"].toordinal())
    if queued and queued["spend_at_stake"] is None:
        return ["At stake: not known yet. Nothing could be learned as of this date, so the rules alone decide."]
    if queued:
        usual, chance, stake = (queued[name] for name in ("usual_spend_90d", "p_no_return_90d", "spend_at_stake"))
        said = "" if queued["at_stake_reason"] == queued["priority_reason"] else f"{queued['at_stake_reason']}. "
    elif cell:
        # as customer_priority has it, half up in whole cents: it has no row of whom it does not list
        usual_cents = (180 * int(row["total_revenue_cents"]) + known_for) // (2 * known_for)
        chance, said = cell["p_no_return_90d"], ""
        usual, stake = usual_cents / 100, (usual_cents * round(1_000_000 * chance) + 500_000) // 1_000_000 / 100
    else:
        return []
    sentences = [
        f"At stake: {said}Usually {usual:,.2f} {currency} in 90 days (90 x {row['total_revenue']:,.2f} / {known_for:,}, the days since the "
        f"first order, at least 30), times {chance:.6f} who stay away for 90 days: {stake:,.2f}."
    ]
    return [*sentences, *_counted(cell)] if cell else sentences


def _counted(cell: dict[str, Any]) -> list[str]:
    """A row of return_rates in sentences."""
    count, back = int(cell["customers"]), int(cell["returned_90"])
    season, level = cell["season_odds"], cell["level_odds"]
    together = min(4.0, max(0.25, (season or 1) * (level or 1)))
    times = f"; together times {together:.3f} (at least 0.25, at most 4)" if season or level else ""
    return [
        f"Compared with customers of {_cell_words(cell)}: on the past days this date learns from {count:,} were counted (who was there on "
        f"several days, several times), {back:,} of them came back within 90 days"
        + (f", {100 * back / count:.1f} %" if count else "")
        + f". With 30 customers added who came back as often as those of any lateness ({cell['parent_rate_90'] / 1e7:.1f} %): "
        f"{cell['rate_90'] / 1e7:.1f} %.",
        f"Season, in odds of coming back: around this time a year ago {_odds(season)}, in the last weeks against a year before "
        f"{_odds(level)}{times}:  {100 - 100 * cell['p_no_return_90d']:.1f} % come back, {100 * cell['p_no_return_90d']:.1f} % stay away.",
    ]


def _odds(odds: float | None) -> str:
    return "not known (changes nothing)" if odds is None else f"times {odds:.3f}"


def _cell_words(cell: dict[str, Any]) -> str:
    def span(name: str, unit: str) -> str:
        first, below = int(cell[name]), cell[f"{name}_below"]
        if below is None:
            return f"{first} or more {unit}s"
        return f"{first} {unit}{'' if first == 1 else 's'}" if below == first + 1 else f"{first} to {below - 1} {unit}s"

    late, below = int(cell["lateness"]), cell["lateness_below"]
    how_late = "" if late < 0 else f", {late} % or more of their usual gap" if below is None else (
        f", {late} to below {below} % of their usual gap")
    return f"{span('visits', 'shopping day')} and {span('recency', 'day')} of silence{how_late}"


def _tier(row: dict[str, Any], listed: int, settings: Settings) -> list[str]:
    queued = row["priority"]
    if queued:
        by_stake = settings.rank_by == "spend_at_stake" and queued["spend_at_stake"] is not None
        order = " (tier by tier, most at stake first)" if by_stake else ""
        return [
            f"In the queue as {queued['priority_tier']}, place {row['rank']:,} of {listed:,}{order}, score {queued['priority_score']:.4f}: "
            f"{queued['priority_reason']}.",
            f"Do not contact: {'consent was refused' if row['refused_consent'] else 'the customer is suppressed'}, "
            "so the audience files leave this customer out." if row["refused_consent"] or row["suppressed"]
            else f"Recommended: {queued['recommended_action']}.",
        ]
    status, level, days = row["retention_status"], row["churn_risk_level"], int(row["days_since_last_order"])
    window = 2 * settings.at_risk_limit
    if row["by_stake"]:
        return [f"Not in the queue: silent for more than {window} days, and nobody is listed who is." if days > window else
                f"Not in the queue: the spend at stake is not among the {listed:,} highest."]
    if status == "INACTIVE" and level == "HIGH" and days > window:
        why = f"silent for more than {window} days, beyond the win-back window of P3"
    elif status == "ACTIVE" and level == "HIGH":
        why = "P1 is limited to customers at or above the median revenue (p1_min_revenue)"
    else:
        needed = {"ACTIVE": "P1 takes ACTIVE customers with HIGH risk", "AT_RISK": "P2 takes AT_RISK customers with HIGH or MEDIUM risk",
                  "INACTIVE": "P3 takes INACTIVE customers with HIGH risk"}[status]
        why = f"{needed}, this one is {level}"
    return [f"Not in the queue: {why}."]
