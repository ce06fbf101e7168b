"""Events: DeepEP's handles of work that goes on, for work that has no stream of a GPU to go on in."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Any

from raynixl.errors import ConfigError, RaynixlError


class Work:
    """What is left of an operation that was started: done once, by whoever waits for it first."""

    def __init__(self, rest: Callable[[], None]) -> None:
        self._rest: Callable[[], None] | None = rest
        self._error: RaynixlError | None = None

    @property
    def is_done(self) -> bool:
        """Whether nothing of it is left."""
        return self._rest is None

    def finish(self) -> None:
        """Do the rest, or raise again what it ended with."""
        if self._rest is not None:
            rest, self._rest = self._rest, None
            try:
                rest()
            except RaynixlError as exc:
                self._error = exc.afresh()
                raise
        elif self._error is not None:
            raise self._error.afresh()


class EventHandle:
    """A point in the work of a buffer. Without any work it has been reached: whoever calls has done all before it."""

    def __init__(self, work: Work | None = None) -> None:
        self._work = work

    def __repr__(self) -> str:
        return f"EventHandle({'reached' if self._work is None or self._work.is_done else 'under way'})"

    def current_stream_wait(self) -> None:
        """Return when the work before this point is done."""
        if self._work is not None:
            self._work.finish()


class EventOverlap:
    """An event with DeepEP's conveniences: `with event:` computes while it is under way, and waits at the end."""

    def __init__(self, event: EventHandle | None = None, extra_tensors: tuple[Any, ...] | None = None) -> None:
        self.event = event
        self.extra_tensors = extra_tensors
        self.hook_after_wait: Callable[[], None] | None = None
        self._releases = False

    def __repr__(self) -> str:
        return f"EventOverlap({self.event!r})"

    def current_stream_wait(self, release_handle: bool = False) -> None:
        """Return when the event is reached, and call the hook, if there is one, once.

        Raises:
            ConfigError: there is no event: the operation was not asynchronous.
        """
        if self.event is None:
            raise ConfigError(
                "this EventOverlap has no event",
                hint="its operation is done already: wait only where async_finish or async_with_compute_stream was set",
            )  # fmt: skip
        self.event.current_stream_wait()
        hook, self.hook_after_wait = self.hook_after_wait, None
        if hook is not None:
            hook()
        if release_handle:
            self.event = None

    def register_hook_after_wait(self, hook_after_wait: Callable[[], None]) -> None:
        """Have a function called after the next `current_stream_wait`."""
        if self.hook_after_wait is not None:
            raise ConfigError("this EventOverlap has a hook already", hint="wait for it first")
        self.hook_after_wait = hook_after_wait

    def __call__(self, release_handle: bool = False) -> EventOverlap:
        """Say whether the end of the `with` that follows drops the event."""
        self._releases = release_handle
        return self

    def __enter__(self) -> EventOverlap:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        releases, self._releases = self._releases, False
        if self.event is not None:
            self.current_stream_wait(release_handle=releases)


def wait_for(previous: EventOverlap | EventHandle | None) -> None:
    """Wait for the event that a call names as the one before it."""
    event = previous.event if isinstance(previous, EventOverlap) else previous
    if event is not None:
        event.current_stream_wait()
