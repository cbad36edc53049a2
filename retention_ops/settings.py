"""Every threshold, path and switch, typed, with its unit and default.

Each can be given as RETENTION_OPS_<NAME> in the environment or in a .env file, e.g. RETENTION_OPS_PROFILE=luxury.
Secrets never belong here as defaults and are never printed.
"""

from __future__ import annotations

import hashlib
import json
import re
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import unquote
from zoneinfo import ZoneInfo

from pydantic import Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from retention_ops.errors import SettingsError

if TYPE_CHECKING:
    from retention_ops.detect.closures import Closure

PROFILES = {"standard": (30, 90), "fast_fashion": (15, 45), "luxury": (60, 180)}
"""profile -> (active_days, at_risk_days)"""


TRIAL = "trial"
"""what a rule answers in while the mode is live and the rule is still in its pilot period; no mode that can be set"""
TEST_MODES = ("pilot", TRIAL)
"""modes that send to the test targets"""
REAL_MODES = ("pilot", TRIAL, "live")
"""modes in which something really leaves"""

OF_THIS_MACHINE = ("home", "ops_database_url")
"""where state lies says nothing about what is computed, and a database's address may hold its password"""
LOGIN = re.compile(r"://(?:[^/\s]+|[^/:@\s]*:[^@\s]*)@")
"""as libraries take it, and as one who did not write a secret's / and ? in the way of an address has it"""


def without_login(address: str) -> str:
    """An address without what may be secret in it: a login, and what follows its `?`. Other texts stay."""
    return LOGIN.sub("://***@", address).partition("?")[0] if "://" in address else address


