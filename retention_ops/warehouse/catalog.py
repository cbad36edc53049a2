"""What every table is: columns, GoogleSQL types, meaning, key and how it is stored.

One declaration serves the typed empty views, the check before a partition is replaced, Dagster's column schema,
the table dictionary and, in production, BigQuery's DDL. It holds no rule: rules are in sql/.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

GoogleType = Literal["STRING", "DATE", "INT64", "FLOAT64", "BOOL", "TIMESTAMP"]

DUCKDB_TYPES: dict[str, str] = {
    "STRING": "VARCHAR", "DATE": "DATE", "INT64": "BIGINT", "FLOAT64": "DOUBLE", "BOOL": "BOOLEAN",
    "TIMESTAMP": "TIMESTAMP WITH TIME ZONE",
}


@dataclass(frozen=True)
class Column:
    name: str
    type: GoogleType
    description: str
    nullable: bool = False


@dataclass(frozen=True)
class Table:
    """`stored`: 'version' (one file per orders version), 'day' (one file per reference date) or 'whole' (one file)."""

    name: str
    description: str
    stored: Literal["version", "day", "whole"]
    key: tuple[str, ...]
    columns: tuple[Column, ...]
    date_column: str | None = None
    snapshot: bool = False  # only the newest snapshot_keep_days are kept

    @property
    def column_names(self) -> list[str]:
        return [column.name for column in self.columns]

    def only(self, names: Sequence[str]) -> Table:
        """The table as one sees it who reads these columns."""
        declared = {column.name: column for column in self.columns}
        return replace(self, columns=tuple(declared[name] for name in names))


def _c(name: str, type_: GoogleType, description: str, nullable: bool = False) -> Column:
    return Column(name, type_, description, nullable)


_AS_OF = _c("as_of_date", "DATE", "Reference date D: only orders up to and including it count")
_CUSTOMER = _c("customer_id", "STRING", "Opaque customer id")
_FACTS = (
    _c("first_order_date", "DATE", "Date of the first order"),
    _c("last_order_date", "DATE", "Date of the latest order"),
    _c("total_orders", "INT64", "Completed orders"),
    _c("order_days", "INT64", "Distinct days with an order; two invoices on one day are one visit"),
    _c("total_revenue_cents", "INT64", "Sum of order values less what was refunded of them by D, cents"),
    _c("last_order_cents", "INT64", "Value of the latest order (by order_date, then order_id), likewise, cents"),
    _c("total_revenue", "FLOAT64", "Sum of order values less refunds, currency units, 2 places"),
    _c("avg_order_value", "FLOAT64", "total_revenue / total_orders, currency units, 2 places, half up"),
    _c("last_order_value", "FLOAT64", "Value of the latest order, currency units, 2 places"),
)
_ATTRIBUTES = (
    _c("country", "STRING", "Customer attribute, where customers were ingested", True),
    _c("segment", "STRING", "Customer attribute", True),
    _c("loyalty_tier", "STRING", "Customer attribute", True),
    _c("acquisition_channel", "STRING", "Customer attribute", True),
    _c("signup_date", "DATE", "Customer attribute", True),
)
_STATUS = (
    _c("days_since_last_order", "INT64", "D - last_order_date, days"),
    _c("retention_status", "STRING", "ACTIVE, AT_RISK or INACTIVE"),
)
_CHURN = (
    _c("usual_gap_days", "FLOAT64", "(last - first order date) / (order_days - 1), days; null with one shopping day", True),
    _c("is_frequency_drop", "BOOL", "Later than 1.5 x the usual gap"),
    _c("is_value_drop", "BOOL", "Latest order below 60 % of the average order"),
    _c("is_status_inconsistent", "BOOL", "ACTIVE, but few orders or past 70 % of the usual gap"),
    _c("churn_risk_score", "INT64", "50/30/20 points for the three signals"),
    _c("churn_risk_level", "STRING", "HIGH, MEDIUM or LOW"),
)

TABLES: dict[str, Table] = {
    table.name: table
    for table in (
        Table("orders", "Completed orders, one row each.", "version", ("order_id",), (
            _c("order_id", "STRING", "Unique order id"),
            _CUSTOMER,
            _c("order_date", "DATE", "Date of the order in shop_timezone"),
            _c("order_cents", "INT64", "Order value in cents, above 0"),
            _c("currency", "STRING", "ISO currency code, one per shop"),
        )),
        Table("refunds", "What was paid back of orders, a row for each order and date; kept with the orders' version.", "version",
              ("order_id", "refund_date"), (
                  _CUSTOMER,
                  _c("order_id", "STRING", "The order"),
                  _c("order_date", "DATE", "Its date"),
                  _c("refund_date", "DATE", "Date of the refund in shop_timezone, not before the order's"),
                  _c("refund_cents", "INT64", "Paid back on that date, cents, above 0; of one order never more than it was worth"),
                  _c("is_last", "BOOL", "The order is the customer's last of its day, by order_id"),
              )),
        Table("customers", "Customer attributes as last ingested; outside the rebuild guarantee.", "version", ("customer_id",), (
            _CUSTOMER, *_ATTRIBUTES,
            _c("consent", "BOOL", "May be contacted; null where not known", True),
        )),
        Table("suppressions", "Customers who must not be contacted; outside the rebuild guarantee.", "version", ("customer_id",), (
            _CUSTOMER,
            _c("reason", "STRING", "Why, in the words of whoever ingested it", True),
            _c("until", "DATE", "Last day of the suppression; null: for ever", True),
        )),
        Table("customer_days", "A customer's shopping days.", "version", ("customer_id", "order_date"), (
            _CUSTOMER,
            _c("order_date", "DATE", "Shopping day"),
            _c("orders", "INT64", "Orders on that day"),
            _c("revenue_cents", "INT64", "Their value as ordered, refunds not taken off, cents"),
            _c("last_order_cents", "INT64", "Value of the day's last order by order_id, cents"),
            _c("first_order_date", "DATE", "The customer's first shopping day"),
            _c("next_order_date", "DATE", "The next shopping day; null: none yet", True),
            _c("order_days_so_far", "INT64", "Shopping days up to and including this one"),
            _c("orders_so_far", "INT64", "Orders likewise"),
            _c("revenue_cents_so_far", "INT64", "Their value, cents"),
        )),
        Table("base_customers", "Facts per customer as of D (SQL1).", "day", ("customer_id",),
              (_AS_OF, _CUSTOMER, *_FACTS, *_ATTRIBUTES), "as_of_date", snapshot=True),
        Table("retention_snapshot", "Retention status per customer as of D (SQL2).", "day", ("customer_id",),
              (_AS_OF, _CUSTOMER, *_FACTS, *_STATUS), "as_of_date", snapshot=True),
        Table("churn_detection", "Explainable churn risk per customer as of D (SQL3).", "day", ("customer_id",),
              (_AS_OF, _CUSTOMER, *_FACTS, *_STATUS, *_CHURN), "as_of_date", snapshot=True),
        Table("cohort_retention_evolution", "Share of each monthly cohort that ordered again, month by month (SQL4).", "whole",
              ("cohort_month", "months_since_acquisition"), (
                  _c("cohort_month", "DATE", "First day of the month of the first order"),
                  _c("months_since_acquisition", "INT64", "Calendar months since cohort_month; 0 is the month itself"),
                  _c("cohort_size", "INT64", "Customers in the cohort"),
                  _c("active_customers", "INT64", "Of these, with an order in that month"),
                  _c("retention_rate", "FLOAT64", "100 x active_customers / cohort_size, %"),
              )),
        Table("retention_daily", "Customers by status as of D.", "day", ("as_of_date",), (
            _AS_OF,
            _c("customers", "INT64", "Customers with an order by D"),
            _c("active", "INT64", "Of these ACTIVE"),
            _c("at_risk", "INT64", "Of these AT_RISK"),
            _c("inactive", "INT64", "Of these INACTIVE"),
            _c("active_pct", "FLOAT64", "100 x active / customers, %; null without customers", True),
            _c("at_risk_pct", "FLOAT64", "100 x at_risk / customers, %", True),
            _c("inactive_pct", "FLOAT64", "100 x inactive / customers, %", True),
        ), "as_of_date"),
        Table("alert_logic", "The macro alerts as of D, a row for each rule: AT_RISK % against the mean of the 7 previous days, and "
              "returning customers against what their own rhythm predicts (SQL5).", "day",
              ("alert_date", "alert_type", "scope"), (
                  _c("alert_date", "DATE", "Reference date D"),
                  _c("alert_type", "STRING", "Which rule: retention_status_degradation or returning_customers_shortfall"),
                  _c("scope", "STRING", "global"),
                  _c("metric_name", "STRING", "at_risk_pct, or returning_customers"),
                  _c("current_value", "FLOAT64", "The metric on D: %, or customers", True),
                  _c("baseline_value", "FLOAT64", "Mean of the 7 previous days, %; or customers expected", True),
                  _c("delta_pct", "FLOAT64", "current - baseline: percentage points, or customers", True),
                  _c("delta_relative_pct", "FLOAT64", "100 x (current - baseline) / baseline, %", True),
                  _c("threshold_warning", "FLOAT64", "WARNING from this delta_relative_pct, %: a rise, or (below 0) a shortfall; "
                                                     "null where nobody is expected", True),
                  _c("threshold_critical", "FLOAT64", "CRITICAL likewise", True),
                  _c("severity", "STRING", "INFO, WARNING or CRITICAL"),
                  _c("alert_flag", "BOOL", "Severity is WARNING or CRITICAL"),
                  _c("sample_size", "INT64", "Customers behind the metric"),
                  _c("gate", "STRING", "Which safeguard held the alert back: data_incomplete, history_warmup, "
                                       "baseline_warmup, min_sample, partial_day; null: none", True),
                  _c("window_days", "INT64", "Shortfall only, like all that follow: days up to D that fall short most, 3 to 14", True),
                  _c("observed", "INT64", "Customers who came back in them", True),
                  _c("expected", "FLOAT64", "Customers who were due back, as known before they began", True),
                  _c("expected_low", "FLOAT64", "WARNING from here down: a threshold below expected, or two thirds of one", True),
                  _c("expected_high", "FLOAT64", "As far above", True),
                  _c("overdispersion", "FLOAT64", "Variance of a day's count as a multiple of a Poisson count's, at least 1", True),
                  _c("score", "FLOAT64", "(expected - observed) / sqrt(overdispersion x expected)", True),
                  _c("lasting_score", "FLOAT64", "The least score of the 8 days up to D; it counts half as much again; null where a day of "
                                                 "them has too few due", True),
                  _c("level", "FLOAT64", "Returns of the last 4 weeks before the window against their half-year habit; 1: the same", True),
                  _c("day_alone", "BOOL", "D by itself has less than a quarter of what was due on it", True),
                  _c("sentence", "STRING", "The row in words", True),
              ), "alert_date"),
        Table("customer_priority", "Who to contact first on D, with reasons.", "day", ("customer_id",), (
            _c("run_date", "DATE", "Reference date D"),
            _CUSTOMER,
            _c("retention_status", "STRING", "ACTIVE, AT_RISK or INACTIVE"),
            _c("churn_risk_level", "STRING", "HIGH, MEDIUM or LOW"),
            _c("churn_risk_score", "INT64", "Points of the three signals"),
            _c("priority_tier", "STRING", "P1 prevention, P2 intervention, P3 win-back"),
            _c("priority_score", "FLOAT64", "Tier base + value + urgency, at most 100, 4 decimals"),
            _c("priority_reason", "STRING", "Why, in the customer's own numbers"),
            _c("days_since_last_order", "INT64", "Days"),
            _c("total_revenue", "FLOAT64", "Currency units, 2 places"),
            _c("total_orders", "INT64", "Completed orders"),
            _c("avg_order_value", "FLOAT64", "Currency units, 2 places"),
            _c("recommended_action", "STRING", "What to do"),
            _c("value_proxy", "FLOAT64", "30 % of total_revenue, currency units, 2 places"),
            _c("created_at", "TIMESTAMP", "When the row was computed; outside every comparison and hash"),
            _c("usual_spend_90d", "FLOAT64", "90 x total_revenue / days since the first order, at least 30; 2 places", True),
            _c("p_no_return_90d", "FLOAT64", "Share of customers like this one who stay away for 90 days; null: not known yet", True),
            _c("spend_at_stake", "FLOAT64", "usual_spend_90d x p_no_return_90d, currency units, 2 places", True),
            _c("at_stake_reason", "STRING", "The same as a sentence", True),
        ), "run_date"),
        Table("audience_current", "The lists of the newest date that has an Action Pack, as handed over.", "whole", ("customer_id",), (
            _c("alert_date", "DATE", "Reference date D of the lists"),
            _c("tier", "STRING", "P1 prevention, P2 intervention, P3 win-back"),
            _CUSTOMER,
            _c("priority_score", "FLOAT64", "Tier base + value + urgency, at most 100, 4 decimals"),
            _c("priority_reason", "STRING", "Why, in the customer's own numbers"),
            _c("recommended_action", "STRING", "What to do"),
            _c("new_since_handover", "BOOL", "Never handed over for an earlier date"),
            _c("last_handed_over", "DATE", "Newest earlier date for which the customer was handed over", True),
            _c("audience_sha256", "STRING", "The lists' hash, as in the pack's manifest"),
        )),
        Table("ops_runs_log", "What was answered, passed over or failed, and why; exported from the ops database.", "whole",
              ("run_id", "alert_date", "alert_type"), (
                  _c("run_id", "STRING", "Dagster run"),
                  _c("run_timestamp", "TIMESTAMP", "When the row was written"),
                  _c("alert_date", "DATE", "Reference date"),
                  _c("alert_type", "STRING", "Which rule"),
                  _c("severity", "STRING", "INFO, WARNING or CRITICAL"),
                  _c("alert_flag", "BOOL", "The rule fired"),
                  _c("current_value", "FLOAT64", "Metric on D", True),
                  _c("baseline_value", "FLOAT64", "Its baseline", True),
                  _c("delta_relative_pct", "FLOAT64", "%", True),
                  _c("sample_size", "INT64", "Customers behind the metric"),
                  _c("p1_count", "INT64", "Customers in P1", True),
                  _c("p2_count", "INT64", "Customers in P2", True),
                  _c("p3_count", "INT64", "Customers in P3", True),
                  _c("total_exported", "INT64", "Customers in the lists handed over"),
                  _c("slack_posted", "BOOL", "A message really went out"),
                  _c("slack_message_ts", "STRING", "Its id", True),
                  _c("ticket_id", "STRING", "Ticket", True),
                  _c("export_p1_link", "STRING", "Where the list went", True),
                  _c("export_p2_link", "STRING", "Where the list went", True),
                  _c("export_p3_link", "STRING", "Where the list went", True),
                  _c("status", "STRING", "success, failed or skipped"),
                  _c("error_message", "STRING", "Why it failed or was skipped", True),
                  _c("execution_time_ms", "INT64", "Duration of the response"),
                  _c("mode", "STRING", "off, shadow, pilot or live"),
                  _c("facts_sha256", "STRING", "Facts of the Action Pack", True),
                  _c("audience_sha256", "STRING", "Lists of the Action Pack", True),
                  _c("prev_hash", "STRING", "row_hash of the row before"),
                  _c("row_hash", "STRING", "sha256 over prev_hash and this row"),
              )),
    )
}

PRIORITY_INTERVALS = Table(
    "priority_intervals", "When each customer is in a tier, or may be: what customer_priority of a range is made from; never stored.",
    "whole",
    ("customer_id", "last_order_date", "priority_tier", "from_day"), (
        _CUSTOMER,
        _c("priority_tier", "STRING", "P1 prevention, P2 intervention, P3 win-back"),
        *(column for column in _FACTS if column.type != "FLOAT64"),
        _c("from_day", "INT64", "First day of the tier within the range, in days since the last order"),
        _c("to_day", "INT64", "Its last day within the range, likewise"),
    ))

CALENDAR_DAYS = Table("calendar_days", "Public holidays and planned closures, from the settings.", "whole", ("calendar_date",), (
    _c("calendar_date", "DATE", "The day"),
    _c("reason", "STRING", "The holiday's name, or the reason of the closure"),
    _c("planned", "BOOL", "A planned closure, else a public holiday"),
))

CLOSED_DAYS = Table("closed_days", "Days without trade: planned closures, and public holidays with hardly an order; never stored.", "whole",
                    ("closed_date",), (
    _c("closed_date", "DATE", "Closed day"),
    _c("reason", "STRING", "Why", True),
))

DUE_DAILY = Table(
    "due_daily", "Customers who could come back on a day, and who did, by rhythm and recency; never stored.", "whole",
    ("as_of_date", "rhythm", "recency"), (
        _AS_OF,
        _c("rhythm", "INT64", "Usual gap: 0 one shopping day, 1..5 below 10, 20, 35, 60, 100 days, 6 slower"),
        _c("recency", "INT64", "Silence from this many days on"),
        _c("due", "INT64", "Customers in the cell"),
        _c("returned", "INT64", "Of these with an order on the day"),
    ), "as_of_date")

RETURN_EXPECTATIONS = Table(
    "return_expectations", "How likely a customer who is due comes back on a day, as known at the end of a date; never stored.", "whole",
    ("known_day", "rhythm", "recency", "weekday"), (
        _c("known_day", "DATE", "What was known at the end of this date P"),
        _c("rhythm", "INT64", "As in due_daily"),
        _c("recency", "INT64", "Likewise"),
        _c("weekday", "INT64", "Days since 1970-01-01, modulo 7"),
        _c("chance", "INT64", "Of a thousand million: returns per customer of the cell on a day of that weekday after P", True),
        _c("level", "FLOAT64", "Returns of the last 4 weeks up to P against their half-year habit", True),
    ), "known_day")

RETURNING_CUSTOMERS = replace(
    TABLES["alert_logic"], name="returning_customers",
    description="Returning customers against what their own rhythm predicts, as rows of alert_logic; never stored.",
)

_CELL = (
    _c("visits", "INT64", "Cell: shopping days so far, from this many on: 1, 2, 3, 4, 6, 8, 11, 16, 26"),
    _c("recency", "INT64", "Cell: days since the last order, from this many on: 0, 8, 15, 22, 31, 46, 61, 76, 91, 121, 151"),
    _c("lateness", "INT64", "Cell: these days in % of the usual gap, from 0, 50, 75, 100, 150, 200, 300, 500 on; -1: one shopping day"),
)

RETURN_DAYS = Table(
    "return_days", "The past days that return_rates of D looks at, and what for; never stored.", "whole",
    ("as_of_date", "purpose", "window_date"), (
        _AS_OF,
        _c("purpose", "STRING", "learn, season, level or level_year"),
        _c("window_date", "DATE", "The day"),
    ))

RETURN_WINDOWS = Table(
    "return_windows", "Customers of a day by visits, recency and lateness, and how many came back; never stored.", "whole",
    ("as_of_date", "visits", "recency", "lateness"), (
        _c("as_of_date", "DATE", "Day S: customers as they were at its end"),
        *_CELL,
        _c("customers", "INT64", "Customers in the cell"),
        _c("returned_30", "INT64", "Of these with an order from S+1 to S+30"),
        _c("returned_90", "INT64", "Of these with an order from S+1 to S+90"),
    ))

RETURN_RATES = Table(
    "return_rates", "How likely customers of each cell come back, as known on D; never stored.", "whole",
    ("as_of_date", "visits", "recency", "lateness"), (
        _AS_OF,
        *_CELL,
        _c("customers", "INT64", "Customers in the cell on the days that D learns from, each day counted by itself"),
        _c("returned_30", "INT64", "Of these back within 30 days"),
        _c("returned_90", "INT64", "Of these back within 90 days"),
        _c("parent_rate_90", "INT64", "Of a thousand million: rate_90 of visits x recency whatever the lateness"),
        _c("rate_30", "INT64", "Of a thousand million: back within 30 days, 30 customers of the parent added"),
        _c("rate_90", "INT64", "Likewise within 90 days"),
        _c("season_odds", "FLOAT64", "Odds of coming back around this time a year ago against those of the rates; null: not known", True),
        _c("level_odds", "FLOAT64", "Odds of coming back in the last weeks against the same weeks a year ago; null: not known", True),
        _c("p_no_return_90d", "FLOAT64", "Share that stays away for 90 days, with season_odds x level_odds; 6 decimals"),
    ))

LEARNED_CHANCES = Table(
    "learned_chances", "What the learned model tells of customers silent for at most 2 x at_risk_days, where it is in use; never stored.",
    "whole", ("as_of_date", "customer_id"), (
        _AS_OF,
        _CUSTOMER,
        _c("p_no_return_90d", "FLOAT64", "Chance of no order from D+1 to D+90; 6 decimals"),
    ))

DUE_CUSTOMERS = Table(
    "due_customers", "Who was due back in a window by their own rhythm, and who of them came; never stored.", "whole", ("customer_id",), (
        _CUSTOMER,
        _c("chance", "INT64", "Returns in the window expected of a thousand million such customers"),
        _c("returned", "INT64", "Days of the window with an order"),
        _c("was_new", "BOOL", "Had one shopping day when the window began, or in it"),
        _c("last_order_date", "DATE", "Date of the latest order by D"),
        _c("days_since_last_order", "INT64", "Days"),
        _c("usual_gap_days", "FLOAT64", "Span / (order_days - 1); null with one shopping day", True),
        _c("total_orders", "INT64", "Completed orders by D"),
        _c("avg_order_value", "FLOAT64", "Currency units, 2 places"),
        _c("is_overdue", "BOOL", "Did not come in the window and is silent for longer than the usual gap"),
        _c("value_due", "FLOAT64", "chance x average order value, currency units, 2 places"),
    ))

SHORTFALL_SLICES = Table(
    "shortfall_slices", "Due and returned customers of a window by what is known of them; never stored.", "whole", ("attribute", "value"), (
        _c("attribute", "STRING", "history, country, segment, loyalty_tier or acquisition_channel"),
        _c("value", "STRING", "Its value; (unknown) where the customer has none"),
        _c("customers", "INT64", "Customers with an order before D"),
        _c("expected", "FLOAT64", "Of these due back"),
        _c("observed", "INT64", "Returns"),
        _c("missing", "FLOAT64", "expected - observed"),
        _c("score", "FLOAT64", "missing / sqrt(overdispersion x expected)", True),
    ))

_BETWEEN = (
    PRIORITY_INTERVALS, CALENDAR_DAYS, CLOSED_DAYS, DUE_DAILY, RETURN_EXPECTATIONS, RETURNING_CUSTOMERS, DUE_CUSTOMERS, SHORTFALL_SLICES,
    RETURN_DAYS, RETURN_WINDOWS, RETURN_RATES, LEARNED_CHANCES,
)
RELATIONS = {**TABLES, **{table.name: table for table in _BETWEEN}}
"""everything a rule may yield or read"""
