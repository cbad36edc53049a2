"""The ledger: what is to be sent, what was sent, and what nobody can tell. One row per action, one event per change.

    planned ──claim──> sending ──receipt──> sent
       ^                  │ ├── refused ──> failed
       │                  │ └── no answer, or the lease ran out ──> unknown
       └── provably absent ───────────────────────────────────────────┤
                                found there ──> sent   cannot be told ──> needs_human

An action waits as `awaiting_approval` until a person approves its list; `needs_human`, `failed` and `cancelled` move only when
a person says so. A claim belongs to one worker until its lease ends. The database decides every race.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import date, datetime, timedelta
from typing import Any, Literal

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine

from retention_ops.errors import LedgerError
from retention_ops.execute.destinations.choice import QUIET_SLOTS
from retention_ops.execute.destinations.seam import Receipt
from retention_ops.execute.hold import Restored, restored
from retention_ops.execute.redact import clean
from retention_ops.log.database import actions, approvals, lock_responses, ops_events, reservations, response_state
from retention_ops.log.exposures import insert_once

PLANNED, SENDING, UNKNOWN, SENT = "planned", "sending", "unknown", "sent"
FAILED, NEEDS_HUMAN, CANCELLED, AWAITING = "failed", "needs_human", "cancelled", "awaiting_approval"
OPEN_STATES = (PLANNED, SENDING, UNKNOWN)
"""states that go on by themselves"""
HELD_STATES = (NEEDS_HUMAN, FAILED, AWAITING)
"""states that wait for a person"""

Row = dict[str, Any]


@dataclass(frozen=True)
class Intent:
    """One action to be: what `plan` writes. The key follows from identity, slot, kind and `part`, never from a run."""

    identity: str
    """alert_type:scope:alert_date:mode, or incident:<id> for what belongs to no date"""
    slot: str
    destination: str
    kind: str
    target: str
    payload: Mapping[str, Any]
    alert_date: date
    mode: str
    part: str = ""
    """tells apart two actions of the same kind: the answer's number, the lists' hash"""
    answer_id: int | None = None
    incident_id: int | None = None
    parent_key: str | None = None
    bound: bool = True
    hold: str = ""
    """why a person must look first; empty: nobody needs to"""
    approval: Mapping[str, Any] = field(default_factory=dict)
    """{'audience_sha256', 'customers'} where a person must approve the lists"""

    @property
    def key(self) -> str:
        return digest([self.identity, self.slot, self.kind, self.part])[:32]


@dataclass(frozen=True)
class Claim:
    """What a worker may do now with the action in `row`: send it, look for it, or nothing (`why`)."""

    task: Literal["send", "look_up", "nothing"]
    row: Row
    why: str = ""


def digest(value: Any) -> str:
    """sha256 over JSON with sorted keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()).hexdigest()


def note(
    connection: Connection, now: datetime, event: str, actor: str, detail: str = "", *,
    action_key: str | None = None, incident_id: int | None = None,
) -> None:
    """Adds one line to the append-only story."""
    connection.execute(ops_events.insert().values(
        at=now, incident_id=incident_id, action_key=action_key, event=event, actor=clean(actor), detail=clean(detail)[:2000],
    ))


# -- planning ----------------------------------------------------------------------------------------------------------


