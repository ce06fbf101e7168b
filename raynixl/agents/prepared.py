"""Prepared operations: checked and resolved once, posted any number of times."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from raynixl.agents.transfer import Stage, Transfer
from raynixl.backends.base import Binding, Link, Op, Request
from raynixl.blocks import Blocks, Segments, match
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
from raynixl.native import CANCELLED, CLOSED, DONE, LOST, STALE, TIMEOUT, Job, Program
from raynixl.region import Region, RemoteRegion
from raynixl.telemetry import RouteCounter

if TYPE_CHECKING:
    from raynixl.agents.agent import Agent

Selection = Region | RemoteRegion | Blocks
Selections = Selection | Sequence[Selection]
_UNBOUND = RouteCounter("", "")


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
        "_link",
        "_programs",
        "_remote",
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
        self.agent = agent
        self.op = op
        mine, theirs = (dst, src) if op is Op.READ else (src, dst)
        ours = [_as_blocks(item, Region, op, "local") for item in as_list(mine)]
        remotes = [_as_blocks(item, RemoteRegion, op, "peer's") for item in as_list(theirs)]
        self.local: list[Region] = _distinct(ours)
        self._remote: list[RemoteRegion] = _distinct(remotes)
        self._check_regions()
        ours_table = [(self.local.index(item.region), item.table) for item in ours]
        remote_table = [(self._remote.index(item.region), item.table) for item in remotes]
        source, target = (remote_table, ours_table) if op is Op.READ else (ours_table, remote_table)
        self.segments: Segments = match(source, target)
        self.nbytes = self.segments.total
        self.count = len(self.segments)
        self.peer = self._remote[0].owner
        self.incarnation = self._remote[0].incarnation
        self.backend = ""
        self._programs: list[Program] | None = None
        self._fast: Program | None = None
        self._link: Link | None = None
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

    def post(self, *, notify: bytes | None = None, timeout: float | None = None) -> Transfer:
        """Start the operation; returns at once.

        `notify` is delivered to the peer after the data is visible there. `timeout` is the transfer's deadline.

        Raises:
            AgentClosed, RegionStale: this side's agent or region is gone. Whatever concerns the peer is
            carried by the handle.
        """
        fast = self._fast
        if fast is not None and notify is None and timeout is None:
            code = fast.run(self._seconds)
            if code == DONE:
                counter = self._counter
                counter.transfers += 1
                counter.nbytes += self.nbytes
                return self._done or self._ended_well()
            return self._take(code, notify, timeout)
        return self._post(notify, timeout)

    def _ended_well(self) -> Transfer:
        """Make the handle of a post that ended at once. From the second on one serves all: it is a value."""
        transfer = Transfer(self, Stage.DONE)
        if self._has_posted:
            self._done = transfer
        self._has_posted = True
        return transfer

    def _post(self, notify: bytes | None, timeout: float | None) -> Transfer:
        seconds = self._check_post(notify, timeout)
        if self._programs is None and not self.agent.connector.bind_now(self):
            return self._take(LOST, notify, timeout)
        assert self._programs is not None
        if len(self._programs) > 1:
            transfer = Transfer(self, Stage.CONNECTING, time.monotonic() + seconds, notify)
            self.run_all(transfer)
            return transfer
        return self._take(self._programs[0].run(seconds), notify, timeout)

    def _check_post(self, notify: bytes | None, timeout: float | None) -> float:
        self.agent.check_open()
        if notify is not None and not isinstance(notify, bytes):
            raise ConfigError(f"a notification is bytes, not {type(notify).__name__}", hint="encode it")
        if notify is not None and len(notify) > self.agent.config.max_message_nbytes - 64:
            raise RangeError(f"a notification of {len(notify)} bytes is too long", hint="write the bytes instead")
        if timeout is not None and not 0 < timeout < 1e9:
            raise ConfigError(f"timeout {timeout!r} is not a positive number of seconds", hint="mend it")
        return self.agent.transfer_timeout if timeout is None else timeout

    def _take(self, result: int | Job, notify: bytes | None, timeout: float | None) -> Transfer:
        """Make the handle for what `run` returned."""
        seconds = self._check_post(notify, timeout)
        transfer = Transfer(self, Stage.CONNECTING, time.monotonic() + seconds, notify)
        if isinstance(result, int) and result == DONE:
            self._start(transfer, [])
        elif isinstance(result, int) and result == LOST:
            self._unbind()
            self.agent.connector.submit(self, transfer)
        elif isinstance(result, int):
            self._refuse_local()
            transfer.failed(self.translate(result))
        else:
            self._start(transfer, [result])
        return transfer

    def _start(self, transfer: Transfer, jobs: list[Job]) -> None:
        assert self._link is not None
        transfer.started(jobs, self._link)
        if transfer._notify is not None and not transfer.done:
            self.agent.watch(transfer)

    def run_all(self, transfer: Transfer) -> None:
        """Run every program for a transfer that has waited for its connection."""
        seconds = max(0.001, transfer.deadline - time.monotonic())
        assert self._programs is not None
        results = [program.run(seconds) for program in self._programs]
        jobs = [result for result in results if not isinstance(result, int)]
        for code in results:
            if isinstance(code, int) and code != DONE:
                for job in jobs:
                    job.cancel(CANCELLED)
                transfer.failed(self.translate(code))
                return
        self._start(transfer, jobs)

    def bind(self, bindings: Sequence[Binding]) -> None:
        """Take the bindings of the peer's regions and compile for them."""
        link = bindings[0].link
        programs = self.agent.backend(link.backend).prepare(Request(self.op, self.segments, self.local, bindings))
        self._link, self.backend = link, link.backend
        self._counter = self.agent.counter(link.backend, self.peer)
        self._programs = programs
        self._fast = programs[0] if len(programs) == 1 else None

    def _unbind(self) -> None:
        self._fast = None
        self._programs = None

    @property
    def remote(self) -> Sequence[RemoteRegion]:
        """The peer's regions that take part."""
        return self._remote

    def count_end(self, error: RaynixlError | None) -> None:
        """Count a transfer that took the long way."""
        counter = self._counter
        if error is None:
            counter.transfers += 1
            counter.nbytes += self.nbytes
        else:
            counter.failures += 1

    def translate(self, code: int) -> RaynixlError:
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
            lost = None if self._link is None else self._link.lost
            return lost or PeerLost(f"peer {self.peer!r} is lost", peer=self.peer)
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


