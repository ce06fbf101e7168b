"""The crew of the MoE benchmark's baseline `mpi`: ranks that mpiexec starts, asked over a socket each."""

from __future__ import annotations

import importlib.util
import json
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import raynixl
from raynixl import errors
from raynixl.bench.crew import Fields
from raynixl.bench.process import ASK_SECONDS, start
from raynixl.errors import ConfigError, PeerLost, RaynixlError, TransferTimeout

_START_SECONDS, _LEAVE_SECONDS = 60.0, 10.0
_ROOT = Path(raynixl.__file__).parents[1]


def find_mpiexec() -> str:
    """Return the command that starts MPI's ranks: the one beside this Python, where the wheel puts it, or the user's.

    Raises:
        ConfigError: mpi4py or an MPI is missing.
    """
    found = shutil.which("mpiexec", path=str(Path(sys.executable).parent)) or shutil.which("mpiexec")
    if found is None or importlib.util.find_spec("mpi4py") is None:
        raise ConfigError("the baseline mpi needs MPI and mpi4py", hint="pip install mpich mpi4py")
    return found


class MpiCrew:
    """The ranks of one mpiexec. They end when their sockets close: with this object, or with this process."""

    def __init__(self, stack: ExitStack, world: int) -> None:
        self.world = world
        command = [find_mpiexec(), "-n", str(world), sys.executable, "-P", str(Path(__file__).with_name("start.py"))]
        with tempfile.TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
            path = f"{folder}/mpi"
            listener.bind(path)
            listener.listen(world)
            launcher = start([*command, "raynixl.bench.moe_mpi", str(_ROOT), path], stdin=subprocess.DEVNULL)
            stack.callback(_reap, launcher)
            self._ranks = _accept(stack, listener, launcher, world)

    def each(self, do: str, fields: list[Fields]) -> list[Fields]:
        """Have every rank do one thing at the same time, each with fields of its own."""
        for rank, own in zip(self._ranks, fields, strict=True):
            rank.tell(do, own)
        return [rank.hear(do) for rank in self._ranks]

    def some(self, do: str, ranks: range, **fields: Any) -> list[Fields]:
        """Have some ranks do one thing at the same time."""
        for rank in ranks:
            self._ranks[rank].tell(do, fields)
        return [self._ranks[rank].hear(do) for rank in ranks]


class _MpiRank:
    """One rank at the other end of a socket."""

    def __init__(self, sock: socket.socket) -> None:
        sock.settimeout(ASK_SECONDS)
        self._sock, self._lines = sock, sock.makefile("rb")
        self.number = int(self._line("start"))

    def tell(self, do: str, fields: Fields) -> None:
        try:
            self._sock.sendall(json.dumps({"do": do, **fields}).encode() + b"\n")
        except OSError as exc:
            raise self._lost() from exc

    def hear(self, do: str) -> Fields:
        reply: Fields = json.loads(self._line(do))
        if "error" in reply:
            raise getattr(errors, reply["error"], RaynixlError)(reply["message"], hint=reply["hint"])
        return reply

    def close(self) -> None:
        self._lines.close()
        self._sock.close()

    def _line(self, do: str) -> bytes:
        try:
            line = self._lines.readline()
        except TimeoutError as exc:
            raise TransferTimeout(f"a rank of MPI did not do {do!r} in time", hint="is it stopped?") from exc
        except OSError as exc:
            raise self._lost() from exc
        if not line:
            raise self._lost()
        return line

    def _lost(self) -> PeerLost:
        return PeerLost("a rank of MPI ended", hint="see what it wrote above", peer="mpi")


def _accept(stack: ExitStack, listener: socket.socket, launcher: subprocess.Popen[Any], world: int) -> list[_MpiRank]:
    """Return the ranks in their order, when all have come."""
    ranks: list[_MpiRank] = []
    deadline = time.monotonic() + _START_SECONDS
    listener.settimeout(0.2)
    while len(ranks) < world:
        try:
            rank = _MpiRank(listener.accept()[0])
        except TimeoutError:
            if launcher.poll() is not None or time.monotonic() > deadline:
                raise ConfigError("mpiexec did not start its ranks", hint="see what it wrote above") from None
            continue
        stack.callback(rank.close)
        ranks.append(rank)
    return sorted(ranks, key=lambda rank: rank.number)


def _reap(launcher: subprocess.Popen[Any]) -> None:
    """Wait until mpiexec has seen its ranks end; end it by force if it does not."""
    try:
        launcher.wait(_LEAVE_SECONDS)
    except subprocess.TimeoutExpired:
        launcher.terminate()  # it ends its ranks
        launcher.wait(_LEAVE_SECONDS)
