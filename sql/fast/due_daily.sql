-- due_daily for a range in one pass; row for row what 05_due_daily.sql says.
-- Why it is the same: within a silence the rhythm stands still and the recency only moves on, so one silence is at most one run of
-- days in each of the twelve recencies. A run is a beginning and an end, and the count of a day is the sum of both up to it.
WITH silences AS (
  -- many silences share all of this; a silence nobody has ended yet is followed to the end of the range
  SELECT
    UNIX_DATE(order_date) AS day,
    UNIX_DATE(CASE WHEN next_order_date <= @to_date THEN next_order_date ELSE @to_date END) AS last_day,
    next_order_date <= @to_date AS ended,
    CASE
      WHEN order_days_so_far = 1 THEN 0
      WHEN DATE_DIFF(order_date, first_order_date, DAY) < 10 * (order_days_so_far - 1) THEN 1
      WHEN DATE_DIFF(order_date, first_order_date, DAY) < 20 * (order_days_so_far - 1) THEN 2
      WHEN DATE_DIFF(order_date, first_order_date, DAY) < 35 * (order_days_so_far - 1) THEN 3
      WHEN DATE_DIFF(order_date, first_order_date, DAY) < 60 * (order_days_so_far - 1) THEN 4
      WHEN DATE_DIFF(order_date, first_order_date, DAY) < 100 * (order_days_so_far - 1) THEN 5
      ELSE 6
    END AS rhythm,
    COUNT(*) AS customers
  FROM customer_days
  WHERE order_date < @to_date AND (next_order_date IS NULL OR next_order_date >= @from_date)
  GROUP BY 1, 2, 3, 4
),
recencies AS (
  SELECT 1 AS recency, 3 AS until
  UNION ALL SELECT 4, 7
  UNION ALL SELECT 8, 14
  UNION ALL SELECT 15, 21
  UNION ALL SELECT 22, 30
  UNION ALL SELECT 31, 45
  UNION ALL SELECT 46, 60
  UNION ALL SELECT 61, 90
  UNION ALL SELECT 91, 120
  UNION ALL SELECT 121, 180
  UNION ALL SELECT 181, 270
  UNION ALL SELECT 271, 1000000
),
runs AS (
  SELECT
    rhythm,
    recency,
    day + recency AS from_day,
    LEAST(day + until, last_day) AS to_day,
    CASE WHEN ended AND last_day <= day + until THEN customers ELSE 0 END AS returned,
    customers
  FROM silences
  JOIN recencies ON day + recency <= last_day
),
changes AS (
  SELECT rhythm, recency, GREATEST(from_day, UNIX_DATE(@from_date)) AS day, customers AS due, 0 AS returned
  FROM runs
  WHERE to_day >= UNIX_DATE(@from_date)
  UNION ALL
  SELECT rhythm, recency, to_day + 1, -customers, 0
  FROM runs
  WHERE to_day >= UNIX_DATE(@from_date)
  UNION ALL
  SELECT rhythm, recency, to_day, 0, returned
  FROM runs
  WHERE returned > 0 AND to_day >= UNIX_DATE(@from_date)
  UNION ALL
  SELECT cells.rhythm, cells.recency, UNIX_DATE(calendar.day), 0, 0
  FROM (SELECT DISTINCT rhythm, recency FROM runs) AS cells
  CROSS JOIN (SELECT day FROM UNNEST(GENERATE_DATE_ARRAY(@from_date, @to_date, INTERVAL 1 DAY)) AS day) AS calendar
),
daily_changes AS (
  SELECT rhythm, recency, day, SUM(due) AS due, SUM(returned) AS returned
  FROM changes
  GROUP BY 1, 2, 3
),
counts AS (
  SELECT
    day,
    rhythm,
    recency,
    CAST(SUM(due) OVER (PARTITION BY rhythm, recency ORDER BY day) AS INT64) AS due,
    CAST(returned AS INT64) AS returned
  FROM daily_changes
)
SELECT
  DATE_FROM_UNIX_DATE(day) AS as_of_date,
  rhythm,
  recency,
  due,
  returned
FROM counts
WHERE due > 0 AND day <= UNIX_DATE(@to_date)
