-- customer_priority: who to contact first, in three tiers, with the reason in the customer's own numbers.
--   P1 prevention    ACTIVE and HIGH
--   P2 intervention  AT_RISK and HIGH or MEDIUM
--   P3 win-back      INACTIVE and HIGH, silent for at most twice @at_risk_days
-- A range of days is asked only about customers who are in a tier: fast/priority_intervals.sql says when that is.
WITH medians AS (
  -- asked for by few shops, and the one thing here that needs every customer
  SELECT DISTINCT
    as_of_date,
    PERCENTILE_CONT(total_revenue_cents, 0.5) OVER (PARTITION BY as_of_date) AS median_revenue_cents
  FROM churn_detection
  WHERE @p1_needs_median_revenue AND as_of_date BETWEEN @from_date AND @to_date
),
candidates AS (
  SELECT
    churn_detection.*,
    medians.median_revenue_cents,
    DATE_DIFF(last_order_date, first_order_date, DAY) AS span_days,
    order_days - 1 AS gaps
  FROM churn_detection
  LEFT JOIN medians ON medians.as_of_date = churn_detection.as_of_date
  WHERE churn_detection.as_of_date BETWEEN @from_date AND @to_date
),
tiers AS (
  SELECT
    *,
    CASE
      WHEN retention_status = 'ACTIVE' AND churn_risk_level = 'HIGH'
        AND (NOT @p1_needs_median_revenue OR total_revenue_cents >= median_revenue_cents) THEN 'P1'
      WHEN retention_status = 'AT_RISK' AND churn_risk_level IN ('HIGH', 'MEDIUM') THEN 'P2'
      WHEN retention_status = 'INACTIVE' AND churn_risk_level = 'HIGH'
        AND days_since_last_order <= 2 * @at_risk_days THEN 'P3'
    END AS priority_tier
  FROM candidates
),
queue AS (
  SELECT
    *,
    -- the usual gap in whole days, half up
    CASE WHEN gaps > 0 THEN DIV((2 * span_days + gaps), (2 * gaps)) END AS usual_gap_whole_days,
    -- how far the latest order is below the average, half up in whole %: 100 - 100 * last * n / sum
    DIV((201 * total_revenue_cents - 200 * last_order_cents * total_orders), (2 * total_revenue_cents)) AS below_average_pct,
    -- up to 20 points for value, logarithmic in revenue
    LEAST(20.0, 2 * LN(1 + total_revenue)) AS value_points,
    -- up to 10 points for urgency: the share of the tier's window that is already gone
    CASE priority_tier
      WHEN 'P1' THEN 10 * days_since_last_order / @active_days
      WHEN 'P2' THEN 10 * (days_since_last_order - @active_days) / (@at_risk_days - @active_days)
      ELSE 10 * (days_since_last_order - @at_risk_days) / @at_risk_days
    END AS urgency_points,
    CASE WHEN days_since_last_order = 1 THEN '1 day' ELSE CONCAT(CAST(days_since_last_order AS STRING), ' days') END AS silence
  FROM tiers
  WHERE priority_tier IS NOT NULL
),
rhythm_words AS (
  SELECT
    *,
    CASE
      WHEN usual_gap_whole_days <= 1 THEN 'every day'
      ELSE CONCAT('every ', CAST(usual_gap_whole_days AS STRING))
    END AS usual_rhythm
  FROM queue
),
reasons AS (
  SELECT
    *,
    CASE
      WHEN is_frequency_drop THEN CONCAT('No order for ', silence, ', usually ', usual_rhythm)
    END AS late_reason,
    CASE
      WHEN is_value_drop AND is_frequency_drop
        THEN CONCAT('last order ', CAST(below_average_pct AS STRING), ' % below average')
      WHEN is_value_drop
        THEN CONCAT('Last order ', CAST(below_average_pct AS STRING), ' % below average')
    END AS value_reason,
    CASE
      -- one order is all there is: neither late nor below its own average, so this stands first
      WHEN is_status_inconsistent AND total_orders <= @few_orders AND total_orders = 1 THEN 'Only 1 order so far'
      WHEN is_status_inconsistent AND total_orders <= @few_orders
        THEN CONCAT(
          CASE WHEN is_frequency_drop OR is_value_drop THEN 'only ' ELSE 'Only ' END, CAST(total_orders AS STRING), ' orders so far')
      WHEN is_status_inconsistent AND NOT is_frequency_drop
        THEN CONCAT(silence, ' since the last order, past ', CAST(@inconsistent_gap_pct AS STRING), ' % of the usual ',
                    CAST(usual_gap_whole_days AS STRING))
    END AS unsettled_reason
  FROM rhythm_words
)
SELECT
  as_of_date AS run_date,
  customer_id,
  retention_status,
  churn_risk_level,
  churn_risk_score,
  priority_tier,
  ROUND(
    LEAST(100.0, CASE priority_tier WHEN 'P1' THEN 70 WHEN 'P2' THEN 50 ELSE 30 END + value_points + urgency_points), 4
  ) AS priority_score,
  CONCAT(
    COALESCE(late_reason, ''),
    CASE WHEN late_reason IS NOT NULL AND value_reason IS NOT NULL THEN '; ' ELSE '' END,
    COALESCE(value_reason, ''),
    CASE WHEN COALESCE(late_reason, value_reason) IS NOT NULL AND unsettled_reason IS NOT NULL THEN '; ' ELSE '' END,
    COALESCE(unsettled_reason, '')
  ) AS priority_reason,
  days_since_last_order,
  total_revenue,
  total_orders,
  avg_order_value,
  CASE
    WHEN priority_tier = 'P2' THEN @action_p2
    WHEN priority_tier = 'P3' THEN @action_p3
    WHEN total_revenue_cents > @vip_revenue_cents THEN @action_p1_vip
    WHEN total_revenue_cents >= @personal_revenue_cents THEN @action_p1_personal
    ELSE @action_p1_reminder
  END AS recommended_action,
  -- half up in whole cents
  DIV((2 * @value_proxy_pct * total_revenue_cents + 100), 200) / 100 AS value_proxy,
  CURRENT_TIMESTAMP() AS created_at
FROM reasons
ORDER BY run_date, priority_score DESC, total_revenue DESC, customer_id
