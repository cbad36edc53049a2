"""The Action Pack of a date: brief, charts, audiences and a manifest, put in place as one.

`action_packs/<D>` is a symbolic link to the folder of the current build; replacing the link is atomic, so a reader
finds the old pack or the new one, never a mixture. Files are readable by their owner only.

Two hashes: `facts_sha256` says what was found (same orders, same settings, same templates: same hash, whenever it is
built); `audience_sha256` says who was on the lists as handed over. Consent, suppressions, holdout and earlier hand-overs
change only the second; `current_audiences` says what it would be now.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import secrets
import shutil
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import date, datetime, timedelta
from pathlib import Path
from typing import Any

import duckdb
import pandas as pd
import pyarrow as pa

from retention_ops.clock import Clock, system_clock
from retention_ops.detect import quality
from retention_ops.detect.alerts import AT_RISK, OTHERS, SHORTFALL, alerts_by_day, answered_rules, row_of, told_by
from retention_ops.detect.compute import Workspace, priority_order, workspace
from retention_ops.detect.missing import Missing, who_is_missing
from retention_ops.errors import NewerSchema, PackError, QualityError
from retention_ops.package.audiences import (
    TIERS,
    Audience,
    HandedOver,
    LeftOut,
    audience_sha256,
    build_audiences,
    holdout_pct,
    to_csv,
)
from retention_ops.package.brief import (
    CHART_FILE,
    RETURNING_FILE,
    BriefFacts,
    drawn_shortfalls,
    render_html,
    render_markdown,
    render_slack,
    safeguards,
    template_fingerprint,
)
from retention_ops.package.chart import returning_chart, trend_chart
from retention_ops.package.stakes import Stake, knows_season, stake_of
from retention_ops.settings import Settings
from retention_ops.sources.contact import NoContact, no_contact
from retention_ops.warehouse.catalog import TABLES
from retention_ops.warehouse.files import fsync_folder, locked, write_atomic
from retention_ops.warehouse.freshness import Changes
from retention_ops.warehouse.render import sql_sha256
from retention_ops.warehouse.seam import Warehouse

MANIFEST = "manifest.json"
PACK_SCHEMA = 2
"""2: the manifest says by which SQL and settings the pack was made; 1 is read as well"""
LOG_FILE = "ops_run_log.json"
OUTBOX = "outbox"
LOCK = ".lock"
ABANDONED_AFTER_SECONDS = 3600
TOP_CUSTOMERS = 5
MISSING_CUSTOMERS = 20


@dataclass(frozen=True)
class Facts:
    """Everything a pack says about D: plain values, no files yet. `no_contact` and `handed_over` decide who is left off the lists."""

    day: date
    alert: dict[str, Any]
    daily: dict[str, Any]
    history: list[dict[str, Any]]
    shortfalls: list[dict[str, Any]]
    flagged: list[str]
    missing: Missing | None
    priority: pd.DataFrame
    no_contact: NoContact
    handed_over: HandedOver
    newly_at_risk: dict[str, int]
    first_order_date: date | None
    complete_through: date
    currency: str
    orders_version: str


@dataclass(frozen=True)
class Pack:
    """A pack on disk. `manifest` is its parsed manifest.json."""

    day: date
    folder: Path
    manifest: dict[str, Any]

    @property
    def facts_sha256(self) -> str:
        return self.manifest["facts_sha256"]

    @property
    def severity(self) -> str:
        return self.manifest["severity"]

    def is_of(self, alert: Mapping[str, Any]) -> bool:
        """Whether it was built from this very result: the leading row, and those flagged beside it."""
        return row_versions(told_by(alert)).items() <= self.manifest["alert_versions"].items()


def plain(value: Any) -> Any:
    """A value as JSON has it: dates as text, NaN and NaT as null, numpy scalars as Python's."""
    if value is None or value is pd.NaT or value is pd.NA:
        return None
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float) and math.isnan(value):
        return None
    if isinstance(value, (pd.Timestamp, datetime)):
        return value.date().isoformat() if value.tzinfo is None else value.isoformat()
    return value.isoformat() if isinstance(value, date) else value


