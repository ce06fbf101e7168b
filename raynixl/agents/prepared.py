"""Prepared operations: checked and resolved once, posted any number of times."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Any

from raynixl import cuda
from raynixl.agents.captured import Captured
from raynixl.agents.ordering import follow, stream_of
from raynixl.agents.selections import Selections, as_blocks, as_list, distinct
from raynixl.agents.transfer import Stage, Transfer, settle_seconds
from raynixl.backends.base import Binding, Link, Op, Request, takes_events
from raynixl.blocks import Segments, match
from raynixl.config import check_timeout
from raynixl.errors import (
    AgentClosed,
    BackendUnavailable,
    ConfigError,
    PeerLost,
    RangeError,
    RaynixlError,
    RegionReadOnly,
    RegionStale,
    RegionUnknown,
    TransferCancelled,
    TransferTimeout,
)
from raynixl.memory import MemoryKind
from raynixl.messages import check_payload
from raynixl.native import CANCELLED, CLOSED, DONE, LOST, RESET, STALE, TIMEOUT, Digesting, Job, Program
from raynixl.region import Region, RemoteRegion
from raynixl.telemetry import RouteCounter

if TYPE_CHECKING:
    from raynixl.agents.agent import Agent

Kinds = frozenset[tuple[MemoryKind, MemoryKind]]
_UNBOUND = RouteCounter("", "")


@dataclass(frozen=True, slots=True)
class Route:
    """What a bound operation runs: replaced as a whole, so that threads never see half of one and half of another."""

    programs: list[Program]
    link: Link
    """The link that carries messages: it stands for as long as the connection does."""
    takes_streams: bool
    """Whether the programs wait for events by themselves."""


class Prepared:
    """One read or write, resolved. Posting it again costs about a microsecond plus the copy.

    Any thread may post; posts may overlap in time. It outlives lost connections: the next post connects again.
    It ends with its regions: `RegionStale` or `PeerRestarted` afterwards.
    """

    __slots__ = (
        "_counter",
        "_done",
        "_fast",
        "_has_posted",
        "_remote",
        "_route",
        "_seconds",
        "agent",
        "backend",
        "count",
        "incarnation",
        "local",
        "nbytes",
        "op",
        "peer",
        "segments",
    )  # fmt: skip

    def __init__(self, agent: Agent, op: Op, src: Selections, dst: Selections) -> None:
        mine, theirs = (dst, src) if op is Op.READ else (src, dst)
        ours = [as_blocks(item, Region, op, "local") for item in as_list(mine)]
        remotes = [as_blocks(item, RemoteRegion, op, "peer's") for item in as_list(theirs)]
        local, ours_table = distinct(ours)
        remote, remote_table = distinct(remotes)
        self._begin(agent, op, local, remote)
        source, target = (remote_table, ours_table) if op is Op.READ else (ours_table, remote_table)
        self._move(match(source, target))

    @classmethod
    def of_segments(cls, agent: Agent, op: Op, segments: Segments, *, local: Region, remote: RemoteRegion) -> Prepared:
        """Make one between two regions whose pieces are known to lie inside of them, and to be matched and disjoint."""
        made = cls.__new__(cls)
        made._begin(agent, op, [local], [remote])
        made._move(segments)
        return made

    def _move(self, segments: Segments) -> None:
        self.segments = segments
        self.nbytes = segments.total
        self.count = len(segments)

    def _begin(self, agent: Agent, op: Op, local: list[Region], remote: list[RemoteRegion]) -> None:
        """Begin with the regions, which must be fit for it."""
        self.agent = agent
        self.op = op
        self.local = local
        self._remote = remote
        self._check_regions()
        self.peer = self._remote[0].owner
        self.incarnation = self._remote[0].incarnation
        self.backend = ""
        self._route: Route | None = None
        self._fast: Program | None = None  # the only program of the route, if it has but one
        self._counter = _UNBOUND
        self._seconds = agent.transfer_timeout
        self._has_posted = False
        self._done: Transfer | None = None

    def __repr__(self) -> str:
        return f"Prepared({self.summary})"

    @property
    def summary(self) -> str:
        """How messages name the operation."""
        way = "from" if self.op is Op.READ else "to"
        over = f" over {self.backend}" if self.backend else ""
        return f"{self.op.value} of {self.nbytes} bytes in {self.count} blocks {way} {self.peer!r}{over}"

    def post(
        self,
        *,
        notify: bytes | None = None,
        timeout: float | None = None,
        digest: tuple[int, int] | None = None,
        stream: Any = None,
    ) -> Transfer:
        """Start the operation; returns at once.

        `notify` is delivered to the peer after the data is visible there. `timeout` is the transfer's deadline.
        `digest` is as of `Agent.read`. With `stream`, one of CUDA as torch or cupy have it or its handle, the operation
        follows what is on that stream now; this thread does not wait for it.

        Raises:
            AgentClosed, RegionStale: this side's agent or region is gone. Whatever concerns the peer is
            carried by the handle.
            ConfigError: no stream, or none of a GPU of this process.
        """
        fast = self._fast
        if fast is not None and notify is None and timeout is None and digest is None and stream is None:
            code = fast.run(self._seconds)
            if code == DONE:
                counter = self._counter
                counter.transfers += 1
                counter.nbytes += self.nbytes
                return self._done or self._ended_well()
            return self._take(code, self._route, self._new_transfer(None, None, None))
        transfer = self._new_transfer(notify, timeout, digest)
        if stream is not None:
            followed = stream_of(stream, self.gpu)
            transfer.after = cuda.record(followed.handle, followed.device)
        return self._post(transfer)

    def capture(self, stream: Any) -> Captured:
        """Put the operation into a CUDA graph that is being captured on a stream; it runs at every replay.

        It must have been posted before. Its regions are in use until `Captured.close`, which `deregister` waits for.

        Raises:
            ConfigError: it was not posted before, no GPU carries it, or that is no stream.
            RegionStale, PeerLost: the memory is gone.
        """
        return Captured(self, self._route, stream)

    def _ended_well(self) -> Transfer:
        """Make the handle of a post that ended at once. From the second on one serves all: it is a value."""
        transfer = Transfer(self, Stage.DONE)
        if self._has_posted:
            self._done = transfer
        self._has_posted = True
        return transfer

    def _post(self, transfer: Transfer) -> Transfer:
        route = self._route
        if route is None or route.link.lost is not None:
            route = self.agent.connector.bind_now(self)
        if route is None:
            return self._take(LOST, None, transfer)
        if transfer.after is not None and not route.takes_streams:
            follow(transfer, lambda: self._run_all(route, transfer))
            return transfer
        if len(route.programs) > 1:
            self._run_all(route, transfer)
            return transfer
        return self._take(self._run(route.programs[0], transfer), route, transfer)

    def _run(self, program: Program, transfer: Transfer) -> int | Job:
        seconds = max(0.001, transfer.deadline - time.monotonic())
        if transfer.after is not None and takes_events(program):
            transfer.wish = None
            return program.run_after(seconds, transfer.after)
        if transfer.wish is None:
            return program.run(seconds)
        if not isinstance(program, Digesting):
            transfer.wish = None
            return program.run(seconds)
        position, seed = transfer.wish
        return program.run_digesting(seconds, (position - self.local[0].memory.address) % (1 << 64), seed)

    def _new_transfer(self, notify: bytes | None, timeout: float | None, digest: tuple[int, int] | None) -> Transfer:
        """Make the handle of a post that is not over at once, if it may be posted at all."""
        self.agent.check_open()
        if notify is not None:
            check_payload(notify, self.agent.config.max_message_nbytes, what="notification")
        seconds = check_timeout(timeout, self.agent.transfer_timeout)
        if digest is not None and (self.op is not Op.READ or len(self.local) != 1):
            raise ConfigError("only what is read into one region is digested", hint="leave digest= away")
        return Transfer(self, Stage.CONNECTING, time.monotonic() + seconds, notify, digest)

    def _take(self, result: int | Job, route: Route | None, transfer: Transfer) -> Transfer:
        """Tell the handle what `run` returned."""
        if not isinstance(result, int):
            self._start(transfer, route, [result])
        elif result == DONE:
            self._start(transfer, route, [])
        elif result == LOST:
            self._unbind(route)
            self.agent.connector.submit(self, transfer)
        else:
            self._refuse_local()
            transfer.failed(self.translate(result, None))
        return transfer

    def _start(self, transfer: Transfer, route: Route | None, jobs: list[Job]) -> None:
        transfer.started(jobs, None if route is None else route.link)
        if transfer.is_expected and not transfer.done:
            self.agent.watcher.add(transfer)

    def run_for(self, transfer: Transfer) -> None:
        """Run for a transfer that has waited for its connection."""
        route = self._route
        if route is None:  # lost again meanwhile, and another thread has noticed
            transfer.failed(self.agent.lost(self.peer) or self.translate(LOST, None))
        elif transfer.after is not None and not route.takes_streams:
            follow(transfer, lambda: self._run_all(route, transfer))
        elif transfer.starts():
            self._run_all(route, transfer)

    def _run_all(self, route: Route, transfer: Transfer) -> None:
        results = [self._run(program, transfer) for program in route.programs]
        jobs = [result for result in results if not isinstance(result, int)]
        for code in results:
            if isinstance(code, int) and code != DONE:
                for job in jobs:
                    job.cancel(CANCELLED)
                    job.wait_settled(settle_seconds(job))
                if code == LOST:
                    self._unbind(route)
                transfer.failed(self.translate(code, route.link), jobs)
                return
        self._start(transfer, route, jobs)

    def bind(self, bindings: Sequence[Binding]) -> Route:
        """Take the bindings of the peer's regions and compile for them."""
        link = bindings[0].link
        backend = self.agent.backend(link.backend)
        programs = backend.prepare(Request(self.op, self.segments, self.local, bindings))
        messenger = link if backend.capabilities.messages else self.agent.connector.messenger(link)
        route = Route(programs, messenger, all(takes_events(program) for program in programs))
        self.backend = link.backend
        self._counter = self.agent.counter(link.backend, self.peer)
        self._route = route
        self._fast = programs[0] if len(programs) == 1 else None
        return route

    def _unbind(self, route: Route | None) -> None:
        """Forget a route that is lost, unless another thread has found a new one."""
        if self._route is route:
            self._fast = None
            self._route = None

    @property
    def remote(self) -> Sequence[RemoteRegion]:
        """The peer's regions that take part."""
        return self._remote

    @property
    def gpu(self) -> int | None:
        """The GPU whose streams are meant where a stream does not say whose it is: that of our own memory."""
        return next((region.device for region in self.local if region.kind is MemoryKind.VRAM), None)

    def kinds(self) -> Kinds:
        """Return the (local, remote) kinds of memory that take part."""
        return frozenset(product({region.kind for region in self.local}, {region.kind for region in self._remote}))

    def count_end(self, error: RaynixlError | None) -> None:
        """Count a transfer that took the long way."""
        counter = self._counter
        if counter is _UNBOUND:  # it was never bound, so no backend has carried it
            counter = self.agent.counter("", self.peer)
        if error is None:
            counter.transfers += 1
            counter.nbytes += self.nbytes
        else:
            counter.failures += 1

    def translate(self, code: int, link: Link | None) -> RaynixlError:
        """Return the typed error for a code of the native core."""
        if code == TIMEOUT:
            return TransferTimeout(
                f"{self.summary} passed its deadline",
                hint="the destination's bytes are undefined",
                peer=self.peer,
            )
        if code == STALE:
            stale = next((region for region in self.local if not region.is_registered), self._remote[0])
            return RegionStale(
                f"{stale.label} is no longer registered", hint="look it up again by name", peer=self.peer
            )
        if code == LOST:
            lost = None if link is None else link.lost
            return lost.afresh() if lost else PeerLost(f"peer {self.peer!r} is lost", peer=self.peer)
        if code == RESET:
            return PeerLost(
                f"the path to {self.peer!r} was reset while {self.summary} was in flight",
                hint="post it again: the next transfer makes a new path", peer=self.peer,
            )  # fmt: skip
        if code == CLOSED:
            return AgentClosed(f"agent {self.agent.name!r} was closed", hint="make a new one")
        if code == CANCELLED:
            return TransferCancelled(f"{self.summary} was cancelled", peer=self.peer)
        return _translate_errno(-code, self)

    def _check_regions(self) -> None:
        self.agent.check_open()
        for region in self.local:
            if region.incarnation != self.agent.incarnation:
                raise RegionUnknown(
                    f"{region.label} belongs to another agent, not to {self.agent.name!r}",
                    hint="register the memory with this agent",
                )
        self._refuse_local()
        owner = self._remote[0]
        for remote in self._remote:
            if (remote.owner, remote.incarnation) != (owner.owner, owner.incarnation):
                raise ConfigError(
                    f"one transfer names regions of {owner.owner!r} and of {remote.owner!r}",
                    hint="post one transfer for each peer",
                )
        for target in self._remote if self.op is Op.WRITE else ():
            if not target.record.writable:
                raise RegionReadOnly(f"{target.label} is read-only", hint="its owner must register writable memory")
        for mine in self.local if self.op is Op.READ else ():
            if not mine.memory.writable:
                raise RegionReadOnly(f"{mine.label} is read-only", hint="register writable memory")

    def _refuse_local(self) -> None:
        self.agent.check_open()
        for region in self.local:
            if not region.is_registered:
                raise RegionStale(f"{region.label} was deregistered", hint="register the memory again")


def _translate_errno(number: int, plan: Prepared) -> RaynixlError:
    if number == errno.EFAULT:
        return RangeError(
            f"{plan.summary} touched memory that is not mapped, or not to be written, any more",
            hint="keep registered memory alive until deregister returns", peer=plan.peer,
        )  # fmt: skip
    if number == errno.ESRCH:
        return PeerLost(f"peer {plan.peer!r} is gone", peer=plan.peer)
    if number == errno.EPERM:
        return BackendUnavailable(
            f"{plan.summary} was forbidden by the kernel", hint="run `raynixl doctor`", peer=plan.peer
        )
    return BackendUnavailable(f"{plan.summary} failed: {os.strerror(number)}", peer=plan.peer)