def plan(connection: Connection, intents: Iterable[Intent], now: datetime, actor: str, limits: Mapping[str, int]) -> list[str]:
    """Writes intents and their guardrail reservations in the caller's transaction; returns the keys, also of known ones.

    `limits` maps a guardrail's name to how many actions it lets through in 24 hours; what exceeds one is held for a human.
    The same key with another payload is an error: content never changes under a key.
    """
    keys = []
    lock_responses(connection)
    position = connection.execute(sa.select(sa.func.coalesce(sa.func.max(actions.c.position), 0))).scalar_one()
    for intent in intents:
        sha = digest(intent.payload)
        known = get(connection, intent.key)
        if known:
            if known["bound"] == intent.bound and known["payload_sha256"] != sha:
                raise LedgerError(f"action {intent.key} is planned already with another content")
            keys.append(intent.key)
            continue
        hold = intent.hold or _over_limit(connection, intent, now, limits)
        state = NEEDS_HUMAN if hold else AWAITING if intent.approval else PLANNED
        if intent.parent_key and _locked(connection, intent.parent_key)["state"] == CANCELLED:
            state, hold = CANCELLED, f"what it builds on ({intent.parent_key[:12]}) was cancelled"
        position += 1
        connection.execute(actions.insert().values(
            key=intent.key, position=position, answer_id=intent.answer_id, incident_id=intent.incident_id, alert_date=intent.alert_date,
            mode=intent.mode, slot=intent.slot, destination=intent.destination, kind=intent.kind, target=intent.target,
            parent_key=intent.parent_key, payload=dict(intent.payload), bound=intent.bound, payload_sha256=sha, state=state,
            attempts=0, looked_up=0, last_error=hold or None, created_at=now, updated_at=now,
        ))
        guardrail = _guardrail(intent)
        connection.execute(reservations.insert().values(guardrail=guardrail, action_key=intent.key, at=now))
        if intent.approval:
            connection.execute(approvals.insert().values(
                action_key=intent.key, state="pending", requested_at=now, **intent.approval,
            ))
        note(connection, now, state, actor, hold or f"{intent.slot} {intent.kind} by {intent.destination}",
             action_key=intent.key, incident_id=intent.incident_id)
        keys.append(intent.key)
    return keys


def _locked(connection: Connection, key: str) -> Row:
    return dict(connection.execute(sa.select(actions).where(actions.c.key == key).with_for_update()).mappings().one())


def _guardrail(intent: Intent) -> str:
    # a health alert that comes and goes must never be why an alarm waits for a person
    own = f":{intent.slot}" if intent.slot in QUIET_SLOTS else ""
    return f"messages:{intent.mode}:{intent.destination}{own}"


def _over_limit(connection: Connection, intent: Intent, now: datetime, limits: Mapping[str, int]) -> str:
    """Why a guardrail holds this intent back, or nothing."""
    if intent.destination == "local":
        return ""
    limit = limits.get(intent.destination, limits.get("*"))
    if limit is None:
        return ""
    used = connection.execute(
        sa.select(sa.func.count()).select_from(reservations)
        .where(reservations.c.guardrail == _guardrail(intent), reservations.c.at > now - timedelta(hours=24))
    ).scalar_one()
    return f"guardrail: {used} actions for {intent.destination} in 24 hours (max_messages_per_day {limit})" if used >= limit else ""


def bind(engine: Engine, key: str, payload: Mapping[str, Any], now: datetime) -> None:
    """Fills in, before the first attempt, what only earlier actions could know; afterwards the content is frozen."""
    with engine.begin() as connection:
        connection.execute(
            actions.update().where(actions.c.key == key, actions.c.bound.is_(False), actions.c.attempts == 0)
            .values(payload=dict(payload), payload_sha256=digest(payload), bound=True, updated_at=now)
        )


# -- reading -----------------------------------------------------------------------------------------------------------


def get(connection: Connection, key: str) -> Row | None:
    found = connection.execute(sa.select(actions).where(actions.c.key == key)).mappings().first()
    return dict(found) if found else None


def find(engine: Engine, **where: Any) -> list[Row]:
    """Actions by exact column values (a tuple means any of them), in the order they were planned."""
    query = sa.select(actions).order_by(actions.c.position)
    for name, value in where.items():
        column = actions.c[name]
        query = query.where(column.in_(value) if isinstance(value, tuple) else column == value)
    with engine.connect() as connection:
        return [dict(row) for row in connection.execute(query).mappings()]


