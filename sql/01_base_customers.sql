-- base_customers: the facts about every customer with an order by @reference_date. No judgement here.
-- The rule; fast/base_customers.sql gives the same rows with less work and is what runs here.
WITH facts AS (
  SELECT
    customer_id,
    MIN(order_date) AS first_order_date,
    MAX(order_date) AS last_order_date,
    CAST(SUM(orders) AS INT64) AS total_orders,
    COUNT(*) AS order_days,
    CAST(SUM(revenue_cents) AS INT64) AS total_revenue_cents,
    ANY_VALUE(last_order_cents HAVING MAX order_date) AS last_order_cents
  FROM customer_days
  WHERE order_date <= @reference_date
  GROUP BY customer_id
)
SELECT
  @reference_date AS as_of_date,
  facts.customer_id,
  facts.first_order_date,
  facts.last_order_date,
  facts.total_orders,
  facts.order_days,
  facts.total_revenue_cents,
  facts.last_order_cents,
  facts.total_revenue_cents / 100 AS total_revenue,
  -- half up in whole cents: (2 * sum + n) / 2n, cut off
  DIV((2 * facts.total_revenue_cents + facts.total_orders), (2 * facts.total_orders)) / 100 AS avg_order_value,
  facts.last_order_cents / 100 AS last_order_value,
  customers.country,
  customers.segment,
  customers.loyalty_tier,
  customers.acquisition_channel,
  customers.signup_date
FROM facts
LEFT JOIN customers ON customers.customer_id = facts.customer_id
