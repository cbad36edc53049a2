-- Your orders, one row each, out of your own BigQuery tables: put your names in place of these.
-- It runs there as a job of your account and is never written to. Who counts as a customer, what counts as an order and what
-- it is worth is decided here, in the open. Change it freely: the next pull notices and reads everything again.
SELECT
  o.order_id,
  -- Accounts that were merged: COALESCE(c.merged_into, o.customer_id) in place of o.customer_id, with the JOIN below. Guests: their
  -- address as it is, not a hash of your own; it is never kept, the pull turns it into a keyed hash (RETENTION_OPS_ID_KEY).
  -- guests, in place of the next line: COALESCE(CAST(o.customer_id AS STRING), LOWER(TRIM(o.email))) AS customer_id,
  o.customer_id,
  o.created_at AS ordered_at,    -- TIMESTAMP is dated in shop_timezone; DATETIME is taken for the shop's own time
  o.total AS order_amount,       -- NUMERIC, in currency units
  o.currency,                    -- one per shop: convert here, or keep one of them
  o.status,                      -- which of them count is RETENTION_OPS_COMPLETED_STATUSES
  o.is_test,                     -- FALSE where you have none; orders of your own staff belong here too
  o.updated_at                   -- optional: with it, changes to orders older than lookback_days are seen as well
  -- optional: , o.refunded AS refund_amount    what was paid back of the order so far, of an order_amount as it was ordered
FROM `my-project.sales.orders` AS o
-- merged accounts: LEFT JOIN `my-project.sales.customers` AS c ON c.id = o.customer_id
WHERE o.customer_id IS NOT NULL  -- an order without any id is nobody's
-- guests, in place of the line before: WHERE (o.customer_id IS NOT NULL OR TRIM(o.email) <> '')
-- B2B: AND COALESCE(o.channel, '') <> 'wholesale'