def by_prefix(engine: Engine, prefix: str) -> Row:
    """The one action whose key starts so. Raises LedgerError when none or several do."""
    with engine.connect() as connection:
        found = connection.execute(sa.select(actions).where(actions.c.key.startswith(prefix, autoescape=True))).mappings().all()
    if len(found) != 1:
        raise LedgerError(f"{len(found) or 'no'} actions have a key that starts with {prefix!r}; `retention-ops actions list` shows them")
    return dict(found[0])


def due(engine: Engine, now: datetime, grace_seconds: float = 0) -> list[Row]:
    """Actions a worker could move now: planned or unknown and not waiting, or with a lease that ran out.

    `grace_seconds` leaves what was touched just now to whoever touched it.
    """
    parent = actions.alias("parent")
    ready = sa.or_(
        sa.and_(actions.c.state == PLANNED, sa.or_(actions.c.parent_key.is_(None), parent.c.state == SENT)),
        actions.c.state == UNKNOWN, actions.c.state == SENDING,
    )
    query = (
        sa.select(actions).outerjoin(parent, parent.c.key == actions.c.parent_key)
        .where(ready)
        .where(sa.or_(actions.c.not_before.is_(None), actions.c.not_before <= now))
        .where(sa.or_(actions.c.lease_until.is_(None), actions.c.lease_until <= now))
        .where(actions.c.updated_at <= now - timedelta(seconds=grace_seconds))
        .order_by(actions.c.position)
    )
    with engine.connect() as connection:
        return [dict(row) for row in connection.execute(query).mappings()]


# -- moving ------------------------------------------------------------------------------------------------------------


def claim(
    engine: Engine, key: str, worker: str, now: datetime, lease_seconds: float, settle_seconds: float = 0, repeatable: bool = False,
) -> Claim:
    """Takes the action for one worker, or says why not. `settle_seconds`: how long after an attempt a look-up makes sense.

    In a restored ledger an action that may have gone out before the restore is looked for before it is sent, unless it is
    `repeatable`: sending it again changes nothing.
    """
    with engine.begin() as connection:
        row = connection.execute(sa.select(actions).where(actions.c.key == key).with_for_update()).mappings().first()
        if row is None:
            raise LedgerError(f"there is no action {key}")
        row = dict(row)
        if row["lease_until"] and row["lease_until"] > now:
            return Claim("nothing", row, "another worker has it")
        if row["state"] == SENDING:  # its worker never came back
            settled = row["last_attempt_at"] + timedelta(seconds=settle_seconds)
            row = _move(connection, row, UNKNOWN, worker, now, "the lease ran out: nobody knows whether it went out",
                        not_before=max(settled, now), lease_owner=None, lease_until=None)
        if row["not_before"] and row["not_before"] > now:
            return Claim("nothing", row, f"waits until {row['not_before']:%Y-%m-%d %H:%M:%S} UTC")
        lease = {"lease_owner": worker, "lease_until": now + timedelta(seconds=lease_seconds)}
        if row["state"] == UNKNOWN:
            return Claim("look_up", _move(connection, row, UNKNOWN, worker, now, "", **lease))
        if row["state"] != PLANNED:
            return Claim("nothing", row, row["state"])
        if row["parent_key"] and get(connection, row["parent_key"])["state"] != SENT:
            return Claim("nothing", row, "waits for the action it builds on")
        lost = restored(connection)
        if lost and not repeatable and may_be_there(lost, row):
            why = "it may have gone out before the ledger was restored: looked for first"
            row = _move(connection, row, UNKNOWN, worker, now, why, **lease, first_attempt_at=row["first_attempt_at"] or lost.backup_at)
            return Claim("look_up", row)
        row = _move(connection, row, SENDING, worker, now, f"attempt {row['attempts'] + 1}", **lease, not_before=None,
                    attempts=row["attempts"] + 1, first_attempt_at=row["first_attempt_at"] or now, last_attempt_at=now, looked_up=0)
        return Claim("send", row)


