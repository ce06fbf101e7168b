"""`raynixl plan`: what a push of a public model would cost between two meshes, worked out and simulated here."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import typer
from rich.table import Table

from raynixl.cli.screen import emit, progress, show
from raynixl.weights import prediction
from raynixl.weights.catalogue import parameters
from raynixl.weights.estimate import Site, coordinator_seconds, loads, memory, over_send, scenarios
from raynixl.weights.meshes import ranks_of_replica, source_shards, target_shards
from raynixl.weights.plan import Plan, plan
from raynixl.weights.scenario import GBPS, Scenario
from raynixl.weights.simulator import simulate

__all__ = ["GBPS", "Question", "run_plan"]
Row = dict[str, Any]
_WAYS: dict[str, Callable[[Scenario], float]] = {
    "lower bound": prediction.lower_bound,
    "direct": lambda scenario: prediction.direct(scenario).seconds,
    "chain": lambda scenario: prediction.chain(scenario).seconds,
    "tree": lambda scenario: prediction.tree(scenario).seconds,
}


@dataclass(frozen=True, slots=True)
class Question:
    """Which model, from which mesh to which, on which machines."""

    model: str
    source: str
    target: str
    site: Site
    hosts: int = 0
    fp8: bool = False
    mtp: bool = False
    chunk_nbytes: int = 16 << 20


def run_plan(question: Question, *, is_json: bool, plot: Path | None = None) -> Row:
    """Plan, predict, print, and return what was printed.

    Raises:
        ConfigError: no such model or mesh, or the picture cannot be written.
    """
    found = parameters(question.model, fp8=question.fp8, mtp=question.mtp)
    sources, targets = source_shards(found, question.source), target_shards(found, question.target)
    if question.hosts:
        question = replace(question, site=replace(question.site, per_host=-(-len(targets) // question.hosts)))
    begun = time.perf_counter()
    decided = plan(sources, targets)
    planned = time.perf_counter() - begun
    row = _figures(question, decided) | {"planning_seconds": planned, "predicted": _predict(question, decided)}
    if is_json:
        emit(row)
    else:
        _show(row)
    if plot is not None:
        from raynixl.bench.plot import plot_plan

        plot_plan(row, plot)
    return row


def _figures(question: Question, decided: Plan) -> Row:
    return {
        "model": question.model,
        "tensors": len(decided.sources[0].tensors),
        "source": question.source,
        "sources": len(decided.sources),
        "parts": len(decided.parts),
        "target": question.target,
        "targets": len(decided.targets),
        "replicas": len(decided.targets) // ranks_of_replica(question.target),
        "images": len(decided.nbytes),
        "image_nbytes": max(decided.nbytes),
        "over_send_nbytes": over_send(decided),
        "coordinator_seconds": coordinator_seconds(decided, question.chunk_nbytes),
        "memory": {"source": asdict(memory(decided.sources)), "target": asdict(memory(decided.targets))},
        "links": [asdict(load) for load in loads(decided, question.site)],
    }


def _predict(question: Question, decided: Plan) -> list[Row]:
    """Return seconds for each way; the slowest of the images that are alike counts."""
    found = scenarios(decided, question.site, chunk_nbytes=question.chunk_nbytes)
    seconds = {name: max(map(formula, found)) for name, formula in _WAYS.items()}
    release = 0.0
    with progress("simulating the swarm", len(found)) as step:
        for scenario in found:
            played = simulate(scenario)
            seconds["swarm"] = max(seconds.get("swarm", 0.0), played.seconds)
            release = max(release, played.release_seconds)
            step()
    bound = seconds["lower bound"]
    rows: list[Row] = [{"way": name, "seconds": took, "of_bound": took / bound} for name, took in seconds.items()]
    rows[-1]["release_seconds"] = release
    rows[-1]["chunk_nbytes"] = max(scenario.chunk_nbytes for scenario in found)
    return rows


def _show(row: Row) -> None:
    typer.echo(
        f"{row['model']}, {row['tensors']:,} tensors: from {row['sources']:,} sources ({row['source']}) "
        f"to {row['targets']:,} targets ({row['target']})"
    )
    show(_links(row))
    show(_ways(row))
    for note in _notes(row):
        typer.echo(note)


def _links(row: Row) -> Table:
    table = Table(header_style="bold")
    table.add_column("bytes over")
    for name in ("links", "the busiest", "all together"):
        table.add_column(name, justify="right")
    for load in row["links"]:
        table.add_row(load["link"], f"{load['links']:,}", _size(load["busiest_nbytes"]), _size(load["total_nbytes"]))
    return table


def _ways(row: Row) -> Table:
    table = Table(header_style="bold")
    table.add_column("way")
    for name in ("seconds", "of the bound", "sources free after"):
        table.add_column(name, justify="right")
    for way in row["predicted"]:
        released = f"{way['release_seconds']:,.3g}" if "release_seconds" in way else ""
        style = "bold green" if way["way"] == "swarm" else ""
        table.add_row(way["way"], f"{way['seconds']:,.3g}", f"{way['of_bound']:.2f}", released, style=style)
    return table


def _notes(row: Row) -> Iterator[str]:
    yield f"planned in {row['planning_seconds']:.2f} s; over-send {row['over_send_nbytes']} bytes"
    yield f"{row['images']} distinct images, the largest of {_size(row['image_nbytes'])}"
    for side, own in row["memory"].items():
        yield f"peak memory of a {side} rank: {_size(own['peak'])}, twice its weights"
    yield f"assigning all chunks takes the coordinator {row['coordinator_seconds']:.2g} s of CPU, not in these seconds"


def _size(nbytes: int) -> str:
    """Say a size as models' and links' are said: in units of 1000."""
    for unit, factor in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if nbytes >= factor:
            return f"{nbytes / factor:,.3g} {unit}"
    return f"{nbytes:,} B"
