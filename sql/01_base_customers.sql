-- base_customers: the facts about every customer with an order by @reference_date. No judgement here.
-- As of a date an order is worth its amount less what was refunded of it by then; refunded in full it is worth 0 and still a visit:
-- the customer did come, so dates, orders and order_days stay as they are.
-- The rule; fast/base_customers.sql gives the same rows with less work and is what runs here.
WITH visits AS (
  SELECT
    customer_id,
    MIN(order_date) AS first_order_date,
    MAX(order_date) AS last_order_date,
    CAST(SUM(orders) AS INT64) AS total_orders,
    COUNT(*) AS order_days,
    CAST(SUM(revenue_cents) AS INT64) AS revenue_cents,
    ANY_VALUE(last_order_cents HAVING MAX order_date) AS last_order_cents
  FROM customer_days
  WHERE order_date <= @reference_date
  GROUP BY customer_id
),
refunded AS (
  SELECT customer_id, CAST(SUM(refund_cents) AS INT64) AS refund_cents
  FROM refunds
  WHERE refund_date <= @reference_date
  GROUP BY customer_id
),
refunded_of_last AS (
  -- of the last order of a day: where the day is the customer's latest, of the customer's latest order
  SELECT customer_id, order_date, CAST(SUM(refund_cents) AS INT64) AS refund_cents
  FROM refunds
  WHERE refund_date <= @reference_date AND is_last
  GROUP BY customer_id, order_date
),
facts AS (
  SELECT
    visits.customer_id,
    visits.first_order_date,
    visits.last_order_date,
    visits.total_orders,
    visits.order_days,
    visits.revenue_cents - COALESCE(refunded.refund_cents, 0) AS total_revenue_cents,
    visits.last_order_cents - COALESCE(refunded_of_last.refund_cents, 0) AS last_order_cents
  FROM visits
  LEFT JOIN refunded ON refunded.customer_id = visits.customer_id
  LEFT JOIN refunded_of_last
    ON refunded_of_last.customer_id = visits.customer_id AND refunded_of_last.order_date = visits.last_order_date
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
