"""ingestions and the append-only ops_runs_log"""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    op.create_table(
        "ingestions",
        sa.Column("dataset", sa.Text, primary_key=True),
        sa.Column("version", sa.Text, primary_key=True),
        sa.Column("ingested_at", sa.DateTime, nullable=False),
        sa.Column("preset", sa.Text, nullable=False),
        sa.Column("rows", sa.BigInteger, nullable=False),
        sa.Column("complete_through", sa.Date),
        sa.Column("stale_from", sa.Date),
        sa.Column("content_sha256", sa.Text, nullable=False),
    )
    op.create_table(
        "ops_runs_log",
        sa.Column("position", sa.Integer, primary_key=True, autoincrement=True),
        sa.Column("run_id", sa.Text, nullable=False),
        sa.Column("run_timestamp", sa.DateTime, nullable=False),
        sa.Column("alert_date", sa.Date, nullable=False),
        sa.Column("alert_type", sa.Text, nullable=False),
        sa.Column("severity", sa.Text, nullable=False),
        sa.Column("alert_flag", sa.Boolean, nullable=False),
        sa.Column("current_value", sa.Double),
        sa.Column("baseline_value", sa.Double),
        sa.Column("delta_relative_pct", sa.Double),
        sa.Column("sample_size", sa.BigInteger, nullable=False),
        sa.Column("p1_count", sa.BigInteger),
        sa.Column("p2_count", sa.BigInteger),
        sa.Column("p3_count", sa.BigInteger),
        sa.Column("total_exported", sa.BigInteger, nullable=False),
        sa.Column("slack_posted", sa.Boolean, nullable=False),
        sa.Column("slack_message_ts", sa.Text),
        sa.Column("ticket_id", sa.Text),
        sa.Column("export_p1_link", sa.Text),
        sa.Column("export_p2_link", sa.Text),
        sa.Column("export_p3_link", sa.Text),
        sa.Column("status", sa.Text, nullable=False),
        sa.Column("error_message", sa.Text),
        sa.Column("execution_time_ms", sa.BigInteger, nullable=False),
        sa.Column("mode", sa.Text, nullable=False),
        sa.Column("facts_sha256", sa.Text),
        sa.Column("audience_sha256", sa.Text),
        sa.Column("prev_hash", sa.Text, nullable=False),
        sa.Column("row_hash", sa.Text, nullable=False),
        sa.UniqueConstraint("run_id", "alert_date", "alert_type", name="ops_runs_log_key"),
    )
    _append_only()


def _append_only() -> None:
    """The log can be added to, never changed: the database itself refuses."""
    refusal = "ops_runs_log is append-only"
    if op.get_bind().dialect.name == "sqlite":
        for verb in ("UPDATE", "DELETE"):
            op.execute(
                f"CREATE TRIGGER ops_runs_log_no_{verb.lower()} BEFORE {verb} ON ops_runs_log "
                f"BEGIN SELECT RAISE(ABORT, '{refusal}'); END"
            )
        # REPLACE deletes without firing the trigger above
        op.execute(
            "CREATE TRIGGER ops_runs_log_no_replace BEFORE INSERT ON ops_runs_log WHEN EXISTS (SELECT 1 FROM ops_runs_log "
            "WHERE position = NEW.position OR (run_id = NEW.run_id AND alert_date = NEW.alert_date AND alert_type = NEW.alert_type)) "
            f"BEGIN SELECT RAISE(ABORT, '{refusal}'); END"
        )
        return
    op.execute(
        "CREATE FUNCTION ops_runs_log_refuse() RETURNS trigger LANGUAGE plpgsql AS "
        f"$$ BEGIN RAISE EXCEPTION '{refusal}'; END $$"
    )
    op.execute(
        "CREATE TRIGGER ops_runs_log_append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON ops_runs_log "
        "FOR EACH STATEMENT EXECUTE FUNCTION ops_runs_log_refuse()"
    )
