"""`raynixl bench`: the benchmarks as commands."""

from __future__ import annotations

import enum
import itertools
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from raynixl.backends import table
from raynixl.bench.sizes import format_size, parse_counts, parse_gpus, parse_size, parse_sizes
from raynixl.cli.screen import FriendlyGroup, progress, report, say
from raynixl.config import default_copy_threads, parse_options
from raynixl.errors import ConfigError

if TYPE_CHECKING:
    from raynixl.bench.moe_simulate import SimulateSpec

bench_app = typer.Typer(
    cls=FriendlyGroup, no_args_is_help=True, help="Measure on this machine, against baselines in the same run."
)


class Op(enum.StrEnum):
    """Directions of a transfer."""

    READ = "read"
    WRITE = "write"


class Kind(enum.StrEnum):
    """Kinds of memory at both ends."""

    ARENA = "arena"
    USER = "user"
    HUGE = "huge"
    VRAM = "vram"


class Pattern(enum.StrEnum):
    """How blocks lie in memory."""

    SEQUENTIAL = "sequential"
    RANDOM = "random"


Json = Annotated[bool, typer.Option("--json", help="One JSON object a line instead of a table.")]
Verify = Annotated[bool, typer.Option("--verify/--no-verify", help="Check the bytes, outside the timed region.")]
Rounds = Annotated[int, typer.Option(min=1, max=1000, help="Rounds; in each, everything is measured in turn.")]
Ucx = Annotated[list[str] | None, typer.Option(metavar="NAME=VALUE", help="Option of UCX, as TLS=cma,tcp; repeatable.")]


def _check_backend(name: str) -> None:
    if name not in table.names():
        raise ConfigError(f"there is no backend {name!r} here", hint=f"there are: {', '.join(table.names())}")


@bench_app.command()
def transfer(  # noqa: PLR0913 - a command's options
    *,
    backend: Annotated[str, typer.Option(help="Backend that carries the bytes.")] = "shm",
    op: Annotated[Op, typer.Option(help="Direction, seen from the measuring process.")] = Op.WRITE,
    memory: Annotated[
        Kind, typer.Option(help="arena: agent.empty(); user: registered; huge: in huge pages; vram: on a GPU.")
    ] = Kind.ARENA,
    target_memory: Annotated[Kind | None, typer.Option(help="The target's, where it is another than ours.")] = None,
    gpus: Annotated[str, typer.Option(help="GPU of vram: one number, or ours and the target's, as 0,1.")] = "0",
    sizes: Annotated[str, typer.Option(help="Block sizes, as 4K,1M.")] = "4K,64K,1M,16M,64M",
    blocks: Annotated[int, typer.Option(min=1, help="Blocks of each transfer.")] = 1,
    pattern: Annotated[Pattern, typer.Option(help="How the blocks lie at both ends.")] = Pattern.SEQUENTIAL,
    threads: Annotated[int, typer.Option(min=0, max=256, help="Threads for all; 0: the default.")] = 0,
    rounds: Rounds = 7,
    baseline: Annotated[
        list[str] | None,
        typer.Option(
            help="memcpy, process_vm, ucx_perftest, nixl, socket, or for vram cudamemcpy, cudamemcpy_loop, "
            "cudamemcpy_loop_c; repeatable."
        ),
    ] = None,
    ucx: Ucx = None,
    busy: Annotated[
        bool, typer.Option("--busy", help="Measure also beside a busy Python thread in the initiator.")
    ] = False,
    launch: Annotated[
        str, typer.Option(metavar="COMMAND", help="Start the target elsewhere, as 'ip netns exec far' or 'ssh host'.")
    ] = "",
    verify: Verify = True,
    plot: Annotated[Path | None, typer.Option(help="Write a picture of GB/s over block size.")] = None,
    is_json: Json = False,
) -> None:
    """Reads or writes between two processes: GB/s, and microseconds from post to done."""
    from raynixl.bench.spec import TransferSpec
    from raynixl.bench.transfer import run_transfer

    _check_backend(backend)
    spec = TransferSpec(
        sizes=tuple(parse_sizes(sizes)), backend=backend, op=op.value, memory=memory.value, blocks=blocks,
        is_random=pattern is Pattern.RANDOM, threads=threads or default_copy_threads(), rounds=rounds,
        baselines=tuple(dict.fromkeys(baseline or ())), is_verified=verify, is_busy=busy,
        ucx=parse_options(ucx or ()), launch=tuple(shlex.split(launch)),
        target_memory=target_memory.value if target_memory else "", gpus=parse_gpus(gpus),
    )  # fmt: skip
    title = f"{op} over {backend}, {spec.memory_name} memory, {pattern} blocks, at most {spec.threads} threads"
    with progress("transfer", rounds * len(spec.sizes)) as step:
        rows = report(run_transfer(spec, step), title, is_json=is_json, is_verified=verify)
    if plot is not None:
        from raynixl.bench.plot import plot_transfer

        plot_transfer(rows, plot)


