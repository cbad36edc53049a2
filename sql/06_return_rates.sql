-- return_rates: how likely customers of each kind come back, as known on each day D from @from_date to @to_date; a row for each cell.
-- Cells, and what `customers`, `returned_30` and `returned_90` count, are those of return_windows, added up over the days D learns from.
-- rate_30 and rate_90 are the share that came back. A cell of few customers says little, so 30 customers of its parent are added to it:
-- lateness within visits x recency, that within visits, that within all. A cell without any customer has its parent's rate.
-- Season, in odds (one who comes back to how many who do not), is how many came back against the rates of the same customers:
--   season_odds  a year ago, around this time of the year
--   level_odds   in the last weeks, against the same weeks a year ago
-- p_no_return_90d is 1 - rate_90, its odds changed by season_odds x level_odds; at most 4 times, at least a quarter; unknown odds change nothing.
-- Rates are of a thousand million and rounded to integers, so that sums of them do not depend on the order of rows.
-- Reads return_days and return_windows of the same dates. A day D that has nothing to learn from has no row.
WITH cells AS (
  SELECT visits, recency, lateness
  FROM UNNEST([1, 2, 3, 4, 6, 8, 11, 16, 26]) AS visits
  CROSS JOIN UNNEST([0, 8, 15, 22, 31, 46, 61, 76, 91, 121, 151]) AS recency
  CROSS JOIN UNNEST([-1, 0, 50, 75, 100, 150, 200, 300, 500]) AS lateness
  WHERE (visits = 1) = (lateness = -1)
),
learned AS (
  SELECT
    return_days.as_of_date,
    return_windows.visits,
    return_windows.recency,
    return_windows.lateness,
    SUM(return_windows.customers) AS customers,
    SUM(return_windows.returned_30) AS returned_30,
    SUM(return_windows.returned_90) AS returned_90
  FROM return_days
  JOIN return_windows ON return_windows.as_of_date = return_days.window_date
  WHERE return_days.purpose = 'learn'
  GROUP BY return_days.as_of_date, return_windows.visits, return_windows.recency, return_windows.lateness
),
grid AS (
  SELECT
    days.as_of_date,
    cells.visits,
    cells.recency,
    cells.lateness,
    CAST(COALESCE(learned.customers, 0) AS INT64) AS customers,
    CAST(COALESCE(learned.returned_30, 0) AS INT64) AS returned_30,
    CAST(COALESCE(learned.returned_90, 0) AS INT64) AS returned_90
  FROM (SELECT DISTINCT as_of_date FROM learned) AS days
  CROSS JOIN cells
  LEFT JOIN learned
    ON learned.as_of_date = days.as_of_date
    AND learned.visits = cells.visits
    AND learned.recency = cells.recency
    AND learned.lateness = cells.lateness
),
parents AS (
  SELECT
    *,
    CAST(SUM(customers) OVER of_day AS INT64) AS day_customers,
    CAST(SUM(returned_30) OVER of_day AS INT64) AS day_returned_30,
    CAST(SUM(returned_90) OVER of_day AS INT64) AS day_returned_90,
    CAST(SUM(customers) OVER of_visits AS INT64) AS visits_customers,
    CAST(SUM(returned_30) OVER of_visits AS INT64) AS visits_returned_30,
    CAST(SUM(returned_90) OVER of_visits AS INT64) AS visits_returned_90,
    CAST(SUM(customers) OVER of_recency AS INT64) AS recency_customers,
    CAST(SUM(returned_30) OVER of_recency AS INT64) AS recency_returned_30,
    CAST(SUM(returned_90) OVER of_recency AS INT64) AS recency_returned_90
  FROM grid
  WINDOW
    of_day AS (PARTITION BY as_of_date),
    of_visits AS (PARTITION BY as_of_date, visits),
    of_recency AS (PARTITION BY as_of_date, visits, recency)
),
-- each rate half up: (2 * numerator + n) / 2n, cut off
all_rates AS (
  SELECT
    *,
    DIV((2000000000 * day_returned_30 + day_customers), (2 * day_customers)) AS day_rate_30,
    DIV((2000000000 * day_returned_90 + day_customers), (2 * day_customers)) AS day_rate_90
  FROM parents
),
visits_rates AS (
  SELECT
    *,
    DIV((2 * (1000000000 * visits_returned_30 + 30 * day_rate_30) + visits_customers + 30), (2 * (visits_customers + 30)))
      AS visits_rate_30,
    DIV((2 * (1000000000 * visits_returned_90 + 30 * day_rate_90) + visits_customers + 30), (2 * (visits_customers + 30)))
      AS visits_rate_90
  FROM all_rates
),
recency_rates AS (
  SELECT
    *,
    DIV((2 * (1000000000 * recency_returned_30 + 30 * visits_rate_30) + recency_customers + 30), (2 * (recency_customers + 30)))
      AS recency_rate_30,
    DIV((2 * (1000000000 * recency_returned_90 + 30 * visits_rate_90) + recency_customers + 30), (2 * (recency_customers + 30)))
      AS recency_rate_90
  FROM visits_rates
),
rates AS (
  SELECT
    as_of_date,
    visits,
    recency,
    lateness,
    customers,
    returned_30,
    returned_90,
    recency_rate_90 AS parent_rate_90,
    DIV((2 * (1000000000 * returned_30 + 30 * recency_rate_30) + customers + 30), (2 * (customers + 30))) AS rate_30,
    DIV((2 * (1000000000 * returned_90 + 30 * recency_rate_90) + customers + 30), (2 * (customers + 30))) AS rate_90
  FROM recency_rates
),
compared AS (
  -- how many came back, of how many, and how many of a thousand million times as many would have by the rates
  SELECT
    return_days.as_of_date,
    return_days.purpose,
    CAST(SUM(return_windows.customers) AS INT64) AS customers,
    CAST(SUM(CASE WHEN return_days.purpose = 'season' THEN return_windows.returned_90 ELSE return_windows.returned_30 END) AS INT64)
      AS returned,
    CAST(SUM(return_windows.customers * CASE WHEN return_days.purpose = 'season' THEN rates.rate_90 ELSE rates.rate_30 END) AS INT64)
      AS expected
  FROM return_days
  JOIN return_windows ON return_windows.as_of_date = return_days.window_date
  JOIN rates
    ON rates.as_of_date = return_days.as_of_date
    AND rates.visits = return_windows.visits
    AND rates.recency = return_windows.recency
    AND rates.lateness = return_windows.lateness
  WHERE return_days.purpose <> 'learn'
  GROUP BY return_days.as_of_date, return_days.purpose
),
odds AS (
  -- of none and of all there are no odds
  SELECT
    as_of_date,
    purpose,
    (NULLIF(returned, 0) / NULLIF(customers - returned, 0))
      / (NULLIF(expected, 0) / NULLIF(1000000000 * customers - expected, 0)) AS against_rates
  FROM compared
),
seasons AS (
  SELECT
    as_of_date,
    MAX(CASE WHEN purpose = 'season' THEN against_rates END) AS season_odds,
    MAX(CASE WHEN purpose = 'level' THEN against_rates END)
      / MAX(CASE WHEN purpose = 'level_year' THEN against_rates END) AS level_odds
  FROM odds
  GROUP BY as_of_date
),
factors AS (
  SELECT
    rates.*,
    seasons.season_odds,
    seasons.level_odds,
    LEAST(4.0, GREATEST(0.25, COALESCE(seasons.season_odds, 1.0) * COALESCE(seasons.level_odds, 1.0))) AS factor
  FROM rates
  LEFT JOIN seasons ON seasons.as_of_date = rates.as_of_date
)
SELECT
  as_of_date,
  visits,
  recency,
  lateness,
  customers,
  returned_30,
  returned_90,
  parent_rate_90,
  rate_30,
  rate_90,
  season_odds,
  level_odds,
  ROUND(1000000 * ((1000000000 - rate_90) / (1000000000 - rate_90 + rate_90 * factor))) / 1000000 AS p_no_return_90d
FROM factors
