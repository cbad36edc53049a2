-- returning_customers: do the customers come back who are due by their own rhythm? The alert 'returning_customers_shortfall',
-- one row for each day from @from_date to @to_date, in one sentence: "212 customers were due back in 7 days, 96 came: -55 %".
-- Reads due_daily from 393 days before @from_date, return_expectations of the same dates, and closed_days (they expect nobody).
-- Windows of 3 to 14 days that end on D are each held against what was expected before they began; the one that falls short most,
-- measured in its own noise, is the row of D. A steep fall shows in the short windows, a slow one in the long.
-- Two thirds of a threshold are enough where the shortfall lasts: the least score of the 8 days up to D is `lasting_score`.
-- Noise: a count that varies as (week over week, over 52 weeks) this shop's days do: `overdispersion` times a Poisson count.
-- A day that falls out alone, the first below the line, may be a load that is not whole: it waits for the next day (partial_day).
WITH calendar AS (
  SELECT
    day,
    UNIX_DATE(day) AS day_no,
    CASE WHEN closed_days.closed_date IS NULL THEN 1 ELSE 0 END AS open
  FROM UNNEST(GENERATE_DATE_ARRAY(CAST(DATE_SUB(@from_date, INTERVAL 393 DAY) AS DATE), @to_date, INTERVAL 1 DAY)) AS day
  LEFT JOIN closed_days ON closed_days.closed_date = day
),
due_on AS (
  -- who is due on a day, and who came, in a cell; nobody on a closed day
  SELECT
    calendar.day_no,
    due_daily.rhythm,
    due_daily.recency,
    calendar.open * due_daily.due AS due,
    calendar.open * due_daily.returned AS returned
  FROM calendar
  JOIN due_daily ON due_daily.as_of_date = calendar.day
),
daily AS (
  SELECT calendar.day_no, calendar.open, CAST(COALESCE(SUM(due_on.returned), 0) AS INT64) AS returned
  FROM calendar
  LEFT JOIN due_on ON due_on.day_no = calendar.day_no
  GROUP BY calendar.day_no, calendar.open
),
ahead AS (
  -- the 14 days after each P
  SELECT levels.known_day, levels.level, daily.day_no, daily.returned
  FROM (SELECT DISTINCT UNIX_DATE(known_day) AS known_day, level FROM return_expectations) AS levels
  JOIN daily ON daily.day_no BETWEEN levels.known_day + 1 AND levels.known_day + 14
),
first_weekdays AS (
  -- the first day of its weekday after P that a chance is about
  SELECT
    UNIX_DATE(known_day) AS known_day,
    UNIX_DATE(known_day) + 1 + MOD(weekday + 7 - MOD(UNIX_DATE(known_day) + 1, 7), 7) AS day_no,
    rhythm,
    recency,
    chance
  FROM return_expectations
),
chances AS (
  SELECT known_day, day_no, rhythm, recency, chance FROM first_weekdays
  UNION ALL
  SELECT known_day, day_no + 7, rhythm, recency, chance FROM first_weekdays
),
expected_on AS (
  -- thousand-millionths of a customer: what the chances of P say of who is due on the days after it
  SELECT chances.known_day, chances.day_no, SUM(chances.chance * due_on.due) AS expected
  FROM chances
  JOIN due_on
    ON due_on.day_no = chances.day_no
    AND due_on.rhythm = chances.rhythm
    AND due_on.recency = chances.recency
  GROUP BY chances.known_day, chances.day_no
),
windows AS (
  SELECT
    ahead.day_no,
    ahead.day_no - ahead.known_day AS window_days,
    ahead.level,
    CASE WHEN ahead.level IS NOT NULL THEN SUM(COALESCE(expected_on.expected, 0)) OVER up_to_day / 1000000000 END AS expected,
    CAST(SUM(ahead.returned) OVER up_to_day AS INT64) AS observed
  FROM ahead
  LEFT JOIN expected_on ON expected_on.known_day = ahead.known_day AND expected_on.day_no = ahead.day_no
  WINDOW up_to_day AS (PARTITION BY ahead.known_day ORDER BY ahead.day_no)
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
  WHERE windows.day_no >= UNIX_DATE(@from_date) - 8
),
scored AS (
  -- without a return in 4 weeks there is no level, and nothing is expected, not even nobody
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
  WHERE window_days >= 3
  QUALIFY ROW_NUMBER() OVER (
    PARTITION BY day_no
    ORDER BY CASE WHEN expected >= @min_due THEN ROUND(score, 9) ELSE window_days - 1000000000 END DESC, window_days
  ) = 1
),
alone AS (
  -- a day with less than a quarter of what was expected of it the evening before
  SELECT day_no
  FROM scored
  WHERE window_days = 1 AND 4 * observed < expected
),
first_order AS (
  SELECT MIN(order_date) AS first_order_date
  FROM customer_days
),
judged_days AS (
  SELECT
    calendar.day,
    worst.*,
    alone.day_no IS NOT NULL AS day_alone,
    -- a day on which too few are due ends what lasts
    CASE WHEN worst.expected >= @min_due THEN worst.score END AS telling_score
  FROM calendar
  LEFT JOIN worst ON worst.day_no = calendar.day_no
  LEFT JOIN alone ON alone.day_no = calendar.day_no
  WHERE calendar.day >= CAST(DATE_SUB(@from_date, INTERVAL 8 DAY) AS DATE)
),
lasting AS (
  SELECT
    *,
    CASE WHEN COUNT(telling_score) OVER days_8 = 8 THEN MIN(telling_score) OVER days_8 END AS lasting_score
  FROM judged_days
  WINDOW days_8 AS (ORDER BY day ROWS BETWEEN 7 PRECEDING AND CURRENT ROW)
),
lines AS (
  SELECT
    *,
    CASE WHEN ROUND(1.5 * lasting_score, 9) >= @shortfall_warning THEN @shortfall_warning / 1.5 ELSE @shortfall_warning END AS warning_line,
    CASE WHEN ROUND(1.5 * lasting_score, 9) >= @shortfall_critical THEN @shortfall_critical / 1.5 ELSE @shortfall_critical END AS critical_line,
    COALESCE(ROUND(telling_score, 9) >= @shortfall_warning OR ROUND(1.5 * lasting_score, 9) >= @shortfall_warning, FALSE) AS is_short
  FROM lasting
),
with_eve AS (
  SELECT
    *,
    LAG(is_short) OVER (ORDER BY day) AS eve_is_short
  FROM lines
),
gated AS (
  SELECT
    with_eve.*,
    CASE
      -- a stopped load must not look like churn
      WHEN day > @complete_through THEN 'data_incomplete'
      WHEN COALESCE(DATE_DIFF(day, first_order.first_order_date, DAY), -1) < @at_risk_days + 7 THEN 'history_warmup'
      WHEN COALESCE(expected, 0) = 0 THEN 'baseline_warmup'
      WHEN expected < @min_due THEN 'min_sample'
      WHEN day_alone AND is_short AND NOT eve_is_short THEN 'partial_day'
    END AS gate
  FROM with_eve
  CROSS JOIN first_order
  WHERE day >= @from_date
),
judged AS (
  SELECT
    *,
    CASE
      WHEN gate IS NOT NULL OR NOT is_short THEN 'INFO'
      WHEN ROUND(score, 9) >= @shortfall_critical OR ROUND(1.5 * lasting_score, 9) >= @shortfall_critical THEN 'CRITICAL'
      ELSE 'WARNING'
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
  -100 * warning_line * spread / NULLIF(expected, 0) AS threshold_warning,
  -100 * critical_line * spread / NULLIF(expected, 0) AS threshold_critical,
  severity,
  severity <> 'INFO' AS alert_flag,
  CAST(ROUND(COALESCE(expected, 0)) AS INT64) AS sample_size,
  gate,
  window_days,
  observed,
  expected,
  CASE WHEN expected < warning_line * spread THEN 0.0 ELSE expected - warning_line * spread END AS expected_low,
  expected + warning_line * spread AS expected_high,
  overdispersion,
  score,
  lasting_score,
  level,
  day_alone,
  CONCAT(
    CAST(CAST(ROUND(expected) AS INT64) AS STRING), ' customers were due back in ', CAST(window_days AS STRING), ' days, ',
    CAST(observed AS STRING), ' came: ', CASE WHEN observed >= expected THEN '+' ELSE '' END,
    CAST(CAST(ROUND(100 * (observed - expected) / NULLIF(expected, 0)) AS INT64) AS STRING), ' %',
    CASE WHEN is_short AND ROUND(score, 9) < @shortfall_warning THEN ', and short for 8 days running' ELSE '' END
  ) AS sentence
FROM judged
