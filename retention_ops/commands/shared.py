"""What every command shares: the home it works on, how values become text or JSON, and what to type next."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, is_dataclass
from datetime import date, datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from sqlalchemy.engine import Engine

from retention_ops.errors import NoOrders, UsageError
from retention_ops.execute.redact import clean
from retention_ops.installation import has_database
from retention_ops.settings import Settings, load_settings

out = Console()
err = Console(stderr=True)
_home: Path | None = None


Json = Annotated[bool, typer.Option("--json", help="Print data as JSON, for scripts.")]
By = Annotated[str, typer.Option("--by", parser=clean, metavar="NAME", help="Who decides this; recorded.")]
Why = Annotated[str, typer.Option("--why", parser=clean, metavar="TEXT", help="The reason; recorded.")]
SEVERITY_STYLE = {"CRITICAL": "bold red", "WARNING": "bold yellow", "INFO": "green"}
STATE_STYLE = {
    "sent": "green", "planned": "cyan", "sending": "cyan", "unknown": "yellow", "awaiting_approval": "yellow", "needs_human": "red",
    "failed": "red", "cancelled": "dim", "open": "red", "resolved": "green", "retracted": "dim", "closed": "green",
}
MARKS = {True: "[green]✓[/green]", False: "[red]✗[/red]", None: "[yellow]?[/yellow]"}


def group(name: str, help_: str) -> typer.Typer:
    """An empty group of commands that behaves like the whole."""
    return typer.Typer(name=name, no_args_is_help=True, rich_markup_mode="rich", pretty_exceptions_enable=False, help=help_)


def examples(*commands: str) -> str:
    """The end of a command's --help."""
    return "Examples:\n\n" + "\n\n".join(f"  retention-ops {command}" for command in commands)


def day(text: str) -> date:
    try:
        if len(text) != 10:
            raise ValueError
        return date.fromisoformat(text)
    except ValueError as error:
        raise typer.BadParameter(f"{text!r} is not a date like 2011-09-30") from error


def date_option(flag: str, help_: str) -> Any:
    return typer.Option(flag, parser=day, metavar="YYYY-MM-DD", help=help_)


# -- the home ----------------------------------------------------------------------------------------------------------


def use_home(home: Path | None) -> None:
    """Every command after this works on `home`; None: as environment and .env have it."""
    global _home
    _home = home


def settings() -> Settings:
    """The settings in force for this command, read anew each time."""
    found = load_settings(**({"home": _home} if _home else {}))
    if found.home.exists() and not found.home.is_dir():
        raise UsageError(f"home {found.home} is not a folder; choose another with --home")
    return found


@contextmanager
def database(found: Settings) -> Iterator[Engine]:
    """The ops database of a home that has one. Raises NoOrders where nothing ever ran: a mistyped --home is not "nothing waits"."""
    from retention_ops.log.database import ops_database

    if not has_database(found):
        raise NoOrders(f"nothing was answered in {found.home} yet; see `retention-ops status`, or name another home with --home")
    with ops_database(found) as engine:
        yield engine


def lake(found: Settings, *, writes: bool = True) -> Any:
    """The warehouse in force; a preview `writes` nothing into it."""
    from retention_ops.warehouse.choice import open_warehouse

    return open_warehouse(found, writes=writes)


def command(found: Settings, words: str) -> str:
    """A command as this user would type it, home included."""
    where = f" --home {shlex.quote(str(found.home))}" if found.home != load_settings().home else ""
    return f"{_program()}{where} {words}"


def _program() -> str:
    """`retention-ops` where the shell finds it, else the path it was started by (after `make demo` it is not on PATH)."""
    started = Path(sys.argv[0])
    if shutil.which("retention-ops") or started.name != "retention-ops":
        return "retention-ops"
    return shlex.quote(os.path.relpath(started) if started.is_relative_to(Path.cwd()) else str(started))


# -- printing ----------------------------------------------------------------------------------------------------------


def plain(value: Any) -> Any:
    """A value as JSON has it."""
    if is_dataclass(value) and not isinstance(value, type):
        return plain(asdict(value))
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set)):
        return [plain(item) for item in value]
    from retention_ops.package.pack import plain as plain_value

    value = plain_value(value)
    return value.as_posix() if isinstance(value, Path) else value


def print_json(value: Any) -> None:
    sys.stdout.write(json.dumps(plain(value), indent=2, ensure_ascii=False) + "\n")


def say(text: str) -> None:
    """A line that wraps where the terminal wraps, so that paths can be copied; markup in `text` is interpreted."""
    out.print(text, soft_wrap=True, highlight=False)


def say_next(*commands: str) -> None:
    say("[bold]Next:[/bold]")
    for text in commands:
        say(f"  {escape(text)}")


def facts_table(rows: Iterator[tuple[str, str]]) -> None:
    """Names and texts in two columns; the texts are markup."""
    table = Table(box=box.SIMPLE, show_header=False, pad_edge=False)
    for name, text in rows:
        table.add_row(name, text)
    out.print(table)


def count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def dates(days: list[date]) -> str:
    """How many dates, and from when to when."""
    return str(days[0]) if len(days) == 1 else f"{len(days):,} dates between {min(days)} and {max(days)}"


def moment(at: datetime | None) -> str:
    return f"{at:%Y-%m-%d %H:%M} UTC" if at else ""


def severity(name: str) -> str:
    return f"[{SEVERITY_STYLE[name]}]{name}[/]"


def state(name: str) -> str:
    style = STATE_STYLE.get(name)
    shown = name.replace("_", " ")
    return f"[{style}]{shown}[/]" if style else shown


@contextmanager
def nothing() -> Iterator[None]:
    yield None


@contextmanager
def progress(quiet: bool = False) -> Iterator[Callable[[str, int, int], None]]:
    """A bar per step on stderr."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=err, transient=True, disable=quiet) as bars:
        tasks: dict[str, Any] = {}

        def step(name: str, done: int, total: int) -> None:
            if name not in tasks:
                tasks[name] = bars.add_task(name, total=total)
            bars.update(tasks[name], completed=done)

        yield step
