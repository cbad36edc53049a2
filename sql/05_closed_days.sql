-- closed_days: days from @from_date to @to_date on which the shop does not trade, and why. They expect no customer and teach nothing.
-- A planned closure is closed, full stop.
-- A public holiday is closed only where the shop hardly traded on it: fewer than half the orders usual for that weekday, which is the
-- median of the 8 same weekdays before it, without days of the calendar and days before the shop's first order.
-- A holiday with normal trade, and one on a weekday that never has orders, stays an ordinary day.
-- Any other day without orders is an outage or missing data, and never explained away.
-- Reads calendar_days (public holidays and planned closures) from 56 days before @from_date. Nothing after a day can change its row.
WITH daily AS (
  SELECT order_date, CAST(SUM(orders) AS INT64) AS day_orders
  FROM customer_days
  WHERE order_date BETWEEN CAST(DATE_SUB(@from_date, INTERVAL 56 DAY) AS DATE) AND @to_date
  GROUP BY order_date
),
first_order AS (
  SELECT MIN(order_date) AS first_order_date
  FROM customer_days
),
ordinary AS (
  -- a day without orders is a day with 0
  SELECT
    day,
    COALESCE(daily.day_orders, 0) AS day_orders
  FROM UNNEST(GENERATE_DATE_ARRAY(CAST(DATE_SUB(@from_date, INTERVAL 56 DAY) AS DATE), @to_date, INTERVAL 1 DAY)) AS day
  CROSS JOIN first_order
  LEFT JOIN daily ON daily.order_date = day
  LEFT JOIN calendar_days ON calendar_days.calendar_date = day
  WHERE calendar_days.calendar_date IS NULL AND day >= first_order.first_order_date
),
holidays AS (
  SELECT
    calendar_days.calendar_date,
    calendar_days.reason,
    COALESCE(daily.day_orders, 0) AS day_orders
  FROM calendar_days
  LEFT JOIN daily ON daily.order_date = calendar_days.calendar_date
  WHERE NOT calendar_days.planned AND calendar_days.calendar_date BETWEEN @from_date AND @to_date
),
compared AS (
  SELECT DISTINCT
    holidays.calendar_date,
    holidays.reason,
    holidays.day_orders,
    PERCENTILE_CONT(ordinary.day_orders, 0.5) OVER (PARTITION BY holidays.calendar_date) AS usual_orders
  FROM holidays
  JOIN ordinary ON DATE_DIFF(holidays.calendar_date, ordinary.day, DAY) IN (7, 14, 21, 28, 35, 42, 49, 56)
)
SELECT
  calendar_date AS closed_date,
  reason
FROM calendar_days
WHERE planned AND calendar_date BETWEEN @from_date AND @to_date
UNION ALL
SELECT
  calendar_date AS closed_date,
  reason
FROM compared
WHERE 2 * day_orders < usual_orders
