-- return_days: which past days return_rates of each day D from @from_date to @to_date looks at, and what for.
--   learn       D-90, and every 28 days before it, 13 days in all: how many of each kind of customer came back within 90 days
--   season      the five weeks around the same day a year ago: were more or fewer coming back than usual?
--   level       D-30, D-37, D-44: are more or fewer coming back (within 30 days) than usual now ...
--   level_year  ... than a year before those days?
-- What became of the customers of such a day is known by D: 90 days have passed since each, or 30 where only 30 are asked about.
-- A shop's first 30 days are not looked at, and season and level only where all of their days are later than that.
WITH first_order AS (
  SELECT MIN(order_date) AS first_order_date
  FROM customer_days
),
days AS (
  SELECT day
  FROM UNNEST(GENERATE_DATE_ARRAY(@from_date, @to_date, INTERVAL 1 DAY)) AS day
),
looks AS (
  SELECT 'learn' AS purpose, 90 + 28 * step AS days_ago, 90 + 28 * step AS needed
  FROM UNNEST(GENERATE_ARRAY(0, 12)) AS step
  UNION ALL
  SELECT 'season', 365 + 7 * step, 409
  FROM UNNEST(GENERATE_ARRAY(-2, 2)) AS step
  UNION ALL
  SELECT 'level', 30 + 7 * step, 409
  FROM UNNEST(GENERATE_ARRAY(0, 2)) AS step
  UNION ALL
  SELECT 'level_year', 395 + 7 * step, 409
  FROM UNNEST(GENERATE_ARRAY(0, 2)) AS step
)
SELECT
  days.day AS as_of_date,
  looks.purpose,
  CAST(DATE_SUB(days.day, INTERVAL looks.days_ago DAY) AS DATE) AS window_date
FROM days
CROSS JOIN looks
CROSS JOIN first_order
WHERE DATE_DIFF(days.day, first_order.first_order_date, DAY) >= looks.needed + 30
