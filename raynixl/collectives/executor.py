"""The executor: carries out a rank's schedule with one-sided reads and short messages."""

from __future__ import annotations

import enum
import hashlib
import logging
import struct
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from raynixl.collectives.own import copy_own
from raynixl.collectives.schedules import Acknowledge, Announce, Await, Buffer, Collect, Pull, Signal, Step
from raynixl.errors import (
    ConfigError,
    IntegrityError,
    PeerLost,
    PeerRestarted,
    RangeError,
    RaynixlError,
    TransferTimeout,
)
from raynixl.region import Region, RemoteRegion

if TYPE_CHECKING:
    from raynixl.agents import Agent, Inbox

_WORD = struct.Struct("<BQQQB")  # kind, operation's number, value, its length, bytes of its text
logger = logging.getLogger(__name__)
_MAX_AHEAD = 1 << 20


class _Kind(enum.IntEnum):
    ANNOUNCE = 1
    ACKNOWLEDGE = 2
    SIGNAL = 3
    SIZE = 4
    ABORT = 5
    LEAVE = 6


@dataclass(frozen=True, slots=True)
class Operation:
    """What every member must call alike: a text such as 'broadcast direct from 0', and the length if it is common."""

    text: str
    nbytes: int = 0

    def check(self, theirs: Operation, member: str) -> None:
        """Refuse what another member calls instead.

        Raises:
            ConfigError: another operation, or the same with other arguments.
            RangeError: a buffer of another length.
        """
        if theirs == self:
            return
        if theirs.text.split(" ")[0] == self.text.split(" ")[0] and theirs.nbytes != self.nbytes:
            raise RangeError(
                f"group member {member!r} calls {theirs.text} with {theirs.nbytes} bytes, we with {self.nbytes}",
                hint="give every member a buffer of one length", peer=member,
            )  # fmt: skip
        raise ConfigError(
            f"group member {member!r} calls {theirs.text!r:.200}, we {self.text!r}",
            hint="call the same operations in the same order on every member", peer=member,
        )  # fmt: skip


@dataclass(slots=True)
class _Heard:
    """What one member has said about one operation."""

    ready: dict[int, int] = field(default_factory=dict)  # by buffer: bytes that may be read
    regions: dict[int, RemoteRegion] = field(default_factory=dict)  # by buffer
    acknowledged: bool = False
    rounds: set[int] = field(default_factory=set)
    size: int | None = None
    operation: Operation | None = None


_BUFFERS = {Buffer.SOURCE: 0, Buffer.OUT: 1}


