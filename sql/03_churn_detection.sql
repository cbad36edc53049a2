-- churn_detection: three signals, each one sentence. All comparisons are between integers, because a division
-- decides wrongly for customers who sit exactly on a line. With span = last - first order date and
-- gaps = order_days - 1, the usual gap is span / gaps, so "days > 150 % of the usual gap" is 100*days*gaps > 150*span.
WITH rhythm AS (
  SELECT
    *,
    DATE_DIFF(last_order_date, first_order_date, DAY) AS span_days,
    order_days - 1 AS gaps
  FROM retention_snapshot
  WHERE as_of_date BETWEEN @from_date AND @to_date
),
signals AS (
  SELECT
    *,
    -- late by their own rhythm
    gaps > 0 AND 100 * days_since_last_order * gaps > @frequency_drop_pct * span_days AS is_frequency_drop,
    -- the latest order is small by their own average (last < 60 % of sum / orders)
    100 * last_order_cents * total_orders < @value_drop_pct * total_revenue_cents AS is_value_drop,
    -- called ACTIVE, but too new to tell or already well into their usual gap
    retention_status = 'ACTIVE' AND (
      total_orders <= @few_orders
      OR (gaps > 0 AND 100 * days_since_last_order * gaps > @inconsistent_gap_pct * span_days)
    ) AS is_status_inconsistent
  FROM rhythm
),
scored AS (
  SELECT
    *,
    CASE WHEN is_frequency_drop THEN @frequency_drop_score ELSE 0 END
    + CASE WHEN is_value_drop THEN @value_drop_score ELSE 0 END
    + CASE WHEN is_status_inconsistent THEN @inconsistent_score ELSE 0 END AS churn_risk_score
  FROM signals
)
SELECT
  as_of_date,
  customer_id,
  first_order_date,
  last_order_date,
  total_orders,
  order_days,
  total_revenue_cents,
  last_order_cents,
  total_revenue,
  avg_order_value,
  last_order_value,
  days_since_last_order,
  retention_status,
  CASE WHEN gaps > 0 THEN span_days / gaps END AS usual_gap_days,
  is_frequency_drop,
  is_value_drop,
  is_status_inconsistent,
  churn_risk_score,
  CASE
    WHEN churn_risk_score >= @high_risk_score THEN 'HIGH'
    WHEN churn_risk_score >= @medium_risk_score THEN 'MEDIUM'
    ELSE 'LOW'
  END AS churn_risk_level
FROM scored
