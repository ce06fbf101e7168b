"""Subscription: a target's weights, replaced by a pushed version all at once and never half."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING

from raynixl.errors import AgentClosed, ConfigError, PeerRestarted, RaynixlError, TransferTimeout
from raynixl.weights.arenas import Arenas
from raynixl.weights.callback import FlipCallback, OnFlip
from raynixl.weights.installer import Install, Installer, Steps
from raynixl.weights.layout import Layout
from raynixl.weights.protocol import Answer, Fault, Flip, Match, Pull, check_weights_name, topic
from raynixl.weights.receiver import PullTimes, Receiver
from raynixl.weights.section import guard_forward
from raynixl.weights.versionlock import VersionLock

if TYPE_CHECKING:
    from raynixl.agents import Agent
    from raynixl.weights.tensors import Model

logger = logging.getLogger(__name__)
_PHASES = ("match", "pull", "flip")
_CLOSE_SECONDS = 10.0
_PIN_SECONDS = 60.0  # how much longer than flip_timeout a reader waits for a flip, on_flip included

_GROW_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class _Ready:
    """A verified version in the shadow slot, until its push is over."""

    push: str
    version: int
    slot: Arenas
    until: float


class Subscription:
    """A model that follows what is pushed under a name. Made by `subscribe`; close it, or use it as a context manager.

    A version lands in a shadow slot while the old one is served, so that its memory is at most twice the model's.
    Tensors that a user took out of the model before a flip may be overwritten by the version after the next.
    """

    def __init__(
        self, agent: Agent, name: str, model: Model, *, on_flip: OnFlip | None, install: str, flip_timeout: float
    ) -> None:
        self.name = check_weights_name(name)
        if agent.control.serves(topic(name, "pull")):
            raise ConfigError(
                f"{agent.name!r} has subscribed to {name!r} already", hint="close that subscription first"
            )
        self._agent = agent
        self._callback = FlipCallback(on_flip)
        self._flip_timeout = flip_timeout
        self._installer = Installer(model, install, owner=agent.name)
        self._lock = VersionLock()
        self._busy = threading.Lock()  # held by the one phase at work; protects all below but _version, _stop
        self._worker: threading.Thread | None = None
        self._shadow: Arenas | None = Arenas(agent, self._installer.layout)
        self._active: Arenas | None = None
        self._ready: _Ready | None = None
        self._layouts: dict[str, Layout] = {}
        self._changed = threading.Condition()  # protects _version, _stop, _is_closed
        self._version = 0
        self._stop = threading.Event()
        self._is_closed = False
        self._unhook = guard_forward(model, self._lock, timeout=flip_timeout + _PIN_SECONDS)
        agent.serve(topic(name, "match"), self._answering(self._on_match), threaded=True)
        agent.serve(topic(name, "pull"), self._answering(self._on_pull), threaded=True)
        agent.serve(topic(name, "flip"), self._answering(self._on_flip_request), threaded=True)

    def __repr__(self) -> str:
        state = "closed" if self._is_closed else f"version {self._version}"
        return f"Subscription({self.name!r}, {state}, install={self._installer.way.value!r})"

    def __enter__(self) -> Subscription:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def version(self) -> int:
        """The version that is served, or 0 before the first."""
        return self._version

    @contextmanager
    def pinned(self) -> Iterator[int]:
        """Read the weights inside: they are of one version, which is returned, to the end of the section.

        A module's root forward is such a section by itself. Sections nest; a flip waits for them, up to flip_timeout.

        Raises:
            TransferTimeout: a flip did not end.
        """
        thread = self._lock.pin(self._flip_timeout + _PIN_SECONDS)
        try:
            yield self._version
        finally:
            self._lock.unpin(thread)

    def wait_version(self, version: int, timeout: float) -> int:
        """Wait until this version or a later one is served; return which.

        Raises:
            TransferTimeout: it did not come in time.
            AgentClosed: the subscription was closed meanwhile.
        """
        with self._changed:
            arrived = self._changed.wait_for(lambda: self._version >= version or self._is_closed, timeout)
            if self._version >= version:
                return self._version
        if arrived:
            raise AgentClosed(f"the subscription to {self.name!r} was closed", hint="subscribe again")
        raise TransferTimeout(
            f"version {version} of {self.name!r} did not come within {timeout:g} s; {self._version} is served",
            hint="see the report of the push",
        )

    def close(self) -> None:
        """Follow no more versions. The model keeps the one it has, which stays valid. Idempotent."""
        with self._changed:
            if self._is_closed:
                return
            self._is_closed = True
            self._stop.set()
            self._changed.notify_all()
        for phase in _PHASES:
            self._agent.control.unserve(topic(self.name, phase))
        self._unhook()
        if self._worker is threading.current_thread():
            return  # called by on_flip: the flip lets go at its end
        if not self._busy.acquire(timeout=_CLOSE_SECONDS):
            logger.warning("a push of %r is still at work in %r; it lets go of the memory at its end", self.name, self)
            return
        try:
            self._let_go()
        finally:
            self._busy.release()

    def _let_go(self) -> None:
        self._ready = None
        for slot in (self._shadow, self._active):
            if slot is not None:
                slot.release()
        self._shadow = self._active = None

    # The phases of a push

    def _answering(self, phase: Callable[[bytes], Answer]) -> Callable[[str, bytes], bytes]:
        """Return a handler that sends errors whole, tables and names of peers included."""

        def answer(_peer: str, payload: bytes) -> bytes:
            try:
                return phase(payload).to_bytes()
            except RaynixlError as exc:
                return Answer(fault=Fault.of(exc), version=self._version).to_bytes()

        return answer

    def _on_match(self, payload: bytes) -> Answer:
        request = Match.from_bytes(payload)
        deadline = time.monotonic() + request.seconds
        with self._working(deadline):
            self._layout_of(request.layout, request.source, deadline)
            return Answer(version=self._version)

    def _on_pull(self, payload: bytes) -> Answer:
        request = Pull.from_bytes(payload)
        arrived = time.monotonic()
        deadline, until = arrived + request.seconds, arrived + request.flip_seconds
        stop = self._begin()
        with self._working(deadline):
            began = time.monotonic()
            self._check_version(request.manifest.version)
            layout = self._layout_of(request.manifest.layout, request.holders[0].name, deadline)
            slot = self._slot(layout)
            times = self._bring(request, slot, deadline, stop)
            self._ready = _Ready(request.push, request.manifest.version, slot, until)
            return Answer(
                version=self._version, seconds=time.monotonic() - began, pull_seconds=times.pull_seconds,
                verify_seconds=times.verify_seconds, nbytes=layout.nbytes,
            )  # fmt: skip

    def _on_flip_request(self, payload: bytes) -> Answer:
        request = Flip.from_bytes(payload)
        began = time.monotonic()
        with self._working(began + request.seconds):
            ready, self._ready = self._ready, None
            if ready is None or ready.push != request.push:
                raise PeerRestarted(f"{self._agent.name!r} has not pulled this push", hint="push again")
            until = min(began + request.seconds, ready.until)
            with self._lock.writing(min(self._flip_timeout, max(0.0, until - time.monotonic()))):
                entered = time.monotonic()
                if entered >= until:  # this process may have been frozen meanwhile, and was given up
                    raise TransferTimeout("the flip came after the push's deadline", hint="push again")
                old = self._steps(ready.slot).run(self._agent)
                self._serve(ready)
                note = self._callback.run(ready.version)
                seconds = time.monotonic() - entered
            del old
            return Answer(version=ready.version, seconds=seconds, note=note)

    def _serve(self, ready: _Ready) -> None:
        """The new version is in place: say so, and make its slot the active one."""
        if self._installer.way is Install.SWAP:
            self._active, self._shadow = self._shadow, self._active
            if self._shadow is None:
                threading.Thread(target=self._grow, args=(ready.slot.layout,), name="raynixl-slot", daemon=True).start()
        with self._changed:
            self._version = ready.version
            self._changed.notify_all()

    def _steps(self, slot: Arenas) -> Steps:
        """Return what installs a slot; looks again, as the model may have changed since the pull."""
        if self._installer.has_changed():
            self._installer.check(slot.layout)
        return self._installer.plan(slot)

    def _grow(self, layout: Layout) -> None:
        """Make the second slot between two pushes: fresh memory comes at 1 GB/s or less, and a push has a deadline."""
        try:
            with self._working(time.monotonic() + _GROW_SECONDS):
                if self._shadow is None:
                    self._shadow = Arenas(self._agent, layout)
                    if self._agent.is_closed:
                        self._shadow.release()
        except RaynixlError as exc:  # the next pull tries again, and tells whoever pushes
            logger.info("no second slot for %r yet: %s", self.name, exc)

    @contextmanager
    def _working(self, deadline: float) -> Iterator[None]:
        """Let one phase work at a time."""
        if not self._busy.acquire(timeout=max(0.0, deadline - time.monotonic())):
            raise TransferTimeout(f"another push is at work at {self._agent.name!r}", hint="push again later")
        self._worker = threading.current_thread()
        try:
            if self._is_closed:
                raise AgentClosed(f"the subscription to {self.name!r} was closed", hint="subscribe again")
            yield
        finally:
            self._worker = None
            if self._is_closed:
                self._let_go()
            self._busy.release()

    def _begin(self) -> threading.Event:
        """End the pull that is at work, which nobody waits for any more; return what ends the new one."""
        with self._changed:
            self._stop.set()
            self._stop = threading.Event()
            return self._stop

    def _check_version(self, version: int) -> None:
        if version <= self._version:
            raise ConfigError(
                f"{self._agent.name!r} serves version {self._version} of {self.name!r}, {version} is not above it",
                hint="versions go up",
            )

    def _layout_of(self, digest: str, source: str, deadline: float) -> Layout:
        """Return a layout that fits, asked for at its source if it is not known."""
        layout = self._layouts.get(digest)
        if layout is None:
            left = max(0.001, deadline - time.monotonic())
            layout = Layout.from_bytes(
                self._agent.ask(source, topic(self.name, "layout"), digest.encode(), timeout=left).wait()
            )
            if layout.digest != digest:
                raise ConfigError(f"{source!r} sent another layout than it named", hint="run one version of raynixl")
            self._installer.check(layout)
            self._layouts = {digest: layout}
        elif self._installer.has_changed():
            self._installer.check(layout)
        return layout

    def _slot(self, layout: Layout) -> Arenas:
        """Return the shadow slot, made for this layout."""
        self._ready = None
        if self._shadow is not None and (self._shadow.layout != layout or self._installer.lies_in(self._shadow)):
            self._shadow.release()
            self._shadow = None
        if self._shadow is None:
            self._shadow = Arenas(self._agent, layout)
        return self._shadow

    def _bring(self, request: Pull, slot: Arenas, deadline: float, stop: threading.Event) -> PullTimes:
        times = Receiver(self._agent, request, slot, deadline, stop).run(threads=self._agent.config.copy_threads)
        self._installer.plan(slot)  # made here, and so not while readers wait
        return times


def subscribe(
    agent: Agent,
    name: str,
    module_or_state_dict: Model,
    *,
    on_flip: OnFlip | None = None,
    install: str = "auto",
    flip_timeout: float = 10.0,
) -> Subscription:
    """Let a module or state dict follow what is pushed under a name.

    `install` is 'swap' (repoint each tensor's data: a flip costs microseconds a tensor), 'copy' (into the tensors'
    own memory) or 'auto': swap for modules in host memory, else copy. `on_flip(version)`, or `on_flip()`, runs after
    each flip, before any reader sees the new version; it may run the module. `flip_timeout` is how long a flip waits
    for readers.

    Takes memory for a second copy of the model at once, so that no push waits for it.

    Raises:
        ConfigError: an argument is unusable, or this agent has subscribed to the name already.
        RangeError: the host has too little memory for a second copy.
    """
    if not 0 < flip_timeout < 1e6:
        raise ConfigError(f"flip_timeout={flip_timeout!r} is not usable", hint="give a positive number of seconds")
    return Subscription(agent, name, module_or_state_dict, on_flip=on_flip, install=install, flip_timeout=flip_timeout)
