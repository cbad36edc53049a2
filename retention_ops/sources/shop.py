"""The synthetic shop: two years of orders with an incident in the last week, for the demo and for tests.

The story. A shop sells to a base it already had when the data begins (about half of its customers) and to newcomers
who join all the time. Everybody has an own rhythm, from weekly to every four months, and an own basket; November and
December are busy, Saturdays are quiet, some people leave every month. Then a five-day sale, 35 to 31 days before the
end, wins 8.6 % of the whole shop as first-time buyers. None of them comes back. For a month nothing looks wrong: the
cohort counts as ACTIVE until its 31st day without an order. Then it falls AT_RISK in the order in which it came, and
the largest part on the last day, because the sale's last day was its busiest.

The numbers. AT_RISK % is about 19 before the incident. With the cohort c = 8.6 points arriving as 14, 30, 46, 62 and
100 % of c over the last five days, the last day stands 0.78 c above the mean of its seven previous days (+32 %:
CRITICAL from +25), the day before 0.49 c (+21 %: WARNING from +15), the one before that 0.40 c (+18 %) and the first
two 0.14 c and 0.28 c (+6 and +13 %: calm). A sale spread evenly over its days would pass +25 a day early. Measured:
for seeds 1 to 10 with 2,000, 6,000 and 50,000 customers the last day is CRITICAL (+29 to +37 %) after at least one
WARNING, and no earlier day outside the warm-up exceeds +12 %. Below about 2,000 customers chance can spoil the story.

Stable bytes. The same arguments give the same bytes on every machine and with every numpy: randomness is a hash of
(seed, purpose, customer, order), every distribution is a table of quantiles interpolated in integers, and time runs in
integer units of shop activity. No floats, no library generator, no libm. Because each customer's fate depends on
nothing but its own number, the chunk size changes memory and never the result. Rhythm, patience, basket and entry are
spread evenly over the customers (a Kronecker sequence) instead of drawn independently: a shop of 2,000 then has
the same calm history as one of a million, where independent draws would ring false alarms.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date, timedelta
from pathlib import Path
from typing import TextIO

import numpy as np
from numpy.typing import NDArray

from retention_ops.errors import UsageError
from retention_ops.warehouse.files import replacing

DEFAULT_END = date(2026, 6, 30)
MAX_CUSTOMERS = 1 << 24
"""A packed order keeps 24 bits for its customer."""

Ints = NDArray[np.int64]
Bits = NDArray[np.uint64]

# --- the shop's habits; quantile tables run from the smallest to the largest value in equal steps of probability

MONTH_ACTIVITY = (92, 93, 97, 99, 100, 98, 94, 92, 98, 103, 116, 120)
"""January to December, in % of an ordinary day: the Christmas business and a quiet summer."""
WEEKDAY_ACTIVITY = (108, 104, 102, 101, 98, 79, 108)
"""Monday to Sunday, in %."""
DAY = 100 * 100
"""Units of activity in an ordinary day: month % x weekday %."""

GAP_DAYS = (7, 10, 14, 19, 25, 32, 40, 49, 60, 73, 88, 103, 120)
"""Usual days between two orders of a customer."""
GAP_JITTER = (300, 460, 570, 670, 750, 840, 930, 1040, 1180, 1360, 1650, 2900)
"""One gap, in permille of the customer's usual gap; the mean is 1."""
STAY_NEW = (0, 0, 40, 300, 700, 1100, 1600, 2300, 3300)
"""Days a newcomer stays; a quarter orders once and never again."""
STAY_OLD = (60, 500, 900, 1300, 1700, 2200, 2800, 3600)
"""Days an old customer still stays when the data begins."""
BASKET_CENTS = (1100, 1700, 2200, 2700, 3200, 3800, 4600, 5700, 7500, 11000, 32000)
"""A customer's usual order."""
BASKET_JITTER = (250, 520, 660, 760, 850, 930, 1010, 1100, 1220, 1420, 2600)
"""One order, in permille of the customer's usual order."""
FAREWELL_PCT = 70
"""People spend less before they leave: their last order, in % of what it would have been."""
ADD_ON_PCT = (15, 25, 35, 50)
"""A forgotten item ordered later on the same day, in % of the first order."""
ADD_ON_ONE_IN = 50

