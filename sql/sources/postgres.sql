-- Your orders, one row each, out of your own Postgres tables: put your names in place of these.
-- It runs there in a read-only transaction. Who counts as a customer, what counts as an order and what it is worth is
-- decided here, in the open. Change it freely: the next pull notices and reads everything again.
SELECT
  o.id AS order_id,
  -- accounts that were merged: COALESCE(c.merged_into, c.id) with a JOIN; guests: their own stable id, such as md5(lower(o.email))
  o.customer_id,
  o.created_at AS ordered_at,    -- timestamptz is dated in shop_timezone; a timestamp without zone is taken for the shop's own time
  o.total AS order_amount,       -- numeric, in currency units
  o.currency,                    -- one per shop: convert here, or keep one of them
  o.status,                      -- which of them count is RETENTION_OPS_COMPLETED_STATUSES
  o.is_test,                     -- FALSE where you have none; orders of your own staff belong here too
  o.updated_at                   -- optional: with it, changes to orders older than lookback_days are seen as well
  -- optional: , o.refunded AS refund_amount    what was paid back of the order so far, of an order_amount as it was ordered
FROM orders AS o
WHERE o.customer_id IS NOT NULL  -- guests without any id cannot be recognised when they come back
-- B2B: AND o.channel <> 'wholesale'
