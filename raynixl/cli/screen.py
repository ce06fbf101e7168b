"""The screen: rows as JSON lines or as a table, progress on standard error, errors in a line or two."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from typer.core import TyperGroup

from raynixl.bench.sizes import format_size
from raynixl.errors import RaynixlError

Row = dict[str, Any]


class FriendlyGroup(TyperGroup):
    """Commands whose RaynixlErrors are told to people: message and hint, exit code 1, no traceback."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except RaynixlError as exc:
            say(f"[bold red]error:[/] {_escape(exc.message)}")
            if exc.hint:
                say(f"[bold]hint:[/] {_escape(exc.hint)}")
            raise typer.Exit(1) from exc
        except KeyboardInterrupt:
            say("interrupted")
            raise


def say(text: str) -> None:
    """Print to standard error, unwrapped."""
    Console(stderr=True, soft_wrap=True, highlight=False).print(text)


def _escape(text: str) -> str:
    return text.replace("[", r"\[")


def emit(row: Row) -> None:
    """Print one JSON object on a line of standard output."""
    typer.echo(json.dumps(row, allow_nan=False))


def show(table: Table) -> None:
    """Print a table; as wide as it must be where standard output is not a terminal."""
    console = Console()
    if not sys.stdout.isatty():
        console = Console(width=200)
    console.print(table)


_IN_TITLE = ("bench", "backend", "op", "memory", "pattern")


def show_rows(rows: Sequence[Row], title: str) -> None:
    """Print rows of one kind as a table; ours stand out."""
    table = Table(title=title, title_justify="left", header_style="bold")
    columns = [name for name in rows[0] if name not in _IN_TITLE] if rows else []
    for name in columns:
        is_text = isinstance(rows[0][name], str)
        heading = name.replace("_nbytes", "").replace("gbps", "GB/s").replace("_", " ")
        table.add_column(heading, justify="left" if is_text else "right")
    for row in rows:
        style = "bold green" if row.get("impl") == "raynixl" else ""
        table.add_row(*(_cell(name, row[name]) for name in columns), style=style)
    show(table)


def _cell(name: str, value: Any) -> str:
    if name.endswith("nbytes"):
        return format_size(value)
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:,.4g}" if abs(value) < 10_000 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


@contextmanager
def progress(title: str, total: int) -> Iterator[Callable[[], None]]:
    """Show a bar on standard error if a person looks at it; yields what to call after each step."""
    if not sys.stderr.isatty():
        yield lambda: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, total=total)
        yield lambda: bar.advance(task)


def report(rows: Iterable[Row], title: str, *, is_json: bool, is_verified: bool = True) -> list[Row]:
    """Print rows as they come (JSON) or at the end (table); return them.

    Raises:
        Exit: with code 1, if bytes were checked and some row's were wrong.
    """
    kept = []
    for row in rows:
        kept.append(row)
        if is_json:
            emit(row)
    if not is_json:
        show_rows(kept, title)
    if is_verified and any(row.get("verified") is False for row in kept):
        say("[bold red]error:[/] some bytes were not what they should be")
        raise typer.Exit(1)
    return kept