JOINERS_PCT = 45
"""Newcomers, of all customers; those who neither join nor come with the sale were there before the data begins."""
COHORT_PERMILLE = 86
"""The sale's customers, of all customers."""
SALE_DAYS_BEFORE_END = 35
SALE_SHARE_BY_DAY = (14, 30, 46, 62, 100)
"""Cumulative %: a sale is busiest in its last hours."""
SALE_BASKET_CENTS = (900, 1500, 2000, 2600, 3500, 6000)

COUNTRIES = (("DE", 34, 100), ("FR", 16, 98), ("NL", 12, 105), ("AT", 9, 102), ("IT", 9, 92), ("ES", 8, 88),
             ("BE", 6, 101), ("IE", 4, 110), ("FI", 2, 108))
"""Country, share in %, spending in % of the average. All of them pay in euro."""
CURRENCY = "EUR"
SEGMENTS = ("frequent", "regular", "occasional", "deal_seeker")
SEGMENT_GAP_DAYS = (21, 50)
"""Usual gap from which a customer is regular, and occasional; deal_seeker is the sale's cohort."""
CHANNELS = ("referral", "email", "search", "social", "marketplace", "promotion")
CHANNELS_BY_SEGMENT = ((35, 65, 85, 95, 100, 100), (20, 45, 75, 90, 100, 100), (8, 20, 50, 78, 100, 100), (0, 0, 0, 0, 0, 100))
"""Cumulative %: friends and newsletters bring customers who stay, adverts and marketplaces occasional ones."""
TIERS = ("bronze", "silver", "gold", "platinum")
TIER_FROM_CENTS = (30_000, 100_000, 200_000)
"""Two years' revenue from which a customer is silver, gold, platinum."""
CONSENT_PCT = 92
SIGNUP_LEAD_DAYS = (0, 0, 0, 0, 0, 0, 1, 3, 8, 25)
"""Days from a newcomer's sign-up to the first order."""
OLD_SIGNUP_DAYS = (5, 120, 300, 560, 900, 1400)
"""Days from an old customer's sign-up to the first day of the data."""

ORDERS_PER_WRITE = 200_000


@dataclass(frozen=True)
class Shop:
    """What was written. Dates are inclusive; cohort_size counts the sale's customers."""

    orders: Path
    customers: Path
    order_count: int
    customer_count: int
    first_date: date
    last_date: date
    promotion_from: date
    promotion_to: date
    cohort_size: int


def write_shop(
    folder: Path,
    *,
    customers: int = 6000,
    seed: int = 7,
    end: date = DEFAULT_END,
    chunk: int = 100_000,
    progress: Callable[[str], None] = lambda text: None,
) -> Shop:
    """Write orders.csv and customers.csv into `folder` (made if missing) and say what is in them.

    Orders cover exactly the two years up to `end`, sorted by time; customers.csv is sorted by id. Each file appears
    whole or not at all. `chunk` is the number of customers worked on at a time. Memory: about 16 bytes an order.
    Raises UsageError when `customers` is not between 1 and MAX_CUSTOMERS.
    """
    if not 1 <= customers <= MAX_CUSTOMERS:
        raise UsageError(f"customers is {customers}; a synthetic shop has 1 to {MAX_CUSTOMERS:,} customers")
    plan = _plan(customers, seed, end)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = folder / "orders.csv", folder / "customers.csv"
    with _replacing(paths[0]) as orders_file, _replacing(paths[1]) as customers_file:
        customers_file.write("customer_id,country,segment,loyalty_tier,acquisition_channel,signup_date,consent\n")
        packed = []
        for start in range(0, customers, chunk):
            people = _people(plan, np.arange(start, min(start + chunk, customers)))
            orders, revenue, first_day = _histories(plan, people)
            packed.append(orders)
            customers_file.writelines(_customer_lines(plan, people, revenue, first_day))
            progress(f"{min(start + chunk, customers):,} of {customers:,} customers")
        ordered = np.concatenate(packed)
        packed.clear()
        ordered.sort()
        _write_orders(plan, ordered, orders_file, progress)
    return Shop(
        orders=paths[0], customers=paths[1], order_count=len(ordered), customer_count=customers,
        first_date=plan.day(0), last_date=end, promotion_from=plan.day(plan.sale_day),
        promotion_to=plan.day(plan.sale_day + len(SALE_SHARE_BY_DAY) - 1), cohort_size=plan.cohort,
    )


# --- the plan: calendar and head counts