def may_be_there(lost: Restored, row: Row) -> bool:
    """Whether the installation whose backup this is may have sent the action, and nobody has looked since."""
    looked = row["looked_at"] is not None and row["looked_at"] >= lost.restored_at
    return row["destination"] != "local" and lost.concerns(row["alert_date"]) and not looked


def _move(connection: Connection, row: Row, state: str, actor: str, now: datetime, why: str, **values: Any) -> Row:
    """One transition with its event; the row as it is afterwards."""
    values = {**values, "state": state, "updated_at": now}
    connection.execute(actions.update().where(actions.c.key == row["key"]).values(**values))
    if why:
        note(connection, now, state, actor, why, action_key=row["key"], incident_id=row["incident_id"])
    return {**row, **values}


def _held(connection: Connection, key: str, worker: str) -> Row | None:
    """The row if `worker` still holds its claim."""
    row = connection.execute(sa.select(actions).where(actions.c.key == key).with_for_update()).mappings().first()
    return dict(row) if row and row["lease_owner"] == worker and row["state"] in (SENDING, UNKNOWN) else None


_FREE = {"lease_owner": None, "lease_until": None}


def sent(connection: Connection, key: str, worker: str, receipt: Receipt, now: datetime, how: str = "sent") -> Row:
    """Records the proof. A receipt that comes after the lease ended is still the truth and is recorded too."""
    row = _held(connection, key, worker)
    if row is None:
        row = get(connection, key)
        if row["state"] == SENT:
            if row["external_id"] != receipt.external_id:
                note(connection, now, "duplicate", worker, f"also exists as {receipt.external_id}", action_key=key,
                     incident_id=row["incident_id"])
            return row
        how = f"{how}, after its lease had ended"
    return _move(
        connection, row, SENT, worker, now, f"{how}: {receipt.external_id}" + (f" {receipt.url}" if receipt.url else ""), **_FREE,
        not_before=None, external_id=receipt.external_id, external_url=receipt.url, detail=dict(receipt.detail), last_error=None,
    )


def release(
    engine: Engine, key: str, worker: str, state: str, why: str, now: datetime, *, wait_seconds: float = 0, looked_up: int | None = None,
    tried: bool = True, absent: bool = False,
) -> Row | None:
    """Gives a claim back in `state`; None where the claim was lost meanwhile. `tried` false: no call was made, so none counts;
    `absent`: the destination was asked and has nothing."""
    with engine.begin() as connection:
        row = _held(connection, key, worker)
        if row is None:
            return None
        why = clean(why)
        values: dict[str, Any] = {**_FREE, "not_before": now + timedelta(seconds=wait_seconds) if wait_seconds else None}
        if looked_up is not None:
            values["looked_up"] = looked_up
        if absent:
            values["looked_at"] = now
        if not tried:
            values |= {"attempts": row["attempts"] - 1} | ({"first_attempt_at": None} if row["attempts"] == 1 else {})
        if state == CANCELLED:
            _void(connection, key, why, now)
        return _move(connection, row, state, worker, now, why, **values, last_error=why)


# -- by hand -----------------------------------------------------------------------------------------------------------


