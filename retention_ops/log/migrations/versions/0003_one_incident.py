"""one open incident whichever rule fires"""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    is_open = sa.text("state = 'open'")
    op.drop_index("incidents_one_open", "incidents")
    op.create_index(
        "incidents_one_open", "incidents", ["scope", "mode"], unique=True, sqlite_where=is_open, postgresql_where=is_open,
    )
