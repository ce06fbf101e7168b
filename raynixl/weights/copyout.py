"""The copy-out: weights brought into a copy, and digested in the same pass where they are plain bytes of the host."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from raynixl.native import Native
from raynixl.native.rows import cut_rows, group_rows
from raynixl.weights.bank import HostBank
from raynixl.weights.fusing import DESTINATION, NBYTES, POSITION, SOURCE, Fused, fuse
from raynixl.weights.workers import run_workers

if TYPE_CHECKING:
    from raynixl.agents import Agent
    from raynixl.weights.bank import Bank
    from raynixl.weights.outgoing import OutgoingRows
    from raynixl.weights.tensors import CopyJob

U64 = NDArray[np.uint64]
_GROUP_NBYTES = 4 << 20  # work for one thread at a time


@dataclass(slots=True, eq=False)
class Digests:
    """What is to be digested of a copy for a version: all rows of a plan at this source, those left to do, the sums."""

    rows: OutgoingRows
    version: int
    threads: int
    sums: U64
    left: U64 | None = None
    """Rows that have not been digested yet; None for all."""

    @staticmethod
    def of(rows: OutgoingRows, version: int, threads: int) -> Digests:
        """Begin with nothing digested."""
        return Digests(rows, version, threads, rows.zeros())

    def finish(self, bank: Bank) -> None:
        """Digest what is left."""
        left = self.rows.at(bank) if self.left is None else self.left
        if len(left):
            bank.digest(left, self.sums, seed=self.version, threads=self.threads)
        self.left = np.zeros((0, 4), np.uint64)


class CopyOut:
    """A copy job that digests on its way; what goes together is found out once for each plan."""

    def __init__(self, job: CopyJob) -> None:
        self._job = job
        self._for: OutgoingRows | None = None
        self._fused: Fused | None = None
        self._groups: list[U64] = []

    def run(self, agent: Agent, bank: Bank, digests: Digests) -> None:
        """Copy everything, and digest of it what can be digested as it is copied."""
        if not isinstance(bank, HostBank) or not len(self._job.rows):
            self._job.run(agent)
            return
        if self._fused is None or self._for is not digests.rows:
            self._fused, self._for = fuse(self._job.rows, digests.rows.at(bank)), digests.rows
            cut = cut_rows(self._fused.both, _GROUP_NBYTES, size=NBYTES, moving=(SOURCE, DESTINATION, POSITION))
            self._groups = group_rows(cut, _GROUP_NBYTES, size=NBYTES)
        _copy_groups(agent.native, self._groups, digests)
        self._job.run_rows(agent, self._fused.copies)
        self._job.run_others()
        digests.left = self._fused.digests


def _copy_groups(native: Native, groups: list[U64], digests: Digests) -> None:
    """Copy and digest groups of rows on several threads, each with sums of its own."""
    sums = [np.zeros_like(digests.sums) for _ in range(max(1, digests.threads))]
    free = list(range(len(sums)))  # pop() and append() are atomic under the interpreter's lock

    def one(number: int) -> None:
        mine = free.pop()
        native.digest_copy(groups[number], sums[mine], digests.version)
        free.append(mine)

    run_workers(one, len(groups), threads=len(sums))
    for own in sums:
        np.add(digests.sums, own, out=digests.sums)