def by_hand(
    engine: Engine, key: str, what: Literal["retry", "cancel", "sent"], who: str, why: str, now: datetime, *, external_id: str = "",
    recorded: Callable[[Connection, Row], None] = lambda connection, row: None,
) -> Row:
    """A person's decision, with name and reason: try again, never send, or record that it is there already.

    `recorded` writes, in the same transaction, what belongs to the proof of sending (see Door).
    """
    if not who.strip() or not why.strip():
        raise LedgerError("say who decides (--by) and why (--why); both are recorded")
    with engine.begin() as connection:
        row = connection.execute(sa.select(actions).where(actions.c.key == key).with_for_update()).mappings().one()
        row = dict(row)
        if row["state"] in (SENT, CANCELLED):
            raise LedgerError(f"action {key[:12]} is {row['state']} already")
        if row["lease_until"] and row["lease_until"] > now:
            raise LedgerError(f"action {key[:12]} is being sent right now; try again in {(row['lease_until'] - now).seconds + 1} s")
        if what == "retry" and row["state"] == AWAITING:
            raise LedgerError(f"action {key[:12]} waits for approval: `retention-ops actions approve {key[:12]} --audience HASH --by NAME`")
        if what == "retry" and row["state"] in (SENDING, UNKNOWN):
            raise LedgerError(f"nobody knows yet whether action {key[:12]} went out; it is looked up first, or decide with "
                              f"`retention-ops actions resolve {key[:12]} --sent ID --by NAME --why TEXT` (or --absent)")
        if what == "sent" and not external_id.strip():
            raise LedgerError("say under which id it is there (--sent ID)")
        state = {"retry": PLANNED, "cancel": CANCELLED, "sent": SENT}[what]
        if what == "retry" and _pending(connection, key):
            state = AWAITING  # a guardrail held it; its list still waits for approval
        values: dict[str, Any] = {**_FREE, "not_before": None}
        if what == "sent":
            values |= {"external_id": external_id, "last_error": None}
        if what == "retry":
            values["looked_at"] = now  # the person has looked
        if what == "cancel":
            values["last_error"] = None
        if what != "retry":
            _void(connection, key, f"by hand ({what})", now)
        moved = _move(connection, row, state, who, now, f"by hand ({what}): {why}", **values)
        if what == "sent":
            recorded(connection, moved)
        if what == "cancel":
            _cancel_children(connection, key, who, now)
        return moved


def _cancel_children(connection: Connection, key: str, who: str, now: datetime) -> None:
    """What builds on a cancelled action can never go out: replies to a message that was not posted."""
    waiting = sa.select(actions).where(actions.c.parent_key == key, actions.c.state.in_((PLANNED, NEEDS_HUMAN, FAILED)))
    for child in connection.execute(waiting.with_for_update()).mappings().all():
        _move(connection, dict(child), CANCELLED, who, now, f"what it builds on ({key[:12]}) was cancelled", **_FREE, not_before=None,
              last_error=None)


def absent(engine: Engine, key: str, who: str, why: str, now: datetime) -> Row:
    """A person looked and it is not there: it may be sent again."""
    with engine.begin() as connection:
        row = dict(connection.execute(sa.select(actions).where(actions.c.key == key).with_for_update()).mappings().one())
        if row["state"] not in (UNKNOWN, NEEDS_HUMAN, SENDING) or (row["lease_until"] and row["lease_until"] > now):
            raise LedgerError(f"action {key[:12]} is {row['state']}; only one that nobody could tell about is resolved")
        state = AWAITING if _pending(connection, key) else PLANNED  # a look-up is no approval
        return _move(connection, row, state, who, now, f"by hand (absent): {why}", **_FREE, not_before=None, looked_at=now)


# -- after a restore ---------------------------------------------------------------------------------------------------


def adopt(connection: Connection, key: str, receipt: Receipt, now: datetime, actor: str) -> Row:
    """Records that the lost installation sent this action: its destination has it. An approval that still waits for it is void."""
    row = _locked(connection, key)
    if row["state"] in (SENT, CANCELLED):
        return row
    _void(connection, key, "the list had left before the ledger was restored", now)
    there = " ".join(filter(None, (receipt.external_id, receipt.url)))
    return _move(
        connection, row, SENT, actor, now, f"found there after a restore: {there}",
        **_FREE, not_before=None, external_id=receipt.external_id, external_url=receipt.url, detail=dict(receipt.detail), last_error=None,
    )


# -- approvals ---------------------------------------------------------------------------------------------------------


def pending_approvals(engine: Engine) -> list[Row]:
    """Lists that wait for a person, with their actions."""
    query = (
        sa.select(approvals, actions.c.alert_date, actions.c.incident_id, actions.c.mode)
        .join(actions, actions.c.key == approvals.c.action_key).where(approvals.c.state == "pending").order_by(approvals.c.id)
    )
    with engine.connect() as connection:
        return [dict(row) for row in connection.execute(query).mappings()]