def records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """A table's rows as plain dictionaries."""
    columns = {name: [plain(value) for value in frame[name].tolist()] for name in frame.columns}
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def canonical_sha256(value: Any) -> str:
    """sha256 over JSON with sorted keys."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def alert_version(alert: Mapping[str, Any]) -> str:
    """Identifies one result of the alert: the same rows, the same version."""
    return canonical_sha256(told_by(alert))


def versions_of(alert: Mapping[str, Any]) -> dict[str, str]:
    """alert_type -> what identifies that row, for every rule, whichever leads."""
    return row_versions(row for told in (alert, *alert[OTHERS]) for row in told_by({**told, OTHERS: []}))


def row_versions(rows: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """alert_type -> what identifies that row."""
    return {row["alert_type"]: canonical_sha256(row) for row in rows}


def collect(
    space: Workspace, day: date, history: pd.DataFrame, daily: pd.DataFrame, priority: pd.DataFrame, handed_over: HandedOver
) -> Facts:
    """The facts of D from computed tables. `history` and `daily` may span more days; each is cut to what D needs.

    `handed_over` is what log.exposures.last_handed_over says for D.
    """
    first = day - timedelta(days=space.settings.trend_days - 1)
    dates = pd.to_datetime(history["alert_date"]).dt.date
    rows = records(history[(dates >= first) & (dates <= day)])
    alerts = alerts_by_day(rows, answered_rules(space.settings))
    if day not in alerts:
        raise PackError(f"no alert_logic row for {day}; run `retention-ops run --date {day}`")
    # what the response answers to, whichever rule says so: a run of flagged days is one story
    flagged = {each.isoformat() for each, alert in alerts.items() if alert["alert_flag"]}
    short = row_of(alerts[day], SHORTFALL)
    window = [row for row in rows if row["alert_type"] == AT_RISK]
    counts = records(daily[pd.to_datetime(daily["as_of_date"]).dt.date == day])
    return Facts(
        day=day, alert=alerts[day], daily=counts[0], history=_since_customers(window),
        shortfalls=[row for row in rows if row["alert_type"] == SHORTFALL], flagged=sorted(flagged),
        missing=who_is_missing(space, day, short) if short and short["alert_flag"] else None, priority=priority,
        no_contact=no_contact(space.lake, day), handed_over=handed_over, newly_at_risk=newly_at_risk(space, day, priority),
        first_order_date=space.orders.first_date if space.orders.first_date <= day else None,
        complete_through=space.orders.complete_through, currency=space.orders.currency, orders_version=space.orders.version,
    )


def _since_customers(window: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The window without the days before anybody had ordered; D itself always stays."""
    first = next((place for place, row in enumerate(window) if row["sample_size"]), len(window) - 1)
    return window[first:]


def newly_at_risk(space: Workspace, day: date, priority: pd.DataFrame) -> dict[str, int]:
    """The people behind a rise: {'customers', 'on_p2', 'one_order'}, those who became AT_RISK on D or in the 6 days before.

    From orders only: `on_p2` counts the tier, whoever may be contacted. One order gives no rhythm, hence no rule that names the
    customer; who is in P2 nevertheless, for what is at stake, is not counted as `one_order`.
    """
    space.use("churn_detection", day)
    first = space.settings.active_limit + 1
    last = min(space.settings.active_limit + 7, space.settings.at_risk_limit)
    customers, one_order = space.connection.execute(
        "SELECT COUNT(*), COUNT(CASE WHEN total_orders = 1 THEN 1 END) FROM churn_detection "
        f"WHERE days_since_last_order BETWEEN {first} AND {last}"
    ).fetchall()[0]
    on_p2 = (priority["priority_tier"] == "P2") & priority["days_since_last_order"].between(first, last)
    once_on_p2 = on_p2 & (priority["total_orders"] == 1)
    return {"customers": customers, "on_p2": int(on_p2.sum()), "one_order": one_order - int(once_on_p2.sum())}


def audiences_of(
    day: date, priority: pd.DataFrame, contact: NoContact, handed_over: HandedOver, settings: Settings
) -> dict[str, Audience]:
    """The lists of D; the one place where it is decided who is on them."""
    return build_audiences(day, priority, LeftOut(
        refused=contact.refused, suppressed=contact.suppressed, holdout_pct=holdout_pct(settings), holdout_salt=settings.holdout_salt,
        handed_over=handed_over, cooldown_days=settings.handover_cooldown_days,
    ))


def current_audiences(lake: Warehouse, day: date, handed_over: HandedOver) -> dict[str, Audience]:
    """The lists of D as a pack built now would have them: today's consent and suppressions, no brief and no chart.

    Asked just before a list leaves. Where `audience_sha256` of it differs from the pack's, `renew_pack` comes first.
    """
    return audiences_of(day, _queue(lake, day), no_contact(lake, day), handed_over, lake.settings)


