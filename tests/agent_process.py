"""An agent in a process of its own, told what to do over a pipe; run as a script it is that process."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import warm

from raynixl import Agent, Region
from raynixl.host import process_state

HERE = Path(__file__).parent
LEAVE_SECONDS = 20.0


class FarAgent:
    """The near end: starts the process, asks it, stops, resumes and kills it."""

    def __init__(self, name: str, *, script: str = __file__, **settings: Any) -> None:
        self._child = warm.popen(
            [sys.executable, script, name, json.dumps(settings)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": str(HERE)},
        )  # fmt: skip
        self.pid = self._child.pid
        self.record: bytes = self._answer()["record"].encode()

    def ask(self, do: str, **fields: Any) -> Any:
        """Have the far end do something; return what it says."""
        assert self._child.stdin is not None
        self._child.stdin.write(json.dumps({"do": do, **fields}).encode() + b"\n")
        self._child.stdin.flush()
        return self._answer()["answer"]

    def stop(self) -> None:
        """Freeze the process, and wait until it is frozen."""
        os.kill(self.pid, signal.SIGSTOP)
        while process_state(self.pid) != "T":
            time.sleep(0.001)

    def resume(self) -> None:
        """Let it run again."""
        os.kill(self.pid, signal.SIGCONT)

    def kill(self) -> None:
        """Kill it at once."""
        self._child.kill()
        self._child.wait(LEAVE_SECONDS)

    def close(self) -> None:
        """Have it close its agent and leave; kill it if it does not."""
        self.resume()
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._child.stdin.close()
        try:
            self._child.wait(LEAVE_SECONDS)
        finally:
            self._child.kill()
            self._child.wait(LEAVE_SECONDS)
            self._child.stdout.close()

    def _answer(self) -> Any:
        assert self._child.stdout is not None
        line = self._child.stdout.readline()
        assert line, f"the far agent (pid {self.pid}) is gone"
        return json.loads(line)


@contextlib.contextmanager
def far_agent(name: str, *, script: str = __file__, **settings: Any) -> Iterator[FarAgent]:
    """A far agent that is gone afterwards; `script` is what its process runs, this one or one that serves more."""
    far = FarAgent(name, script=script, **settings)
    try:
        yield far
    finally:
        if far._child.poll() is None:
            far.close()
        else:
            far._child.stdin.close()  # type: ignore[union-attr]
            far._child.stdout.close()  # type: ignore[union-attr]


class Served:
    """What the far end does."""

    def __init__(self, agent: Agent) -> None:
        self.agent = agent
        self.regions: dict[str, Region] = {}

    def region(self, name: str, nbytes: int, memory: str = "arena") -> None:
        """Register memory of zeros."""
        if memory == "arena":
            self.regions[name] = self.agent.empty(nbytes, name=name)
        else:
            self.regions[name] = self.agent.register(bytearray(nbytes), name=name)

    def fill(self, name: str, value: int) -> None:
        """Set every byte."""
        self.regions[name].array()[:] = value

    def values(self, name: str) -> list[int]:
        """Which byte values occur."""
        return sorted(np.unique(self.regions[name].array()).tolist())

    def deregister(self, name: str) -> float:
        """Withdraw a region; say how long that took."""
        began = time.monotonic()
        self.agent.deregister(self.regions.pop(name))
        return time.monotonic() - began

    def read(self, record: str, region: str) -> int:
        """Read a region of another agent once; say the sum of its bytes."""
        theirs = self.agent.peer(record.encode())[region]
        mine = self.agent.empty(theirs.nbytes)
        self.agent.read(theirs, mine).wait(LEAVE_SECONDS)
        total = int(mine.array().sum())
        self.agent.deregister(mine)
        return total

    def notes(self) -> list[str]:
        """Take the notifications that are here."""
        return [note.payload.decode() for note in self.agent.notifications()]


def main(serving: type[Served] = Served, backends: tuple[str, ...] = ("shm",)) -> None:
    """Serve until the pipe closes."""
    from agent_tools import make_agent

    name, settings = sys.argv[1], json.loads(sys.argv[2])
    with make_agent(name, backends=backends, **settings) as agent:
        served = serving(agent)
        sys.stdout.write(json.dumps({"record": agent.record().decode()}) + "\n")
        sys.stdout.flush()
        for line in sys.stdin:
            request = json.loads(line)
            answer = getattr(served, request.pop("do"))(**request)
            sys.stdout.write(json.dumps({"answer": answer}) + "\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