@dataclass(frozen=True)
class _Plan:
    customers: int
    seed: int
    first_date: date
    days: int
    activity: Ints
    """Units of shop activity up to the end of each day; an order's moment is a unit, its day a search in here."""
    old: int
    joiners: int
    cohort: int

    @property
    def sale_day(self) -> int:
        return self.days - 1 - SALE_DAYS_BEFORE_END

    @property
    def units(self) -> int:
        return int(self.activity[-1])

    def day(self, index: int) -> date:
        return self.first_date + timedelta(days=index)

    def day_of(self, moment: Ints) -> Ints:
        return np.searchsorted(self.activity, moment, side="right")


def _plan(customers: int, seed: int, end: date) -> _Plan:
    leap = end.month == 2 and end.day == 29
    first = end.replace(year=end.year - 2, day=28 if leap else end.day) + timedelta(days=1)
    calendar = [first + timedelta(days=index) for index in range((end - first).days + 1)]
    activity = np.cumsum([MONTH_ACTIVITY[day.month - 1] * WEEKDAY_ACTIVITY[day.weekday()] for day in calendar], dtype=np.int64)
    joiners = customers * JOINERS_PCT // 100
    cohort = (customers * COHORT_PERMILLE + 500) // 1000
    return _Plan(customers, seed, first, len(calendar), activity, customers - joiners - cohort, joiners, cohort)


# --- randomness: a hash of what it is for

_GOLDEN = 0x9E3779B97F4A7C15
_EVEN_STEPS = {"gap": 0xDB4F0B9175AE2165, "stay": 0xBBE0563303A4615F, "entry": 0xA0F2EC75A1FE1575, "basket": 0x89E182857D9ED689}
"""Step of each Kronecker sequence, in 2**-64: powers of 1/1.1673..., the root of x**5 = x + 1 (Roberts' R4)."""
_PURPOSES = ("number", "gap", "stay", "entry", "basket", "country", "channel", "consent", "signup",
             "jitter", "amount", "add_on", "hour")


def _mix(value: Bits) -> Bits:
    """splitmix64's finaliser: every input bit reaches every output bit. Wraps at 2**64, as meant."""
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


def _bits(plan: _Plan, purpose: str, *keys: Ints | int) -> Bits:
    """64 random bits per element, the same for the same seed, purpose and keys."""
    value = np.array([plan.seed & (1 << 64) - 1], dtype=np.uint64)
    for key in (_PURPOSES.index(purpose) + 1, *keys):
        value = _mix(value + np.atleast_1d(np.asarray(key, dtype=np.uint64)) * np.uint64(_GOLDEN))
    return value


def _even_bits(plan: _Plan, purpose: str, place: Ints) -> Bits:
    """64 bits per place, evenly spread over any run of places; the seed decides where the sequence starts."""
    return place.astype(np.uint64) * np.uint64(_EVEN_STEPS[purpose]) + _bits(plan, purpose)


def _quantile(table: tuple[int, ...], bits: Bits) -> Ints:
    """The value at a random point of a quantile table, between its entries by integer interpolation."""
    steps = np.array(table, dtype=np.int64)
    point = (bits >> np.uint64(44)).astype(np.int64) * (len(table) - 1)
    index, rest = point >> 20, point & (1 << 20) - 1
    return steps[index] + ((steps[index + 1] - steps[index]) * rest >> 20)


def _percent(bits: Bits) -> Ints:
    """0 to 99."""
    return ((bits >> np.uint64(32)) * np.uint64(100) >> np.uint64(32)).astype(np.int64)


# --- people


@dataclass(frozen=True)
class _People:
    """A chunk of customers. Moments and gaps are in units of shop activity."""

    number: Ints
    """0-based, the customer's id."""
    place: Ints
    """Position in the story: old customers first, then newcomers by the time they join, then the sale's cohort."""
    is_old: NDArray[np.bool_]
    in_cohort: NDArray[np.bool_]
    gap: Ints
    first_moment: Ints
    leaves: Ints
    country: Ints
    basket: Ints


