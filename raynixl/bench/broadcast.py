"""The broadcast benchmark: one process's own tensor into every receiver's own buffer, against other ways."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any, Protocol

import numpy as np

from raynixl.bench.layout import digest, fill
from raynixl.bench.names import check_baselines
from raynixl.bench.process import TargetProcess
from raynixl.bench.timing import rounded
from raynixl.errors import BackendUnavailable, IntegrityError

Row = dict[str, Any]
BASELINES = ("ray", "gloo")
SEED = 7
RAY_SECONDS = 120.0


class Way(Protocol):
    """One way to broadcast: ready to run, and to be checked."""

    impl: str

    def run(self) -> float:
        """Broadcast once; return the seconds until the last receiver has its bytes."""

    def clear(self) -> None:
        """Clear every receiver's buffer."""

    def digests(self) -> list[str]:
        """Return the digest of every receiver's buffer."""


def run_broadcast(
    nbytes: int,
    receivers: int,
    baselines: Sequence[str],
    rounds: int,
    verify: bool,
    step: Callable[[], None] = lambda: None,
) -> Iterator[Row]:
    """Yield a row for ours and each baseline: medians of rounds measured in turn, after one that warms up.

    The bytes begin in plain memory of the source's own and end in plain memory of each receiver's own.
    """
    check_baselines(baselines, BASELINES)
    with ExitStack() as stack:
        members = Members(stack, nbytes, receivers)
        ways: list[Way] = [members.way("raynixl")]
        if "gloo" in baselines:
            ways.append(members.way("gloo"))
        if "ray" in baselines:
            ways.append(RayWay(stack, nbytes, receivers))
        seconds = _measure(ways, rounds, step)
        for way, times in zip(ways, seconds, strict=True):
            median = float(np.median(times))
            yield {
                "bench": "broadcast", "impl": way.impl, "nbytes": nbytes, "receivers": receivers,
                "gbps": rounded(nbytes * receivers / median / 1e9), "seconds": rounded(median),
                "verified": _verify(way, nbytes) if verify else False,
            }  # fmt: skip


def _measure(ways: Sequence[Way], rounds: int, step: Callable[[], None]) -> list[list[float]]:
    seconds: list[list[float]] = [[] for _ in ways]
    for number in range(rounds + 1):
        order = range(len(ways)) if number % 2 == 0 else reversed(range(len(ways)))
        for index in order:
            taken = ways[index].run()
            if number:
                seconds[index].append(taken)
        step()
    return seconds


def _verify(way: Way, nbytes: int) -> bool:
    """Clear every receiver's buffer, broadcast once more, and compare the bytes."""
    wanted = np.empty(nbytes, np.uint8)
    fill(wanted, SEED)
    way.clear()
    way.run()
    if set(way.digests()) != {digest(wanted)}:
        raise IntegrityError(f"the broadcast by {way.impl} left other bytes than the source's", hint="report this")
    return True


class Members:
    """The source and the receivers, each in a process of its own; they serve raynixl and gloo alike."""

    def __init__(self, stack: ExitStack, nbytes: int, receivers: int) -> None:
        self._stack = stack
        self._world = [stack.enter_context(TargetProcess("raynixl.bench.member")) for _ in range(receivers + 1)]
        self.all("buffer", nbytes=nbytes)
        self._world[0].ask("fill", seed=SEED)

    def all(self, do: str, **fields: Any) -> list[Row]:
        """Have every member do one thing at the same time."""
        for member in self._world:
            member.tell(do, **fields)
        return [member.hear(do) for member in self._world]

    def receivers(self, do: str, **fields: Any) -> list[Row]:
        """Have every receiver do one thing, one after the other."""
        return [member.ask(do, **fields) for member in self._world[1:]]

    def way(self, impl: str) -> MembersWay:
        """Join the members in a group of one kind."""
        if impl == "gloo":
            store = self._stack.enter_context(tempfile.TemporaryDirectory())
            for rank, member in enumerate(self._world):
                member.tell("join_gloo", rank=rank, world=len(self._world), store=f"{store}/store")
            for member in self._world:
                member.hear("join_gloo")
        else:
            names = [f"rank-{rank}" for rank in range(len(self._world))]
            records = [
                member.ask("agent", name=name)["record"] for member, name in zip(self._world, names, strict=True)
            ]
            self.all("join", members=names, records=records)
        return MembersWay(impl, self)


class MembersWay:
    """A broadcast among the members."""

    def __init__(self, impl: str, members: Members) -> None:
        self.impl = impl
        self._members = members

    def run(self) -> float:
        """Broadcast once, timed from before the first is told to when the last has ended."""
        began = time.monotonic()
        return float(max(reply["at"] for reply in self._members.all(self.impl)) - began)

    def clear(self) -> None:
        """Clear every receiver's buffer."""
        self._members.receivers("fill", seed=0)

    def digests(self) -> list[str]:
        """Return the digest of every receiver's buffer."""
        return [reply["digest"] for reply in self._members.receivers("digest")]


class RayWay:
    """Ray's object store: the source puts an array, each receiver copies it into its own buffer.

    The fastest plain way that Ray has: no serialisation but one copy into shared memory, and one out of it.
    """

    impl = "ray"

    def __init__(self, stack: ExitStack, nbytes: int, receivers: int) -> None:
        try:
            import ray
        except ImportError as exc:
            raise BackendUnavailable("Ray is not installed", hint="pip install 'raynixl[ray]'") from exc
        import logging

        self._ray = ray
        ray.init(
            address="local", num_cpus=receivers + 1, include_dashboard=False, log_to_driver=False,
            logging_level=logging.ERROR, object_store_memory=max(4 * nbytes, 128 << 20),
        )  # fmt: skip
        stack.callback(ray.shutdown)
        holder: Any = ray.remote(num_cpus=1)(_Holder)
        self._source: Any = holder.remote(nbytes, SEED)
        self._receivers: list[Any] = [holder.remote(nbytes, 0) for _ in range(receivers)]
        ray.get([actor.__ray_ready__.remote() for actor in (self._source, *self._receivers)], timeout=RAY_SECONDS)

    def run(self) -> float:
        """Broadcast once, timed from before the put to the end of the last copy."""
        began = time.monotonic()
        made = self._source.give.remote()
        copies = [receiver.take.remote(made) for receiver in self._receivers]
        ends: list[float] = self._ray.get(copies, timeout=RAY_SECONDS)
        return max(ends) - began

    def clear(self) -> None:
        """Clear every receiver's buffer."""
        self._ray.get([receiver.clear.remote() for receiver in self._receivers], timeout=RAY_SECONDS)

    def digests(self) -> list[str]:
        """Return the digest of every receiver's buffer."""
        found: list[str] = self._ray.get([one.digest.remote() for one in self._receivers], timeout=RAY_SECONDS)
        return found


class _Holder:
    """An actor with a buffer of its own."""

    def __init__(self, nbytes: int, seed: int) -> None:
        self._buffer = np.zeros(nbytes, np.uint8)
        if seed:
            fill(self._buffer, seed)

    def give(self) -> Any:
        """Return the buffer, which Ray puts into its store."""
        return self._buffer

    def take(self, array: Any) -> float:
        """Copy an array of the store into the buffer; return when that was done."""
        np.copyto(self._buffer, array)
        return time.monotonic()

    def clear(self) -> None:
        """Clear the buffer."""
        self._buffer[:] = 0

    def digest(self) -> str:
        """Return the digest of the buffer."""
        return digest(self._buffer)
