-- cohort_retention_evolution: of the customers who first ordered in a month, how many ordered again 0, 1, 2, ... months
-- later. A customer never changes cohort; month 0 is 100 % by definition. Months without a single order are shown as 0.
WITH cohorts AS (
  SELECT
    customer_id,
    CAST(DATE_TRUNC(MIN(order_date), MONTH) AS DATE) AS cohort_month
  FROM customer_days
  GROUP BY customer_id
),
sizes AS (
  SELECT cohort_month, COUNT(*) AS cohort_size
  FROM cohorts
  GROUP BY cohort_month
),
activity AS (
  SELECT
    cohorts.cohort_month,
    DATE_DIFF(customer_days.order_date, cohorts.cohort_month, MONTH) AS months_since_acquisition,
    COUNT(DISTINCT customer_days.customer_id) AS active_customers
  FROM customer_days
  JOIN cohorts ON cohorts.customer_id = customer_days.customer_id
  GROUP BY 1, 2
),
bounds AS (
  SELECT
    CAST(DATE_TRUNC(MIN(order_date), MONTH) AS DATE) AS first_month,
    CAST(DATE_TRUNC(MAX(order_date), MONTH) AS DATE) AS last_month
  FROM customer_days
),
months AS (
  SELECT activity_month
  FROM bounds, UNNEST(GENERATE_DATE_ARRAY(first_month, last_month, INTERVAL 1 MONTH)) AS activity_month
),
triangle AS (
  SELECT
    sizes.cohort_month,
    sizes.cohort_size,
    DATE_DIFF(months.activity_month, sizes.cohort_month, MONTH) AS months_since_acquisition
  FROM sizes
  JOIN months ON months.activity_month >= sizes.cohort_month
)
SELECT
  triangle.cohort_month,
  triangle.months_since_acquisition,
  triangle.cohort_size,
  COALESCE(activity.active_customers, 0) AS active_customers,
  100 * COALESCE(activity.active_customers, 0) / triangle.cohort_size AS retention_rate
FROM triangle
LEFT JOIN activity
  ON activity.cohort_month = triangle.cohort_month
  AND activity.months_since_acquisition = triangle.months_since_acquisition
