-- alert_logic: the alerts of each day from @from_date to @to_date, a row for each rule.
-- 'retention_status_degradation': is the share of AT_RISK customers unusually high? Today against the mean of the 7 previous days.
-- Reads retention_daily from 7 days before @from_date.
-- 'returning_customers_shortfall': do the customers come back who are due? What 05_returning_customers.sql says.
-- The seven days are added one by one, in a fixed order, so that a single day and a year give the same last digit.
WITH history AS (
  SELECT
    as_of_date,
    customers,
    at_risk_pct,
    LAG(at_risk_pct, 1) OVER (ORDER BY as_of_date) AS before_1,
    LAG(at_risk_pct, 2) OVER (ORDER BY as_of_date) AS before_2,
    LAG(at_risk_pct, 3) OVER (ORDER BY as_of_date) AS before_3,
    LAG(at_risk_pct, 4) OVER (ORDER BY as_of_date) AS before_4,
    LAG(at_risk_pct, 5) OVER (ORDER BY as_of_date) AS before_5,
    LAG(at_risk_pct, 6) OVER (ORDER BY as_of_date) AS before_6,
    LAG(at_risk_pct, 7) OVER (ORDER BY as_of_date) AS before_7
  FROM retention_daily
  WHERE as_of_date BETWEEN DATE_SUB(@from_date, INTERVAL 7 DAY) AND @to_date
),
against_baseline AS (
  SELECT
    *,
    (before_1 + before_2 + before_3 + before_4 + before_5 + before_6 + before_7) / 7 AS baseline_value
  FROM history
  WHERE as_of_date >= @from_date
),
first_order AS (
  SELECT MIN(order_date) AS first_order_date
  FROM customer_days
),
deltas AS (
  SELECT
    against_baseline.*,
    DATE_DIFF(against_baseline.as_of_date, first_order.first_order_date, DAY) AS history_days,
    at_risk_pct - baseline_value AS delta_pct,
    100 * (at_risk_pct - baseline_value) / NULLIF(baseline_value, 0) AS delta_relative_pct
  FROM against_baseline
  CROSS JOIN first_order
),
gated AS (
  SELECT
    *,
    CASE
      -- a stopped load must not look like churn
      WHEN as_of_date > @complete_through THEN 'data_incomplete'
      -- before this nobody can be INACTIVE and the mix is not settled: on two real years, 17 of 17 alarms were false
      WHEN COALESCE(history_days, -1) < @at_risk_days + 7 THEN 'history_warmup'
      WHEN COALESCE(baseline_value, 0) = 0 THEN 'baseline_warmup'
      WHEN customers < @min_sample THEN 'min_sample'
    END AS gate
  FROM deltas
),
judged AS (
  SELECT
    *,
    -- rounded before comparing: a float a hair below an exact 15 % would fall on the wrong side. Only increases alert.
    CASE
      WHEN gate IS NOT NULL THEN 'INFO'
      WHEN ROUND(delta_relative_pct, 9) >= @critical_pct THEN 'CRITICAL'
      WHEN ROUND(delta_relative_pct, 9) >= @warning_pct THEN 'WARNING'
      ELSE 'INFO'
    END AS severity
  FROM gated
)
SELECT
  as_of_date AS alert_date,
  'retention_status_degradation' AS alert_type,
  'global' AS scope,
  'at_risk_pct' AS metric_name,
  at_risk_pct AS current_value,
  baseline_value,
  delta_pct,
  delta_relative_pct,
  @warning_pct AS threshold_warning,
  @critical_pct AS threshold_critical,
  severity,
  severity <> 'INFO' AS alert_flag,
  customers AS sample_size,
  gate,
  CAST(NULL AS INT64) AS window_days,
  CAST(NULL AS INT64) AS observed,
  CAST(NULL AS FLOAT64) AS expected,
  CAST(NULL AS FLOAT64) AS expected_low,
  CAST(NULL AS FLOAT64) AS expected_high,
  CAST(NULL AS FLOAT64) AS overdispersion,
  CAST(NULL AS FLOAT64) AS score,
  CAST(NULL AS FLOAT64) AS lasting_score,
  CAST(NULL AS FLOAT64) AS level,
  CAST(NULL AS BOOL) AS day_alone,
  CAST(NULL AS STRING) AS sentence
FROM judged
UNION ALL
SELECT
  alert_date,
  alert_type,
  scope,
  metric_name,
  current_value,
  baseline_value,
  delta_pct,
  delta_relative_pct,
  threshold_warning,
  threshold_critical,
  severity,
  alert_flag,
  sample_size,
  gate,
  window_days,
  observed,
  expected,
  expected_low,
  expected_high,
  overdispersion,
  score,
  lasting_score,
  level,
  day_alone,
  sentence
FROM returning_customers
