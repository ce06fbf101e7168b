"""The target's process as the measuring side sees it: started, asked, and always reaped."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any, Protocol

import raynixl
from raynixl import errors
from raynixl.errors import ConfigError, PeerLost, RaynixlError, TransferTimeout

ASK_SECONDS = 120.0
"""Filling and digesting gigabytes takes a while; nothing asked takes longer."""
_LEAVE_SECONDS = 5.0
_ROOT = str(Path(raynixl.__file__).parents[1])
_START = str(Path(__file__).with_name("start.py"))


def with_environment(variables: Mapping[str, str]) -> list[str]:
    """Return the start of a command that adds variables to the environment it inherits."""
    return ["env", *(f"{name}={value}" for name, value in variables.items())]


def start(command: Sequence[str], **options: Any) -> subprocess.Popen[Any]:
    """Start a command in a session of its own: `subprocess.Popen` with its options.

    Raises:
        ConfigError: there is no such command.
    """
    try:
        return subprocess.Popen(command, start_new_session=True, **options)
    except OSError as exc:
        raise ConfigError(f"{command[0]!r} does not start: {exc.strerror}", hint="see --launch") from exc


def signal_all(leader: subprocess.Popen[Any], number: int) -> None:
    """Send a signal to a process that `start` started and to those that it has started, while it is not reaped."""
    if leader.poll() is None:
        os.killpg(leader.pid, number)


class Asked(Protocol):
    """A target, wherever it runs."""

    def ask(self, do: str, **fields: Any) -> dict[str, Any]:
        """Answer one request."""

    def close(self) -> None:
        """End it; idempotent."""


class TargetProcess:
    """A child process that runs a module which answers requests; ends with this object or with this process.

    It is in a session of its own, so that Ctrl-C reaches the measuring side alone, which then ends it. `environment`
    is added to what it inherits. `launch` is a command that runs a command elsewhere and stands before it; whatever it
    puts between us and the target, the end of its standard input ends the target, and the signals go to all of the
    session that runs here.
    """

    def __init__(
        self,
        module: str = "raynixl.bench.target",
        environment: Mapping[str, str] = MappingProxyType({}),
        *,
        launch: Sequence[str] = (),
    ) -> None:
        command = [*launch, *with_environment(environment), sys.executable, "-P", _START, module, _ROOT]
        self._child = start(
            command,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        self._pending = b""

    def __enter__(self) -> TargetProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._child.pid

    def ask(self, do: str, **fields: Any) -> dict[str, Any]:
        """Have one thing done over there.

        Raises:
            PeerLost: the process ended.
            TransferTimeout: it did not answer in time.
            RaynixlError: what went wrong over there.
        """
        self.tell(do, **fields)
        return self.hear(do)

    def tell(self, do: str, **fields: Any) -> None:
        """Have one thing begun over there; `hear` its end before anything else is asked."""
        assert self._child.stdin is not None
        try:
            self._child.stdin.write(json.dumps({"do": do, **fields}).encode() + b"\n")
            self._child.stdin.flush()
        except (BrokenPipeError, ValueError) as exc:
            raise self._lost() from exc

    def hear(self, do: str) -> dict[str, Any]:
        """Return the reply to what was told. Raises as `ask` does."""
        reply: dict[str, Any] = json.loads(self._read_line(do))
        if "error" in reply:
            kind = getattr(errors, reply["error"], RaynixlError)
            raise kind(reply["message"], hint=reply["hint"])
        return reply

    def pause(self) -> None:
        """Stop it, so that it uses no processor until it is resumed; only what may be asked nothing meanwhile."""
        signal_all(self._child, signal.SIGSTOP)

    def resume(self) -> None:
        """Let it go on."""
        signal_all(self._child, signal.SIGCONT)

    def close(self) -> None:
        """End the process: by closing its input, then by force."""
        self.resume()
        for pipe in (self._child.stdin, self._child.stdout):
            if pipe is not None:
                try:
                    pipe.close()
                except BrokenPipeError:
                    continue
        try:
            self._child.wait(_LEAVE_SECONDS)
        except subprocess.TimeoutExpired:
            signal_all(self._child, signal.SIGKILL)
            self._child.wait(_LEAVE_SECONDS)

    def _read_line(self, do: str) -> bytes:
        assert self._child.stdout is not None
        fd, deadline = self._child.stdout.fileno(), time.monotonic() + ASK_SECONDS
        while b"\n" not in self._pending:
            if not select.select([fd], [], [], max(0.0, deadline - time.monotonic()))[0]:
                raise TransferTimeout(
                    f"the target process did not do {do!r} within {ASK_SECONDS:g} s", hint="is it stopped?"
                )
            data = os.read(fd, 1 << 16)
            if not data:
                raise self._lost()
            self._pending += data
        line, _, self._pending = self._pending.partition(b"\n")
        return line

    def _lost(self) -> PeerLost:
        try:
            code = self._child.wait(_LEAVE_SECONDS)
        except subprocess.TimeoutExpired:
            return PeerLost("the target process closed its pipe", hint="run the command again")
        how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
        return PeerLost(f"the target process {how}", hint="run the command again", peer="target")