class Executor:
    """One member's side of a group: numbers the operations, sorts the messages, runs the steps."""

    def __init__(self, agent: Agent, members: Sequence[str], name: str) -> None:
        self._agent = agent
        self._members = tuple(members)
        self._ranks = {member: rank for rank, member in enumerate(members)}
        self._rank = self._ranks[agent.name]
        self._name = name
        self._inbox: Inbox | None = None
        self._number = 0
        self._heard: defaultdict[tuple[int, int], _Heard] = defaultdict(_Heard)  # by operation and rank
        self._operation = Operation("")
        self._steps: Sequence[Step] = ()
        self._place = 0
        self._left_after: dict[int, int] = {}  # by rank that closed its group: how many operations it went along with
        self._incarnations: dict[str, str] = {}
        self._error: RaynixlError | None = None
        self._deadline = 0.0
        self._seconds = 0.0

    def is_one_host(self) -> bool:
        """Whether every member runs on this host, as far as the directory knows."""
        records = [self._agent.find(member) for member in self._members if member != self._agent.name]
        return all(record is None or record.host == self._agent.host for record in records)

    def run(
        self,
        steps: Sequence[Step],
        *,
        operation: Operation,
        source: Region | None = None,
        out: Region | None = None,
        timeout: float,
    ) -> None:
        """Carry out one operation's steps.

        Raises:
            PeerLost, PeerRestarted: a member is gone; named.
            TransferTimeout: a member did not come in time; named.
        """
        with self._operating(operation, steps, timeout):
            for self._place, step in enumerate(steps):
                self._do(step, source, out)

    def exchange(self, value: int, *, operation: Operation, timeout: float) -> list[int]:
        """Tell every member a number and return theirs, by rank."""
        with self._operating(operation, (), timeout):
            for member in self._others():
                self._say(member, _Kind.SIZE, value)
            return [value if rank == self._rank else self._wait_size(rank) for rank in range(len(self._members))]

    @contextmanager
    def _operating(self, operation: Operation, steps: Sequence[Step], timeout: float) -> Iterator[None]:
        """Begin and end one operation; whatever ends it early ends the group, for the others wait for us."""
        self._begin(operation, steps, timeout)
        try:
            for rank in range(len(self._members)):
                self._check_operation(rank)
            yield
        except RaynixlError as exc:
            self.fail(exc)
            raise
        except BaseException as exc:
            self.fail(RaynixlError(f"{self._agent.name!r} was interrupted: {exc!r:.200}", peer=self._agent.name))
            raise
        self._end()

    def fail(self, error: RaynixlError) -> None:
        """End the group with an error and tell every member that can be told."""
        if self._error is not None:
            return
        self._error = error
        text = "\n".join((type(error).__name__, error.peer, error.message)).encode()[:4096]
        for member in self._others():
            connection = self._agent.connector.current(member)
            is_open = connection is not None and connection.lost is None and self._inbox is not None
            if is_open:
                try:
                    self._say(member, _Kind.ABORT, 0, text)
                except RaynixlError:
                    continue  # that member is going as well; the others must still hear

    def close(self) -> None:
        """Stop listening, and tell the others that we are done; idempotent."""
        if self._inbox is not None and self._error is None:
            for member in self._others():
                if self._loss(self._ranks[member]) is None:
                    self._say_leave(member)
        if self._inbox is not None:
            self._agent.control.topics.close_inbox(self._inbox.topic)
        if self._error is None:
            self._error = ConfigError("the group was closed", hint="make a new group")

    def _say_leave(self, member: str) -> None:
        try:
            self._say(member, _Kind.LEAVE, self._number)
        except RaynixlError as exc:  # it is going as well
            logger.debug("did not tell %s that we leave: %s", member, exc)

    def _begin(self, operation: Operation, steps: Sequence[Step], timeout: float) -> None:
        if self._error is not None:
            raise ConfigError(
                f"the group has ended: {self._error}", hint="go on with group.without(member)", peer=self._error.peer
            )
        self._seconds = timeout
        self._deadline = time.monotonic() + timeout
        self._number += 1
        self._operation, self._steps, self._place = operation, steps, 0
        try:
            self._connect()
            self._take_all()  # an end of the group that was heard since ends this at once
        except RaynixlError as exc:
            self.fail(exc)
            raise

    def _connect(self) -> None:
        """Connect every member once, so that the death of any is heard by all."""
        for member in self._others():
            if member not in self._incarnations:
                peer = self._agent.peer(member, timeout=self._left())
                self._incarnations[member] = peer.connect(self._left())
        if self._inbox is None:
            self._inbox = self._agent.inbox(self._topic())

    def _topic(self) -> str:
        """Return what no other group uses: name, processes, and the how-manyth group of that name among them."""
        present = {**self._incarnations, self._agent.name: self._agent.incarnation}
        text = "\n".join(present[member] for member in self._members)
        topic = f"raynixl.group/{self._name}/{hashlib.sha256(text.encode()).hexdigest()[:16]}"
        return f"{topic}/{self._agent.control.count(topic)}"

    def _end(self) -> None:
        for key in [key for key in self._heard if key[0] <= self._number]:
            del self._heard[key]

    def _do(self, step: Step, source: Region | None, out: Region | None) -> None:
        match step:
            case Announce(to, buffer, ready):
                region = source if buffer is Buffer.SOURCE else out
                assert region is not None
                head = bytes((_BUFFERS[buffer],)) + region.describe().to_bytes()
                self._say(self._members[to], _Kind.ANNOUNCE, ready, head)
            case Acknowledge(to):
                self._say(self._members[to], _Kind.ACKNOWLEDGE, 0)
            case Signal(to, number):
                self._say(self._members[to], _Kind.SIGNAL, number)
            case Collect(rank):
                self._wait(rank, lambda heard: heard.acknowledged)
            case Await(rank, number):
                self._wait(rank, lambda heard: number in heard.rounds)
            case Pull():
                self._pull(step, source, out)

    def _pull(self, step: Pull, source: Region | None, out: Region | None) -> None:
        assert out is not None
        if step.source == self._rank:
            assert source is not None
            copy_own(self._agent, source, out, (step.source_offset, step.offset, step.nbytes), self._left())
            return
        slot, end = _BUFFERS[step.buffer], step.source_offset + step.nbytes
        remote = self._wait(step.source, lambda heard: heard.ready.get(slot, 0) >= end).regions[slot]
        transfer = self._agent.read(
            remote.span(step.source_offset, step.nbytes), out.span(step.offset, step.nbytes), timeout=self._left()
        )
        try:
            transfer.wait()
        except RaynixlError:
            self._take_all()  # a member that has given up withdrew its buffer, after it said why
            raise

    def _wait_size(self, rank: int) -> int:
        size = self._wait(rank, lambda heard: heard.size is not None).size
        assert size is not None
        return size

    def _wait(self, rank: int, is_there: Callable[[_Heard], bool]) -> _Heard:
        """Take messages until a member has said what we wait for."""
        key = (self._number, rank)
        while not is_there(self._heard[key]):
            try:
                assert self._inbox is not None
                note = self._inbox.wait(self._left(), check=self._check_members)
            except TransferTimeout as exc:
                member = self._members[rank]
                raise TransferTimeout(
                    f"group member {member!r} did not come within {self._seconds:g} s",
                    hint="it is frozen, busy, or in another operation", peer=member,
                ) from exc  # fmt: skip
            self._take(note.peer, note.payload)
        return self._heard[key]

    def _check_members(self) -> RaynixlError | None:
        for member in self._incarnations:
            error = self._loss(self._ranks[member])
            if error is not None and self._does_concern_us(self._ranks[member]):
                return error
        return None

    def _loss(self, rank: int) -> RaynixlError | None:
        """Return why a member cannot be reached any more."""
        member = self._members[rank]
        connection = self._agent.connector.current(member)
        if connection is None:
            return None
        if connection.incarnation != self._incarnations[member]:
            return PeerRestarted(f"group member {member!r} restarted", hint="make a new group", peer=member)
        if connection.lost is None:
            return None
        return PeerLost(
            f"group member {member!r} is lost: {connection.lost.message}",
            hint="go on with group.without(member)", peer=member,
        )  # fmt: skip

    def _does_concern_us(self, rank: int) -> bool:
        """Say whether a member that is gone fails this operation: not if its part in it is done.

        Those that need more of it than we do will fail, and tell us.
        """
        heard, is_done = self._heard[(self._number, rank)], False
        for place, step in enumerate(self._steps):
            if isinstance(step, Pull | Collect | Await) and step.source == rank:
                is_done = place < self._place or _is_satisfied(step, heard)
                if not is_done:
                    return True
        return not (is_done or self._left_after.get(rank, 0) >= self._number)

    def _take_all(self) -> None:
        assert self._inbox is not None
        for note in self._inbox.drain():
            self._take(note.peer, note.payload)

    def _take(self, member: str, payload: bytes) -> None:
        rank = self._ranks.get(member)
        if rank is None or len(payload) < _WORD.size:
            return  # not from this group
        kind, number, value, nbytes, length = _WORD.unpack_from(payload)
        text, body = payload[_WORD.size : _WORD.size + length], payload[_WORD.size + length :]
        if kind == _Kind.ABORT:
            raise _parse_abort(member, body)
        if kind == _Kind.LEAVE:
            self._left_after[rank] = value
            return
        if not self._number <= number <= self._number + _MAX_AHEAD:
            return  # of an operation that is over
        heard = self._heard[(number, rank)]
        heard.operation = Operation(text.decode(errors="replace"), nbytes)
        if number == self._number:
            self._check_operation(rank)
        if kind == _Kind.ANNOUNCE:
            self._take_region(heard, member, value, body)
        elif kind == _Kind.ACKNOWLEDGE:
            heard.acknowledged = True
        elif kind == _Kind.SIGNAL:
            heard.rounds.add(value)
        elif kind == _Kind.SIZE:
            heard.size = value

    def _check_operation(self, rank: int) -> None:
        theirs = self._heard[(self._number, rank)].operation
        if theirs is not None:
            self._operation.check(theirs, self._members[rank])

    def _take_region(self, heard: _Heard, member: str, ready: int, body: bytes) -> None:
        region = RemoteRegion.from_bytes(body[1:])
        if body[0] not in _BUFFERS.values() or region.owner != member or region.nbytes < ready:
            raise IntegrityError(f"group member {member!r} announced {ready} bytes of {region.label}", peer=member)
        heard.ready[body[0]], heard.regions[body[0]] = ready, region

    def _say(self, member: str, kind: _Kind, value: int, body: bytes = b"") -> None:
        text = self._operation.text.encode()
        payload = _WORD.pack(kind, self._number, value, self._operation.nbytes, len(text)) + text + body
        assert self._inbox is not None
        error = self._loss(self._ranks[member])
        if error is not None:
            raise error
        self._agent.send(member, self._inbox.topic, payload, timeout=self._left())

    def _others(self) -> list[str]:
        return [member for member in self._members if member != self._agent.name]

    def _left(self) -> float:
        return max(0.001, self._deadline - time.monotonic())


def _is_satisfied(step: Collect | Await | Pull, heard: _Heard) -> bool:
    match step:
        case Collect():
            return heard.acknowledged
        case Await():
            return step.round in heard.rounds
        case Pull():
            return False  # until it is behind us


_MEND = "call the same operation with buffers of one length on every member, in a new group"
_ABORTS = {error.__name__: error for error in (PeerLost, PeerRestarted, TransferTimeout, RangeError, ConfigError)}


def _parse_abort(member: str, body: bytes) -> RaynixlError:
    """Return the error that another member's step ended with."""
    kind, peer, message = ([*body.decode(errors="replace").split("\n", 2), "", ""])[:3]
    error = _ABORTS.get(kind, RaynixlError)
    hint = _MEND if error in (ConfigError, RangeError) else "go on with group.without(member)"
    return error(f"group member {member!r} says: {message}", hint=hint, peer=peer or member)
