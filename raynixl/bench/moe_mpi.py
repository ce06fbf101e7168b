"""A rank of the MoE benchmark's baseline `mpi`: MPI's Alltoallv, in a process that mpiexec starts.

    mpiexec -n RANKS python -P start.py raynixl.bench.moe_mpi ROOT SOCKET

Each rank connects to the measuring side's socket, says its rank and answers requests there until that side is gone.
"""

from __future__ import annotations

import itertools
import os
import socket
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from mpi4py import MPI

from raynixl.bench.moe_rank import MoeRank
from raynixl.bench.target import answer_requests

if TYPE_CHECKING:
    import torch


class MpiExchange:
    """The world's all-to-all. A row is a datatype of its own, so that counts stay small.

    MPICH takes longer to copy a rank's rows for itself than all others' together (measured: 11 of 21 ms), so there is
    also a way that leaves them out, as somebody would who has noticed.
    """

    def __init__(self, *, skips_own: bool) -> None:
        self.skips_own = skips_own
        self._world = MPI.COMM_WORLD
        self._types: dict[int, Any] = {}

    def begin_equal(self, source: torch.Tensor, into: torch.Tensor) -> Callable[[], object]:
        """Begin to exchange one row with each rank; return what waits for the end."""
        request = self._world.Ialltoall([source.numpy(), MPI.BYTE], [into.numpy(), MPI.BYTE])
        return request.Wait

    def rows(self, source: torch.Tensor, sent: list[int], into: torch.Tensor, received: list[int]) -> None:
        """Exchange so many rows with each rank; with ourselves, unless it skips them."""
        kind = self._type_of(source.shape[1])
        self._world.Alltoallv([source.numpy(), self._parts(sent), kind], [into.numpy(), self._parts(received), kind])

    def _parts(self, counts: list[int]) -> tuple[list[int], list[int]]:
        """Return how many rows of each rank are exchanged, and where they are."""
        starts = [0, *itertools.accumulate(counts[:-1])]
        if self.skips_own:
            counts = [0 if rank == self._world.rank else count for rank, count in enumerate(counts)]
        return counts, starts

    def _type_of(self, nbytes: int) -> Any:
        if nbytes not in self._types:
            self._types[nbytes] = MPI.BYTE.Create_contiguous(nbytes).Commit()
        return self._types[nbytes]


def _connect(path: str) -> None:
    """Make the measuring side's socket our standard input and output."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.connect(path)
        sock.sendall(b"%d\n" % MPI.COMM_WORLD.rank)
        os.dup2(sock.fileno(), 0)
        os.dup2(sock.fileno(), 1)


if __name__ == "__main__":
    _connect(sys.argv[3])
    answer_requests(MoeRank({"mpi": MpiExchange(skips_own=False), "mpi-split": MpiExchange(skips_own=True)}))
