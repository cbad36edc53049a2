-- Your orders, one row each, out of Shopify's own export (Orders > Export > csv), with exports/ as RETENTION_OPS_SOURCE_PATH.
-- DuckDB runs this over the view `source_files`: every column of the export as text, and source_file, the file's name.
-- Who counts as a customer, what counts as an order and what it is worth is decided here, in the open. Change it freely:
-- the next pull notices and reads everything again.
WITH lines AS (
  SELECT *
  FROM source_files
  -- several exports may overlap: of each order the last file by name counts, so name them by date
  QUALIFY source_file = MAX(source_file) OVER (PARTITION BY "Name")
)
SELECT
  "Name" AS order_id,
  -- the export knows no customer id, so the address is it. It is never kept: the pull turns it into a keyed hash (RETENTION_OPS_ID_KEY).
  -- An order without an address (point of sale, draft) is nobody's and is left out below; merged accounts are merged here.
  LOWER(TRIM(MAX("Email"))) AS customer_id,
  MAX("Created at") AS ordered_at,            -- 2026-01-31 18:05:00 -0500: has its zone, becomes the date in shop_timezone
  MAX("Total") AS order_amount,               -- after discounts, with taxes and shipping; "Subtotal" is without these two
  MAX("Refunded Amount") AS refund_amount,    -- so far; what is more than at the pull before is a refund of the day it is first seen
  MAX("Currency") AS currency,                -- one per shop: convert here, or keep one of them
  -- paid, refunded, ...; an order refunded in full is still a visit, then worth 0; which of them count is RETENTION_OPS_COMPLETED_STATUSES
  CASE WHEN MAX("Cancelled at") IS NOT NULL THEN 'cancelled' ELSE MAX("Financial Status") END AS status,
  -- Shopify's gateway for tests; add your own, for instance addresses of your company
  COALESCE(MAX("Payment Method") ILIKE '%bogus%', FALSE) AS is_test
FROM lines
GROUP BY "Name"  -- an order has a row for each of its items; only the first names date, amount and status
HAVING MAX("Email") IS NOT NULL
-- B2B: AND COALESCE(MAX("Tags"), '') NOT ILIKE '%wholesale%'
