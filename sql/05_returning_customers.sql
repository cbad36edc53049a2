-- returning_customers: do the customers come back who are due by their own rhythm? The alert 'returning_customers_shortfall',
-- one row for each day from @from_date to @to_date, in one sentence: "212 customers were due back in 7 days, 96 came: -55 %".
-- Reads due_daily from 386 days before @from_date, return_expectations of the same dates, and closed_days (they expect nobody).
-- Windows of 3 to 14 days that end on D are each held against what was expected before they began; the one that falls short most,
-- measured in its own noise, is the row of D. A steep fall shows in the short windows, a slow one in the long.
-- Noise: a count that varies as (week over week, over 52 weeks) this shop's days do: `overdispersion` times a Poisson count.
-- A day that falls out alone, the first below the line, may be a load that is not whole: it waits for the next day (partial_day).
WITH calendar AS (
  SELECT
    day,
    UNIX_DATE(day) AS day_no,
    CASE WHEN closed_days.closed_date IS NULL THEN 1 ELSE 0 END AS open
  FROM UNNEST(GENERATE_DATE_ARRAY(CAST(DATE_SUB(@from_date, INTERVAL 386 DAY) AS DATE), @to_date, INTERVAL 1 DAY)) AS day
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
  WHERE windows.day_no >= UNIX_DATE(@from_date) - 1
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
gated AS (
  SELECT
    calendar.day,
    worst.*,
    alone.day_no IS NOT NULL AS day_alone,
    CASE
      -- a stopped load must not look like churn
      WHEN calendar.day > @complete_through THEN 'data_incomplete'
      WHEN COALESCE(DATE_DIFF(calendar.day, first_order.first_order_date, DAY), -1) < @at_risk_days + 7 THEN 'history_warmup'
      WHEN COALESCE(worst.expected, 0) = 0 THEN 'baseline_warmup'
      WHEN worst.expected < @min_due THEN 'min_sample'
      WHEN alone.day_no IS NOT NULL
        AND ROUND(worst.score, 9) >= @shortfall_warning
        AND (COALESCE(day_before.expected, 0) < @min_due OR ROUND(day_before.score, 9) < @shortfall_warning) THEN 'partial_day'
    END AS gate
  FROM calendar
  CROSS JOIN first_order
  LEFT JOIN worst ON worst.day_no = calendar.day_no
  LEFT JOIN worst AS day_before ON day_before.day_no = calendar.day_no - 1
  LEFT JOIN alone ON alone.day_no = calendar.day_no
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
  level,
  day_alone,
  CONCAT(
    CAST(CAST(ROUND(expected) AS INT64) AS STRING), ' customers were due back in ', CAST(window_days AS STRING), ' days, ',
    CAST(observed AS STRING), ' came: ', CASE WHEN observed >= expected THEN '+' ELSE '' END,
    CAST(CAST(ROUND(100 * (observed - expected) / NULLIF(expected, 0)) AS INT64) AS STRING), ' %'
  ) AS sentence
FROM judged
