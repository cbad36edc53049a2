-- customer_priority: who to contact first, in three tiers, with the reason in the customer's own numbers.
--   P1 prevention    ACTIVE and HIGH
--   P2 intervention  AT_RISK and HIGH or MEDIUM
--   P3 win-back      INACTIVE and HIGH, silent for at most twice @at_risk_days
-- So with @membership 'rules'. With 'at_stake' the list is instead whoever has most at stake: of all customers silent for at most twice
-- @at_risk_days those with the highest spend_at_stake, @at_stake_size of them (0: as many as the rules would list that day), and the
-- tier follows the status alone. On days on which return_rates has nothing to learn from yet the rules hold.
-- spend_at_stake is what a customer usually spends in 90 days x the share of customers like this one who stay away for 90 days:
-- return_rates says it, or learned_chances where the shop uses a learned model (retention_ops/detect/learned.py); most shops have none.
-- A range of days is asked only about customers who can be on the list: fast/priority_intervals.sql says when that is.
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
    END AS rule_tier
  FROM candidates
),
in_cells AS (
  -- the cells are those of return_windows
  SELECT
    *,
    GREATEST(30, DATE_DIFF(as_of_date, first_order_date, DAY)) AS customer_for_days,
    CASE
      WHEN order_days < 4 THEN order_days
      WHEN order_days < 6 THEN 4
      WHEN order_days < 8 THEN 6
      WHEN order_days < 11 THEN 8
      WHEN order_days < 16 THEN 11
      WHEN order_days < 26 THEN 16
      ELSE 26
    END AS visits,
    CASE
      WHEN days_since_last_order < 8 THEN 0
      WHEN days_since_last_order < 15 THEN 8
      WHEN days_since_last_order < 22 THEN 15
      WHEN days_since_last_order < 31 THEN 22
      WHEN days_since_last_order < 46 THEN 31
      WHEN days_since_last_order < 61 THEN 46
      WHEN days_since_last_order < 76 THEN 61
      WHEN days_since_last_order < 91 THEN 76
      WHEN days_since_last_order < 121 THEN 91
      WHEN days_since_last_order < 151 THEN 121
      ELSE 151
    END AS recency,
    CASE
      WHEN gaps = 0 THEN -1
      WHEN 100 * days_since_last_order * gaps < 50 * span_days THEN 0
      WHEN 100 * days_since_last_order * gaps < 75 * span_days THEN 50
      WHEN 100 * days_since_last_order * gaps < 100 * span_days THEN 75
      WHEN 100 * days_since_last_order * gaps < 150 * span_days THEN 100
      WHEN 100 * days_since_last_order * gaps < 200 * span_days THEN 150
      WHEN 100 * days_since_last_order * gaps < 300 * span_days THEN 200
      WHEN 100 * days_since_last_order * gaps < 500 * span_days THEN 300
      ELSE 500
    END AS lateness
  FROM tiers
  WHERE rule_tier IS NOT NULL OR (@membership = 'at_stake' AND days_since_last_order <= 2 * @at_risk_days)
),
chances AS (
  SELECT
    in_cells.*,
    learned_chances.customer_id IS NOT NULL AS is_learned,
    COALESCE(learned_chances.p_no_return_90d, return_rates.p_no_return_90d) AS p_no_return_90d,
    -- both have 6 decimals
    CAST(ROUND(1000000 * COALESCE(learned_chances.p_no_return_90d, return_rates.p_no_return_90d)) AS INT64) AS stay_away_millionths,
    -- half up in whole cents: (2 * 90 * sum + n) / 2n, cut off
    DIV((180 * total_revenue_cents + customer_for_days), (2 * customer_for_days)) AS usual_spend_cents
  FROM in_cells
  LEFT JOIN return_rates
    ON return_rates.as_of_date = in_cells.as_of_date
    AND return_rates.visits = in_cells.visits
    AND return_rates.recency = in_cells.recency
    AND return_rates.lateness = in_cells.lateness
  LEFT JOIN learned_chances
    ON learned_chances.as_of_date = in_cells.as_of_date
    AND learned_chances.customer_id = in_cells.customer_id
),
stakes AS (
  SELECT
    *,
    DIV((usual_spend_cents * stay_away_millionths + 500000), 1000000) AS spend_at_stake_cents
  FROM chances
),
ranked AS (
  SELECT
    *,
    ROW_NUMBER() OVER (
      PARTITION BY as_of_date ORDER BY spend_at_stake_cents DESC, total_revenue_cents DESC, customer_id
    ) AS place,
    CASE
      WHEN @at_stake_size > 0 THEN @at_stake_size
      ELSE SUM(CASE WHEN rule_tier IS NULL THEN 0 ELSE 1 END) OVER (PARTITION BY as_of_date)
    END AS places
  FROM stakes
  WHERE @membership = 'at_stake' AND spend_at_stake_cents IS NOT NULL
),
listed AS (
  SELECT
    *,
    0 AS place,
    0 AS places,
    rule_tier AS priority_tier
  FROM stakes
  WHERE rule_tier IS NOT NULL AND (@membership = 'rules' OR spend_at_stake_cents IS NULL)
  UNION ALL
  SELECT
    *,
    CASE retention_status WHEN 'ACTIVE' THEN 'P1' WHEN 'AT_RISK' THEN 'P2' ELSE 'P3' END AS priority_tier
  FROM ranked
  WHERE place <= places
),
queue AS (
  SELECT
    *,
    -- the usual gap in whole days, half up
    CASE WHEN gaps > 0 THEN DIV((2 * span_days + gaps), (2 * gaps)) END AS usual_gap_whole_days,
    -- how far the latest order is below the average, half up in whole %: 100 - 100 * last * n / sum
    -- where all was refunded there is no average to be below
    DIV((201 * total_revenue_cents - 200 * last_order_cents * total_orders), NULLIF(2 * total_revenue_cents, 0)) AS below_average_pct,
    -- up to 20 points for value, logarithmic in revenue
    LEAST(20.0, 2 * LN(1 + total_revenue)) AS value_points,
    -- up to 10 points for urgency: the share of the tier's window that is already gone
    CASE priority_tier
      WHEN 'P1' THEN 10 * days_since_last_order / @active_days
      WHEN 'P2' THEN 10 * (days_since_last_order - @active_days) / (@at_risk_days - @active_days)
      ELSE 10 * (days_since_last_order - @at_risk_days) / @at_risk_days
    END AS urgency_points,
    CASE WHEN days_since_last_order = 1 THEN '1 day' ELSE CONCAT(CAST(days_since_last_order AS STRING), ' days') END AS silence,
    -- in tenths, half up
    CASE
      WHEN stay_away_millionths < 50000 THEN 'fewer than 1 of 10'
      WHEN stay_away_millionths >= 950000 THEN 'more than 9 of 10'
      ELSE CONCAT(CAST(DIV((stay_away_millionths + 50000), 100000) AS STRING), ' of 10')
    END AS stay_away
  FROM listed
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
    END AS unsettled_reason,
    CASE
      WHEN spend_at_stake_cents IS NOT NULL
        THEN CONCAT(stay_away,
                    CASE
                      WHEN is_learned THEN ' like this one will stay away, says the learned model'
                      -- one shopping day gives no rhythm to be late by
                      WHEN gaps = 0 THEN ' one-time customers silent this long stayed away'
                      ELSE ' customers this late stayed away'
                    END,
                    '; usually spends ',
                    CAST(DIV((usual_spend_cents + 50), 100) AS STRING), ' a quarter: ',
                    CAST(DIV((spend_at_stake_cents + 50), 100) AS STRING), ' at stake')
    END AS at_stake_reason
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
    COALESCE(unsettled_reason, ''),
    -- only somebody whom no rule lists has none of the three
    CASE WHEN COALESCE(late_reason, value_reason, unsettled_reason) IS NULL THEN COALESCE(at_stake_reason, '') ELSE '' END
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
  CURRENT_TIMESTAMP() AS created_at,
  usual_spend_cents / 100 AS usual_spend_90d,
  p_no_return_90d,
  spend_at_stake_cents / 100 AS spend_at_stake,
  at_stake_reason
FROM reasons
-- the order of rank_by=score; with rank_by=spend_at_stake the rows are handed out by priority_tier, spend_at_stake DESC, and then so
ORDER BY run_date, priority_score DESC, total_revenue DESC, customer_id
