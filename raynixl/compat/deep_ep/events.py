"""Events: DeepEP's handles of work that goes on, behind the caller's back or on a stream of a GPU."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Any

from raynixl.errors import ConfigError, RaynixlError
from raynixl.moe import cuda_device


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
    """A point in work: all that was put on the current stream of a GPU so far, where this process uses one.

    For work of the host it has been reached, since whoever calls has done all before it, unless `work` says what is
    left. `gpu` is the GPU whose stream is meant: that of this thread if not given.
    """

    def __init__(self, work: Work | None = None, *, gpu: int | None = None) -> None:
        number = cuda_device.used_gpu() if gpu is None and work is None else gpu
        self._work = work
        self._follow = None if number is None else cuda_device.gpu(number).mark()

    def __repr__(self) -> str:
        if self._follow is not None:
            return "EventHandle(on a stream)"
        return f"EventHandle({'reached' if self._work is None or self._work.is_done else 'under way'})"

    def current_stream_wait(self) -> None:
        """Have what is put on the current stream from now on come after this point; for work of the host, wait."""
        if self._work is not None:
            self._work.finish()
        if self._follow is not None:
            self._follow()


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
        """Wait for the event, as `EventHandle` does, and call the hook, if there is one, once.

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
