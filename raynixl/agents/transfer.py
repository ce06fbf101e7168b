"""Transfers: the handle of one posted operation."""

from __future__ import annotations

import enum
import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from raynixl.agents.ordering import order, stream_of
from raynixl.agents.waiters import Waiters
from raynixl.backends.base import can_be_followed
from raynixl.config import check_wait
from raynixl.errors import RaynixlError, TransferCancelled, TransferTimeout
from raynixl.messages import notification_bytes
from raynixl.native import CANCELLED, DONE, PENDING, DigestingJob, Job

if TYPE_CHECKING:
    from raynixl.agents.prepared import Prepared
    from raynixl.backends.base import Link
    from raynixl.cuda import Event


class Stage(enum.Enum):
    """How far a transfer has come."""

    CONNECTING = "connecting"
    COPYING = "copying"
    NOTIFYING = "notifying"
    DONE = "done"
    FAILED = "failed"


SETTLE_SECONDS = 5.0
_GPU_SETTLE_SECONDS = 0.02
_WORDS = 1 << 64
_DONE = Stage.DONE  # looked up a million times a second


@dataclass(frozen=True, slots=True)
class TransferStatistics:
    """What one transfer did.

    `seconds` counts from the post to the end, or until now; None if it ended inside the post of a prepared
    operation, which reads no clock.
    """

    peer: str
    backend: str
    nbytes: int
    blocks: int
    seconds: float | None
    stage: Stage


def settle_seconds(job: Job) -> float:
    """Return how long to wait, at most, until a job that was ended touches its memory no more.

    Threads of ours stop at their next piece, in less than a millisecond. A GPU cannot be stopped, and may be behind
    somebody's stream for long: the gates of the memory are held until it is through, whoever waits for that or not.
    """
    return _GPU_SETTLE_SECONDS if can_be_followed(job) else SETTLE_SECONDS