def _people(plan: _Plan, number: Ints) -> _People:
    place = _places(plan, number)
    is_old, in_cohort = place < plan.old, place >= plan.old + plan.joiners
    gap = _quantile(tuple(days * DAY for days in GAP_DAYS), _even_bits(plan, "gap", place))
    stay_bits = _even_bits(plan, "stay", place)
    stay = np.where(is_old, _quantile(STAY_OLD, stay_bits), _quantile(STAY_NEW, stay_bits)) * DAY
    joined = np.where(is_old, 0, (2 * (place - plan.old) + 1) * plan.units // max(1, 2 * plan.joiners))
    # an old customer is anywhere between two orders when the data begins; a newcomer's first order is the joining
    wait = gap * (_even_bits(plan, "entry", place) >> np.uint64(54)).astype(np.int64) >> 10
    first_moment = np.where(is_old, wait, joined)
    first_moment[in_cohort] = _sale_moments(plan, place[in_cohort])
    leaves = np.where(in_cohort, first_moment, joined + stay)
    # the first old customer orders on the first and on the last day, so that a shop of any size spans its two years
    faithful = place == 0
    first_moment[faithful], leaves[faithful] = 0, plan.units
    shares = np.cumsum([share for _, share, _ in COUNTRIES])
    country = np.searchsorted(shares, _percent(_bits(plan, "country", number)), side="right")
    basket_bits = _even_bits(plan, "basket", place)
    basket = np.where(in_cohort, _quantile(SALE_BASKET_CENTS, basket_bits), _quantile(BASKET_CENTS, basket_bits))
    basket = basket * np.array([spending for _, _, spending in COUNTRIES])[country] // 100
    return _People(number, place, is_old, in_cohort, gap, first_moment, leaves, country, basket)


def _places(plan: _Plan, number: Ints) -> Ints:
    """Deal the places out to the customer numbers one to one, so that an id says nothing about its customer."""
    stride = plan.customers * 618 // 1000 + 1
    while math.gcd(stride, plan.customers) != 1:
        stride += 1
    shift = int(_bits(plan, "number")[0] % np.uint64(plan.customers))
    return (number.astype(np.int64) * stride + shift) % plan.customers


def _sale_moments(plan: _Plan, place: Ints) -> Ints:
    """The single order of each cohort customer: exact head counts per day of the sale, any time of that day."""
    day_ends = np.array(SALE_SHARE_BY_DAY, dtype=np.int64) * plan.cohort // 100
    day = plan.sale_day + np.searchsorted(day_ends, place - plan.old - plan.joiners, side="right")
    begin = plan.activity[day - 1]
    return begin + (plan.activity[day] - begin) * (_bits(plan, "hour", place) >> np.uint64(48)).astype(np.int64) // (1 << 16)


# --- orders, packed into 64 bits so that one in-place sort puts them in the order of time

_DAY_SHIFT, _HOUR_SHIFT, _CUSTOMER_SHIFT = 54, 48, 24
_LAST_HOUR = (1 << 6) - 1
_MAX_CENTS = (1 << 24) - 1


def _histories(plan: _Plan, people: _People) -> tuple[Bits, Ints, Ints]:
    """All orders of these people (packed, unsorted), their revenue in cents and the day of their first order."""
    revenue = np.zeros(len(people.number), dtype=np.int64)
    packed: list[Bits] = []
    who, moment, step = np.arange(len(people.number)), people.first_moment, 0
    while len(who):
        number, leaves = people.number[who], people.leaves[who]
        gap = people.gap[who] * _quantile(GAP_JITTER, _bits(plan, "jitter", number, step)) // 1000
        following = moment + gap
        cents = people.basket[who] * _quantile(BASKET_JITTER, _bits(plan, "amount", number, step)) // 1000
        says_farewell = (following >= leaves) & (step > 0)
        cents = np.where(says_farewell, cents * FAREWELL_PCT // 100, cents)
        extra = np.where(people.in_cohort[who], 0, _add_on(plan, number, cents, step))
        packed += _visit(plan, number, moment, cents, extra)
        revenue[who] += cents + extra  # `who` names nobody twice
        stays = following < np.minimum(leaves, plan.units)
        who, moment, step = who[stays], following[stays], step + 1
    faithful = np.flatnonzero(people.place == 0)
    cents = people.basket[faithful]
    packed.append(_pack(np.full(len(faithful), plan.days - 1), _LAST_HOUR, people.number[faithful], cents))
    revenue[faithful] += cents
    return np.concatenate(packed), revenue, plan.day_of(people.first_moment)


def _add_on(plan: _Plan, number: Ints, cents: Ints, step: int) -> Ints:
    """Cents of the forgotten item, 0 for nearly everybody."""
    bits = _bits(plan, "add_on", number, step)
    return np.where(bits % np.uint64(ADD_ON_ONE_IN) == 0, cents * _quantile(ADD_ON_PCT, _mix(bits)) // 100, 0)


def _visit(plan: _Plan, number: Ints, moment: Ints, cents: Ints, extra: Ints) -> tuple[Bits, Bits]:
    """The order of each customer and, where `extra` is not 0, the one later that day."""
    day = plan.day_of(moment)
    day_units = np.diff(plan.activity, prepend=0)[day]
    hour = (moment - plan.activity[day] + day_units) * (_LAST_HOUR + 1) // day_units
    again = np.flatnonzero(extra)
    later = np.minimum(hour[again] + 1, _LAST_HOUR)
    return _pack(day, hour, number, cents), _pack(day[again], later, number[again], extra[again])


def _pack(day: Ints, hour: Ints | int, number: Ints, cents: Ints) -> Bits:
    fields = (day, _DAY_SHIFT), (hour, _HOUR_SHIFT), (number, _CUSTOMER_SHIFT), (cents, 0)
    packed = np.zeros(len(number), dtype=np.uint64)
    for value, shift in fields:
        packed |= np.asarray(value).astype(np.uint64) << np.uint64(shift)
    return packed


# --- files


def _write_orders(plan: _Plan, packed: Bits, file: TextIO, progress: Callable[[str], None]) -> None:
    """Number the sorted orders and write them, a slice at a time."""
    file.write("order_id,customer_id,order_date,order_amount,currency\n")
    dates = [plan.day(index).isoformat() for index in range(plan.days)]
    for start in range(0, len(packed), ORDERS_PER_WRITE):
        part = packed[start : start + ORDERS_PER_WRITE]
        day = (part >> np.uint64(_DAY_SHIFT)).tolist()
        number = (part >> np.uint64(_CUSTOMER_SHIFT) & np.uint64(MAX_CUSTOMERS - 1)).tolist()
        cents = (part & np.uint64(_MAX_CENTS)).tolist()
        rows = zip(range(start + 1, start + len(part) + 1), number, day, cents, strict=True)
        file.writelines(
            f"O{order:09d},{_customer_id(buyer)},{dates[when]},{amount // 100}.{amount % 100:02d},{CURRENCY}\n"
            for order, buyer, when, amount in rows
        )
        progress(f"{start + len(part):,} of {len(packed):,} orders written")


def _customer_lines(plan: _Plan, people: _People, revenue: Ints, first_day: Ints) -> Iterator[str]:
    """A line of customers.csv each: what a shop would know about them, in step with what they do."""
    segment = np.searchsorted(np.array(SEGMENT_GAP_DAYS) * DAY, people.gap, side="right")
    segment[people.in_cohort] = SEGMENTS.index("deal_seeker")
    # the channel is the number of cumulative shares at or below the draw
    draw = _percent(_bits(plan, "channel", people.number))
    channel = (np.array(CHANNELS_BY_SEGMENT)[segment] <= draw[:, None]).sum(axis=1)
    tier = np.searchsorted(TIER_FROM_CENTS, revenue, side="right")
    signup_bits = _bits(plan, "signup", people.number)
    lead = np.where(people.in_cohort, 0, _quantile(SIGNUP_LEAD_DAYS, signup_bits))
    signup_day = np.where(people.is_old, -_quantile(OLD_SIGNUP_DAYS, signup_bits), first_day - lead)
    consent = _percent(_bits(plan, "consent", people.number)) < CONSENT_PCT
    columns = (people.number, people.country, segment, tier, channel, signup_day, consent)
    for number, country, kind, level, source, signed, agrees in zip(*(column.tolist() for column in columns), strict=True):
        yield (
            f"{_customer_id(number)},{COUNTRIES[country][0]},{SEGMENTS[kind]},{TIERS[level]},{CHANNELS[source]},"
            f"{plan.day(signed).isoformat()},{'true' if agrees else 'false'}\n"
        )


def _customer_id(number: int) -> str:
    return f"C{number + 1:06d}"


@contextmanager
def _replacing(path: Path) -> Iterator[TextIO]:
    """A text file that takes the place of `path` when the block ends well and leaves nothing behind when it does not."""
    with replacing(path) as partial, open(partial, "w", encoding="ascii", newline="") as file:
        yield file
