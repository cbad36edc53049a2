"""`retention-ops init`: a working example of where orders come from, to be changed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.markup import escape

from retention_ops.commands.shared import Json, examples, print_json, say, say_next

app = typer.Typer()

FIRST = {
    "shopify": [
        "put Shopify's order exports (csv) into exports/",
        "export RETENTION_OPS_ID_KEY=$(openssl rand -hex 32)   # once, and keep it: addresses are kept as hashes made with it",
    ],
    "postgres": [
        "export RETENTION_OPS_SOURCE_URL=postgresql://USER:PASSWORD@HOST:5432/DATABASE   # a user who may only read",
        "put your tables and columns into sql/sources/orders.sql",
    ],
    "bigquery": [
        "gcloud auth application-default login",
        "put your project into .env and your tables into sql/sources/orders.sql",
    ],
}


@app.command(epilog=examples("init --source shopify", "init --source postgres --folder retention"))
def init(
    source: Annotated[Literal["shopify", "postgres", "bigquery"], typer.Option("--source", help="Which example.")] = "shopify",
    folder: Annotated[Path, typer.Option("--folder", help="Where to write it; commands then run in that folder.")] = Path("."),
    force: Annotated[bool, typer.Option("--force", help="Replace what is there.")] = False,
    as_json: Json = False,
) -> None:
    """Write a working example of your orders' SELECT and its settings. Nothing that exists is touched without --force."""
    from retention_ops.sources.examples import write_example

    written = write_example(source, folder, force)
    if as_json:
        print_json(written)
        return
    for item in written:
        say(f"{item.what:>9}  {escape(str(item.path))}")
    here = folder.resolve() == Path.cwd().resolve()
    steps = [] if here else [f"cd {folder}"]
    say_next(*steps, *FIRST[source], "set RETENTION_OPS_SHOP_TIMEZONE, _CURRENCY and _OWNER in .env", "retention-ops source check")
