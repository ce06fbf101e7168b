"""Pictures of benchmark rows: GB/s over block size or receivers, ours beside the baselines."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from raynixl.bench.sizes import format_size
from raynixl.errors import ConfigError

Row = dict[str, Any]
_COLOURS = {"raynixl": "#d1495b", "memcpy": "#30638e", "process_vm": "#edae49"}
_OTHERS = ("#66a182", "#8d6a9f", "#2e4057")


def plot_transfer(rows: Sequence[Row], path: Path) -> None:
    """Write a picture of transfer rows; the file's ending says its format.

    Raises:
        ConfigError: matplotlib is missing or cannot write that format.
    """
    _plot(rows, path, _draw)


def plot_weights(rows: Sequence[Row], path: Path) -> None:
    """Write a picture of weights rows: a bar for each way at each number of receivers."""
    _plot(rows, path, _draw_bars)


def plot_moe(rows: Sequence[Row], path: Path) -> None:
    """Write a picture of moe rows: a bar for each way at each number of tokens, on a logarithmic scale."""
    _plot(rows, path, _draw_moe)


def plot_plan(row: Row, path: Path) -> None:
    """Write a picture of a plan: predicted seconds of each way beside the lower bound."""
    _plot([row], path, _draw_plan)


def plot_simulation(rows: Sequence[Row], path: Path) -> None:
    """Write a picture of simulated expert parallelism: messages of a rank and predicted time over ranks."""
    _plot(rows, path, _draw_simulation)


def _plot(rows: Sequence[Row], path: Path, draw: Callable[[Any, Sequence[Row]], None]) -> None:
    try:
        import matplotlib as mpl
    except ImportError as exc:
        raise ConfigError("--plot needs matplotlib", hint="pip install matplotlib") from exc
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.8), dpi=160, layout="constrained")
    try:
        draw(axes, rows)
        figure.savefig(path)
    except (ValueError, OSError) as exc:
        raise ConfigError(f"the picture cannot be written to {path}: {exc}", hint="use a .png, .svg or .pdf") from exc
    finally:
        plt.close(figure)


def _draw_bars(axes: Any, rows: Sequence[Row]) -> None:
    counts = sorted({row["receivers"] for row in rows})
    impls = list(dict.fromkeys(row["impl"] for row in rows))
    others, width = iter(_OTHERS), 0.8 / len(impls)
    for place, impl in enumerate(impls):
        mine = [row for row in rows if row["impl"] == impl]
        at = [counts.index(row["receivers"]) + (place - (len(impls) - 1) / 2) * width for row in mine]
        colour = _COLOURS.get(impl) or next(others, "#888888")
        bars = axes.bar(at, [row["gbps"] for row in mine], width * 0.92, label=impl, color=colour, zorder=2)
        axes.bar_label(bars, fmt="%.1f", fontsize=8, padding=2)
    axes.set_xticks(range(len(counts)), [str(count) for count in counts])
    axes.set_xlabel("receivers")
    axes.set_ylabel("GB/s, all receivers together")
    axes.set_title(f"weights of {rows[0]['model']} into the receivers' parameters", loc="left", fontsize=12)
    axes.grid(axis="y", color="#e4e4e4", zorder=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)


def _draw_moe(axes: Any, rows: Sequence[Row]) -> None:
    counts = sorted({row["tokens"] for row in rows})
    impls = list(dict.fromkeys(row["impl"] for row in rows))
    others, width = iter(_OTHERS), 0.8 / len(impls)
    for place, impl in enumerate(impls):
        mine = [row for row in rows if row["impl"] == impl]
        at = [counts.index(row["tokens"]) + (place - (len(impls) - 1) / 2) * width for row in mine]
        colour = _COLOURS.get(impl) or next(others, "#888888")
        bars = axes.bar(at, [row["both_ms"] for row in mine], width * 0.92, label=impl, color=colour, zorder=2)
        axes.bar(at, [row["dispatch_ms"] for row in mine], width * 0.92, color="#00000033", zorder=3)
        axes.bar_label(bars, fmt="%.3g", fontsize=8, padding=2)
    for place, count in enumerate(counts):
        floor = next(row["floor_ms"] for row in rows if row["tokens"] == count)
        axes.plot([place - 0.42, place + 0.42], [floor, floor], color="#2e4057", linestyle="--", zorder=4,
                  label="" if place else "the bare copy")  # fmt: skip
    axes.set_yscale("log")
    axes.set_xticks(range(len(counts)), [f"{count:,}" for count in counts])
    axes.set_xlabel("tokens of each rank")
    axes.set_ylabel("ms, dispatch and combine (dark: dispatch alone)")
    first = rows[0]
    title = f"{first['ranks']} ranks, top-{first['topk']} of {first['experts']}, {first['hidden']} x {first['dtype']}"
    axes.set_title(title, loc="left", fontsize=12)
    axes.grid(axis="y", color="#e4e4e4", zorder=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)


def _draw_plan(axes: Any, rows: Sequence[Row]) -> None:
    (row,) = rows
    bound, *ways = row["predicted"]
    names, seconds = [way["way"] for way in ways], [way["seconds"] for way in ways]
    colours = [_COLOURS["raynixl"] if name == "swarm" else _COLOURS["memcpy"] for name in names]
    bars = axes.barh(names, seconds, 0.62, color=colours, zorder=2)
    axes.bar_label(bars, [f"{value:,.3g} s" for value in seconds], fontsize=9, padding=4)
    axes.axvline(bound["seconds"], color="#2e4057", linestyle="--", linewidth=1.4, zorder=3)
    axes.annotate(f"no way is below {bound['seconds']:,.3g} s", (bound["seconds"], 1.0), (4, -10),
                  xycoords=("data", "axes fraction"), textcoords="offset points", fontsize=9)  # fmt: skip
    if max(seconds) > 20 * min(seconds):
        axes.set_xscale("log")
    axes.margins(x=0.15)
    axes.invert_yaxis()
    axes.set_xlabel("seconds, predicted")
    title = f"{row['model']}: {row['sources']} trainers ({row['source']}) to {row['targets']} ranks ({row['target']})"
    axes.set_title(title, loc="left", fontsize=12)
    axes.grid(axis="x", color="#e4e4e4", zorder=0)
    axes.spines[["top", "right"]].set_visible(False)


def _draw_simulation(axes: Any, rows: Sequence[Row]) -> None:
    figure, first = axes.figure, rows[0]
    axes.remove()
    ranks = sorted({row["ranks"] for row in rows})
    colours = {
        "flat": _COLOURS["memcpy"],
        "two-level": _COLOURS["raynixl"],
        "two-level, square": _COLOURS["process_vm"],
    }
    for place, name, label in ((1, "messages", "messages of the busiest rank"), (2, "both_ms", "ms, predicted")):
        part = figure.add_subplot(1, 2, place)
        for impl in dict.fromkeys(row["impl"] for row in rows):
            mine = sorted((row["ranks"], row[name]) for row in rows if row["impl"] == impl)
            part.plot(*zip(*mine, strict=True), label=impl, color=colours[impl], marker="o", linewidth=2.2)
        part.set_xscale("log", base=2)
        part.set_yscale("log")
        part.set_xticks(ranks, [str(count) for count in ranks], minor=False)
        part.margins(x=0.1)
        part.set_xlabel("ranks")
        part.set_title(label, loc="left", fontsize=10)
        part.grid(axis="y", color="#e4e4e4", zorder=0)
        part.spines[["top", "right"]].set_visible(False)
        part.legend(frameon=False)
    step = f"{first['tokens']} tokens of {first['hidden']} a rank, top {first['topk']} of {first['experts']} experts"
    figure.suptitle(f"dispatch and combine, simulated: {step}", x=0.01, ha="left", fontsize=12)


def _draw(axes: Any, rows: Sequence[Row]) -> None:
    sizes = sorted({row["block_nbytes"] for row in rows})
    rows = [row for row in rows if not row["busy"]]
    others = iter(_OTHERS)
    for impl in dict.fromkeys(row["impl"] for row in rows):
        mine = sorted((row["block_nbytes"], row["gbps"]) for row in rows if row["impl"] == impl)
        is_ours = impl == "raynixl"
        colour = _COLOURS.get(impl) or next(others, "#888888")
        axes.plot(
            *zip(*mine, strict=True), label=impl, color=colour, marker="o", markersize=6 if is_ours else 4.5,
            linewidth=2.6 if is_ours else 1.6, linestyle="-" if is_ours else "--", zorder=3 if is_ours else 2,
        )  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, [format_size(size) for size in sizes], minor=False)
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.set_xlabel("block size")
    axes.set_ylabel("GB/s, post to done")
    first = rows[0]
    count = f"{first['blocks']:,} {first['pattern']} blocks" if first["blocks"] > 1 else "one block"
    axes.set_title(f"{first['backend']} {first['op']}, {first['memory']} memory, {count}", loc="left", fontsize=12)
    axes.grid(axis="y", color="#e4e4e4", zorder=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