class Settings(BaseSettings):
    """All settings of one installation."""

    model_config = SettingsConfigDict(
        env_prefix="RETENTION_OPS_", env_file=".env", env_file_encoding="utf-8", extra="ignore", frozen=True,
        env_ignore_empty=True,
    )

    # where things live
    home: Path = Field(Path(".retention_ops"), description="folder that holds all state")
    ops_database_url: str = Field("", description="SQLAlchemy URL; empty: SQLite file ops.sqlite in home")
    templates_dir: Path | None = Field(None, description="folder whose templates override or extend the shipped ones")
    dagster_url: str = Field("http://127.0.0.1:3000", description="where people reach the Dagster UI; used in links")
    dashboard_url: str = Field("", description="your own dashboard, linked from the brief when set")

    # the warehouse
    warehouse: Literal["lake", "bigquery"] = Field("lake", description="where tables are computed; lake: files in home")
    bigquery_project: str = Field("", description="project that runs the jobs and holds the dataset")
    bigquery_dataset: str = Field("", description="our dataset, created where missing; nothing else is ever written", pattern=r"^\w*$")
    bigquery_location: str = Field("", description="its location, e.g. EU or europe-west1")
    maximum_bytes_billed: int = Field(
        100_000_000_000, description="a query that would bill more bytes fails before it costs anything", ge=10_485_760,
    )
    bigquery_monthly_budget_gb: float | None = Field(
        None, description="no query starts that would take this month's (UTC) billed bytes past so many GB; empty: no budget",
        gt=0, allow_inf_nan=False,
    )

    # the shop
    shop_name: str = Field("Your shop", description="name in the brief", min_length=1, max_length=60)
    shop_timezone: str = Field("UTC", description="IANA zone; order_date is the date there")
    currency: str = Field("EUR", description="ISO code for order files that name none", pattern=r"^[A-Z]{3}$")
    start_date: date | None = Field(None, description="first partition; default: the first order_date")
    schedule_time: str = Field("06:00", description="daily run, hh:mm in shop_timezone", pattern=r"^([01]\d|2[0-3]):[0-5]\d$")
    data_deadline: str = Field(
        "08:00", description="until then a morning waits for data that is not complete, hh:mm in shop_timezone",
        pattern=r"^([01]\d|2[0-3]):[0-5]\d$",
    )
    rebuild_days: int = Field(
        7, ge=1, le=400,
        description="days back in which a morning rebuilds what corrections made stale, and computes dates whose data did not come",
    )
    holiday_country: str = Field(
        "", description="ISO 3166 code whose public holidays may be days without trade, e.g. DE or GB-ENG; empty: no public holidays",
    )
    closures_file: Path | None = Field(None, description="csv from,to,reason: planned closures, both dates included; to empty: one day")
    hash_customer_ids: Literal["emails", "all", "off"] = Field(
        "emails", description="customer ids that are e-mail addresses, or all, are kept as keyed hashes; needs RETENTION_OPS_ID_KEY",
    )
    max_order_amount: int = Field(10_000_000, description="an order above this many currency units is refused", gt=0)

    # where the orders come from, each morning
    source: Literal["", "postgres", "files", "bigquery"] = Field(
        "", description="where source_sql runs: postgres (needs RETENTION_OPS_SOURCE_URL), files, bigquery; empty: orders come by `ingest`",
    )
    source_sql: Path = Field(Path("sql/sources/orders.sql"), description="your SELECT of orders; `retention-ops init` writes an example")
    source_path: str = Field(
        "", description="source=files: folder or pattern of csv or parquet files, e.g. exports/*.csv, s3://bucket/orders, gs://bucket/orders",
    )
    completed_statuses: str = Field(
        "completed,complete,paid,fulfilled,shipped,delivered",
        description="values of the SELECT's status that count as an order, separated by commas; the others are counted and left out",
        pattern=r"[^,\s]",
    )
    lookback_days: int = Field(45, description="newest days that each pull reads again, for orders that changed or vanished", ge=1, le=3660)
    source_timeout_seconds: int = Field(600, description="source=postgres: a longer statement is cancelled, seconds", ge=1, le=86_400)
    source_max_vanished_pct: int = Field(
        20, description="a pull is refused when more than this % of the orders it could see again have vanished: a half-loaded table",
        ge=0, le=100,
    )

    # retention status
    profile: Literal["standard", "fast_fashion", "luxury"] = Field("standard", description="sets active_days and at_risk_days")
    active_days: int | None = Field(None, description="ACTIVE up to this many days since the last order; default from profile", gt=0)
    at_risk_days: int | None = Field(None, description="AT_RISK up to this many days; default from profile", gt=0)

    # churn risk: percentages are whole numbers so that the SQL compares integers
    frequency_drop_pct: int = Field(150, description="late: days since last order above this % of the usual gap", gt=0)
    value_drop_pct: int = Field(60, description="spending less: last order below this % of the average order", gt=0, le=100)
    inconsistent_gap_pct: int = Field(70, description="ACTIVE but past this % of the usual gap", gt=0)
    few_orders: int = Field(3, description="ACTIVE with at most this many orders is not settled yet", ge=0)
    frequency_drop_score: int = Field(50, description="points", ge=0, le=100)
    value_drop_score: int = Field(30, description="points", ge=0, le=100)
    inconsistent_score: int = Field(20, description="points", ge=0, le=100)
    high_risk_score: int = Field(51, description="HIGH from this score", ge=1, le=100)
    medium_risk_score: int = Field(21, description="MEDIUM from this score", ge=1, le=100)

    # macro alert
    warning_pct: float = Field(15.0, description="WARNING when AT_RISK % is this much above its baseline, in %", gt=0, allow_inf_nan=False)
    critical_pct: float = Field(25.0, description="CRITICAL likewise, in %", gt=0, allow_inf_nan=False)
    shortfall_warning: float = Field(
        3.0, gt=0, allow_inf_nan=False,
        description="WARNING when fewer customers return than are due by this many times the noise, or two thirds of that 8 days running",
    )
    shortfall_critical: float = Field(4.5, description="CRITICAL likewise", gt=0, allow_inf_nan=False)
    min_due: int = Field(20, description="customers due back in a window before it is judged", ge=1)
    shortfall_response: bool = Field(True, description="answer shortfalls of returning customers; their rows and flags are computed anyway")
    shortfall_pilot_days: int = Field(
        14, description="in live: days after its first morning in which a shortfall alone is answered as in pilot; 0: none", ge=0,
    )
    min_sample: int = Field(100, description="customers needed before the alert may fire", ge=0)

    # priority queue
    p1_min_revenue: Literal["none", "median"] = Field("none", description="P1 only for customers at or above the median revenue")
    vip_revenue: int = Field(2000, description="P1 revenue above this: VIP outreach, currency units", ge=0)
    personal_revenue: int = Field(1000, description="P1 revenue from this: personal email, currency units", ge=0)
    action_p1_vip: str = Field(
        "VIP outreach + 10 % loyalty incentive", description="what to do in P1 above vip_revenue", min_length=1, max_length=200,
    )
    action_p1_personal: str = Field(
        "Personal email + free shipping", description="what to do in P1 from personal_revenue", min_length=1, max_length=200,
    )
    action_p1_reminder: str = Field("Personal email + reminder", description="what to do in the rest of P1", min_length=1, max_length=200)
    action_p2: str = Field(
        "Win-back sequence (3 emails, 7 days) + free shipping", description="what to do in P2", min_length=1, max_length=200,
    )
    action_p3: str = Field("20 % comeback offer + survey", description="what to do in P3", min_length=1, max_length=200)
    value_proxy_pct: int = Field(30, description="value_proxy as % of total_revenue", ge=0, le=100)

    rank_by: Literal["score", "spend_at_stake"] = Field(
        "score", description="order of the queue: by priority_score, or tier by tier by spend_at_stake",
    )
    membership: Literal["rules", "at_stake"] = Field(
        "rules", description="who is in the queue: whom the rules name, or the highest spend_at_stake (tiers then follow the status)",
    )
    return_model: Literal["table", "learned"] = Field(
        "table",
        description="p_no_return_90d from return_rates, or learned (extra models) where `backtest targeting --model` found that better",
    )
    at_stake_size: int = Field(0, description="customers in the queue with membership=at_stake; 0: as many as the rules name", ge=0)

    # response
    mode: Literal["off", "shadow", "pilot", "live"] = Field(
        "shadow", description="off: nothing; shadow: rehearse, send nothing; pilot: WARNING only, test channel and project; live",
    )
    max_alert_age_days: int = Field(7, description="older flagged dates are history: logged, not answered", ge=0)
    owner: str = Field("", description="who owns incidents: a name, or a Slack member id such as U0123ABCD")
    backup_owner: str = Field("", description="who is asked when the owner does not acknowledge in time")
    ack_hours_critical: int = Field(4, description="business hours to acknowledge a CRITICAL incident", gt=0)
    ack_hours_warning: int = Field(24, description="business hours to acknowledge a WARNING incident", gt=0)
    business_hours: str = Field(
        "09:00-18:00", description="hh:mm-hh:mm in shop_timezone; ack hours count only these",
        pattern=r"^([01]\d|2[0-3]):[0-5]\d-([01]\d|2[0-3]):[0-5]\d$",
    )
    business_days: str = Field("mon-fri", description="mon-fri, mon-sat or mon-sun", pattern=r"^mon-(fri|sat|sun)$")
    broadcast: bool = Field(False, description="a CRITICAL message may notify the whole Slack channel")
    max_incidents_per_day: int = Field(3, description="more new incidents in 24 hours wait for a human", gt=0)
    max_messages_per_day: int = Field(40, description="per destination; more in 24 hours wait for a human", gt=0)
    lease_seconds: int = Field(300, description="a send that has not answered for so long counts as unknown", ge=60)

    # lists
    approval_above: int | None = Field(None, description="a CRITICAL hand-over of more customers waits for approval; empty: never", ge=0)
    holdout_pct: int = Field(10, description="live only: % of customers never contacted, to measure what contacting brings", ge=0, le=50)
    holdout_salt: str = Field("holdout-1", description="changing it draws another holdout", min_length=1)
    handover_cooldown_days: int = Field(14, description="days in which nobody is handed over twice; 0: none", ge=0)

    # destinations: local writes what would be sent into the pack's outbox
    messages_to: Literal["local", "slack"] = Field("local", description="where the brief goes; slack needs RETENTION_OPS_SLACK_TOKEN")
    tickets_to: Literal["local", "jira", "asana", "roundup"] = Field("local", description="each needs RETENTION_OPS_TICKET_TOKEN")
    lists_to: Literal["local", "sheets"] = Field("local", description="sheets needs RETENTION_OPS_GOOGLE_CREDENTIALS")
    webhook_to: Literal["local", "make", "zapier", "generic"] = Field(
        "local", description="needs RETENTION_OPS_WEBHOOK_URL and RETENTION_OPS_WEBHOOK_SECRET",
    )
    slack_channel: str = Field("", description="channel id such as C0123ABCD")
    slack_test_channel: str = Field("", description="the same for pilot")
    slack_api_url: str = Field("https://slack.com/api/", description="Slack's Web API")
    ticket_url: str = Field("", description="https://you.atlassian.net, a Roundup tracker, or empty for Asana")
    ticket_user: str = Field("", description="Jira: the token's e-mail address; Roundup: the user name")
    ticket_project: str = Field("", description="Jira: project key; Asana: project gid; Roundup: not used")
    ticket_test_project: str = Field("", description="the same for pilot")
    ticket_issue_type: str = Field("Task", description="Jira issue type")
    ticket_priority_warning: str = Field("High", description="the ticket system's own name for it")
    ticket_priority_critical: str = Field("Highest", description="the ticket system's own name for it")
    ticket_resolved_status: str = Field("Done", description="the ticket system's own name for the last status")
    ticket_priority_field: str = Field("", description="Asana: gid of an enum custom field; empty: the priority stands in the text")
    ticket_external_ids: bool = Field(True, description="Asana: external ids (OAuth apps); false: a marker that is searched for")
    sheets_spreadsheet: str = Field("", description="id of a spreadsheet shared with the service account")
    sheets_test_spreadsheet: str = Field("", description="the same for pilot")
    sheets_api_url: str = Field("https://sheets.googleapis.com", description="Google's Sheets API")
    webhook_dedupes: bool = Field(False, description="the receiver drops a repeated Idempotency-Key, so a lost answer may be sent again")
    smtp_host: str = Field("", description="mail server for the backup mail when the webhook fails; empty: no mail")
    smtp_port: int = Field(587, description="mail server's port", gt=0, le=65535)
    smtp_security: Literal["starttls", "tls", "none"] = Field("starttls", description="none only on a loopback address")
    smtp_user: str = Field("", description="empty: no login")
    mail_from: str = Field("", description="sender's address")
    mail_to: str = Field("", description="receivers' addresses, separated by commas")

    # quiet mornings
    digest: Literal["off", "weekly", "daily"] = Field("weekly", description="the digest that says we looked, and what there was to see")
    digest_day: Literal["mon", "tue", "wed", "thu", "fri", "sat", "sun"] = Field("mon", description="day of the weekly digest")
    health_channel: str = Field("", description="Slack channel id of the data owner; needs RETENTION_OPS_SLACK_TOKEN")
    health_email: str = Field("", description="the data owner's addresses, used where health_channel is empty; needs smtp_host, mail_from")
    runbooks_url: str = Field("", description="address of docs/runbooks, linked from health alerts; empty: they name the command")
    metrics_file: Path | None = Field(
        None, description="Prometheus text file, renewed every minute, e.g. metrics.prom; a relative path lies in home; empty: none",
    )

    # MCP server
    mcp_toolsets: str = Field(
        "read,actions", description="toolsets the MCP server offers: read, actions, or both", pattern=r"^(read|actions)(,(read|actions))*$",
    )
    mcp_read_only: bool = Field(False, description="the MCP server offers the toolset read only, whatever else is set")
    mcp_export_limit: int = Field(1000, description="most customers one export_audience call may hand over", ge=1, le=100_000)
    mcp_wait_seconds: int = Field(45, description="how long a tool waits for its run before it answers `running`, seconds", ge=0, le=600)
    mcp_allowed_hosts: str = Field("", description="names, separated by commas, by which the MCP server may be addressed besides loopback")

    # keeping
    snapshot_keep_days: int = Field(90, description="newest days of base_customers, retention_snapshot, churn_detection", gt=0, le=36500)
    pack_keep_days: int = Field(90, description="days a pack is kept after it was built; a range builds its newest so many", gt=0, le=36500)
    sheets_keep_days: int = Field(90, description="days a worksheet of ours stays in Google Sheets; the run deletes it", gt=0, le=36500)
    orders_keep_versions: int = Field(10, description="newest orders versions kept on disk", ge=2)
    trend_days: int = Field(60, description="days shown in the trend chart", ge=14, le=365)

    # DuckDB
    duckdb_memory_limit: str = Field("", description="e.g. 2GB; empty: DuckDB's default (80 % of memory)")
    duckdb_threads: int = Field(0, description="0: one per core", ge=0)

    @field_validator("shop_timezone")
    @classmethod
    def _known_zone(cls, value: str) -> str:
        try:
            ZoneInfo(value)
        except (KeyError, ValueError, OSError) as error:
            raise ValueError(f"{value!r} is not an IANA time zone such as Europe/London") from error
        return value

    @field_validator("holiday_country")
    @classmethod
    def _known_country(cls, value: str) -> str:
        if value:
            from retention_ops.detect.closures import check_country  # the library is read only where it is wanted

            check_country(value)
        return value

    @model_validator(mode="after")
    def _order(self) -> Settings:
        if self.active_limit >= self.at_risk_limit:
            raise ValueError(f"active_days ({self.active_limit}) must be below at_risk_days ({self.at_risk_limit})")
        missing = [name for name in ("project", "dataset", "location") if not getattr(self, f"bigquery_{name}")]
        if self.warehouse == "bigquery" and missing:
            raise ValueError("warehouse=bigquery needs " + ", ".join(f"RETENTION_OPS_BIGQUERY_{name.upper()}" for name in missing))
        if self.warehouse == "bigquery" and self.return_model == "learned":
            raise ValueError("return_model=learned needs warehouse=lake: the model is fitted on this machine, over its files")
        if self.source == "bigquery" and not (self.bigquery_project and self.bigquery_location):
            raise ValueError("source=bigquery needs RETENTION_OPS_BIGQUERY_PROJECT, RETENTION_OPS_BIGQUERY_LOCATION")
        if self.source == "files" and not self.source_path:
            raise ValueError("source=files needs RETENTION_OPS_SOURCE_PATH")
        if self.data_deadline <= self.schedule_time:
            raise ValueError(f"data_deadline ({self.data_deadline}) must be after schedule_time ({self.schedule_time}): in between "
                             "the morning waits for its orders")
        if self.warning_pct >= self.critical_pct:
            raise ValueError(f"warning_pct ({self.warning_pct}) must be below critical_pct ({self.critical_pct})")
        if self.shortfall_warning >= self.shortfall_critical:
            raise ValueError(f"shortfall_warning ({self.shortfall_warning}) must be below shortfall_critical ({self.shortfall_critical})")
        if self.medium_risk_score > self.high_risk_score:
            raise ValueError("medium_risk_score must not exceed high_risk_score")
        if self.personal_revenue > self.vip_revenue:
            raise ValueError("personal_revenue must not exceed vip_revenue")
        return self

    @property
    def active_limit(self) -> int:
        """Days up to which a customer is ACTIVE."""
        return self.active_days or PROFILES[self.profile][0]

    @property
    def at_risk_limit(self) -> int:
        """Days up to which a customer is AT_RISK."""
        return self.at_risk_days or PROFILES[self.profile][1]

    def target(self, name: str, mode: str) -> str:
        """The setting `name` as `mode` uses it: pilot and trial keep to the test channel, project and spreadsheet."""
        group, _, what = name.partition("_")
        return getattr(self, f"{group}_test_{what}" if mode in TEST_MODES else name)

    @property
    def packs(self) -> Path:
        return self.home / "action_packs"

    @property
    def outbox(self) -> Path:
        """Where `local` writes what belongs to no pack: digests, health alerts, heartbeats."""
        return self.home / "outbox"

    @property
    def database_url(self) -> str:
        return self.ops_database_url or f"sqlite:///{(self.home / 'ops.sqlite').absolute()}"

    @property
    def counted_statuses(self) -> list[str]:
        """The statuses that count as an order, in lower case."""
        return [status.strip().lower() for status in self.completed_statuses.split(",") if status.strip()]

    def recorded(self) -> dict[str, Any]:
        """Every setting as it may be kept: as JSON has it, without what belongs to this machine and without logins inside addresses."""
        values = self.model_dump(mode="json", exclude=set(OF_THIS_MACHINE))
        return {name: without_login(value) if isinstance(value, str) else value for name, value in values.items()}

    def settings_sha256(self) -> str:
        """Identifies `recorded`."""
        return hashlib.sha256(json.dumps(self.recorded(), sort_keys=True, separators=(",", ":")).encode()).hexdigest()

    def rule_parameters(self) -> dict[str, Any]:
        """The named parameters of sql/*.sql that come from settings (dates are added by the caller)."""
        return {
            "active_days": self.active_limit,
            "at_risk_days": self.at_risk_limit,
            "frequency_drop_pct": self.frequency_drop_pct,
            "value_drop_pct": self.value_drop_pct,
            "inconsistent_gap_pct": self.inconsistent_gap_pct,
            "few_orders": self.few_orders,
            "frequency_drop_score": self.frequency_drop_score,
            "value_drop_score": self.value_drop_score,
            "inconsistent_score": self.inconsistent_score,
            "high_risk_score": self.high_risk_score,
            "medium_risk_score": self.medium_risk_score,
            "warning_pct": float(self.warning_pct),
            "critical_pct": float(self.critical_pct),
            "min_sample": self.min_sample,
            "shortfall_warning": float(self.shortfall_warning),
            "shortfall_critical": float(self.shortfall_critical),
            "min_due": self.min_due,
            "p1_needs_median_revenue": self.p1_min_revenue == "median",
            "vip_revenue_cents": self.vip_revenue * 100,
            "personal_revenue_cents": self.personal_revenue * 100,
            "action_p1_vip": self.action_p1_vip,
            "action_p1_personal": self.action_p1_personal,
            "action_p1_reminder": self.action_p1_reminder,
            "action_p2": self.action_p2,
            "action_p3": self.action_p3,
            "value_proxy_pct": self.value_proxy_pct,
            "membership": self.membership,
            "at_stake_size": self.at_stake_size,
        }

    def rules_sha256(self, closures: tuple[Closure, ...] | None = None) -> str:
        """Identifies the rules in force: same hash, same meaning of every table.

        The calendar is one of them: `closures` as they were read already, else those of the file now. Raises what reading it raises.
        """
        rules = {**self.rule_parameters(), "rank_by": self.rank_by}  # rows are stored in this order
        if self.holiday_country or self.closures_file:
            from retention_ops.detect.closures import identity, planned_closures

            rules |= identity(self, planned_closures(self) if closures is None else closures)
        if self.return_model == "learned":
            from retention_ops.detect.verdict import learned_identity

            rules |= learned_identity(self)
        text = json.dumps(rules, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()


class Secrets(BaseSettings):
    """Credentials, from the environment only: no file is read for them, nothing prints them."""

    model_config = SettingsConfigDict(env_prefix="RETENTION_OPS_", env_file=None, extra="ignore", frozen=True, env_ignore_empty=True)

    source_url: SecretStr | None = Field(None, description="postgresql://user:password@host:5432/database of a reader")
    slack_token: SecretStr | None = Field(None, description="bot token xoxb-..., scopes chat:write, files:write, channels:history")
    ticket_token: SecretStr | None = Field(None, description="Jira API token, Asana access token or Roundup password")
    google_credentials: SecretStr | None = Field(None, description="service account: its JSON, or the path of the JSON file")
    webhook_url: SecretStr | None = Field(None, description="the address is the credential")
    webhook_secret: SecretStr | None = Field(None, description="whsec_... of Standard Webhooks; the receiver verifies with it")
    webhook_apikey: SecretStr | None = Field(None, description="Make.com's x-make-apikey, where the hook asks for one")
    smtp_password: SecretStr | None = Field(None, description="mail server login")
    id_key: SecretStr | None = Field(
        None, description="hashes customer ids and marks forgotten customers; at least 32 characters: openssl rand -hex 32",
    )
    heartbeat_url: SecretStr | None = Field(
        None, description="called (GET) once after each good day in pilot and live; the address is the credential",
    )
    mcp_tokens: SecretStr | None = Field(
        None, description="callers of the MCP server over HTTP: name:scope+scope:token, separated by commas; scopes read, actions",
    )

    def values(self) -> list[str]:
        """Every secret in clear, for `redact`: longest first."""
        given = [item.get_secret_value() for item in (getattr(self, name) for name in type(self).model_fields) if item]
        tokens = [part.split(":", 2)[-1].strip() for part in self.mcp_tokens.get_secret_value().split(",")] if self.mcp_tokens else []
        return sorted(filter(None, [*given, *tokens, *self._source_passwords()]), key=len, reverse=True)

    def _source_passwords(self) -> list[str]:
        """The password in source_url, as it stands there and as the server knows it."""
        found = re.search(r"://[^/:@]*:(.+)@", self.source_url.get_secret_value()) if self.source_url else None
        return [found[1], unquote(found[1])] if found else []


def load_settings(**overrides: Any) -> Settings:
    """Settings from environment and .env, with `overrides` on top. Raises SettingsError naming the variable."""
    try:
        return Settings(**overrides)
    except ValidationError as error:
        lines = []
        for item in error.errors(include_url=False, include_input=False):
            name = ".".join(str(part) for part in item["loc"])
            lines.append(f"RETENTION_OPS_{name.upper()}: {item['msg']}" if name else item["msg"].removeprefix("Value error, "))
        raise SettingsError("settings cannot be used:\n  " + "\n  ".join(lines)) from error


def env_example() -> str:
    """The text of .env.example: every setting with its meaning and default, commented out."""
    lines = ["# Copy to .env and uncomment what you change. The environment wins over this file. Keep secrets out of both."]
    for name, field in Settings.model_fields.items():
        default = field.get_default()
        shown = "" if default is None else default
        lines += ["", f"# {field.description}"] if field.description else [""]
        lines.append(f"# RETENTION_OPS_{name.upper()}={shown}")
    lines += ["", "# Secrets: set these in the environment; they are not read from this file."]
    for name, field in Secrets.model_fields.items():
        lines.append(f"#   RETENTION_OPS_{name.upper()}: {field.description}")
    return "\n".join(lines) + "\n"
