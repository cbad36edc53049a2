-- retention_snapshot of the customers in a tier only: their rows for each day from @from_date to @to_date, out of
-- priority_intervals. 03_churn_detection.sql and 06_customer_priority.sql read them as they read the whole table and give the
-- same rows of customer_priority, because customers in no tier leave none there and a customer's row depends on no other
-- customer's. (With @p1_needs_median_revenue it does: then this is not used. With @membership 'at_stake' it depends on whoever can be
-- on the list, and they are all in priority_intervals then.)
WITH clipped AS (
  SELECT
    *,
    GREATEST(from_day, DATE_DIFF(@from_date, last_order_date, DAY)) AS first_day,
    LEAST(to_day, DATE_DIFF(@to_date, last_order_date, DAY)) AS last_day,
    -- half up in whole cents: (2 * sum + n) / 2n, cut off
    DIV((2 * total_revenue_cents + total_orders), (2 * total_orders)) / 100 AS avg_order_value
  FROM priority_intervals
)
SELECT
  CAST(DATE_ADD(last_order_date, INTERVAL days_since_last_order DAY) AS DATE) AS as_of_date,
  customer_id,
  first_order_date,
  last_order_date,
  total_orders,
  order_days,
  total_revenue_cents,
  last_order_cents,
  total_revenue_cents / 100 AS total_revenue,
  avg_order_value,
  last_order_cents / 100 AS last_order_value,
  days_since_last_order,
  CASE priority_tier WHEN 'P1' THEN 'ACTIVE' WHEN 'P2' THEN 'AT_RISK' ELSE 'INACTIVE' END AS retention_status
FROM clipped
CROSS JOIN UNNEST(GENERATE_ARRAY(first_day, last_day)) AS days_since_last_order
WHERE first_day <= last_day