def _queue(lake: Warehouse, day: date) -> pd.DataFrame:
    """customer_priority of D: as stored where the orders of D and the rules are still the same, else computed.

    Workspace.use would compute it also after every new consent, on which the queue does not depend.
    """
    try:
        made_from = lake.provenance("customer_priority", day)
        same_rules = made_from.get("rules_sha256") == lake.settings.rules_sha256()
        if same_rules and not Changes(lake).since(made_from.get("orders_version", ""), day):
            return lake.read("customer_priority", day, priority_order(lake.settings))
    except duckdb.Error:
        pass  # damaged: as good as another make
    with workspace(lake) as space:
        space.use("customer_priority", day)
        return space.rows("customer_priority", priority_order(lake.settings))


def facts_sha256(facts: Facts, settings: Settings) -> str:
    """Covers what was found (alert row, priority rows, chart data, newly AT_RISK), the templates and the settings; no clock, no run."""
    columns = [name for name in TABLES["customer_priority"].column_names if name != "created_at"]
    return canonical_sha256({
        "alert": facts.alert,
        "daily": facts.daily,
        "chart": facts.history,
        "shortfalls": facts.shortfalls,
        "flagged": facts.flagged,
        "missing": plain_missing(facts.missing),
        "newly_at_risk": facts.newly_at_risk,
        "first_order_date": plain(facts.first_order_date),
        "priority": hashlib.sha256(to_csv(facts.priority, columns).encode()).hexdigest(),
        "templates": template_fingerprint(settings),
        "rules": _rules(settings),
        "shop": [settings.shop_name, facts.currency, settings.trend_days],
    })


def _rules(settings: Settings) -> dict[str, Any]:
    """What the brief's words follow: the rules' parameters, and the order of the queue, which no rule reads."""
    return {**settings.rule_parameters(), "rank_by": settings.rank_by}


def brief_facts(facts: Facts, audiences: Mapping[str, Audience], settings: Settings, links: Mapping[str, str]) -> BriefFacts:
    """What the templates see."""
    # nobody is told to call a customer who is left off the lists, nor is that customer's spend at stake for them to save
    listed = {customer_id for audience in audiences.values() for customer_id in audience.treated_ids}
    contactable = facts.priority[facts.priority["customer_id"].isin(listed)]
    by_tier = {tier: contactable[contactable["priority_tier"] == tier] for tier in TIERS}
    return BriefFacts(
        alert=facts.alert,
        daily=facts.daily,
        history=facts.history,
        shortfalls=facts.shortfalls,
        flagged={date.fromisoformat(each) for each in facts.flagged},
        missing=_nameable(facts, settings),
        newly_at_risk=facts.newly_at_risk,
        counts={tier: audience.rows for tier, audience in audiences.items()},
        totals={tier: audience.listed for tier, audience in audiences.items()},
        stakes=_stakes(facts.priority, by_tier, knows_season(facts.first_order_date, facts.day)),
        # summed in cents: the sum of a column of floats depends on its order
        next_orders={
            tier: int((rows["avg_order_value"] * 100).round().astype("int64").sum()) / 100 for tier, rows in by_tier.items()
        },
        top=records(contactable.head(TOP_CUSTOMERS)),
        actions={tier: _actions(rows) for tier, rows in by_tier.items()},
        audiences={
            tier: {"file": audience.file, "rows": audience.rows, "excluded": audience.excluded}
            for tier, audience in audiences.items()
        },
        complete_through=facts.complete_through,
        first_order_date=facts.first_order_date,
        currency=facts.currency,
        shop_name=settings.shop_name,
        mode=settings.mode,
        links=dict(links),
        safeguards=safeguards(facts.alert, facts.complete_through, settings, facts.first_order_date),
        rules=_rules(settings),
    )


def _stakes(priority: pd.DataFrame, by_tier: Mapping[str, pd.DataFrame], season_known: bool) -> dict[str, Stake] | None:
    """Of the customers `by_tier`; None where the date's queue says of nobody what is at stake: there was nothing to learn from."""
    if not priority["spend_at_stake"].notna().any():
        return None
    return {
        tier: stake_of(rows["usual_spend_90d"], rows["p_no_return_90d"], rows["spend_at_stake"], season_known)
        for tier, rows in by_tier.items()
    }


