-- retention_daily: customers by status, one row for each day from @from_date to @to_date.
-- Each shopping day counts from itself until the customer's next one, so on any day a customer is counted once,
-- with the silence since the latest order up to that day. Nothing after a day can change its row.
-- The rule; fast/retention_daily.sql gives the same rows with less work and is what runs here.
WITH visits AS (
  SELECT
    order_date,
    LEAD(order_date) OVER (PARTITION BY customer_id ORDER BY order_date) AS next_order_date
  FROM customer_days
  WHERE order_date <= @to_date
),
days AS (
  SELECT day
  FROM UNNEST(GENERATE_DATE_ARRAY(@from_date, @to_date, INTERVAL 1 DAY)) AS day
),
silence AS (
  SELECT
    days.day,
    DATE_DIFF(days.day, visits.order_date, DAY) AS days_since_last_order
  FROM days
  JOIN visits
    ON visits.order_date <= days.day
    AND (visits.next_order_date IS NULL OR visits.next_order_date > days.day)
),
counts AS (
  SELECT
    day,
    COUNT(*) AS customers,
    SUM(CASE WHEN days_since_last_order <= @active_days THEN 1 ELSE 0 END) AS active,
    SUM(CASE WHEN days_since_last_order > @at_risk_days THEN 1 ELSE 0 END) AS inactive
  FROM silence
  GROUP BY day
),
filled AS (
  SELECT
    days.day,
    CAST(COALESCE(counts.customers, 0) AS INT64) AS customers,
    CAST(COALESCE(counts.active, 0) AS INT64) AS active,
    CAST(COALESCE(counts.customers - counts.active - counts.inactive, 0) AS INT64) AS at_risk,
    CAST(COALESCE(counts.inactive, 0) AS INT64) AS inactive
  FROM days
  LEFT JOIN counts ON counts.day = days.day
)
SELECT
  day AS as_of_date,
  customers,
  active,
  at_risk,
  inactive,
  100 * active / NULLIF(customers, 0) AS active_pct,
  100 * at_risk / NULLIF(customers, 0) AS at_risk_pct,
  100 * inactive / NULLIF(customers, 0) AS inactive_pct
FROM filled
