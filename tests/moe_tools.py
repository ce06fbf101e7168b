"""Crews of ranks for the tests of expert parallelism: in threads of this process, or in processes of their own."""

from __future__ import annotations

import contextlib
import itertools
import pickle
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

from agent_tools import eventually, make_agent
from weights_nursery import Brood, Nursery

from raynixl import Group, InMemoryDirectory
from raynixl.host import process_state
from raynixl.moe import ExpertParallel

SECONDS = 60.0
DEADLINE = 20.0
CHILD = Path(__file__).parent / "moe" / "child.py"

_numbers = itertools.count()


class Threads:
    """Ranks of one process: an agent and a thread each. The agents are used for one `ExpertParallel` after another."""

    def __init__(self, world: int, *, backends: tuple[str, ...] = ("loopback",), **settings: Any) -> None:
        directory = InMemoryDirectory()
        self.world = world
        self.names = [f"rank{rank}" for rank in range(world)]
        self.agents = [make_agent(name, directory=directory, backends=backends, **settings) for name in self.names]
        self._pool = ThreadPoolExecutor(world, thread_name_prefix="crew")

    def __enter__(self) -> Threads:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()
        for agent in self.agents:
            agent.close()

    @contextlib.contextmanager
    def experts(self, world: int | None = None, **options: Any) -> Iterator[Layer]:
        """An `ExpertParallel` on each of the first `world` ranks, closed afterwards."""
        layer = Layer(self, self.world if world is None else world, options)
        try:
            yield layer
        finally:
            layer.close()

    def run(self, works: Sequence[Callable[[], Any]], timeout: float = SECONDS) -> list[Any]:
        """Run one function on each rank at the same time; return what each returns, or raise the first error."""
        futures = [self._pool.submit(work) for work in works]
        done, late = wait(futures, timeout)
        for rank, future in enumerate(futures):
            if future in done and (error := future.exception()) is not None:
                error.add_note(f"on rank {rank} of {len(futures)}")
                raise error
        assert not late, f"ranks {[rank for rank, future in enumerate(futures) if future in late]} do not return"
        return [future.result() for future in futures]


class Layer:
    """One `ExpertParallel` on each rank of a crew of threads."""

    def __init__(self, crew: Threads, world: int, options: dict[str, Any]) -> None:
        self.crew, self.world = crew, world
        name = f"layer{next(_numbers)}"
        names = crew.names[:world]
        self.groups = [Group(agent, names, name=name, timeout=DEADLINE) for agent in crew.agents[:world]]
        settings = {"name": name, "deadline": DEADLINE, **options}
        kind = settings.pop("kind", ExpertParallel)
        if kind is ExpertParallel:
            settings.setdefault("eager_nbytes", 0)  # small as the steps of tests are, counts go first
        self.eps: list[ExpertParallel] = []
        try:
            self.eps = crew.run([lambda group=group: kind(group, **settings) for group in self.groups])
        except BaseException:
            self.close()
            raise

    def run(self, work: Callable[[int, ExpertParallel], Any], ranks: Sequence[int] | None = None) -> list[Any]:
        """Run work(rank, ep) on all ranks, or on these; return what each returns."""
        chosen = range(self.world) if ranks is None else ranks
        return self.crew.run([lambda rank=rank: work(rank, self.eps[rank]) for rank in chosen])

    def errors(self, work: Callable[[int, ExpertParallel], Any]) -> list[Exception | None]:
        """Run work(rank, ep) on all ranks; return the error of each."""

        def attempt(rank: int, ep: ExpertParallel) -> Exception | None:
            try:
                work(rank, ep)
            except Exception as error:  # noqa: BLE001 - it is the result
                return error
            return None

        return self.run(attempt)

    def close(self) -> None:
        """Close all at the same time."""
        if self.eps:
            self.crew.run([ep.close for ep in self.eps])
        for group in self.groups:
            group.close()


class Layers:
    """Some layers of a crew, by what they are made with, to be used again; one in which something fails is closed."""

    MOST = 12

    def __init__(self, crew: Threads) -> None:
        self._crew = crew
        self._open: dict[str, Layer] = {}

    @contextlib.contextmanager
    def of(self, world: int, **options: Any) -> Iterator[Layer]:
        """The layer that is made so, on the first `world` ranks."""
        key = repr((world, options))
        if key not in self._open:
            if len(self._open) == self.MOST:
                self._open.pop(next(iter(self._open))).close()
            self._open[key] = Layer(self._crew, world, options)
        try:
            yield self._open[key]
        except BaseException:
            self._open.pop(key).close()
            raise

    def close(self) -> None:
        """Close all."""
        for layer in self._open.values():
            layer.close()


