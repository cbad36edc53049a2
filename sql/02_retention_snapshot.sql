-- retention_snapshot: how long each customer has been silent, and what we call it.
WITH silence AS (
  SELECT
    *,
    DATE_DIFF(@reference_date, last_order_date, DAY) AS days_since_last_order
  FROM base_customers
  WHERE as_of_date = @reference_date
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
  CASE
    WHEN days_since_last_order <= @active_days THEN 'ACTIVE'
    WHEN days_since_last_order <= @at_risk_days THEN 'AT_RISK'
    ELSE 'INACTIVE'
  END AS retention_status
FROM silence
