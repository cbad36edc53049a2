-- customer_days: a customer's shopping days. Derived once per orders version.
-- Two orders on one day are one visit: rhythm is measured between days, not between invoices.
-- Each day also says what was true of the customer up to and including it, and when the next one came: a customer is as a
-- row says from its order_date until next_order_date. As of D, a next_order_date after D is one that nobody knows yet.
WITH days AS (
  SELECT
    customer_id,
    order_date,
    COUNT(*) AS orders,
    CAST(SUM(order_cents) AS INT64) AS revenue_cents,
    ANY_VALUE(order_cents HAVING MAX order_id) AS last_order_cents
  FROM orders
  GROUP BY customer_id, order_date
)
SELECT
  customer_id,
  order_date,
  orders,
  revenue_cents,
  last_order_cents,
  FIRST_VALUE(order_date) OVER so_far AS first_order_date,
  LEAD(order_date) OVER in_order AS next_order_date,
  ROW_NUMBER() OVER in_order AS order_days_so_far,
  CAST(SUM(orders) OVER so_far AS INT64) AS orders_so_far,
  CAST(SUM(revenue_cents) OVER so_far AS INT64) AS revenue_cents_so_far
FROM days
WINDOW
  in_order AS (PARTITION BY customer_id ORDER BY order_date),
  so_far AS (in_order ROWS BETWEEN UNBOUNDED PRECEDING AND CURRENT ROW)
