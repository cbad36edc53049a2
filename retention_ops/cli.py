"""The command `retention-ops`. Each command prints what happened and what to do next; `--json` prints data only.

Exit codes: 0 done, 1 failed, 2 bad usage, 130 stopped by Ctrl-C. Dagster is imported only by commands that start runs.
"""

from __future__ import annotations

import fcntl
import os
import signal
import socket
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from retention_ops.commands import (
    actions,
    asking,
    audit,
    backtest,
    closures,
    doctor,
    incidents,
    ingest,
    init,
    keep,
    mcp,
    morning,
    person,
    preview,
    quiet,
    reconcile,
    runs,
    shared,
    source,
    status,
)
from retention_ops.commands.shared import err, say
from retention_ops.errors import RetentionOpsError, UsageError

app = typer.Typer(
    name="retention-ops", no_args_is_help=True, rich_markup_mode="rich", pretty_exceptions_enable=False, add_completion=False,
    help="Detect slipping customers, package what to do about it, execute it once, log whether it worked.",
    epilog="Try it: retention-ops demo   ·   Your data: retention-ops ingest orders.csv --preset orders",
)
for commands in (
    init.app, ingest.app, runs.app, morning.app, asking.app, closures.app, status.app, quiet.app, doctor.app, person.app, keep.app, mcp.app,
):
    app.add_typer(commands)
for part in (preview.app, reconcile.app):
    actions.app.add_typer(part)
for group in (source.app, backtest.app, actions.app, incidents.app, audit.app):
    app.add_typer(group)
STORAGE = ("duckdb", "_duckdb", "sqlalchemy", "sqlite3", "yaml")
"""whose errors mean damaged or unreachable storage rather than a bug"""


@app.callback()
def _options(
    home: Annotated[
        Path | None, typer.Option("--home", help="Folder with all state; default RETENTION_OPS_HOME or ./.retention_ops.")
    ] = None,
) -> None:
    shared.use_home(home)


@app.command(epilog="Examples:\n\n  retention-ops ui\n\n  retention-ops --home .retention_ops/demo ui --port 3001")
def ui(
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port of the Dagster UI.")] = 3000,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
) -> None:
    """Dagster's own UI and daemon on this home. Stop with Ctrl-C."""
    from retention_ops.launch import dagster_home

    settings = shared.settings()
    home = dagster_home(settings)
    _check_free(host, port)
    # one daemon per home; the lock goes with the process that this one becomes
    held = os.open(home / ".ui.lock", os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UsageError(f"`retention-ops ui` already runs for {settings.home}; stop it first, or open the page it named") from None
    os.set_inheritable(held, True)
    environment = {
        **os.environ, "DAGSTER_HOME": str(home), "RETENTION_OPS_HOME": str(settings.home.absolute()),
        "RETENTION_OPS_DAGSTER_URL": os.environ.get("RETENTION_OPS_DAGSTER_URL") or f"http://{host}:{port}",
    }
    say(f"Dagster on http://{host}:{port} for {escape(str(settings.home))}; its runs page is /runs. Stop with Ctrl-C.")
    # started with & from a script, SIGINT arrives ignored, and Dagster would then ignore SIGTERM as well
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    command = [
        sys.executable, "-m", "dagster", "dev", "-m", "retention_ops.definitions", "-h", host, "-p", str(port),
        # by default a code server that was killed is never started again, and sensors stand still; so the daemon does it in a minute
        "--use-legacy-code-server-behavior",
    ]
    os.execve(sys.executable, command, environment)


def _check_free(host: str, port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise UsageError(f"cannot listen on {host}:{port} ({error.strerror}); choose another --port") from error


def main() -> None:
    """Entry point: runs the command, turns expected errors into one clear message and an exit code."""
    try:
        app()
    except RetentionOpsError as error:
        err.print(f"[red]error[/red] {escape(str(error))}", soft_wrap=True, highlight=False)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)
    except OSError as error:
        where = f" {error.filename}" if error.filename else ""
        err.print(f"[red]error[/red] {escape(f'{error.strerror or error}{where}')}", soft_wrap=True, highlight=False)
        sys.exit(1)
    except Exception as error:
        if type(error).__module__.split(".")[0] not in STORAGE:
            raise
        err.print(f"[red]error[/red] stored data or a database cannot be used: {escape(str(error))}", soft_wrap=True, highlight=False)
        err.print("Running the date it names again builds a damaged partition anew; orders come back by ingesting their files.")
        sys.exit(1)


if __name__ == "__main__":
    main()
