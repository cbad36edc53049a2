-- return_windows of the days of return_days from @from_date to @to_date; row for row what 06_return_windows.sql says, with less work.
-- Why it is the same: days are numbered, and a customer counts on the days from the first one that is not before the order up to the one
-- before the first that is not before the next order, or not before the silence is too long. Looking up two numbers for each silence
-- costs less than comparing each silence with each day: most silences of a single date lie between two of its days. Dates are looked
-- up and not computed for the same reason.
WITH days AS (
  SELECT day, UNIX_DATE(day) AS day_no, ROW_NUMBER() OVER (ORDER BY day) AS number
  FROM (SELECT DISTINCT window_date AS day FROM return_days WHERE window_date BETWEEN @from_date AND @to_date) AS asked
),
calendar AS (
  -- each date of an order that can count or be a return, and the number of the first day from it on
  SELECT
    calendar_date,
    UNIX_DATE(calendar_date) AS day_no,
    COALESCE(
      MIN(days.number) OVER (ORDER BY calendar_date ROWS BETWEEN CURRENT ROW AND UNBOUNDED FOLLOWING),
      (SELECT COUNT(*) + 1 FROM days)
    ) AS number
  FROM UNNEST(GENERATE_DATE_ARRAY(
    CAST(DATE_SUB(@from_date, INTERVAL (2 * @at_risk_days) DAY) AS DATE),
    CAST(DATE_ADD(@to_date, INTERVAL (2 * @at_risk_days + 91) DAY) AS DATE), INTERVAL 1 DAY)) AS calendar_date
  LEFT JOIN days ON days.day = calendar_date
),
spans AS (
  -- the days between each two numbers, listed once for all silences that lie so
  SELECT between_numbers.from_number, between_numbers.to_number, days.day, days.day_no
  FROM (
    SELECT DISTINCT from_day.number AS from_number, to_day.number AS to_number
    FROM calendar AS from_day
    JOIN calendar AS to_day ON to_day.day_no BETWEEN from_day.day_no + 1 AND from_day.day_no + 2 * @at_risk_days + 1
  ) AS between_numbers
  JOIN days ON days.number >= between_numbers.from_number AND days.number < between_numbers.to_number
),
orders_on AS (
  -- a date of an order, with the number of the first day on which its silence is too long
  SELECT from_day.calendar_date, from_day.day_no, from_day.number, too_long.number AS too_long_number
  FROM calendar AS from_day
  JOIN calendar AS too_long ON too_long.day_no = from_day.day_no + 2 * @at_risk_days + 1
),
silences AS (
  SELECT
    orders_on.day_no,
    orders_on.number AS from_number,
    CASE WHEN back.number < orders_on.too_long_number THEN back.number ELSE orders_on.too_long_number END AS to_number,
    -- a return after the calendar is too late to count
    back.day_no - orders_on.day_no AS next_in,
    CASE
      WHEN order_days_so_far < 4 THEN order_days_so_far
      WHEN order_days_so_far < 6 THEN 4
      WHEN order_days_so_far < 8 THEN 6
      WHEN order_days_so_far < 11 THEN 8
      WHEN order_days_so_far < 16 THEN 11
      WHEN order_days_so_far < 26 THEN 16
      ELSE 26
    END AS visits,
    100 * (order_days_so_far - 1) AS gaps_100,
    -- shopping days are different days: only one alone has no span
    NULLIF(DATE_DIFF(order_date, first_order_date, DAY), 0) AS span
  FROM customer_days
  JOIN orders_on ON orders_on.calendar_date = customer_days.order_date
  LEFT JOIN calendar AS back ON back.calendar_date = customer_days.next_order_date
  WHERE order_date BETWEEN CAST(DATE_SUB(@from_date, INTERVAL (2 * @at_risk_days) DAY) AS DATE) AND @to_date
    AND (next_order_date IS NULL OR next_order_date > @from_date)
),
silent AS (
  SELECT
    spans.day,
    silences.visits,
    silences.gaps_100,
    silences.span,
    silences.next_in,
    spans.day_no - silences.day_no AS silence
  FROM silences
  JOIN spans ON spans.from_number = silences.from_number AND spans.to_number = silences.to_number
),
measured AS (
  -- whole % of the usual gap, cut off: below a whole limit before it was cut off or after is the same
  SELECT
    day,
    visits,
    silence,
    DIV((silence * gaps_100), span) AS late_pct,
    next_in - silence AS back_in
  FROM silent
),
in_cells AS (
  SELECT
    day,
    visits,
    CASE
      WHEN silence < 8 THEN 0
      WHEN silence < 15 THEN 8
      WHEN silence < 22 THEN 15
      WHEN silence < 31 THEN 22
      WHEN silence < 46 THEN 31
      WHEN silence < 61 THEN 46
      WHEN silence < 76 THEN 61
      WHEN silence < 91 THEN 76
      WHEN silence < 121 THEN 91
      WHEN silence < 151 THEN 121
      ELSE 151
    END AS recency,
    CASE
      WHEN late_pct IS NULL THEN -1
      WHEN late_pct < 50 THEN 0
      WHEN late_pct < 75 THEN 50
      WHEN late_pct < 100 THEN 75
      WHEN late_pct < 150 THEN 100
      WHEN late_pct < 200 THEN 150
      WHEN late_pct < 300 THEN 200
      WHEN late_pct < 500 THEN 300
      ELSE 500
    END AS lateness,
    CASE WHEN back_in <= 30 THEN 1 ELSE 0 END AS in_30,
    CASE WHEN back_in <= 90 THEN 1 ELSE 0 END AS in_90
  FROM measured
)
SELECT
  day AS as_of_date,
  visits,
  recency,
  lateness,
  COUNT(*) AS customers,
  CAST(SUM(in_30) AS INT64) AS returned_30,
  CAST(SUM(in_90) AS INT64) AS returned_90
FROM in_cells
GROUP BY day, visits, recency, lateness
