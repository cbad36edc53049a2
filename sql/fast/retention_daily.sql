-- retention_daily for a range in one pass; row for row what 05_retention_daily.sql says.
-- Why it is the same: a customer's status changes only when an order comes and when a silence grows past a limit. After
-- a shopping day the customer is ACTIVE, then AT_RISK, then INACTIVE, until the next shopping day ends all three. So one
-- silence is at most four changes of the counts, and the counts of a day are the sum of all changes up to it.
-- A silence that began more than @at_risk_days before @from_date is INACTIVE or over by then: INACTIVE is whoever is
-- left when ACTIVE and AT_RISK are taken from all customers. What comes after @to_date is dropped.
WITH silences AS (
  -- many silences share a beginning and a length; none is followed longer than until it is INACTIVE
  SELECT
    UNIX_DATE(order_date) AS first_day,
    CASE
      WHEN DATE_DIFF(next_order_date, order_date, DAY) <= @at_risk_days THEN DATE_DIFF(next_order_date, order_date, DAY)
      ELSE @at_risk_days + 1
    END AS days,
    COUNT(*) AS customers
  FROM customer_days
  WHERE order_date BETWEEN CAST(DATE_SUB(@from_date, INTERVAL @at_risk_days DAY) AS DATE) AND @to_date
  GROUP BY 1, 2
),
first_orders AS (
  SELECT UNIX_DATE(order_date) AS day, COUNT(*) AS customers
  FROM customer_days
  WHERE order_date = first_order_date AND order_date <= @to_date
  GROUP BY 1
),
calendar AS (
  SELECT day AS as_of_date
  FROM UNNEST(GENERATE_DATE_ARRAY(@from_date, @to_date, INTERVAL 1 DAY)) AS day
),
changes AS (
  SELECT UNIX_DATE(as_of_date) AS day, 0 AS customers, 0 AS active, 0 AS at_risk FROM calendar
  UNION ALL
  SELECT day, customers, 0, 0 FROM first_orders
  UNION ALL
  SELECT first_day, 0, customers, 0 FROM silences
  UNION ALL
  SELECT first_day + LEAST(days, @active_days + 1), 0, -customers, 0 FROM silences
  UNION ALL
  SELECT first_day + @active_days + 1, 0, 0, customers FROM silences WHERE days > @active_days + 1
  UNION ALL
  SELECT first_day + days, 0, 0, -customers FROM silences WHERE days > @active_days + 1
),
daily_changes AS (
  -- what changed before the range counts on its first day
  SELECT
    GREATEST(day, UNIX_DATE(@from_date)) AS day,
    SUM(customers) AS customers,
    SUM(active) AS active,
    SUM(at_risk) AS at_risk
  FROM changes
  WHERE day <= UNIX_DATE(@to_date)
  GROUP BY 1
),
counts AS (
  SELECT
    day,
    CAST(SUM(customers) OVER (ORDER BY day) AS INT64) AS customers,
    CAST(SUM(active) OVER (ORDER BY day) AS INT64) AS active,
    CAST(SUM(at_risk) OVER (ORDER BY day) AS INT64) AS at_risk
  FROM daily_changes
)
SELECT
  calendar.as_of_date,
  counts.customers,
  counts.active,
  counts.at_risk,
  counts.customers - counts.active - counts.at_risk AS inactive,
  100 * counts.active / NULLIF(counts.customers, 0) AS active_pct,
  100 * counts.at_risk / NULLIF(counts.customers, 0) AS at_risk_pct,
  100 * (counts.customers - counts.active - counts.at_risk) / NULLIF(counts.customers, 0) AS inactive_pct
FROM calendar
JOIN counts ON counts.day = UNIX_DATE(calendar.as_of_date)
