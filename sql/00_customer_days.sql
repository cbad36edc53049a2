-- customer_days: a customer's shopping days. Derived once per orders version.
-- Two orders on one day are one visit: rhythm is measured between days, not between invoices.
SELECT
  customer_id,
  order_date,
  COUNT(*) AS orders,
  CAST(SUM(order_cents) AS INT64) AS revenue_cents,
  ANY_VALUE(order_cents HAVING MAX order_id) AS last_order_cents
FROM orders
GROUP BY customer_id, order_date