def _nameable(facts: Facts, settings: Settings) -> Missing | None:
    """Who is missing, without those whom nobody is told to call: no consent, suppressed, or held out."""
    if facts.missing is None:
        return None
    left_out = LeftOut(facts.no_contact.refused, facts.no_contact.suppressed, holdout_pct(settings), settings.holdout_salt)
    named = [row for row in facts.missing.top if left_out.reason(row["customer_id"], facts.day) is None]
    return replace(facts.missing, top=named[:MISSING_CUSTOMERS])


def plain_missing(missing: Missing | None) -> dict[str, Any] | None:
    """As JSON has it."""
    return None if missing is None else vars(missing)


def _actions(rows: pd.DataFrame) -> list[tuple[str, int]]:
    """Recommended action -> customers, in the order of the queue's best customer for each."""
    counts = rows["recommended_action"].value_counts()
    return [(action, int(counts[action])) for action in rows["recommended_action"].unique()]


def build_pack(facts: Facts, settings: Settings, *, run_id: str, links: Mapping[str, str], clock: Clock = system_clock) -> Pack:
    """Renders and writes the pack of D, replacing the one before. Outbox and log of the old build are carried over."""
    audiences = audiences_of(facts.day, facts.priority, facts.no_contact, facts.handed_over, settings)
    brief = brief_facts(facts, audiences, settings, links)
    chart = trend_chart(
        facts.history, warning_pct=settings.warning_pct, critical_pct=settings.critical_pct, shop_name=settings.shop_name,
        currency=facts.currency,
    )
    shortfalls = drawn_shortfalls(facts.shortfalls, facts.history)
    returning = returning_chart(shortfalls, settings.shop_name) if shortfalls else None
    severity = facts.alert["severity"]
    contents: dict[str, tuple[bytes, int]] = {  # name -> (bytes, rows)
        f"briefing_{severity}.md": (render_markdown(brief, settings).encode(), 1),
        "briefing.slack.json": (json.dumps(render_slack(brief, settings), indent=1, ensure_ascii=False).encode(), 1),
        "briefing.html": (render_html(brief, settings, chart_png=chart, returning_png=returning).encode(), 1),
        CHART_FILE: (chart, len(facts.history)),
        **({RETURNING_FILE: (returning, len(shortfalls))} if returning else {}),
        **{audience.file: (audience.csv.encode(), audience.rows) for audience in audiences.values()},
    }
    manifest = {
        "schema": PACK_SCHEMA,
        "date": facts.day.isoformat(),
        "severity": severity,
        "alert_flag": facts.alert["alert_flag"],
        "gate": facts.alert["gate"],
        "alert_versions": versions_of(facts.alert),
        "facts_sha256": facts_sha256(facts, settings),
        "audience_sha256": audience_sha256(audiences),
        "orders_version": facts.orders_version,
        "customers_version": facts.no_contact.customers_version,
        "suppressions_version": facts.no_contact.suppressions_version,
        "complete_through": facts.complete_through.isoformat(),
        "rules_sha256": settings.rules_sha256(),
        "sql_sha256": sql_sha256(),
        "settings_sha256": settings.settings_sha256(),
        "created_at": clock().isoformat(timespec="seconds"),
        "run_id": run_id,
        "audiences": {
            tier: {
                "file": a.file, "rows": a.rows, "new": a.new, "listed": a.listed, "excluded": a.excluded,
                "content_sha256": a.content_sha256,
            }
            for tier, a in audiences.items()
        },
        "files": {name: file_entry(data, rows) for name, (data, rows) in contents.items()},
    }
    folder = _put_in_place(settings.packs, facts.day, {name: data for name, (data, _) in contents.items()}, manifest)
    return Pack(facts.day, folder, manifest)


def brief_links(settings: Settings, run_id: str) -> dict[str, str]:
    """Addresses for the brief. The default dagster_url is this machine's own, which leads a manager nowhere: no link then."""
    links = {"run": f"{settings.dagster_url}/runs/{run_id}"} if "dagster_url" in settings.model_fields_set else {}
    return {**links, "dashboard": settings.dashboard_url} if settings.dashboard_url else links


def renew_pack(lake: Warehouse, day: date, handed_over: HandedOver, *, run_id: str, clock: Clock = system_clock) -> Pack:
    """Builds the pack of D again from the orders, consent and suppressions of this moment."""
    with workspace(lake) as space:
        space.build_range("alert_logic", day - timedelta(days=lake.settings.trend_days - 1), day)
        space.use("customer_priority", day)
        priority = space.rows("customer_priority", priority_order(lake.settings))
        facts = collect(space, day, space.rows("alert_logic"), space.rows("retention_daily"), priority, handed_over)
    pack = build_pack(facts, lake.settings, run_id=run_id, links=brief_links(lake.settings, run_id), clock=clock)
    publish_lists(lake, facts)
    return pack


