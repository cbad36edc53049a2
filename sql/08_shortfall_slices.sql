-- shortfall_slices: which part of the customers carries a shortfall? Due and returned customers of a window by what is known of them.
-- Reads due_customers of a window that ends on @to_date, and returning_customers of that date; one row for each attribute and value.
-- A customer without the attribute counts as '(unknown)'.
-- `score` is the shortfall in its own noise, like that of returning_customers; `missing` says how many did not come who were due.
WITH known AS (
  SELECT
    due_customers.chance,
    due_customers.returned,
    CASE WHEN due_customers.was_new THEN 'one shopping day' ELSE 'several shopping days' END AS history,
    COALESCE(customers.country, '(unknown)') AS country,
    COALESCE(customers.segment, '(unknown)') AS segment,
    COALESCE(customers.loyalty_tier, '(unknown)') AS loyalty_tier,
    COALESCE(customers.acquisition_channel, '(unknown)') AS acquisition_channel
  FROM due_customers
  LEFT JOIN customers ON customers.customer_id = due_customers.customer_id
),
by_attribute AS (
  SELECT 'history' AS attribute, history AS value, chance, returned FROM known
  UNION ALL SELECT 'country', country, chance, returned FROM known
  UNION ALL SELECT 'segment', segment, chance, returned FROM known
  UNION ALL SELECT 'loyalty_tier', loyalty_tier, chance, returned FROM known
  UNION ALL SELECT 'acquisition_channel', acquisition_channel, chance, returned FROM known
),
slices AS (
  SELECT
    attribute,
    value,
    COUNT(*) AS customers,
    SUM(chance) / 1000000000 AS expected,
    CAST(SUM(returned) AS INT64) AS observed
  FROM by_attribute
  GROUP BY attribute, value
)
SELECT
  slices.attribute,
  slices.value,
  slices.customers,
  slices.expected,
  slices.observed,
  slices.expected - slices.observed AS missing,
  (slices.expected - slices.observed) / NULLIF(SQRT(returning_customers.overdispersion * slices.expected), 0) AS score
FROM slices
JOIN returning_customers ON returning_customers.alert_date = @to_date
