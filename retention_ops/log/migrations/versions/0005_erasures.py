"""requests to be forgotten; while one is carried out, exposures may be deleted and the texts of ops_events rewritten"""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"

UNDER_WAY = "EXISTS (SELECT 1 FROM erasures WHERE finished_at IS NULL)"
ALLOWED = {"exposures": "DELETE", "ops_events": "UPDATE"}
"""table -> the one thing an erasure does to it; everything else stays append-only even then"""


def upgrade() -> None:
    op.create_table(
        "erasures",
        sa.Column("mark", sa.Text, primary_key=True),
        sa.Column("key_fingerprint", sa.Text, nullable=False),
        sa.Column("requested_at", sa.DateTime, nullable=False),
        sa.Column("finished_at", sa.DateTime),
        sa.Column("progress", sa.JSON, nullable=False),
        sa.Column("unreached", sa.JSON, nullable=False),
    )
    for table, verb in ALLOWED.items():
        refusal = f"{table} is append-only"
        if op.get_bind().dialect.name == "sqlite":
            name = f"{table}_no_{verb.lower()}"
            op.execute(f"DROP TRIGGER {name}")
            op.execute(f"CREATE TRIGGER {name} BEFORE {verb} ON {table} WHEN NOT {UNDER_WAY} BEGIN SELECT RAISE(ABORT, '{refusal}'); END")
        else:
            op.execute(
                f"CREATE OR REPLACE FUNCTION {table}_refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN "
                f"IF TG_OP = '{verb}' AND {UNDER_WAY} THEN RETURN NULL; END IF; RAISE EXCEPTION '{refusal}'; END $$"
            )
