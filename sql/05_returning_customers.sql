-- returning_customers: do the customers come back who are due by their own rhythm? The alert 'returning_customers_shortfall',
-- one row for each day from @from_date to @to_date, in one sentence: "212 customers were due back in 7 days, 96 came: -55 %".
-- Reads due_daily from 385 days before @from_date, and closed_days (days on which the shop does not trade: they expect nobody).
-- What was expected of the days after a date P is what was known at the end of P:
--   the share that returned, of each cell of rhythm x recency, in the 26 weeks up to P,
--   x the weekday's part of it in those weeks, x the level of the last 4 weeks against them.
-- Windows of 3 to 14 days that end on D are each held against what was expected before they began; the one that falls short most,
-- measured in its own noise, is the row of D. A steep fall shows in the short windows, a slow one in the long.
-- Noise: a count that varies as (week over week, over 52 weeks) this shop's days do: `overdispersion` times a Poisson count.
-- Shares, factors and expectations are rounded to integers before they are added: sums then do not depend on the order of rows.
WITH calendar AS (
  SELECT
    day,
    UNIX_DATE(day) AS day_no,
    MOD(UNIX_DATE(day), 7) AS weekday,
    CASE WHEN closed_days.closed_date IS NULL THEN 1 ELSE 0 END AS open
  FROM UNNEST(GENERATE_DATE_ARRAY(CAST(DATE_SUB(@from_date, INTERVAL 385 DAY) AS DATE), @to_date, INTERVAL 1 DAY)) AS day
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
  WHERE calendar.day_no BETWEEN UNIX_DATE(@from_date) - 14 AND UNIX_DATE(@to_date) - 3
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
),
due_on AS (
  -- the days after P: what the shares of P say of who is due on them
  SELECT
    shares.known_day,
    grid.day_no,
    grid.weekday,
    SUM(COALESCE(shares.share, 0) * grid.due) / 1000000000 AS by_share,
    CAST(SUM(grid.returned) AS INT64) AS returned
  FROM shares
  JOIN grid
    ON grid.day_no BETWEEN shares.known_day + 1 AND shares.known_day + 14
    AND grid.rhythm = shares.rhythm
    AND grid.recency = shares.recency
  GROUP BY shares.known_day, grid.day_no, grid.weekday
),
expected_on AS (
  SELECT
    due_on.known_day,
    due_on.day_no,
    due_on.returned,
    CAST(ROUND(1000 * (due_on.by_share * weekday_factors.weekday_factor * levels.level)) AS INT64) AS expected_thousandths
  FROM due_on
  JOIN weekday_factors
    ON weekday_factors.known_day = due_on.known_day
    AND weekday_factors.weekday = due_on.weekday
  JOIN levels ON levels.known_day = due_on.known_day
),
windows AS (
  SELECT
    day_no,
    day_no - known_day AS window_days,
    SUM(expected_thousandths) OVER up_to_day / 1000 AS expected,
    CAST(SUM(returned) OVER up_to_day AS INT64) AS observed
  FROM expected_on
  WINDOW up_to_day AS (PARTITION BY known_day ORDER BY day_no)
),
daily AS (
  SELECT calendar.day_no, calendar.open, CAST(COALESCE(SUM(grid.returned), 0) AS INT64) AS returned
  FROM calendar
  LEFT JOIN grid ON grid.day_no = calendar.day_no
  GROUP BY calendar.day_no, calendar.open
),
weeks_apart AS (
  SELECT day_no, open * LAG(open, 7) OVER by_day AS both_open, returned, LAG(returned, 7) OVER by_day AS week_before
  FROM daily
  WINDOW by_day AS (ORDER BY day_no)
),
noise AS (
  -- a Poisson count differs from another of the same mean by its mean, squared, twice; the 14 days of the windows stay out
  SELECT
    day_no,
    SUM(both_open * (returned - week_before) * (returned - week_before)) OVER year
      / NULLIF(SUM(both_open * (returned + week_before)) OVER year, 0) AS overdispersion
  FROM weeks_apart
  WINDOW year AS (ORDER BY day_no ROWS BETWEEN 377 PRECEDING AND 14 PRECEDING)
),
measured AS (
  SELECT
    windows.*,
    CASE WHEN noise.overdispersion > 1 THEN noise.overdispersion ELSE 1.0 END AS overdispersion,
    SQRT((CASE WHEN noise.overdispersion > 1 THEN noise.overdispersion ELSE 1.0 END) * windows.expected) AS spread
  FROM windows
  JOIN noise ON noise.day_no = windows.day_no
  WHERE windows.window_days >= 3 AND windows.day_no >= UNIX_DATE(@from_date)
),
scored AS (
  -- without a return in 4 weeks nothing is expected, not even nobody
  SELECT
    *,
    (expected - observed) / NULLIF(spread, 0) AS score
  FROM measured
  WHERE expected IS NOT NULL
),
worst AS (
  -- windows in which too few are due say nothing; where none says anything the longest is shown
  SELECT *
  FROM scored
  WHERE TRUE
  QUALIFY ROW_NUMBER() OVER (
    PARTITION BY day_no
    ORDER BY CASE WHEN expected >= @min_due THEN ROUND(score, 9) ELSE window_days - 1000000000 END DESC, window_days
  ) = 1
),
first_order AS (
  SELECT MIN(order_date) AS first_order_date
  FROM customer_days
),
gated AS (
  SELECT
    calendar.day,
    worst.*,
    CASE
      -- a stopped load must not look like churn
      WHEN calendar.day > @complete_through THEN 'data_incomplete'
      WHEN COALESCE(DATE_DIFF(calendar.day, first_order.first_order_date, DAY), -1) < @at_risk_days + 7 THEN 'history_warmup'
      WHEN COALESCE(worst.expected, 0) = 0 THEN 'baseline_warmup'
      WHEN worst.expected < @min_due THEN 'min_sample'
    END AS gate
  FROM calendar
  CROSS JOIN first_order
  LEFT JOIN worst ON worst.day_no = calendar.day_no
  WHERE calendar.day >= @from_date
),
judged AS (
  SELECT
    *,
    CASE
      WHEN gate IS NOT NULL THEN 'INFO'
      WHEN ROUND(score, 9) >= @shortfall_critical THEN 'CRITICAL'
      WHEN ROUND(score, 9) >= @shortfall_warning THEN 'WARNING'
      ELSE 'INFO'
    END AS severity
  FROM gated
)
SELECT
  day AS alert_date,
  'returning_customers_shortfall' AS alert_type,
  'global' AS scope,
  'returning_customers' AS metric_name,
  CAST(observed AS FLOAT64) AS current_value,
  expected AS baseline_value,
  observed - expected AS delta_pct,
  100 * (observed - expected) / NULLIF(expected, 0) AS delta_relative_pct,
  -100 * @shortfall_warning * spread / NULLIF(expected, 0) AS threshold_warning,
  -100 * @shortfall_critical * spread / NULLIF(expected, 0) AS threshold_critical,
  severity,
  severity <> 'INFO' AS alert_flag,
  CAST(ROUND(COALESCE(expected, 0)) AS INT64) AS sample_size,
  gate,
  window_days,
  observed,
  expected,
  CASE WHEN expected < @shortfall_warning * spread THEN 0.0 ELSE expected - @shortfall_warning * spread END AS expected_low,
  expected + @shortfall_warning * spread AS expected_high,
  overdispersion,
  score,
  CONCAT(
    CAST(CAST(ROUND(expected) AS INT64) AS STRING), ' customers were due back in ', CAST(window_days AS STRING), ' days, ',
    CAST(observed AS STRING), ' came: ', CASE WHEN observed >= expected THEN '+' ELSE '' END,
    CAST(CAST(ROUND(100 * (observed - expected) / NULLIF(expected, 0)) AS INT64) AS STRING), ' %'
  ) AS sentence
FROM judged