@bench_app.command()
def broadcast(
    nbytes: Annotated[str, typer.Option(help="Bytes that each receiver gets, as 256M.")] = "256M",
    receivers: Annotated[int, typer.Option(min=1, max=64, help="Receiving processes.")] = 4,
    rounds: Rounds = 5,
    baseline: Annotated[list[str] | None, typer.Option(help="ray or gloo; repeatable.")] = None,
    verify: Verify = True,
    is_json: Json = False,
) -> None:
    """One source into every receiver's own buffer: GB/s of all receivers together."""
    from raynixl.bench.broadcast import run_broadcast

    size, names = parse_size(nbytes), tuple(dict.fromkeys(baseline or ()))
    title = f"broadcast of {format_size(size)} to {receivers}"
    with progress("broadcast", rounds + 1) as step:
        report(run_broadcast(size, receivers, names, rounds, verify, step), title, is_json=is_json, is_verified=verify)


@bench_app.command()
def weights(  # noqa: PLR0913 - a command's options
    *,
    model: Annotated[str, typer.Option(help="Whose parameters, as qwen2.5-0.5b.")] = "qwen2.5-0.5b",
    receivers: Annotated[str, typer.Option(help="Receiving processes; several counts as 1,2,4.")] = "1",
    rounds: Rounds = 5,
    baseline: Annotated[list[str] | None, typer.Option(help="ray, gloo, rdt or transfer; repeatable.")] = None,
    install: Annotated[str, typer.Option(help="How a receiver takes a version: auto, swap or copy.")] = "auto",
    in_place: Annotated[
        bool, typer.Option("--in-place", help="Read the trainer's own memory, which it may not change meanwhile.")
    ] = False,
    memory: Annotated[
        str, typer.Option(help="Where the parameters are, at both ends: dram, or vram (GPU 0).")
    ] = "dram",
    topology: Annotated[str, typer.Option(help="auto, direct, or relay: receivers feed each other.")] = "auto",
    verify: Verify = True,
    plot: Annotated[Path | None, typer.Option(help="Write a picture of GB/s over receivers.")] = None,
    is_json: Json = False,
) -> None:
    """One trainer's weights into every receiver's own parameters: GB/s of all receivers together."""
    from raynixl.bench.weights import WeightsSpec, run_weights

    names = tuple(dict.fromkeys(baseline or ()))
    counts = parse_counts(receivers)
    specs = [WeightsSpec(model, count, rounds, names, install, in_place, topology, verify, memory) for count in counts]
    with progress("weights", (rounds + 1) * len(specs)) as step:
        every = itertools.chain.from_iterable(run_weights(spec, step, skipped=say) for spec in specs)
        rows = report(every, f"weights of {model}", is_json=is_json, is_verified=verify)
    if plot is not None:
        from raynixl.bench.plot import plot_weights

        plot_weights(rows, plot)


@bench_app.command()
def moe(  # noqa: PLR0913 - a command's options
    *,
    ranks: Annotated[int, typer.Option(min=1, max=64, help="Processes that hold the experts and the tokens.")] = 4,
    tokens: Annotated[str, typer.Option(help="Tokens of each rank; several numbers as 128,1024.")] = "128",
    hidden: Annotated[int, typer.Option(min=1, max=1 << 20, help="Numbers in a row.")] = 7168,
    topk: Annotated[int, typer.Option(min=1, max=256, help="Experts of each token.")] = 8,
    experts: Annotated[int, typer.Option(min=1, max=4096, help="Experts of all ranks together.")] = 256,
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32.")] = "bfloat16",
    layout: Annotated[str, typer.Option(help="How rows lie after a dispatch: tokens, experts or slots.")] = "tokens",
    memory: Annotated[str, typer.Option(help="dram, or vram: all ranks on the first GPU.")] = "dram",
    rounds: Rounds = 7,
    baseline: Annotated[
        list[str] | None, typer.Option(help="gloo, gloo-index-add, mpi, mpi-split or mpi-index-add; repeatable.")
    ] = None,
    simulate: Annotated[
        str, typer.Option(metavar="RANKS", help="Simulate so many ranks instead, flat and in two stages; as 64,1024.")
    ] = "",
    hosts: Annotated[int, typer.Option(min=1, max=4096, help="Simulated: hosts of the most ranks.")] = 1,
    skew: Annotated[float, typer.Option(min=0, max=4, help="Simulated: 0, all experts alike, to 1, Zipf's law.")] = 0,
    link_gbps: Annotated[
        float, typer.Option(min=0, help="Simulated: each rank's share of the network, Gb/s; 0: 10 GB/s a host.")
    ] = 0,
    verify: Verify = True,
    plot: Annotated[Path | None, typer.Option(help="Write a picture of milliseconds by tokens.")] = None,
    is_json: Json = False,
) -> None:
    """Tokens to their experts and back: milliseconds of dispatch, combine and both, beside the bare copy's."""
    if simulate:
        from raynixl.bench.moe_simulate import SimulateSpec

        like = SimulateSpec(hidden=hidden, topk=topk, experts=experts, hosts=hosts, skew=skew, link_gbps=link_gbps)
        _simulate_moe(like, parse_counts(simulate, most=4096), parse_counts(tokens, most=1 << 20), plot, is_json)
        return
    from raynixl.bench.moe import MoeSpec, run_moe

    spec = MoeSpec(
        tokens=tuple(parse_counts(tokens, most=1 << 20)), ranks=ranks, hidden=hidden, topk=topk, experts=experts,
        dtype=dtype, layout=layout, memory=memory, rounds=rounds, baselines=tuple(dict.fromkeys(baseline or ())),
        is_verified=verify,
    )  # fmt: skip
    with progress("moe", rounds * len(spec.tokens)) as step:
        title = f"top-{topk} of {experts} experts on {ranks} ranks, rows of {hidden} {dtype}"
        rows = report(run_moe(spec, step), title, is_json=is_json, is_verified=verify)
    if plot is not None:
        from raynixl.bench.plot import plot_moe

        plot_moe(rows, plot)


