-- return_expectations: how likely a customer who is due comes back on a day, by what was known at the end of a date P.
-- One row for each known_day from 22 days before @from_date to the day before @to_date,
-- cell of rhythm x recency and weekday:
--   the share of the cell that returned on a day, in the 26 weeks up to P,
--   x the weekday's part of it in those weeks, x the level of the last 4 weeks against them.
-- Reads due_daily from 393 days before @from_date, and closed_days (days on which the shop does not trade: they teach nothing).
-- Chances are of a thousand million and rounded to integers, so that sums of them do not depend on the order of rows.
WITH calendar AS (
  SELECT
    day,
    UNIX_DATE(day) AS day_no,
    MOD(UNIX_DATE(day), 7) AS weekday,
    CASE WHEN closed_days.closed_date IS NULL THEN 1 ELSE 0 END AS open
  FROM UNNEST(GENERATE_DATE_ARRAY(CAST(DATE_SUB(@from_date, INTERVAL 393 DAY) AS DATE), @to_date, INTERVAL 1 DAY)) AS day
  LEFT JOIN closed_days ON closed_days.closed_date = day
),
cells AS (
  SELECT DISTINCT rhythm, recency
  FROM due_daily
),
grid AS (
  -- every cell on every day; closed days teach nothing
  SELECT
    calendar.day_no,
    calendar.weekday,
    cells.rhythm,
    cells.recency,
    calendar.open * COALESCE(due_daily.due, 0) AS due,
    calendar.open * COALESCE(due_daily.returned, 0) AS returned
  FROM calendar
  CROSS JOIN cells
  LEFT JOIN due_daily
    ON due_daily.as_of_date = calendar.day
    AND due_daily.rhythm = cells.rhythm
    AND due_daily.recency = cells.recency
),
same_weekdays AS (
  -- a cell's last 26, and last 4, days of one weekday
  SELECT
    *,
    SUM(due) OVER weeks_26 AS due_26,
    SUM(returned) OVER weeks_26 AS returned_26,
    SUM(due) OVER weeks_4 AS due_4,
    SUM(returned) OVER weeks_4 AS returned_4
  FROM grid
  WINDOW
    one_weekday AS (PARTITION BY rhythm, recency, weekday ORDER BY day_no),
    weeks_26 AS (one_weekday ROWS BETWEEN 25 PRECEDING AND CURRENT ROW),
    weeks_4 AS (one_weekday ROWS BETWEEN 3 PRECEDING AND CURRENT ROW)
),
known AS (
  -- the seven weekdays up to P are the 26 and the 4 weeks up to P
  SELECT
    calendar.day_no AS known_day,
    same_weekdays.rhythm,
    same_weekdays.recency,
    same_weekdays.weekday,
    same_weekdays.due_26,
    same_weekdays.returned_26,
    same_weekdays.due_4,
    same_weekdays.returned_4
  FROM calendar
  JOIN same_weekdays ON same_weekdays.day_no BETWEEN calendar.day_no - 6 AND calendar.day_no
  WHERE calendar.day_no BETWEEN UNIX_DATE(@from_date) - 22 AND UNIX_DATE(@to_date) - 1
),
shares AS (
  -- of a thousand million
  SELECT
    known_day,
    rhythm,
    recency,
    CAST(ROUND(1000000000 * (SUM(returned_26) / NULLIF(SUM(due_26), 0))) AS INT64) AS share
  FROM known
  GROUP BY known_day, rhythm, recency
),
weekdays AS (
  SELECT
    known.known_day,
    known.weekday,
    CAST(SUM(known.returned_26) AS INT64) AS returned_26,
    CAST(SUM(known.returned_4) AS INT64) AS returned_4,
    SUM(COALESCE(shares.share, 0) * known.due_26) / 1000000000 AS expected_26,
    SUM(COALESCE(shares.share, 0) * known.due_4) / 1000000000 AS expected_4
  FROM known
  JOIN shares
    ON shares.known_day = known.known_day
    AND shares.rhythm = known.rhythm
    AND shares.recency = known.recency
  GROUP BY known.known_day, known.weekday
),
weekday_factors AS (
  SELECT
    *,
    CASE WHEN expected_26 = 0 THEN 0.0 ELSE returned_26 / expected_26 END AS weekday_factor
  FROM weekdays
),
levels AS (
  -- thousandths of a customer
  SELECT
    known_day,
    1000 * SUM(returned_4) / NULLIF(SUM(CAST(ROUND(1000 * (expected_4 * weekday_factor)) AS INT64)), 0) AS level
  FROM weekday_factors
  GROUP BY known_day
)
SELECT
  DATE_FROM_UNIX_DATE(shares.known_day) AS known_day,
  shares.rhythm,
  shares.recency,
  weekday_factors.weekday,
  -- without a return in 4 weeks nothing is expected, not even nobody
  CAST(ROUND(COALESCE(shares.share, 0) * (weekday_factors.weekday_factor * levels.level)) AS INT64) AS chance,
  levels.level
FROM shares
JOIN weekday_factors ON weekday_factors.known_day = shares.known_day
JOIN levels ON levels.known_day = shares.known_day
