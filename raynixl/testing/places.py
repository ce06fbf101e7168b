"""Places: where the far side of a check lives, and how to start, ask and kill it there."""

from __future__ import annotations

import enum
import multiprocessing
import pickle
import subprocess
import sys
from collections.abc import Callable
from typing import Any, Protocol

from raynixl.backends.table import Factory
from raynixl.config import AgentConfig
from raynixl.errors import ConfigError, RaynixlError
from raynixl.testing.far import PATIENCE, FarAgent

Launch = Callable[..., "subprocess.Popen[bytes]"]


class Place(enum.Enum):
    """Where the far side of a check lives."""

    HERE = "in this process"
    IDLE = "in another process"
    BUSY = "in another process whose Python is busy"


class Far(Protocol):
    """The far side, wherever it is."""

    def open(self, name: str) -> None:
        """Start a new agent there."""

    def ask(self, method: str, *arguments: Any) -> Any:
        """Have it do something (a method of `FarAgent`) and return the result, or raise its error."""

    def close_agent(self) -> None:
        """Close the agent properly."""

    def vanish(self) -> None:
        """Have the agent end without a word where that can be: its process is killed."""

    def close(self) -> None:
        """End it; idempotent."""


class FarHere:
    """A second agent of this process."""

    def __init__(self, factory: Factory, config: AgentConfig) -> None:
        self._factory = factory
        self._config = config
        self._far: FarAgent | None = None

    def open(self, name: str) -> None:
        """Make the agent."""
        self._far = FarAgent(self._factory, self._config, name)

    def ask(self, method: str, *arguments: Any) -> Any:
        """Call the method."""
        return getattr(self._far, method)(*arguments)

    def close_agent(self) -> None:
        """Close the agent."""
        if self._far is not None:
            self._far.close()
            self._far = None

    vanish = close_agent
    close = close_agent


class FarProcess:
    """An agent of another process, started at first use and again after it was killed.

    `launch` starts it in the way of `subprocess.Popen`, by default here, else wherever that is.
    """

    def __init__(
        self, factory: Factory, config: AgentConfig, *, is_busy: bool, launch: Launch = subprocess.Popen
    ) -> None:
        try:
            self._task = pickle.dumps((factory, config))
        except (pickle.PicklingError, AttributeError, TypeError) as exc:
            raise ConfigError(
                f"the factory {factory!r:.100} cannot be sent to another process",
                hint="define it at the top of a module, or check with places=(Place.HERE,)",
            ) from exc
        self._is_busy = is_busy
        self._launch = launch
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        """The process that runs."""
        assert self._process is not None
        return self._process.pid

    def open(self, name: str) -> None:
        """Start the process if it does not run, and the agent."""
        if self._process is None:
            self._start()
        self.ask("open", name)

    def ask(self, method: str, *arguments: Any) -> Any:
        """Send the call through the pipe."""
        try:
            self._pipe.send((method, arguments))
            if not self._pipe.poll(2 * PATIENCE):
                raise RaynixlError(f"the far process did not finish {method!r} within {2 * PATIENCE:g} s")
            is_well, answer = self._pipe.recv()
        except (EOFError, ConnectionError) as exc:
            how = self._ended()
            raise RaynixlError(f"the far process {how} during {method!r}", hint="look at its standard error") from exc
        if not is_well:
            raise answer
        return answer

    def close_agent(self) -> None:
        """Close the agent; the process serves the next."""
        if self._process is not None:
            self.ask("close")

    def vanish(self) -> None:
        """Kill the process."""
        if self._process is not None:
            self._process.kill()
            self._end()

    def close(self) -> None:
        """End the process, by force if it does not end by itself."""
        if self._process is None:
            return
        self._pipe.close()
        try:
            self._process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self._process.kill()
        self._end()

    def _start(self) -> None:
        self._pipe, theirs = multiprocessing.Pipe()
        with theirs:
            code = f"from raynixl.testing.far import main; main({theirs.fileno()})"
            self._process = self._launch([sys.executable, "-c", code], pass_fds=[theirs.fileno()])
        self._pipe.send((sys.path, self._is_busy))
        self._pipe.send_bytes(self._task)

    def _ended(self) -> str:
        """Say how a process that has closed its pipe ended."""
        assert self._process is not None
        try:
            code = self._process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            return "closed its pipe"
        return f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"

    def _end(self) -> None:
        assert self._process is not None
        self._process.wait(PATIENCE)
        self._pipe.close()
        self._process = None


def far_side(place: Place, factory: Factory, config: AgentConfig) -> Far:
    """Return the far side at a place."""
    if place is Place.HERE:
        return FarHere(factory, config)
    return FarProcess(factory, config, is_busy=place is Place.BUSY)