def as_list(selections: Selections) -> list[Selection]:
    """Return what a transfer reads or writes as a list."""
    if isinstance(selections, Region | RemoteRegion | Blocks):
        return [selections]
    if not isinstance(selections, Sequence) or not selections:
        raise ConfigError(
            f"{type(selections).__name__} is not what a transfer moves",
            hint="pass regions, spans, pages or a list of them",
        )
    return list(selections)


def _as_blocks(item: Selection, kind: type[Region] | type[RemoteRegion], op: Op, whose: str) -> Blocks:
    blocks = item.span() if isinstance(item, Region | RemoteRegion) else item
    if not isinstance(blocks, Blocks) or not isinstance(blocks.region, kind):
        raise ConfigError(
            f"a {op.value} needs a {whose} region here, not {type(getattr(item, 'region', item)).__name__}",
            hint="read(peer's, ours) and write(ours, peer's): source first, destination second",
        )
    return blocks


def _distinct(items: list[Blocks]) -> list[Any]:
    regions: list[Any] = []
    for item in items:
        if item.region not in regions:
            regions.append(item.region)
    return regions


def _translate_errno(number: int, plan: Prepared) -> RaynixlError:
    if number == errno.EFAULT:
        return RangeError(
            f"{plan.summary} touched memory that is not mapped any more",
            hint="keep registered memory alive until deregister returns", peer=plan.peer,
        )  # fmt: skip
    if number == errno.ESRCH:
        return PeerLost(f"peer {plan.peer!r} is gone", peer=plan.peer)
    if number == errno.EPERM:
        return BackendUnavailable(
            f"{plan.summary} was forbidden by the kernel", hint="run `raynixl doctor`", peer=plan.peer
        )
    return BackendUnavailable(f"{plan.summary} failed: {os.strerror(number)}", peer=plan.peer)
