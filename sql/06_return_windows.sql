-- return_windows: how many customers there were of each kind at the end of a day, and how many of them came back within 30 and 90 days.
-- One row for each day of return_days from @from_date to @to_date and cell. A cell is visits x recency x lateness:
--   visits    shopping days so far (from 1, 2, 3, 4, 6, 8, 11, 16 and 26 on)
--   recency   days since the last order (from 0, 8, 15, 22, 31, 46, 61, 76, 91, 121 and 151 on), at most twice @at_risk_days
--   lateness  those days in % of the customer's usual gap (from 0, 50, 75, 100, 150, 200, 300 and 500 on); -1: one shopping day, no gap
-- Lateness is compared in integers: days are 100 % of the usual gap, span / gaps, where 100*days*gaps = 100*span.
-- Nothing that happens more than 90 days after a day can change its rows, and no count within 30 what happens more than 30 days after.
-- The rule; fast/return_windows.sql gives the same rows of many days with less work.
WITH days AS (
  SELECT DISTINCT window_date AS day
  FROM return_days
  WHERE window_date BETWEEN @from_date AND @to_date
),
silences AS (
  SELECT
    order_date,
    next_order_date,
    order_days_so_far,
    order_days_so_far - 1 AS gaps,
    DATE_DIFF(order_date, first_order_date, DAY) AS span
  FROM customer_days
  WHERE order_date BETWEEN CAST(DATE_SUB(@from_date, INTERVAL (2 * @at_risk_days) DAY) AS DATE) AND @to_date
),
silent AS (
  SELECT
    days.day,
    silences.order_days_so_far,
    silences.gaps,
    silences.span,
    DATE_DIFF(days.day, silences.order_date, DAY) AS silence,
    DATE_DIFF(silences.next_order_date, days.day, DAY) AS back_in
  FROM days
  JOIN silences
    ON silences.order_date <= days.day
    AND silences.order_date >= CAST(DATE_SUB(days.day, INTERVAL (2 * @at_risk_days) DAY) AS DATE)
    AND (silences.next_order_date IS NULL OR silences.next_order_date > days.day)
),
in_cells AS (
  SELECT
    day,
    CASE
      WHEN order_days_so_far < 4 THEN order_days_so_far
      WHEN order_days_so_far < 6 THEN 4
      WHEN order_days_so_far < 8 THEN 6
      WHEN order_days_so_far < 11 THEN 8
      WHEN order_days_so_far < 16 THEN 11
      WHEN order_days_so_far < 26 THEN 16
      ELSE 26
    END AS visits,
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
      WHEN gaps = 0 THEN -1
      WHEN 100 * silence * gaps < 50 * span THEN 0
      WHEN 100 * silence * gaps < 75 * span THEN 50
      WHEN 100 * silence * gaps < 100 * span THEN 75
      WHEN 100 * silence * gaps < 150 * span THEN 100
      WHEN 100 * silence * gaps < 200 * span THEN 150
      WHEN 100 * silence * gaps < 300 * span THEN 200
      WHEN 100 * silence * gaps < 500 * span THEN 300
      ELSE 500
    END AS lateness,
    CASE WHEN back_in <= 30 THEN 1 ELSE 0 END AS in_30,
    CASE WHEN back_in <= 90 THEN 1 ELSE 0 END AS in_90
  FROM silent
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
