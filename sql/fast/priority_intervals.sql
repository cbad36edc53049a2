-- priority_intervals: from when until when each customer is in a tier, for all dates from @from_date to @to_date.
-- Why these are the tiers of 03_churn_detection.sql and 06_customer_priority.sql: between two shopping days only the days
-- since the last order change. Every rule there is a line in those days, and within a status points are only added while
-- a silence grows, so a tier begins on one day of the silence and holds until the status ends or the next order comes.
-- A refund changes revenue, and maybe the latest order's value, in the middle of a silence: there the silence is cut, each stretch
-- has amounts of its own, and a tier may end with one and begin with another.
-- For whole days, 100 * days * gaps > pct * span says the same as days >= DIV(pct * span, 100 * gaps) + 1.
-- A silence that ended by @from_date, or was longer than 2 * @at_risk_days by then, is in no tier.
-- (Not with @p1_needs_median_revenue: then P1 depends on everybody else's revenue as well.)
-- With @membership 'at_stake' anybody may be on the list until the silence is too long: a tier then begins with its status.
WITH refunded AS (
  -- what was refunded of a customer's orders from a date on, until another refund comes; nothing before the first
  SELECT
    customer_id,
    refund_date AS from_date,
    LEAD(refund_date) OVER in_order AS until_date,
    CAST(SUM(SUM(refund_cents)) OVER so_far AS INT64) AS refund_cents
  FROM (
    SELECT customer_id, refund_date, refund_cents FROM refunds
    UNION ALL
    SELECT DISTINCT customer_id, DATE '1970-01-01', 0 FROM refunds
  ) AS steps
  GROUP BY customer_id, refund_date
  WINDOW
    in_order AS (PARTITION BY customer_id ORDER BY refund_date),
    so_far AS (in_order ROWS BETWEEN UNBOUNDED PRECEDING AND CURRENT ROW)
),
refunded_of_last AS (
  -- the same of the last order of a day
  SELECT
    refunded.customer_id,
    refunded.from_date,
    refunds.order_date,
    CAST(SUM(refunds.refund_cents) AS INT64) AS refund_cents
  FROM refunded
  JOIN refunds ON refunds.customer_id = refunded.customer_id AND refunds.refund_date <= refunded.from_date
  WHERE refunds.is_last
  GROUP BY refunded.customer_id, refunded.from_date, refunds.order_date
),
silences AS (
  SELECT
    customer_days.customer_id,
    first_order_date,
    customer_days.order_date AS last_order_date,
    orders_so_far AS total_orders,
    order_days_so_far AS order_days,
    revenue_cents_so_far - COALESCE(refunded.refund_cents, 0) AS total_revenue_cents,
    last_order_cents - COALESCE(refunded_of_last.refund_cents, 0) AS last_order_cents,
    DATE_DIFF(customer_days.order_date, first_order_date, DAY) AS span_days,
    order_days_so_far - 1 AS gaps,
    CASE
      WHEN refunded.from_date > customer_days.order_date THEN DATE_DIFF(refunded.from_date, customer_days.order_date, DAY)
      ELSE 0
    END AS first_day,
    -- the last day before the next refund or order; an open silence is followed to the end of the last tier
    CASE
      WHEN refunded.until_date < next_order_date OR (refunded.until_date IS NOT NULL AND next_order_date IS NULL)
        THEN DATE_DIFF(refunded.until_date, customer_days.order_date, DAY) - 1
      ELSE COALESCE(DATE_DIFF(next_order_date, customer_days.order_date, DAY) - 1, 2 * @at_risk_days)
    END AS last_day
  FROM customer_days
  LEFT JOIN refunded
    ON refunded.customer_id = customer_days.customer_id
    AND (next_order_date IS NULL OR refunded.from_date < next_order_date)
    AND (refunded.until_date IS NULL OR refunded.until_date > customer_days.order_date)
  LEFT JOIN refunded_of_last
    ON refunded_of_last.customer_id = refunded.customer_id
    AND refunded_of_last.from_date = refunded.from_date
    AND refunded_of_last.order_date = customer_days.order_date
  WHERE customer_days.order_date BETWEEN CAST(DATE_SUB(@from_date, INTERVAL (2 * @at_risk_days) DAY) AS DATE) AND @to_date
    AND (next_order_date IS NULL OR next_order_date > @from_date)
),
signals AS (
  -- from which day of the silence each signal is on; 2 * @at_risk_days + 1 is past every tier: never
  SELECT
    *,
    CASE WHEN gaps > 0 THEN DIV((@frequency_drop_pct * span_days), (100 * gaps)) + 1 ELSE 2 * @at_risk_days + 1 END AS late_from,
    CASE
      WHEN total_orders <= @few_orders THEN 0
      WHEN gaps > 0 THEN DIV((@inconsistent_gap_pct * span_days), (100 * gaps)) + 1
      ELSE 2 * @at_risk_days + 1
    END AS unsettled_from,
    CASE WHEN 100 * last_order_cents * total_orders < @value_drop_pct * total_revenue_cents THEN @value_drop_score ELSE 0 END AS points
  FROM silences
),
enough AS (
  -- from which day the points are enough: HIGH while ACTIVE, MEDIUM or HIGH after that, where nobody is unsettled
  SELECT
    *,
    CASE
      WHEN points >= @high_risk_score THEN 0
      WHEN points + @frequency_drop_score >= @high_risk_score AND points + @inconsistent_score >= @high_risk_score
        THEN LEAST(late_from, unsettled_from)
      WHEN points + @frequency_drop_score >= @high_risk_score THEN late_from
      WHEN points + @inconsistent_score >= @high_risk_score THEN unsettled_from
      WHEN points + @frequency_drop_score + @inconsistent_score >= @high_risk_score THEN GREATEST(late_from, unsettled_from)
      ELSE 2 * @at_risk_days + 1
    END AS active_high_from,
    CASE
      WHEN points >= @medium_risk_score THEN 0
      WHEN points + @frequency_drop_score >= @medium_risk_score THEN late_from
      ELSE 2 * @at_risk_days + 1
    END AS medium_from,
    CASE
      WHEN points >= @high_risk_score THEN 0
      WHEN points + @frequency_drop_score >= @high_risk_score THEN late_from
      ELSE 2 * @at_risk_days + 1
    END AS high_from
  FROM signals
),
tiers AS (
  SELECT
    enough.*,
    tier AS priority_tier,
    GREATEST(first_day, CASE
      WHEN @membership = 'at_stake' THEN CASE tier WHEN 'P1' THEN 0 WHEN 'P2' THEN @active_days + 1 ELSE @at_risk_days + 1 END
      WHEN tier = 'P1' THEN active_high_from
      WHEN tier = 'P2' THEN GREATEST(medium_from, @active_days + 1)
      ELSE GREATEST(high_from, @at_risk_days + 1)
    END) AS from_day,
    LEAST(last_day, CASE tier WHEN 'P1' THEN @active_days WHEN 'P2' THEN @at_risk_days ELSE 2 * @at_risk_days END) AS to_day
  FROM enough
  CROSS JOIN UNNEST(['P1', 'P2', 'P3']) AS tier
  WHERE @membership = 'at_stake'
    OR active_high_from <= LEAST(last_day, @active_days)
    OR (last_day > @active_days AND medium_from <= last_day)
)
SELECT
  customer_id,
  priority_tier,
  first_order_date,
  last_order_date,
  total_orders,
  order_days,
  total_revenue_cents,
  last_order_cents,
  GREATEST(from_day, DATE_DIFF(@from_date, last_order_date, DAY)) AS from_day,
  LEAST(to_day, DATE_DIFF(@to_date, last_order_date, DAY)) AS to_day
FROM tiers
WHERE from_day <= to_day
  AND to_day >= DATE_DIFF(@from_date, last_order_date, DAY)
  AND from_day <= DATE_DIFF(@to_date, last_order_date, DAY)