def decide_approval(engine: Engine, key: str, approve: bool, audience_sha256: str, who: str, why: str, now: datetime) -> Row:
    """A person's word on exactly one list, named by (the start of) its hash. Raises LedgerError if the list is another one by now."""
    if not who.strip() or (not approve and not why.strip()):
        raise LedgerError("say who decides (--by); a refusal also needs --why")
    with engine.begin() as connection:
        # the action first, as everywhere: two that lock in another order would wait for each other for ever
        connection.execute(sa.select(actions.c.key).where(actions.c.key == key).with_for_update())
        row = connection.execute(
            sa.select(approvals).where(approvals.c.action_key == key).order_by(approvals.c.id.desc()).limit(1).with_for_update()
        ).mappings().first()
        if row is None or row["state"] != "pending":
            raise LedgerError(f"action {key[:12]} has no pending approval" + (f" (it is {row['state']})" if row else ""))
        if len(audience_sha256) < 8 or not row["audience_sha256"].startswith(audience_sha256):
            raise LedgerError(
                f"the list that waits has audience_sha256 {row['audience_sha256'][:12]}…, not {audience_sha256[:12]!r}; look at it again"
            )
        connection.execute(approvals.update().where(approvals.c.id == row["id"]).values(
            state="approved" if approve else "refused", decided_at=now, decided_by=who, why=why,
        ))
        action = get(connection, key)
        if action["state"] not in (AWAITING, NEEDS_HUMAN):
            raise LedgerError(f"action {key[:12]} is {action['state']} already")
        return _move(connection, action, PLANNED if approve else CANCELLED, who, now,
                     f"{'approved' if approve else 'refused'} {row['customers']} customers, audience {row['audience_sha256'][:12]}: {why}")


def _pending(connection: Connection, key: str) -> bool:
    query = sa.select(approvals.c.id).where(approvals.c.action_key == key, approvals.c.state == "pending")
    return connection.execute(query).first() is not None


def _void(connection: Connection, key: str, why: str, now: datetime) -> None:
    connection.execute(
        approvals.update().where(approvals.c.action_key == key, approvals.c.state.in_(("pending", "approved")))
        .values(state="void", why=why, decided_at=now)
    )


def supersede(connection: Connection, key: str, why: str, now: datetime, actor: str) -> bool:
    """Cancels an action that is certain not to have gone out, and what builds on it; its approval is void. False where it may have."""
    row = connection.execute(sa.select(actions).where(actions.c.key == key).with_for_update()).mappings().one()
    not_out = row["state"] in (PLANNED, AWAITING) or (row["state"] == NEEDS_HUMAN and not row["attempts"])
    if not not_out:
        return False
    _void(connection, key, why, now)
    _move(connection, dict(row), CANCELLED, actor, now, why, **_FREE, last_error=None)  # replaced or taken back: no trouble
    _cancel_children(connection, key, actor, now)
    return True


# -- switches ----------------------------------------------------------------------------------------------------------


def read_state(engine: Engine, name: str) -> Row | None:
    with engine.connect() as connection:
        row = connection.execute(sa.select(response_state).filter_by(name=name)).mappings().first()
    return dict(row) if row else None


def set_state(engine: Engine, name: str, value: str, who: str, why: str, now: datetime, *, once: bool = False) -> Row:
    """Writes one switch; `once` keeps what stands there already."""
    with engine.begin() as connection:
        values = {"name": name, "value": value, "by": who, "why": why, "at": now}
        # not rowcount: psycopg's says -1 here
        added = connection.execute(insert_once(connection, response_state).values(values).returning(response_state.c.name)).first()
        if not added and not once:
            connection.execute(response_state.update().where(response_state.c.name == name).values(values))
        if added or not once:
            note(connection, now, name, who, f"{value}: {why}")
    return read_state(engine, name)