class Processes:
    """Ranks in processes of their own, which are told what to run by the name of a function: 'module:function'.

    A nursery is closed with them, unless it is lent.
    """

    def __init__(
        self, world: int, *, backends: tuple[str, ...] = ("shm",), nursery: Any = None, lent: Nursery | None = None
    ) -> None:
        self.names = [f"rank{rank}" for rank in range(world)]
        self._label = "+" + ",".join(backends)
        self._nursery = (nursery or Nursery(CHILD)) if lent is None else Brood(lent)
        self.children: list[Any] = []
        try:
            self.children = [self._nursery.child(name + self._label) for name in self.names]
            self._introduce(self.children)
        except BaseException:
            self._nursery.close()
            raise

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                left = [child.ask("leave") for child in self.children if child.is_alive]
                assert not any(left), f"threads left behind in children: {left}"
        finally:
            self._nursery.close()

    def tell(self, rank: int, function: str, *args: Any, **options: Any) -> None:
        """Have a rank run function(member, *args, **options); `hear` it later."""
        packed = pickle.dumps((args, options)).hex()
        self.children[rank].send("call", function=function, rank=rank, args=packed)

    def hear(self, rank: int) -> Any:
        """Return what a rank's function has returned, or raise what it has raised."""
        value, error = pickle.loads(bytes.fromhex(self.children[rank].hear()))
        if error is not None:
            error.add_note(f"on rank {rank} of {len(self.children)}\n{value}")
            raise error
        return value

    def call(self, function: str, *args: Any, ranks: Sequence[int] | None = None, **options: Any) -> list[Any]:
        """Run a function on all ranks, or on these, at the same time; return what each returns, or raise the first."""
        chosen = range(len(self.children)) if ranks is None else ranks
        for rank in chosen:
            self.tell(rank, function, *args, **options)
        heard, errors = [], []
        for rank in chosen:
            try:
                heard.append(self.hear(rank))
            except Exception as error:  # noqa: BLE001 - raised below, when all have been heard
                errors.append(error)
        if errors:
            raise errors[0]
        return heard

    def make(self, name: str, *, ranks: Sequence[int] | None = None, **options: Any) -> None:
        """Make `member.eps[name]` on all ranks, a member of the group of these."""
        chosen = list(range(len(self.children)) if ranks is None else ranks)
        names = [self.names[rank] for rank in chosen]
        self.call("moe_tools:make_experts", names, {"name": name, "deadline": DEADLINE, **options}, ranks=chosen)

    def drop(self, name: str, ranks: Sequence[int] | None = None) -> None:
        """Close `member.eps[name]` on all ranks."""
        self.call("moe_tools:drop_experts", name, ranks=ranks)

    def kill(self, rank: int) -> None:
        """SIGKILL; returns when it has ended."""
        self.children[rank].kill()

    def stop(self, rank: int) -> None:
        """SIGSTOP; returns when it stands."""
        self.children[rank].signal(signal.SIGSTOP)
        eventually(lambda: process_state(self.children[rank].pid) == "T", f"rank {rank} stands")

    def resume(self, rank: int) -> None:
        """SIGCONT."""
        self.children[rank].signal(signal.SIGCONT)

    def restart(self, rank: int) -> None:
        """Start a process in the place of one that was killed, and introduce it to those that live."""
        assert not self.children[rank].is_alive
        self.replace(rank)

    def replace(self, rank: int) -> Any:
        """Start a process in the place of another, whatever that does, which is returned."""
        former, self.children[rank] = self.children[rank], self._nursery.child(self.names[rank] + self._label)
        self._introduce([child for child in self.children if child.is_alive])
        return former

    def _introduce(self, children: Sequence[Any]) -> None:
        records = [child.record.hex() for child in children]
        for child in children:
            child.ask("meet", records=records)


def make_experts(member: Any, names: list[str], options: dict[str, Any]) -> None:
    """On a member: make an `ExpertParallel`."""
    kind = options.pop("kind", ExpertParallel)
    group = Group(member.agent, names, name=options["name"], timeout=DEADLINE)
    member.groups[options["name"]] = group
    member.eps[options["name"]] = kind(group, **options)


def drop_experts(member: Any, name: str) -> None:
    """On a member: close one."""
    member.eps.pop(name).close()
    member.groups.pop(name).close()