def _simulate_moe(like: SimulateSpec, ranks: list[int], tokens: list[int], plot: Path | None, is_json: bool) -> None:
    """Simulate each number of ranks with each number of tokens; what all rows have alike is the table's title."""
    from raynixl.bench.moe_simulate import COMMON, run_simulation, sweep

    specs = sweep(like, ranks, tokens)
    title = f"simulated: top-{like.topk} of {like.experts} experts, skew {like.skew:g}, rows of {like.hidden} bfloat16"
    with progress("moe", 3 * len(specs)) as step:
        rows = list(itertools.chain.from_iterable(run_simulation(spec, step) for spec in specs))
    shown = rows if is_json else [{name: row[name] for name in row if name not in COMMON} for row in rows]
    report(shown, title, is_json=is_json)
    if plot is not None:
        from raynixl.bench.plot import plot_simulation

        plot_simulation(rows, plot)


@bench_app.command()
def notify(
    trips: Annotated[int, typer.Option(min=10, max=1_000_000, help="Round trips measured.")] = 2000,
    nbytes: Annotated[int, typer.Option(min=8, max=1 << 20, help="Bytes of a notification.")] = 8,
    pause_ms: Annotated[float, typer.Option(min=0.01, max=1000, help="Pause before each, in the second row.")] = 2.0,
    baseline: Annotated[list[str] | None, typer.Option(help="socket: a bare Unix socket.")] = None,
    is_json: Json = False,
) -> None:
    """Round trip of a notification between two idle processes: in a conversation, and after a pause."""
    from raynixl.bench.notify import NotifySpec, run_notify

    spec = NotifySpec(trips, nbytes, pause_ms, tuple(dict.fromkeys(baseline or ())))
    with progress("notify", 22) as step:
        report(run_notify(spec, step), "round trip of a notification", is_json=is_json)


@bench_app.command()
def agent(
    peers: Annotated[int, typer.Option(min=1, max=200, help="New peers to meet.")] = 10,
    idle_seconds: Annotated[float, typer.Option(min=0.1, max=300, help="How long to watch idle agents.")] = 5.0,
    records: Annotated[int, typer.Option(min=0, max=10_000, help="Records in a GCS to find a peer among.")] = 1000,
    is_json: Json = False,
) -> None:
    """What an agent costs: to make, to use for the first time, to keep idle, and to find among many."""
    from raynixl.bench.footprint import run_agent

    with progress("agent", 4) as step:
        rows = run_agent(peers, idle_seconds, records, step)
    report(rows, "an agent's cost", is_json=is_json)


@bench_app.command()
def peers(
    count: Annotated[int, typer.Option("--peers", min=1, max=1000, help="Peers to connect to one process.")] = 64,
    processes: Annotated[int, typer.Option(min=1, max=64, help="Processes that the peers are spread over.")] = 4,
    backend: Annotated[str, typer.Option(help="Backend that carries the bytes.")] = "shm",
    ucx: Ucx = None,
    is_json: Json = False,
) -> None:
    """What many peers cost one process: time to connect and read from each, memory, descriptors, threads."""
    from raynixl.bench.peers import PeersSpec, run_peers

    _check_backend(backend)
    spec = PeersSpec(count, processes, backend, parse_options(ucx or ()))
    with progress("peers", count) as step:
        report(run_peers(spec, step), f"{count} peers of one process over {backend}", is_json=is_json)
