-- base_customers without adding anything up; row for row what 01_base_customers.sql says.
-- Why it is the same: as of @reference_date a customer stands on the latest shopping day up to it, which is the one day whose
-- next one is later or has not come; and that row of customer_days already holds the totals of all days up to itself.
-- What was refunded is added up here as there: refunds come when they like, so no shopping day can hold them.
WITH visits AS (
  SELECT
    customer_id,
    first_order_date,
    order_date AS last_order_date,
    orders_so_far AS total_orders,
    order_days_so_far AS order_days,
    revenue_cents_so_far AS revenue_cents,
    last_order_cents
  FROM customer_days
  WHERE order_date <= @reference_date AND (next_order_date IS NULL OR next_order_date > @reference_date)
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
