-- due_daily: who could come back on a day, and who did, one row for each day from @from_date to @to_date and cell.
-- A cell is rhythm x recency. Rhythm is the usual gap between shopping days (0: only one yet; then below 10, 20, 35, 60 and 100 days,
-- and slower). Recency is the silence so far (from 1, 4, 8, 15, 22, 31, 46, 61, 91, 121, 181 and 271 days on).
-- A customer counts in `due` on every day after an order up to and including the day of the next one, and in `returned` on that one.
-- Nothing after a day can change its rows.
-- The rule; fast/due_daily.sql gives the same rows with less work.
WITH days AS (
  SELECT day
  FROM UNNEST(GENERATE_DATE_ARRAY(@from_date, @to_date, INTERVAL 1 DAY)) AS day
),
silences AS (
  SELECT
    order_date,
    next_order_date,
    order_days_so_far - 1 AS gaps,
    DATE_DIFF(order_date, first_order_date, DAY) AS span
  FROM customer_days
  WHERE order_date < @to_date
),
silent AS (
  SELECT
    days.day,
    DATE_DIFF(days.day, silences.order_date, DAY) AS silence,
    CASE
      WHEN gaps = 0 THEN 0
      WHEN span < 10 * gaps THEN 1
      WHEN span < 20 * gaps THEN 2
      WHEN span < 35 * gaps THEN 3
      WHEN span < 60 * gaps THEN 4
      WHEN span < 100 * gaps THEN 5
      ELSE 6
    END AS rhythm,
    CASE WHEN silences.next_order_date = days.day THEN 1 ELSE 0 END AS came
  FROM days
  JOIN silences
    ON silences.order_date < days.day
    AND (silences.next_order_date IS NULL OR silences.next_order_date >= days.day)
),
in_cells AS (
  SELECT
    day,
    rhythm,
    CASE
      WHEN silence < 4 THEN 1
      WHEN silence < 8 THEN 4
      WHEN silence < 15 THEN 8
      WHEN silence < 22 THEN 15
      WHEN silence < 31 THEN 22
      WHEN silence < 46 THEN 31
      WHEN silence < 61 THEN 46
      WHEN silence < 91 THEN 61
      WHEN silence < 121 THEN 91
      WHEN silence < 181 THEN 121
      WHEN silence < 271 THEN 181
      ELSE 271
    END AS recency,
    came
  FROM silent
)
SELECT
  day AS as_of_date,
  rhythm,
  recency,
  COUNT(*) AS due,
  CAST(SUM(came) AS INT64) AS returned
FROM in_cells
GROUP BY day, rhythm, recency