class Transfer:
    """One posted operation. It ends as done, or fails with one typed error, by its deadline.

    Until it has ended the memory at both ends belongs to it. After a failure the destination's bytes are
    undefined. Dropping the handle does not stop the operation. Any thread may use it.
    """

    __slots__ = (
        "_deadline",
        "_ended",
        "_error",
        "_is_starting",
        "_jobs",
        "_link",
        "_notify",
        "_posted",
        "_prepared",
        "_stage",
        "_waiters",
        "after",
        "wish",
    )  # fmt: skip

    def __init__(
        self,
        prepared: Prepared,
        stage: Stage,
        deadline: float = 0.0,
        notify: bytes | None = None,
        wish: tuple[int, int] | None = None,
    ) -> None:
        self.after: Event | None = None
        """What must have happened on a stream before it begins."""
        self._prepared = prepared
        self._stage = stage
        self._deadline = deadline
        self._notify = notify
        self.wish = wish
        """The (position, seed) to digest with; None where nobody asked, or the path cannot."""
        self._posted = time.monotonic() if stage is not Stage.DONE else 0.0
        self._ended = 0.0
        self._error: RaynixlError | None = None
        self._jobs: Sequence[Job] = ()
        self._link: Link | None = None
        self._is_starting = False  # a thread is handing it to the engine, or copies it inline
        self._waiters: Waiters | None = None

    def __repr__(self) -> str:
        return f"Transfer({self._prepared.summary}, {self._stage.value})"

    @property
    def done(self) -> bool:
        """Whether it has ended, well or not."""
        return self._stage is Stage.DONE or self._advance()

    @property
    def error(self) -> RaynixlError | None:
        """Why it failed, or None."""
        return self._error if self.done else None

    @property
    def nbytes(self) -> int:
        """How many bytes it moves."""
        return self._prepared.nbytes

    @property
    def peer(self) -> str:
        """The other agent's name."""
        return self._prepared.peer

    @property
    def digest(self) -> tuple[int, int] | None:
        """The digest of the bytes that it brought, if one was asked for and the path makes them; see `Agent.read`."""
        if self.wish is None or not self.done or self._error is not None:
            return None
        found = [job.digest if isinstance(job, DigestingJob) else None for job in self._jobs]
        sums = [one for one in found if one is not None]
        if not sums or len(sums) < len(found):
            return None
        return sum(one[0] for one in sums) % _WORDS, sum(one[1] for one in sums) % _WORDS

    @property
    def stats(self) -> TransferStatistics:
        """What it did so far."""
        seconds = (self._ended or time.monotonic()) - self._posted if self._posted else None
        plan = self._prepared
        return TransferStatistics(plan.peer, plan.backend, plan.nbytes, plan.count, seconds, self._stage)

    def wait(self, timeout: float | None = None, *, stream: Any = None) -> None:
        """Wait for the end; the waiting thread helps to copy. `timeout` bounds this wait, not the transfer.

        With `stream`, what is put on that stream of CUDA from now on waits instead, and this returns as soon as the
        transfer has begun. Whether it ends well is then asked later: a stream goes on also after one that failed.

        Raises:
            TransferTimeout: the deadline passed; or `timeout` did, and the transfer goes on.
            RaynixlError: whatever else ended the transfer.
            ConfigError: no stream, or none of a GPU of this process.
        """
        follower = None if stream is None else stream_of(stream, self._prepared.gpu)
        if self._stage is _DONE:
            return
        limit = self._deadline if timeout is None else min(self._deadline, time.monotonic() + check_wait(timeout))
        while not self._advance():
            if follower is not None and self._stage is Stage.COPYING and order(self._jobs, follower):
                return
            remaining = limit - time.monotonic()
            if remaining <= 0 and limit < self._deadline:
                raise TransferTimeout(
                    f"{self._prepared.summary} is still {self._stage.value} after {timeout:g} s",
                    hint="wait again, or cancel() it", peer=self.peer,
                )  # fmt: skip
            self._wait_stage(max(0.0, remaining))
        self._raise_error()

    def cancel(self) -> bool:
        """End it with `TransferCancelled` unless it has ended; return whether this call did.

        When this returns no thread of ours touches the memory any more; a GPU may, which cannot be stopped.
        """
        agent = self._prepared.agent
        with agent.settled:
            if self._advance_locked():
                return False
            error = TransferCancelled(f"{self._prepared.summary} was cancelled", peer=self.peer)
            self._end_locked(error)
        self._settle()
        return True

    def __await__(self) -> Generator[object, None, None]:
        """Wait for the end in an event loop."""
        if self._stage is not Stage.DONE and not self._advance():
            yield from self._ended_future().__await__()
        self._raise_error()

    def _raise_error(self) -> None:
        """Raise what ended it, once no thread of ours touches the memory: a piece takes less than a millisecond."""
        if self._error is not None:
            self._settle()
            raise self._error

    def _settle(self) -> None:
        """Wait until no thread of ours touches the memory any more."""
        if self._is_starting:
            with self._prepared.agent.settled:
                self._prepared.agent.settled.wait_for(lambda: not self._is_starting, SETTLE_SECONDS)
        for job in self._jobs:
            job.wait_settled(settle_seconds(job))

    async def _ended_future(self) -> None:
        with self._prepared.agent.settled:
            if self._advance_locked():
                return
            if self._waiters is None:
                self._waiters = Waiters()
            future = self._waiters.add()
        self._prepared.agent.watcher.add(self)
        try:
            await future
        finally:
            self._waiters.discard(future)

    def _wait_stage(self, remaining: float) -> None:
        """Wait until the stage may have changed."""
        if self._stage is Stage.COPYING:
            for job in self._jobs:
                if not job.wait(remaining):
                    return
            return
        stage = self._stage
        settled = self._prepared.agent.settled
        with settled:
            settled.wait_for(lambda: self._stage is not stage, remaining)

    def _advance(self) -> bool:
        """Move on as far as possible without waiting; return whether it has ended."""
        if self._stage in (Stage.DONE, Stage.FAILED):
            return True
        with self._prepared.agent.settled:
            return self._advance_locked()

    def _advance_locked(self) -> bool:
        if self._stage is Stage.COPYING:
            self._check_jobs()
        if self._stage is Stage.NOTIFYING:
            self._check_link()
        if self._stage in (Stage.DONE, Stage.FAILED):
            return True
        if time.monotonic() > self._deadline:
            self._end_locked(self._timeout())
            return True
        return False

    def _check_jobs(self) -> None:
        is_over = True
        for job in self._jobs:  # often one, at whose end every microsecond counts
            code = job.code
            if code == PENDING:
                is_over = False
            elif code != DONE:  # the first error ends it
                self._end_locked(self._prepared.translate(code, self._link))
                for other in self._jobs:
                    other.cancel(CANCELLED)
                return
        if is_over:
            self._notify_locked()

    def _notify_locked(self) -> None:
        """The data has landed; say so if asked to."""
        if self._notify is None:
            self._end_locked(None)
            return
        assert self._link is not None
        try:
            self._prepared.agent.control.notify(self._link, notification_bytes(self._notify))
        except RaynixlError as exc:
            self._end_locked(exc)
            return
        self._stage = Stage.NOTIFYING
        self._check_link()

    def _check_link(self) -> None:
        assert self._link is not None
        if self._link.flushed():
            self._end_locked(None)
        elif self._link.lost is not None:
            self._end_locked(self._link.lost.afresh())

    def _timeout(self) -> TransferTimeout:
        seconds = self._deadline - self._posted
        return TransferTimeout(
            f"{self._prepared.summary} was still {self._stage.value} at its deadline of {seconds:.3g} s",
            hint="the destination's bytes are undefined; see whether the peer is alive", peer=self.peer,
        )  # fmt: skip

    def _end_locked(self, error: RaynixlError | None) -> None:
        """Record the end and wake those who wait; `settled` is held."""
        self._ended = time.monotonic()
        self._error = error
        self._forget_event()
        self._stage = Stage.DONE if error is None else Stage.FAILED
        self._prepared.count_end(error)
        if error is not None:
            for job in self._jobs:
                job.cancel(CANCELLED)
        self._prepared.agent.settled.notify_all()
        if self._waiters is not None:
            self._waiters.wake()

    def _forget_event(self) -> None:
        """Give the event back, unless somebody starts it just now: programs without one would not wait."""
        if not self._is_starting:
            self.after = None

    def starts(self) -> bool:
        """Whether it still wants to be started, now that it can be; its memory is touched from here on.

        Whoever gets True calls `started` or `failed` next.
        """
        with self._prepared.agent.settled:
            self._is_starting = not self._advance_locked()
            return self._is_starting

    def started(self, jobs: Sequence[Job], link: Link | None) -> None:
        """Take the jobs that carry it; called once, by whoever posted it."""
        settled = self._prepared.agent.settled
        with settled:
            self._is_starting = False
            self._jobs, self._link = jobs, link
            self._forget_event()
            if self._stage is Stage.CONNECTING:
                self._stage = Stage.COPYING
                self._advance_locked()
            else:  # cancelled or timed out meanwhile
                for job in jobs:
                    job.cancel(CANCELLED)
            settled.notify_all()

    def failed(self, error: RaynixlError, jobs: Sequence[Job] = ()) -> None:
        """End it with an error unless it has ended. `jobs` have begun, and may still touch the memory."""
        settled = self._prepared.agent.settled
        with settled:
            self._is_starting = False
            self._jobs = jobs or self._jobs
            self._forget_event()
            if self._stage not in (Stage.DONE, Stage.FAILED):
                self._end_locked(error)
            settled.notify_all()

    @property
    def is_expected(self) -> bool:
        """Whether somebody must see to its end: it has a notification to send, or a coroutine awaits it."""
        return self._notify is not None or self._waiters is not None

    @property
    def jobs(self) -> Sequence[Job]:
        """The native jobs that carry it."""
        return self._jobs

    @property
    def deadline(self) -> float:
        """Monotonic second by which it ends."""
        return self._deadline
