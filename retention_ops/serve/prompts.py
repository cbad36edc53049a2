"""The two conversations worth starting with one click."""

from __future__ import annotations

from datetime import date


def morning_check(day: date | None) -> str:
    """The text of the prompt; `day` is None where nothing was computed yet."""
    when = f"for {day}" if day else "for the newest date (nothing is computed yet: say so)"
    return f"""\
Do the retention morning check {when}.

1. get_alert_decision: did anything happen? If a gate held the alert back, name it and what it means; it is no all-clear.
2. get_operational_context: how many customers are ACTIVE, AT_RISK, INACTIVE, and where the metric stands in its last 14 days.
3. Only if the date is flagged: generate_brief as markdown. If there is none, ask me before you build it (build_priority_queue).

Then tell me in at most six sentences: what happened with its numbers, who to contact first (P1, P2, P3 counts), what you advise for today.
Do not export lists or trigger the playbook unless I say so."""


def incident_review(day: date) -> str:
    """The text of the prompt for one flagged date."""
    before = date.fromordinal(day.toordinal() - 7)
    return f"""\
Review the retention incident of {day}.

1. get_alert_decision and get_operational_context for {day}; compare_dates from {before} to {day}.
2. retention-ops://briefs/{day}: what the team was told. retention-ops://packs/{day}: who was on the lists and who was left out, in numbers.
3. Explain three customers of the brief with explain_customer.

Then write: what changed and since when, what was done, what the numbers do not tell (HIGH risk is no probability), and whether the alarm
looks real, expected, a data fault or false, so that a person can close it with `retention-ops incidents close`."""
