-- due_customers: who was due back from @from_date to @to_date (D) by their own rhythm, and who of them came.
-- One row for each customer with an order before D. `chance` adds up to what returning_customers expects of the window, to the last
-- digit: it is how often, of a thousand million customers of the same rhythm and silence, one came back in such days.
-- Overdue is who did not come in the window and is silent for longer than the own usual gap; one shopping day gives no gap yet.
-- Reads return_expectations of the day before @from_date, and closed_days.
WITH days AS (
  SELECT day
  FROM UNNEST(GENERATE_DATE_ARRAY(@from_date, @to_date, INTERVAL 1 DAY)) AS day
  LEFT JOIN closed_days ON closed_days.closed_date = day
  WHERE closed_days.closed_date IS NULL
),
chances AS (
  SELECT rhythm, recency, weekday, chance
  FROM return_expectations
  WHERE known_day = DATE_SUB(@from_date, INTERVAL 1 DAY)
),
silences AS (
  SELECT
    customer_id,
    order_date,
    next_order_date,
    CASE
      WHEN order_days_so_far = 1 THEN 0
      WHEN DATE_DIFF(order_date, first_order_date, DAY) < 10 * (order_days_so_far - 1) THEN 1
      WHEN DATE_DIFF(order_date, first_order_date, DAY) < 20 * (order_days_so_far - 1) THEN 2
      WHEN DATE_DIFF(order_date, first_order_date, DAY) < 35 * (order_days_so_far - 1) THEN 3
      WHEN DATE_DIFF(order_date, first_order_date, DAY) < 60 * (order_days_so_far - 1) THEN 4
      WHEN DATE_DIFF(order_date, first_order_date, DAY) < 100 * (order_days_so_far - 1) THEN 5
      ELSE 6
    END AS rhythm
  FROM customer_days
  WHERE order_date < @to_date AND (next_order_date IS NULL OR next_order_date >= @from_date)
),
due_on AS (
  SELECT
    silences.customer_id,
    silences.rhythm,
    MOD(UNIX_DATE(days.day), 7) AS weekday,
    CASE WHEN silences.next_order_date = days.day THEN 1 ELSE 0 END AS came,
    DATE_DIFF(days.day, silences.order_date, DAY) AS silence
  FROM days
  JOIN silences
    ON silences.order_date < days.day
    AND (silences.next_order_date IS NULL OR silences.next_order_date >= days.day)
),
in_cells AS (
  SELECT
    customer_id,
    rhythm,
    weekday,
    came,
    CASE
      WHEN silence < 4 THEN 1
      WHEN silence < 8 THEN 4
      WHEN silence < 15 THEN 8
      WHEN silence < 22 THEN 15
      WHEN silence < 31 THEN 22
      WHEN silence < 46 THEN 31
      WHEN silence < 61 THEN 46
      WHEN silence < 91 THEN 61
      WHEN silence < 121 THEN 91
      WHEN silence < 181 THEN 121
      WHEN silence < 271 THEN 181
      ELSE 271
    END AS recency
  FROM due_on
),
due AS (
  SELECT
    in_cells.customer_id,
    -- only a silence after the very first shopping day has no rhythm
    MIN(in_cells.rhythm) = 0 AS was_new,
    CAST(SUM(COALESCE(chances.chance, 0)) AS INT64) AS chance,
    CAST(SUM(in_cells.came) AS INT64) AS returned
  FROM in_cells
  LEFT JOIN chances
    ON chances.rhythm = in_cells.rhythm
    AND chances.recency = in_cells.recency
    AND chances.weekday = in_cells.weekday
  GROUP BY in_cells.customer_id
),
refunded AS (
  SELECT customer_id, CAST(SUM(refund_cents) AS INT64) AS refund_cents
  FROM refunds
  WHERE refund_date <= @to_date
  GROUP BY customer_id
),
as_of_d AS (
  -- what is known of each on D: the silence that lasts; money less refunds, as in base_customers
  SELECT
    customer_days.customer_id,
    order_date AS last_order_date,
    DATE_DIFF(@to_date, order_date, DAY) AS days_since_last_order,
    order_days_so_far - 1 AS gaps,
    DATE_DIFF(order_date, first_order_date, DAY) AS span_days,
    orders_so_far AS total_orders,
    revenue_cents_so_far - COALESCE(refunded.refund_cents, 0) AS total_revenue_cents
  FROM customer_days
  LEFT JOIN refunded ON refunded.customer_id = customer_days.customer_id
  WHERE order_date <= @to_date AND (next_order_date IS NULL OR next_order_date > @to_date)
)
SELECT
  due.customer_id,
  due.chance,
  due.returned,
  due.was_new,
  as_of_d.last_order_date,
  as_of_d.days_since_last_order,
  CASE WHEN as_of_d.gaps > 0 THEN as_of_d.span_days / as_of_d.gaps END AS usual_gap_days,
  as_of_d.total_orders,
  ROUND(as_of_d.total_revenue_cents / as_of_d.total_orders) / 100 AS avg_order_value,
  due.returned = 0 AND as_of_d.gaps > 0 AND as_of_d.days_since_last_order * as_of_d.gaps > as_of_d.span_days AS is_overdue,
  -- what a usual order of theirs, times the chance of it, would have brought
  ROUND(due.chance / 1000000000 * (as_of_d.total_revenue_cents / as_of_d.total_orders)) / 100 AS value_due
FROM due
JOIN as_of_d ON as_of_d.customer_id = due.customer_id