CURRENT_LISTS = "audience_current"


def publish_lists(lake: Warehouse, facts: Facts) -> bool:
    """Writes the lists of D as the table audience_current, if D is the newest date with a pack and that pack has these lists.

    Raises QualityError where the rows break the table's rules; the old table stays.
    """
    audiences = audiences_of(facts.day, facts.priority, facts.no_contact, facts.handed_over, lake.settings)
    fingerprint = audience_sha256(audiences)
    with locked(lake.root / f".{CURRENT_LISTS}.lock"), lake.connection() as connection:
        pack = find_pack(lake.settings, facts.day)
        # where a newer date or another build came in between, its own run writes the table
        if pack is None or pack_days(lake.settings)[-1] != facts.day or pack.manifest["audience_sha256"] != fingerprint:
            return False
        rows = pd.concat([audiences[tier].table for tier in TIERS])
        texts, numbers = ("customer_id", "priority_tier", "priority_reason", "recommended_action"), ("priority_score", "total_revenue")
        connection.register("list_rows", pa.table({
            **{name: pa.array(rows[name], pa.string()) for name in texts},
            **{name: pa.array(rows[name], pa.float64()) for name in numbers},
            "new_since_handover": pa.array(rows["new_since_handover"], pa.bool_()),
            "last_handed_over": pa.array(rows["last_handed_over"].tolist(), pa.date32()),
            "place": pa.array(range(len(rows)), pa.int64()),  # the lists are in the queue's order
        }))
        connection.execute(
            f"CREATE TEMP TABLE {CURRENT_LISTS} AS "
            "SELECT *, CAST(? AS DATE) AS alert_date, priority_tier AS tier, ? AS audience_sha256 FROM list_rows",
            [facts.day, fingerprint],
        )
        broken = [check.name for check in quality.check(connection, CURRENT_LISTS, lake.settings) if not check.passed]
        if broken:
            raise QualityError(f"{CURRENT_LISTS} of {facts.day} breaks its own rules and was not replaced: {', '.join(broken)}")
        made_from = {"alert_date": facts.day.isoformat(), "audience_sha256": fingerprint}
        lake.write(connection, CURRENT_LISTS, None, made_from, order_by="tier, place")
    lake.refresh_views()
    return True


def withdraw_lists(lake: Warehouse) -> None:
    """Removes audience_current where the pack it came from is gone: lists expire with their pack."""
    with locked(lake.root / f".{CURRENT_LISTS}.lock"):
        day = lake.provenance(CURRENT_LISTS).get("alert_date")
        if day is None or (lake.settings.packs / day).exists():
            return
        lake.remove(CURRENT_LISTS)
    lake.refresh_views()


def file_entry(data: bytes, rows: int) -> dict[str, Any]:
    """What a manifest says of a file."""
    return {"sha256": hashlib.sha256(data).hexdigest(), "rows": rows, "bytes": len(data)}


def _put_in_place(packs: Path, day: date, contents: Mapping[str, bytes], manifest: dict[str, Any]) -> Path:
    with locked(packs / LOCK):  # two builds of one date: the later one wins whole
        return _swap(packs, day, contents, manifest)


def _swap(packs: Path, day: date, contents: Mapping[str, bytes], manifest: dict[str, Any]) -> Path:
    link = packs / day.isoformat()
    build = packs / ".builds" / f"{day.isoformat()}.{secrets.token_hex(4)}"
    build.mkdir(parents=True, mode=0o700)
    old = link.resolve() if link.exists() else None
    if old:
        _carry_over(old, build)
    for name, data in contents.items():
        write_atomic(build / name, data, mode=0o600)
    write_atomic(build / MANIFEST, json.dumps(manifest, indent=1, ensure_ascii=False), mode=0o600)
    fsync_folder(build)
    fresh = packs / f".{day.isoformat()}.{secrets.token_hex(4)}.partial"
    os.symlink(Path(".builds") / build.name, fresh)
    os.replace(fresh, link)
    fsync_folder(packs)
    if old:
        shutil.rmtree(old, ignore_errors=True)
    return link


def _carry_over(old: Path, build: Path) -> None:
    """What was answered stays with the date even when its pack is built again."""
    if (old / OUTBOX).is_dir():
        shutil.copytree(old / OUTBOX, build / OUTBOX)
    if (old / LOG_FILE).is_file():
        shutil.copy2(old / LOG_FILE, build / LOG_FILE)


