"""A lane: one stream of a GPU, the word of host memory that tells how far it has come, and the jobs in flight on it."""

from __future__ import annotations

import ctypes
from collections import deque
from typing import TYPE_CHECKING

from raynixl import cuda

if TYPE_CHECKING:
    from raynixl.backends.nvlink_program import GpuJob

WORD_NBYTES = 64  # a word has a line of the cache for itself


class Lane:
    """What is put on it ends in order: each end has a number, which a kernel writes to the lane's word.

    `sequence`, `load`, `stream` and `pending` are protected by the mover's lock.
    """

    __slots__ = ("_event", "_word", "address", "counter", "flag", "load", "pending", "sequence", "stream")

    def __init__(self, stream: int, word: int, flag: int, counter: int) -> None:
        """Use a stream, a word of pinned memory as the host and as the GPU address it, and two numbers of the GPU's.

        All are zero, or as an earlier lane has left them.
        """
        self.stream = stream
        self.address = word
        self.flag = flag
        self.counter = counter
        self.pending: deque[GpuJob] = deque()
        self._word = ctypes.c_uint64.from_address(word)
        self._event = 0
        self.sequence = self.reached
        self.load = 0
        """What was put on the stream since the lane was idle: CUDA takes about 1000 things, then it waits."""

    @property
    def reached(self) -> int:
        """The number of the last end so far."""
        return int(self._word.value)

    @property
    def is_idle(self) -> bool:
        """Whether all that was put on it has ended."""
        return self._word.value >= self.sequence

    @property
    def has_ended(self) -> bool:
        """Whether a job has ended that is still on the lane."""
        try:
            return self.pending[0].sequence <= self._word.value
        except IndexError:
            return False

    def take_number(self) -> int:
        """Return the number of the next end. It is taken before anything is put: no two ends ever have the same."""
        if self.is_idle:
            self.load = 0
        self.sequence += 1
        return self.sequence

    def add(self, job: GpuJob) -> None:
        """Take a job in, in the order of their numbers: threads may come in another."""
        place = len(self.pending)
        while place and self.pending[place - 1].sequence > job.sequence:
            place -= 1
        self.pending.insert(place, job)

    def finish(self) -> list[int]:
        """Finish the jobs that have ended, and take them off the lane; return whom to tell."""
        reached = self._word.value
        armed: list[int] = []
        while self.pending and self.pending[0].sequence <= reached:
            armed += self.pending[0].finish(0)
            self.pending.popleft()  # not before: who sees none may ask a job's code
        return armed

    def fail(self, code: int) -> list[int]:
        """Finish all jobs with a code: nothing is done for them any more; return whom to tell."""
        armed: list[int] = []
        while self.pending:
            armed += self.pending[0].finish(code)
            self.pending.popleft()
        return armed

    def order(self, stream: int, device: int) -> None:
        """Have another stream, of a GPU, wait for what is on the lane now; the lane's context is current."""
        if not self._event:
            self._event = cuda.event_create()
        cuda.event_record(self._event, self.stream)
        with cuda.on(device):  # whose default stream it may be
            cuda.stream_wait_event(stream, self._event)

    def close(self) -> None:
        """Give stream and event back; nothing is on the lane."""
        if self._event:
            cuda.event_destroy(self._event)
        cuda.stream_destroy(self.stream)
