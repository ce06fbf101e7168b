"""The relay: a receiver's part in a swarm: it asks what to pull from whom, pulls, and says what became of it."""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from raynixl.errors import BackendUnavailable, IntegrityError, PeerLost, RaynixlError, TransferTimeout
from raynixl.weights.cargo import Giver
from raynixl.weights.protocol import Holder, topic
from raynixl.weights.receiver import Receiver, is_origin, reason
from raynixl.weights.relaying import Batch, Failed, Next
from raynixl.weights.workers import start_threads

if TYPE_CHECKING:
    from raynixl.agents import Agent

_ROOM = 4  # chunks under way or waiting at a time
_ASK_SECONDS = 10.0
_LOOK_SECONDS = 0.2  # how often a pull that waits for chunks looks whether it is over


def next_topic(name: str, push: str) -> str:
    """Return the topic under which receivers of a push ask for chunks, and are answered when there are some."""
    return topic(name, f"next/{push}")


def done_topic(name: str, push: str) -> str:
    """Return the topic under which they say what they have meanwhile."""
    return topic(name, f"done/{push}")


@dataclass(slots=True)
class Relay:
    """One receiver's part in a push. `coordinator` is the agent that answers; `holder` is this receiver's slot.

    `have` are chunks that lie there already, verified. `is_delta` says that it is the delta that is relayed.
    """

    agent: Agent
    receiver: Receiver
    name: str
    push: str
    coordinator: str
    holder: Holder
    have: Sequence[int] = ()
    is_delta: bool = False
    _changed: threading.Condition = field(default_factory=threading.Condition)  # protects all below
    _todo: deque[tuple[int, str]] = field(default_factory=deque)
    _pulling: int = 0
    _done: list[int] = field(default_factory=list)
    _failed: list[Failed] = field(default_factory=list)
    _have: set[int] = field(default_factory=set)
    _is_asking: bool = False
    _is_over: bool = False
    _error: BaseException | None = None
    _corrupt: IntegrityError | None = None
    _givers: dict[str, Giver] = field(default_factory=dict)

    def run(self, *, threads: int) -> None:
        """Bring everything in.

        Raises:
            RaynixlError: nobody can give some chunk any more, whoever coordinates is gone, or it did not come in time.
        """
        helpers = start_threads(self._work, threads, name="raynixl-relay")
        if not helpers:
            raise BackendUnavailable(
                f"{self.agent.name!r} can start no thread to bring weights in",
                hint="raise the limit of threads (ulimit -u, pids.max)", peer=self.agent.name,
            )  # fmt: skip
        try:
            self._talk()
        finally:
            with self._changed:
                self._is_over = True
                self._changed.notify_all()
            for helper in helpers:
                helper.join()
        if self._error is not None:
            raise self._error
        self._report(is_last=True)

    def _talk(self) -> None:
        """Ask for more whenever there is room, until all is here."""
        total = len(self.receiver.digests)
        self._have.update(self.have)
        self._done.extend(self.have)
        first: Holder | None = self.holder
        while True:
            with self._changed:
                left = self.receiver.left()
                self._changed.wait_for(lambda: self._error is not None or self._has_room(total), min(left, 1.0))
                if self._error is not None or len(self._have) >= total:
                    return
                if not self._has_room(total):
                    continue
                room = _ROOM - len(self._todo) - self._pulling
                message = self._take_news(room, first)
                self._is_asking = True
            try:
                self._take(self._ask(message))
            finally:
                with self._changed:
                    self._is_asking = False
            first = None

    def _has_room(self, total: int) -> bool:
        return len(self._have) >= total or len(self._todo) + self._pulling <= _ROOM // 2

    def _take_news(self, room: int, holder: Holder | None) -> bytes:
        message = Next(self._done, self._failed, room, holder, self.is_delta).to_bytes()
        self._done, self._failed = [], []
        return message

    def _ask(self, message: bytes) -> Batch:
        """Ask for chunks; stop waiting for the answer if this pull is over before: whoever coordinates may be frozen.

        Raises:
            RaynixlError: it is gone, or does not answer, or the pull is over.
        """
        timeout = max(0.001, min(_ASK_SECONDS, self.receiver.left()))
        reply = self.agent.ask(self.coordinator, next_topic(self.name, self.push), message, timeout=timeout)
        while not reply.done:
            with contextlib.suppress(TransferTimeout):  # it is looked at again
                reply.wait(_LOOK_SECONDS)
            self.receiver.left()
            if self._error is not None:
                raise self._error
        return Batch.from_bytes(reply.wait())

    def _take(self, batch: Batch) -> None:
        if batch.fault is not None:
            raise batch.fault.error() if self._corrupt is None else self._corrupt
        total = len(self.receiver.digests)
        with self._changed:
            self._givers.update((one.name, Giver(one.name, one.remotes())) for one in batch.holders)
            self._todo.extend(one for one in batch.chunks if one[0] < total and one[0] not in self._have)
            self._changed.notify_all()

    def _report(self, *, is_last: bool = False) -> None:
        """Say what is here if no question is to be asked now; the answer means nothing."""
        with self._changed:
            waits = self._is_asking or is_last or not self._has_room(len(self.receiver.digests))
            if not (self._done or self._failed) or not waits:
                return  # it goes with the question that is asked now
            message = self._take_news(0, None)
        reply = self.agent.ask(self.coordinator, done_topic(self.name, self.push), message, timeout=_ASK_SECONDS)
        if is_last:
            reply.wait()

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._todo or self._is_over or self._error is not None)
                if self._is_over or self._error is not None:
                    return
                chunk, holder = self._todo.popleft()
                self._pulling += 1
            try:
                failed = self._bring(chunk, holder)
            except BaseException as exc:  # noqa: BLE001 - thread edge: `run` raises it
                with self._changed:
                    self._pulling -= 1
                    self._error = exc
                    self._changed.notify_all()
                return
            with self._changed:
                self._pulling -= 1
                if failed is None:
                    self._have.add(chunk)
                    self._done.append(chunk)
                else:
                    self._failed.append(failed)
                self._changed.notify_all()
            self._report_safely()

    def _report_safely(self) -> None:
        try:
            self._report()
        except RaynixlError as exc:
            with self._changed:
                self._error = exc
                self._changed.notify_all()

    def _bring(self, chunk: int, holder: str) -> Failed | None:
        """Pull one chunk; return how that failed, if it did and others may do better."""
        try:
            if is_origin(holder):
                self.receiver.from_origin(chunk)
            else:
                self.receiver.from_peer(chunk, self._giver(holder))
        except RaynixlError as exc:
            self.receiver.left()  # raises if it is our own time that is over
            if isinstance(exc, IntegrityError):
                self._corrupt = exc
            return Failed(chunk=chunk, holder=holder, why=reason(exc))
        return None

    def _giver(self, holder: str) -> Giver:
        with self._changed:
            giver = self._givers.get(holder)
        if giver is None:
            raise PeerLost(f"{holder!r} has told nobody where its chunks lie", peer=holder)
        return giver
