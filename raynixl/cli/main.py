"""The root of the `raynixl` command."""

from __future__ import annotations

from typing import Annotated

import typer

import raynixl
from raynixl.cli.bench import bench_app
from raynixl.cli.screen import FriendlyGroup

app = typer.Typer(
    cls=FriendlyGroup,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
    help="The transfer layer that Ray lacks: what works here, who is there, how fast it is.",
)
app.add_typer(bench_app, name="bench")
Json = Annotated[bool, typer.Option("--json", help="JSON instead of a table.")]


@app.command()
def version() -> None:
    """Print the version."""
    typer.echo(raynixl.__version__)


@app.command()
def doctor(is_json: Json = False) -> None:
    """Say what works on this machine and what does not, by trying it; exit code 1 if no backend works."""
    from raynixl.cli.doctor import run_doctor

    if not run_doctor(is_json=is_json):
        raise typer.Exit(1)


@app.command()
def agents(
    address: Annotated[str, typer.Option(help="Ray cluster to look at.")] = "auto", is_json: Json = False
) -> None:
    """List who is in the Ray cluster."""
    from raynixl.cli.agents import show_agents

    show_agents(address, is_json=is_json)
