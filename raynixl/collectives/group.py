"""Groups: the members of a collective, and the operations that all of them call in the same order."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

from raynixl.agents.past import Past, streams_of
from raynixl.collectives import schedules
from raynixl.collectives.cost import CHUNK_NBYTES, NETWORK, ONE_HOST, choose_broadcast
from raynixl.collectives.executor import Executor, Operation
from raynixl.collectives.registrations import Registrations, gpus_of
from raynixl.errors import ConfigError, RangeError
from raynixl.record import check_name

if TYPE_CHECKING:
    from raynixl.agents import Agent

_ALGORITHMS = ("auto", "direct", "chain")


class Group:
    """Members by agent name, in the same order on every member; a member's rank is its place in the list.

    Every member calls the same operations in the same order, from one thread at a time. Buffers are torch tensors,
    numpy arrays, anything that can be registered, or regions. An operation returns when this member's part is
    done and its buffers are its own again, for any stream of a GPU, too. Buffers on GPUs are touched once all is
    through that is on this thread's current streams at the call, torch's and cupy's, or on `stream`, if one is named.

    A member's death fails the operation on every survivor with `PeerLost` that names it; a member that does not
    come fails it with `TransferTimeout`. A group that has failed does nothing more; `without(member)` goes on.
    """

    def __init__(
        self, agent: Agent, members: Sequence[str], *, name: str = "default", timeout: float | None = None
    ) -> None:
        self.name = check_name(name, "group name")
        self.members = (members,) if isinstance(members, str) else tuple(members)
        for member in self.members:
            check_name(member, "group member")
        if len(set(self.members)) != len(self.members) or agent.name not in self.members:
            raise ConfigError(
                f"group {name!r} of {list(self.members)} must name each member once, {agent.name!r} among them",
                hint="give every member the same list",
            )
        self._agent = agent
        self._timeout = agent.config.transfer_timeout if timeout is None else timeout
        self.rank = self.members.index(agent.name)
        self.world = len(self.members)
        self._registrations = Registrations(agent)
        self._executor = Executor(agent, self.members, self.name)

    @property
    def agent(self) -> Agent:
        """This member's agent."""
        return self._agent

    def __repr__(self) -> str:
        return f"Group({self.name!r}, rank {self.rank} of {self.world})"

    def __enter__(self) -> Group:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def broadcast(
        self, buffer: Any, root: int = 0, *, algorithm: str = "auto", timeout: float | None = None, stream: Any = None
    ) -> None:
        """Fill every member's buffer with the root's; all have the same length.

        `algorithm` is 'direct' (all read from the root), 'chain' (each reads from the one before, in chunks) or
        'auto', by the cost model.
        """
        if algorithm not in _ALGORITHMS:
            raise ConfigError(f"there is no broadcast {algorithm!r}", hint=f"known are {', '.join(_ALGORITHMS)}")
        self._catch_up((buffer,), stream, timeout)
        region = self._registrations.get(buffer)
        nbytes = 0 if region is None else region.nbytes
        if algorithm == "auto":
            algorithm = choose_broadcast(nbytes, self.world, ONE_HOST if self._executor.is_one_host() else NETWORK)
        if algorithm == "chain":
            steps = schedules.broadcast_chain(self.rank, self.world, root, nbytes=nbytes, chunk_nbytes=CHUNK_NBYTES)
        else:
            steps = schedules.broadcast_direct(self.rank, self.world, root, nbytes=nbytes)
        operation = Operation(f"broadcast {algorithm} from rank {root}", nbytes)
        self._executor.run(steps, operation=operation, out=region, timeout=self._seconds(timeout))
        self._registrations.trim()

    def scatter(
        self, source: Any, out: Any, root: int = 0, *, timeout: float | None = None, stream: Any = None
    ) -> None:
        """Give each member its part of the root's `source` in its own `out`; parts lie in rank order.

        `source` is used at the root alone. Members' parts may differ in length: sizes are exchanged first.
        """
        self._catch_up((source, out), stream, timeout)
        given = self._registrations.get(source) if self.rank == root else None
        target = self._registrations.get(out)
        operation = Operation(f"scatter from rank {root}")
        sizes = self._sizes(target, operation, timeout)
        if self.rank == root and (given.nbytes if given else 0) != sum(sizes):
            self._fail(f"scatter of {given.nbytes if given else 0} bytes into parts of {sizes}")
        steps = schedules.scatter(self.rank, root, sizes)
        self._executor.run(steps, operation=operation, source=given, out=target, timeout=self._seconds(timeout))
        self._registrations.trim()

    def gather(self, source: Any, out: Any, root: int = 0, *, timeout: float | None = None, stream: Any = None) -> None:
        """Collect every member's `source` in the root's `out`, in rank order; `out` is used at the root alone."""
        self._catch_up((source, out), stream, timeout)
        given = self._registrations.get(source)
        target = self._registrations.get(out) if self.rank == root else None
        operation = Operation(f"gather to rank {root}")
        sizes = self._sizes(given, operation, timeout)
        if self.rank == root and (target.nbytes if target else 0) != sum(sizes):
            self._fail(f"gather of {sizes} bytes into {target.nbytes if target else 0}")
        steps = schedules.gather(self.rank, root, sizes)
        self._executor.run(steps, operation=operation, source=given, out=target, timeout=self._seconds(timeout))
        self._registrations.trim()

    def allgather(self, source: Any, out: Any, *, timeout: float | None = None, stream: Any = None) -> None:
        """Collect every member's `source` in every member's `out`, in rank order."""
        self._catch_up((source, out), stream, timeout)
        given, target = self._registrations.get(source), self._registrations.get(out)
        operation = Operation("allgather")
        sizes = self._sizes(given, operation, timeout)
        if (target.nbytes if target else 0) != sum(sizes):
            self._fail(f"allgather of {sizes} bytes into {target.nbytes if target else 0}")
        steps = schedules.allgather(self.rank, sizes)
        self._executor.run(steps, operation=operation, source=given, out=target, timeout=self._seconds(timeout))
        self._registrations.trim()

    def barrier(self, *, timeout: float | None = None) -> None:
        """Return when every member has come."""
        steps = schedules.barrier(self.rank, self.world)
        self._executor.run(steps, operation=Operation("barrier"), timeout=self._seconds(timeout))

    async def broadcast_async(self, buffer: Any, root: int = 0, **options: Any) -> None:
        """Broadcast from an event loop; runs on a thread of the loop's."""
        await asyncio.to_thread(self.broadcast, buffer, root, **_with_streams(options, (buffer,)))

    async def scatter_async(self, source: Any, out: Any, root: int = 0, **options: Any) -> None:
        """Scatter from an event loop."""
        await asyncio.to_thread(self.scatter, source, out, root, **_with_streams(options, (source, out)))

    async def gather_async(self, source: Any, out: Any, root: int = 0, **options: Any) -> None:
        """Gather from an event loop."""
        await asyncio.to_thread(self.gather, source, out, root, **_with_streams(options, (source, out)))

    async def allgather_async(self, source: Any, out: Any, **options: Any) -> None:
        """Allgather from an event loop."""
        await asyncio.to_thread(self.allgather, source, out, **_with_streams(options, (source, out)))

    async def barrier_async(self, **options: Any) -> None:
        """Wait at the barrier from an event loop."""
        await asyncio.to_thread(self.barrier, **options)

    def without(self, *members: str) -> Group:
        """Close this group and return the one of all others, which every survivor makes in the same way."""
        gone = [member for member in members if member in self.members]
        if len(gone) != len(members) or self._agent.name in gone:
            raise ConfigError(f"{members} cannot leave {list(self.members)}", hint="name other members of the group")
        self.close()
        rest = [member for member in self.members if member not in gone]
        ranks = "-".join(str(self.members.index(member)) for member in sorted(gone, key=self.members.index))
        return Group(self._agent, rest, name=f"{self.name}~{ranks}", timeout=self._timeout)

    def close(self) -> None:
        """Deregister the buffers that operations have used, and stop listening. Idempotent."""
        self._executor.close()
        self._registrations.close()

    def _catch_up(self, buffers: Sequence[Any], stream: Any, timeout: float | None) -> None:
        """Wait for what is on the streams that buffers on GPUs are used on: from now on peers touch them."""
        gpus = gpus_of(buffers)
        if gpus:
            Past(gpus, stream).wait(self._seconds(timeout))

    def _sizes(self, region: Any, operation: Operation, timeout: float | None) -> list[int]:
        nbytes = 0 if region is None else int(region.nbytes)
        return self._executor.exchange(nbytes, operation=operation, timeout=self._seconds(timeout))

    def _seconds(self, timeout: float | None) -> float:
        return self._timeout if timeout is None else timeout

    def _fail(self, what: str) -> None:
        error = RangeError(f"group {self.name!r}: {what} does not fit", hint="sum the parts of all members")
        self._executor.fail(error)
        raise error


def _with_streams(options: dict[str, Any], buffers: Sequence[Any]) -> dict[str, Any]:
    """Name the streams of this thread, which carries out nothing, for one that does."""
    if options.get("stream") is not None:
        return options
    return {**options, "stream": streams_of(gpus_of(buffers))}