def find_pack(settings: Settings, day: date) -> Pack | None:
    """The pack of D, or None. Raises PackError where its manifest cannot be read."""
    folder = settings.packs / day.isoformat()
    path = folder / MANIFEST
    if not path.is_file():
        return None
    return Pack(day, folder, _read_manifest(path, day))


def _read_manifest(path: Path, day: date) -> dict[str, Any]:
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        datetime.fromisoformat(manifest["created_at"])
        missing = {"files", "audiences", "facts_sha256", "alert_versions"} - manifest.keys()
        if missing:
            raise ValueError(f"{', '.join(sorted(missing))} missing")
        newer = manifest.get("schema", 1) > PACK_SCHEMA
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise PackError(f"{path} cannot be read ({error}); `retention-ops run --date {day}` builds the pack again") from None
    if newer:
        raise NewerSchema(f"{path} has schema {manifest['schema']}; this program knows schemas up to {PACK_SCHEMA}. Install the release "
                          "that wrote it, or a newer one")
    return manifest


def verify(pack: Pack) -> None:
    """Raises PackError naming the first file that is missing or differs from the manifest.

    Other workers add files to a pack meanwhile: what seems to differ is looked at once more as it lies there, while nobody writes.
    """
    try:
        _verify(pack, pack.manifest)
    except PackError:
        with locked(pack.folder.parent / LOCK):
            manifest = _read_manifest(pack.folder.resolve() / MANIFEST, pack.day)
            if manifest["facts_sha256"] != pack.facts_sha256:
                raise
            _verify(pack, manifest)


def _verify(pack: Pack, manifest: Mapping[str, Any]) -> None:
    for name, entry in manifest["files"].items():
        path = pack.folder / name
        found = path.read_bytes() if path.is_file() else None
        if found is None or hashlib.sha256(found).hexdigest() != entry["sha256"]:
            what = "is missing" if found is None else "differs from its manifest"
            raise PackError(f"{path} {what}; `retention-ops run --date {pack.day}` builds the pack again")


def add_files(pack: Pack, contents: Mapping[str, tuple[bytes, int]]) -> Pack:
    """Adds files (name -> bytes, rows) to a pack and names them in its manifest; both hashes stay as they are.

    Another run may have built the pack again meanwhile: the files go to the build in place, if it says the same. Raises
    PackError if it does not.
    """
    with locked(pack.folder.parent / LOCK):
        folder = pack.folder.resolve()
        manifest = _read_manifest(folder / MANIFEST, pack.day)
        if manifest["facts_sha256"] != pack.facts_sha256:
            raise PackError(f"the pack of {pack.day} was built again from other facts; `retention-ops run --date {pack.day}` answers them")
        for name, (data, rows) in contents.items():
            (folder / name).parent.mkdir(mode=0o700, exist_ok=True)
            write_atomic(folder / name, data, mode=0o600)
            manifest["files"][name] = file_entry(data, rows)
        write_atomic(folder / MANIFEST, json.dumps(manifest, indent=1, ensure_ascii=False), mode=0o600)
    return Pack(pack.day, pack.folder, manifest)


def pack_days(settings: Settings) -> list[date]:
    """Dates that have a pack, oldest first; whatever else lies in the folder is not ours."""
    found = []
    for entry in settings.packs.glob("????-??-??"):
        with suppress(ValueError):
            found.append(date.fromisoformat(entry.name))
    return sorted(found)


def expire_packs(settings: Settings, clock: Clock = system_clock) -> list[date]:
    """Removes packs built more than pack_keep_days ago and builds that no date points to; returns the dates removed."""
    oldest = clock() - timedelta(days=settings.pack_keep_days)
    removed = []
    for day in pack_days(settings):
        link = settings.packs / day.isoformat()
        try:
            pack = find_pack(settings, day)
        except PackError:
            continue  # said where that pack is used
        if pack and datetime.fromisoformat(pack.manifest["created_at"]) < oldest:
            build = link.resolve()
            link.unlink()
            shutil.rmtree(build, ignore_errors=True)
            removed.append(pack.day)
    in_use = {(settings.packs / day.isoformat()).resolve() for day in pack_days(settings)}
    for build in (settings.packs / ".builds").glob("*"):  # left by a kill between building and linking
        age = clock().timestamp() - build.stat().st_mtime
        if build.resolve() not in in_use and age > ABANDONED_AFTER_SECONDS:
            shutil.rmtree(build, ignore_errors=True)
    return removed
