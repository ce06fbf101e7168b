"""The root of the `raynixl` command."""

from __future__ import annotations

import math
from pathlib import Path
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


def _show_version(is_asked: bool) -> None:
    if is_asked:
        typer.echo(raynixl.__version__)
        raise typer.Exit


@app.callback()
def root(
    *,
    is_version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Take what stands before a command."""


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
def plan(  # noqa: PLR0913 - a command's options
    model: Annotated[str, typer.Argument(help="A model of the catalogue, as qwen3-30b-a3b.")],
    *,
    source: Annotated[str, typer.Option(help="Trainers: sizes of replicas, pp, tp, ep, fsdp, flat.")],
    target: Annotated[str, typer.Option(help="Engines: sizes of replicas, pp, tp, ep.")],
    link_gbps: Annotated[float, typer.Option(min=0.001, help="Gbit/s of each GPU's link, each way.")] = 400.0,
    host_gbps: Annotated[float, typer.Option(min=0.0, help="Gbit/s of a host's links together; 0: its GPUs'.")] = 0.0,
    copy_gbps: Annotated[float, typer.Option(min=0.001, help="Gbit/s that a GPU copies inside its host.")] = 2000.0,
    gpus_per_host: Annotated[int, typer.Option(min=1, max=1024, help="GPUs of a host.")] = 8,
    hosts: Annotated[int, typer.Option(min=0, help="Hosts of the engines, instead; 0: as few as hold them.")] = 0,
    chunk: Annotated[str, typer.Option(help="Bytes of a chunk, as 16M.")] = "16M",
    fp8: Annotated[bool, typer.Option("--fp8", help="Weights in FP8 with scales, as DeepSeek-V3 has them.")] = False,
    mtp: Annotated[bool, typer.Option("--mtp", help="With the layers that predict further tokens.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Write a picture of the seconds.")] = None,
    is_json: Json = False,
) -> None:
    """Say what a push of a model costs between two meshes: bytes over each link, seconds, memory; nothing is moved."""
    from raynixl.bench.sizes import parse_size
    from raynixl.cli.plan import GBPS, Question, run_plan
    from raynixl.weights.estimate import Site

    site = Site(link_gbps * GBPS, gpus_per_host, host_gbps * GBPS or math.inf, copy_gbps * GBPS)
    question = Question(model, source, target, site, hosts=hosts, fp8=fp8, mtp=mtp, chunk_nbytes=parse_size(chunk))
    run_plan(question, is_json=is_json, plot=plot)


@app.command()
def agents(
    address: Annotated[str, typer.Option(help="Ray cluster to look at.")] = "auto", is_json: Json = False
) -> None:
    """List who is in the Ray cluster."""
    from raynixl.cli.agents import show_agents

    show_agents(address, is_json=is_json)
