"""what an answer was made from, when an action was last looked for, and the settings by their hash (append-only)"""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"


def upgrade() -> None:
    op.add_column("answers", sa.Column("made_from", sa.JSON))
    op.add_column("actions", sa.Column("looked_at", sa.DateTime))
    op.create_table(
        "settings_history",
        sa.Column("settings_sha256", sa.Text, primary_key=True),
        sa.Column("first_seen", sa.DateTime, nullable=False),
        sa.Column("values", sa.JSON, nullable=False),
    )
    refusal = "settings_history is append-only"
    if op.get_bind().dialect.name == "sqlite":
        for verb in ("UPDATE", "DELETE"):
            op.execute(f"CREATE TRIGGER settings_history_no_{verb.lower()} BEFORE {verb} ON settings_history "
                       f"BEGIN SELECT RAISE(ABORT, '{refusal}'); END")
        # REPLACE deletes without firing the trigger above
        op.execute("CREATE TRIGGER settings_history_no_replace BEFORE INSERT ON settings_history WHEN EXISTS (SELECT 1 FROM "
                   "settings_history WHERE settings_sha256 = NEW.settings_sha256) BEGIN SELECT RAISE(IGNORE); END")
        return
    op.execute("CREATE FUNCTION settings_history_refuse() RETURNS trigger LANGUAGE plpgsql AS "
               f"$$ BEGIN RAISE EXCEPTION '{refusal}'; END $$")
    op.execute("CREATE TRIGGER settings_history_append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON settings_history "
               "FOR EACH STATEMENT EXECUTE FUNCTION settings_history_refuse()")
