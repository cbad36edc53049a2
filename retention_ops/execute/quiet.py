"""A quiet morning: what there is to say when nothing happened. Health alerts and their end, the digest, the heartbeat.

`pending` says whether there is anything to do, `tell` does it. Whatever is told is an action of the ledger and leaves by the door;
what could not leave at once is finished by the follow-up, like any action.
"""

from __future__ import annotations

import shutil
from datetime import date, timedelta

from sqlalchemy.engine import Connection

from retention_ops.clock import shop_day
from retention_ops.execute import digest, health, ledger
from retention_ops.execute.destinations.choice import HEARTBEAT_SLOT, QUIET_SLOTS, chosen
from retention_ops.execute.ledger import Intent
from retention_ops.execute.respond import Responder
from retention_ops.log.database import lock_responses
from retention_ops.settings import Settings


def pending(responder: Responder) -> list[str]:
    """What `tell` would do now, in words that stay the same until it is done; writes nothing."""
    now, settings = responder.clock(), responder.settings
    with responder.engine.connect() as connection, connection.begin() as transaction:
        found = health.settle(connection, responder.lake, settings, now, responder.run_id)
        transaction.rollback()
    with responder.engine.connect() as connection:
        period = digest.due(connection, responder.lake, settings, now)
        beat = _heartbeat_due(connection, responder)
    return [*found, *([period.identity] if period else []), *([f"heartbeat:{beat.alert_date}"] if beat else [])]


def tell(responder: Responder) -> list[ledger.Row]:
    """Opens and closes health causes, plans what is due, and moves it as far as it goes now; returns those actions.

    Planned in transactions of their own before anything leaves: whoever comes after a kill finds what is left to send.
    """
    settings, engine, now = responder.settings, responder.engine, responder.clock()
    with engine.begin() as connection:
        health.settle(connection, responder.lake, settings, now, responder.run_id)
    responder.checkpoint("settled", {})
    if settings.mode == "off":
        return []
    _plan_digest(responder)
    with engine.begin() as connection:
        lock_responses(connection)
        beat = _heartbeat_due(connection, responder)
        if beat:
            ledger.plan(connection, [beat], now, responder.run_id, {})
    responder.checkpoint("planned", {})
    _expire(settings, now.date())
    rows = ledger.find(engine, slot=QUIET_SLOTS, mode=settings.mode, state=ledger.OPEN_STATES)
    return [responder.door.deliver(row["key"], responder.patience) for row in rows]


def _expire(settings: Settings, today: date) -> None:
    """What was rehearsed goes when a pack of that day would."""
    oldest = (today - timedelta(days=settings.pack_keep_days)).isoformat()
    for folder in settings.outbox.glob("????-??-??"):
        if folder.name < oldest:
            shutil.rmtree(folder, ignore_errors=True)


def _plan_digest(responder: Responder) -> None:
    """Reads the tables outside the transaction that plans: they are slow, and the lock is everybody's."""
    engine, settings, now = responder.engine, responder.settings, responder.clock()
    with engine.connect() as connection:
        period = digest.due(connection, responder.lake, settings, now)
    if period is None:
        return
    planned = digest.intent(period, digest.collect(engine, responder.lake, settings, period), settings)
    with engine.begin() as connection:
        lock_responses(connection)
        if ledger.get(connection, planned.key) is None:  # another worker may have been faster: what it planned stands
            ledger.plan(connection, [planned], now, responder.run_id, {"*": settings.max_messages_per_day})


def _heartbeat_due(connection: Connection, responder: Responder) -> Intent | None:
    """The heartbeat of yesterday in the shop's time zone, once it was a good day. Of the days before nobody needs one any more."""
    settings = responder.settings
    if settings.mode == "off" or responder.secrets.heartbeat_url is None:
        return None
    today = shop_day(responder.clock(), settings.shop_timezone)
    planned = _heartbeat(responder, today - timedelta(days=1))
    if ledger.get(connection, planned.key) or not health.good_day(connection, responder.lake, planned.alert_date):
        return None
    return planned


def _heartbeat(responder: Responder, day: date) -> Intent:
    mode = responder.settings.mode
    destination = chosen(HEARTBEAT_SLOT, responder.settings, mode)
    kind, target = ("post", f"{day}/heartbeat") if destination == "local" else ("ping", "")  # the address is a secret
    return Intent(
        identity=f"heartbeat:{day}:{mode}", slot=HEARTBEAT_SLOT, destination=destination, kind=kind, target=target, alert_date=day,
        mode=mode, payload={"date": day.isoformat(), "last_day": (day + timedelta(days=1)).isoformat()},
    )
