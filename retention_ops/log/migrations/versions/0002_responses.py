"""the ledger of actions, incidents, answers, approvals, exposures and the append-only ops_events"""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def _time(name: str, nullable: bool = True) -> sa.Column:
    return sa.Column(name, sa.DateTime, nullable=nullable)


def _text(name: str, nullable: bool = False, **options) -> sa.Column:
    return sa.Column(name, sa.Text, nullable=nullable, **options)


def upgrade() -> None:
    op.create_table(
        "incidents",
        sa.Column("id", sa.Integer, primary_key=True, autoincrement=True),
        _text("alert_type"), _text("scope"), _text("mode"), _text("state"), _text("severity"),
        sa.Column("opened_on", sa.Date, nullable=False),
        sa.Column("last_flagged_on", sa.Date, nullable=False),
        sa.Column("frozen_baseline", sa.Double, nullable=False),
        sa.Column("frozen_warning_pct", sa.Double, nullable=False),
        _text("owner"), _text("backup_owner"), _time("ack_by", False), _time("acked_at"), _text("acked_by", True),
        _time("escalated_at"), _time("snoozed_until"), _text("verdict", True), _time("closed_at"), _text("closed_by", True),
        _time("created_at", False), _time("updated_at", False),
    )
    op.create_index(
        "incidents_one_open", "incidents", ["alert_type", "scope", "mode"], unique=True,
        sqlite_where=sa.text("state = 'open'"), postgresql_where=sa.text("state = 'open'"),
    )
    op.create_table(
        "answers",
        sa.Column("id", sa.Integer, primary_key=True, autoincrement=True),
        _text("alert_type"), _text("scope"),
        sa.Column("alert_date", sa.Date, nullable=False),
        _text("mode"),
        sa.Column("seq", sa.Integer, nullable=False),
        _text("version"), _text("severity"), _text("verdict"), _text("reason"),
        sa.Column("incident_id", sa.Integer, sa.ForeignKey("incidents.id")),
        _text("run_id"), _time("answered_at", False), _text("facts_sha256", True), _text("audience_sha256", True),
        sa.UniqueConstraint("alert_type", "scope", "alert_date", "mode", "seq", name="answers_identity"),
    )
    op.create_table(
        "actions",
        _text("key", primary_key=True),
        sa.Column("position", sa.Integer, nullable=False),
        sa.Column("answer_id", sa.Integer, sa.ForeignKey("answers.id"), index=True),
        sa.Column("incident_id", sa.Integer, sa.ForeignKey("incidents.id"), index=True),
        sa.Column("alert_date", sa.Date, nullable=False),
        _text("mode"), _text("slot"), _text("destination"), _text("kind"), _text("target"), _text("parent_key", True),
        sa.Column("payload", sa.JSON, nullable=False),
        sa.Column("bound", sa.Boolean, nullable=False),
        _text("payload_sha256"), _text("state", index=True),
        sa.Column("attempts", sa.Integer, nullable=False),
        sa.Column("looked_up", sa.Integer, nullable=False),
        _text("lease_owner", True), _time("lease_until"), _time("not_before"), _time("first_attempt_at"), _time("last_attempt_at"),
        _text("external_id", True), _text("external_url", True),
        sa.Column("detail", sa.JSON),
        _text("last_error", True), _time("created_at", False), _time("updated_at", False),
    )
    op.create_table(
        "reservations",
        sa.Column("id", sa.Integer, primary_key=True, autoincrement=True),
        _text("guardrail"),
        sa.Column("action_key", sa.Text, sa.ForeignKey("actions.key"), nullable=False),
        _time("at", False),
        sa.UniqueConstraint("guardrail", "action_key", name="reservations_once"),
    )
    op.create_table(
        "approvals",
        sa.Column("id", sa.Integer, primary_key=True, autoincrement=True),
        sa.Column("action_key", sa.Text, sa.ForeignKey("actions.key"), nullable=False, index=True),
        _text("audience_sha256"),
        sa.Column("customers", sa.BigInteger, nullable=False),
        _text("state"), _time("requested_at", False), _time("decided_at"), _text("decided_by", True), _text("why", True),
    )
    op.create_table(
        "exposures",
        sa.Column("incident_id", sa.Integer, sa.ForeignKey("incidents.id"), primary_key=True),
        sa.Column("alert_date", sa.Date, primary_key=True),
        _text("customer_id", primary_key=True),
        _text("tier"), _text("arm"),
        sa.Column("action_key", sa.Text, sa.ForeignKey("actions.key"), nullable=False),
        _time("at", False),
    )
    op.create_index("exposures_by_date", "exposures", ["arm", "alert_date"])
    op.create_table(
        "pending_handovers",
        sa.Column("action_key", sa.Text, sa.ForeignKey("actions.key"), primary_key=True),
        sa.Column("arms", sa.JSON, nullable=False),
    )
    op.create_table(
        "ops_events",
        sa.Column("id", sa.Integer, primary_key=True, autoincrement=True),
        _time("at", False),
        sa.Column("incident_id", sa.Integer, index=True),
        _text("action_key", True, index=True), _text("event"), _text("actor"), _text("detail"),
    )
    op.create_table("response_state", _text("name", primary_key=True), _text("value"), _text("by"), _text("why"), _time("at", False))
    _append_only("ops_events", "id")
    _append_only("exposures", "incident_id", "alert_date", "customer_id")


def _append_only(table: str, *key: str) -> None:
    """What was sent to whom, by whom and when can be added to, never changed: the database itself refuses."""
    refusal = f"{table} is append-only"
    if op.get_bind().dialect.name == "sqlite":
        for verb in ("UPDATE", "DELETE"):
            op.execute(
                f"CREATE TRIGGER {table}_no_{verb.lower()} BEFORE {verb} ON {table} BEGIN SELECT RAISE(ABORT, '{refusal}'); END"
            )
        # REPLACE deletes without firing the trigger above; IGNORE leaves ON CONFLICT DO NOTHING what it is
        same = " AND ".join(f"{column} = NEW.{column}" for column in key)
        op.execute(
            f"CREATE TRIGGER {table}_no_replace BEFORE INSERT ON {table} WHEN EXISTS (SELECT 1 FROM {table} WHERE {same}) "
            "BEGIN SELECT RAISE(IGNORE); END"
        )
        return
    op.execute(
        f"CREATE FUNCTION {table}_refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE EXCEPTION '{refusal}'; END $$"
    )
    op.execute(
        f"CREATE TRIGGER {table}_append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON {table} "
        f"FOR EACH STATEMENT EXECUTE FUNCTION {table}_refuse()"
    )
