"""What each kind of input file means, declared as data: columns, exclusions, and how records become orders.

SQL fragments here see the typed columns of one record under the field names. Nothing in this module reads a file.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from retention_ops.errors import UsageError
from retention_ops.warehouse.dialect import literal

Kind = Literal[
    "id", "numeric_id", "whole", "decimal", "money", "date", "us_date", "compact_date", "end_date", "text", "boolean", "currency",
]
"""How a text value is parsed and which rules it must pass; see validation.py for both."""

Format = Literal["csv", "xlsx", "parquet", "text"]


@dataclass(frozen=True)
class Field:
    """One column that is used. `needed`: the header must have it; `filled`: every record must have a value."""

    name: str
    kind: Kind
    header: str
    aliases: tuple[str, ...] = ()
    needed: bool = True
    filled: bool = True

    @property
    def headers(self) -> tuple[str, ...]:
        """Every header that means this field."""
        return (self.header, *self.aliases)


@dataclass(frozen=True)
class Exclusion:
    """Records that are legal but do not become part of an order; `when` is SQL over one typed record.

    They are counted under `reason`, and where there is a `by` (SQL over one record too) for each of its values.
    """

    reason: str
    when: str
    by: str = ""


@dataclass(frozen=True)
class Preset:
    """One kind of input file.

    `key` names an order (or a customer) and `amount` is a record's value in currency units, both SQL over one record.
    `several_records`: whether one key may have several records in one file, which are then summed. `of_source`: the records are
    a source's own answer, so a known order that it excludes is taken back, and no record at all is an answer too. `carried`: fields
    that are kept beside the orders while they are taken in.
    """

    name: str
    title: str
    dataset: Literal["orders", "refunds", "customers", "suppressions", "closures"]
    formats: tuple[Format, ...]
    fields: tuple[Field, ...]
    key: str
    key_field: str
    repeated: str
    amount: str = ""
    amount_field: str = ""
    zero: str = ""
    several_records: bool = False
    of_source: bool = False
    carried: tuple[str, ...] = ()
    exclusions: tuple[Exclusion, ...] = ()
    currency: str | None = None
    notes: tuple[str, ...] = ()
    example: str = ""

    def field(self, name: str) -> Field:
        return next(field for field in self.fields if field.name == name)


PRESETS: dict[str, Preset] = {
    preset.name: preset
    for preset in (
        Preset(
            name="uci-online-retail",
            title="invoice lines of the UCI Online Retail data sets, both editions",
            dataset="orders",
            formats=("csv", "xlsx", "parquet"),
            fields=(
                Field("invoice", "numeric_id", "InvoiceNo", ("Invoice",)),
                Field("quantity", "whole", "Quantity"),
                Field("order_date", "us_date", "InvoiceDate"),
                Field("price", "decimal", "UnitPrice", ("Price",)),
                Field("customer_id", "numeric_id", "CustomerID", ("Customer ID",), filled=False),
            ),
            key="invoice",
            key_field="invoice",
            repeated="invoice already in an earlier file",
            # DECIMAL(10,0) x DECIMAL(28,12) is the widest product that still fits DECIMAL(38,12) exactly
            amount="CAST(quantity AS DECIMAL(10, 0)) * price",
            amount_field="price",
            zero="invoice worth less than half a cent",
            several_records=True,
            exclusions=(
                Exclusion("cancellation", "upper(left(invoice, 1)) = 'C'"),
                Exclusion("no customer", "customer_id IS NULL"),
                Exclusion("quantity not positive", "quantity <= 0"),
                Exclusion("price not positive", "price <= 0"),
            ),
            currency="GBP",
            notes=(
                "An order is an invoice, dated by its earliest line, worth the sum of quantity x price.",
                "Dates: 2010-12-01 08:26:00 (shop time), 2010-12-01T08:26:00Z (converted to shop time) or 12/1/2010 8:26.",
            ),
            example="online_retail.csv online_retail_II.xlsx",
        ),
        Preset(
            name="cdnow",
            title="CDNOW purchases, one per line, as text",
            dataset="orders",
            formats=("text",),
            fields=(
                Field("customer_id", "id", "customer_id"),
                Field("order_date", "compact_date", "date"),
                Field("quantity", "whole", "number_of_cds"),
                Field("value", "money", "dollar_value"),
            ),
            key="customer_id || '-' || CAST(order_date AS VARCHAR)",
            key_field="customer_id",
            repeated="customer's day already in an earlier file",
            amount="value",
            amount_field="value",
            zero="day worth nothing",
            several_records=True,
            currency="USD",
            notes=(
                "Fields are separated by blanks or commas: customer, date (YYYYMMDD), quantity, value; a header is optional.",
                "With five fields the first one is dropped (the 1/10 sample file). An order is a customer's day.",
            ),
            example="CDNOW_master.txt",
        ),
        Preset(
            name="orders",
            title="one order per record",
            dataset="orders",
            formats=("csv", "xlsx", "parquet"),
            fields=(
                Field("order_id", "id", "order_id"),
                Field("customer_id", "id", "customer_id"),
                Field("order_date", "date", "order_date"),
                Field("order_amount", "money", "order_amount"),
                Field("currency", "currency", "currency", needed=False, filled=False),
            ),
            key="order_id",
            key_field="order_id",
            repeated="order already in an earlier file",
            amount="order_amount",
            amount_field="order_amount",
            zero="zero amount",
            notes=(
                "Dates: 2024-05-31, 2024-05-31 14:00:00 (shop time) or with an offset, which is converted to shop time.",
                "Amounts use a decimal point and no thousands separator. Without a currency the setting `currency` counts.",
            ),
            example="orders.csv",
        ),
        Preset(
            name="refunds",
            title="what was paid back of known orders, one refund per record",
            dataset="refunds",
            formats=("csv", "xlsx", "parquet"),
            fields=(
                Field("order_id", "id", "order_id"),
                Field("refund_date", "date", "refund_date"),
                Field("refund_amount", "money", "refund_amount"),
                Field("currency", "currency", "currency", needed=False, filled=False),
            ),
            key="order_id",
            key_field="order_id",
            repeated="refund already in an earlier file",
            amount="refund_amount",
            amount_field="refund_amount",
            zero="zero amount",
            several_records=True,
            notes=(
                "From its date on an order is worth that much less; it stays a visit, also when all of it was paid back.",
                "Amounts are above 0, in the currency of the orders. Those of one order and day are added up; all of them together must",
                "not exceed the order.",
                "Orders come first: a refund of an order that is not known is refused, and one before the order's date.",
                "Another amount for a known order and day takes --replace; 0 then takes the refund back.",
            ),
            example="refunds.csv",
        ),
        Preset(
            name="customers",
            title="one customer per record, with optional attributes",
            dataset="customers",
            formats=("csv", "xlsx", "parquet"),
            fields=(
                Field("customer_id", "id", "customer_id"),
                Field("country", "text", "country", needed=False, filled=False),
                Field("segment", "text", "segment", needed=False, filled=False),
                Field("loyalty_tier", "text", "loyalty_tier", needed=False, filled=False),
                Field("acquisition_channel", "text", "acquisition_channel", needed=False, filled=False),
                Field("signup_date", "date", "signup_date", needed=False, filled=False),
                Field("consent", "boolean", "consent", needed=False, filled=False),
            ),
            key="customer_id",
            key_field="customer_id",
            repeated="customer already in an earlier file",
            notes=(
                "Known customers are updated by id. An empty cell, or a column the file does not have, keeps what is stored.",
                "consent is true/false, yes/no or 1/0; empty means not known, so it never undoes a no.",
            ),
            example="customers.csv",
        ),
        Preset(
            name="suppressions",
            title="customers who must not be contacted, one per record, with reason and last day where there is one",
            dataset="suppressions",
            formats=("csv", "xlsx", "parquet"),
            fields=(
                Field("customer_id", "id", "customer_id"),
                Field("reason", "text", "reason", needed=False, filled=False),
                Field("until", "end_date", "until", needed=False, filled=False),
            ),
            key="customer_id",
            key_field="customer_id",
            repeated="customer already in an earlier file",
            notes=(
                "until is the last day of the suppression; empty, or a column the file does not have, means for ever.",
                "Files add to the list: the longer suppression wins, so no file lifts one by leaving a customer or a date out.",
                "With --replace the files are the whole list: whoever is not in them is lifted, and the report says how many.",
            ),
            example="do_not_contact.csv",
        ),
    )
}


def source_preset(completed: Sequence[str]) -> Preset:
    """What sql/sources/orders.sql gives, one order per row; `completed` are the statuses, in lower case, that count."""
    counted = ", ".join(literal(status) for status in completed)
    return Preset(
        name="source",
        title="the SELECT of sql/sources/orders.sql, one order per row",
        dataset="orders",
        formats=("parquet",),
        fields=(
            Field("order_id", "id", "order_id"),
            Field("customer_id", "id", "customer_id"),
            Field("order_date", "date", "ordered_at"),
            Field("order_amount", "decimal", "order_amount"),
            Field("currency", "currency", "currency"),
            Field("status", "text", "status"),
            Field("is_test", "boolean", "is_test"),
            Field("updated_on", "end_date", "updated_at", needed=False, filled=False),
            Field("refund_amount", "money", "refund_amount", needed=False, filled=False),
        ),
        key="order_id",
        key_field="order_id",
        repeated="",
        amount="order_amount",
        amount_field="order_amount",
        zero="amount below half a cent",
        of_source=True,
        carried=("updated_on", "refund_amount"),
        exclusions=(
            Exclusion("test order", "is_test"),
            Exclusion("status", f"lower(status) NOT IN ({counted})", by="lower(status)"),
            Exclusion("amount not positive", "order_amount <= 0"),
        ),
    )


def get_preset(name: str) -> Preset:
    """The preset of that name. Raises UsageError naming the ones that exist."""
    try:
        return PRESETS[name]
    except KeyError:
        raise UsageError(f"there is no preset {name!r}; use one of {', '.join(PRESETS)}") from None


def describe(name: str) -> str:
    """What a preset expects and leaves out, as a few lines of plain text for help pages."""
    preset = get_preset(name)
    needed = [" or ".join(field.headers) for field in preset.fields if field.needed]
    optional = [" or ".join(field.headers) for field in preset.fields if not field.needed]
    excluded = [exclusion.reason for exclusion in preset.exclusions] + ([preset.zero] if preset.zero else []) + [preset.repeated]
    lines = [
        f"{preset.name}: {preset.title} ({', '.join(preset.formats)}).",
        f"  Columns: {', '.join(needed)}" + (f"; optional: {', '.join(optional)}" if optional else "") + ". Others are ignored.",
        *(f"  {note}" for note in preset.notes),
        f"  Counted, not kept: {'; '.join(excluded)}.",
    ]
    if preset.currency:
        lines.append(f"  Currency: {preset.currency}.")
    lines.append(f"  Example: retention-ops ingest {preset.example} --preset {preset.name}")
    return "\n".join(lines)
