"""The follower: a target's part in pushes: it says what it needs, pulls versions into slots, and flips to them."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from raynixl.errors import (
    AgentClosed,
    ConfigError,
    IntegrityError,
    PeerRestarted,
    RaynixlError,
    TransferTimeout,
)
from raynixl.host import host_identity
from raynixl.weights.callback import FlipCallback
from raynixl.weights.cargo import ImageCargo
from raynixl.weights.filling import Filler
from raynixl.weights.installer import Install, Installer
from raynixl.weights.plan import plan
from raynixl.weights.protocol import Answer, Fault, topic
from raynixl.weights.pulling import Pulling
from raynixl.weights.shards import Shards
from raynixl.weights.slots import Ready, Slot, Slots
from raynixl.weights.streams import Streams
from raynixl.weights.table import Table
from raynixl.weights.targeting import Describe, Incoming, Manifest, Pull, Return, Step, Subscribed
from raynixl.weights.throttle import Throttle
from raynixl.weights.versionlock import VersionLock

if TYPE_CHECKING:
    from raynixl.agents import Agent

logger = logging.getLogger(__name__)
_GROW_SECONDS = 60.0
_KEPT_PLANS = 4


@dataclass(frozen=True, slots=True)
class Options:
    """How a target takes versions."""

    flip_timeout: float
    keep: int
    throttle: Throttle


class Follower:
    """Answers the phases of a push for one target. `served` is called, with the version, when one has been flipped to.

    One phase works at a time; a pull that begins ends the one before, which nobody waits for any more.
    """

    def __init__(
        self, agent: Agent, name: str, installer: Installer, *, callback: FlipCallback, options: Options,
        served: Callable[[int], None],
    ) -> None:  # fmt: skip
        self.version = 0
        self._streams = Streams(installer.tensors)
        self.lock = VersionLock(self._streams.note)
        self.worker: threading.Thread | None = None
        self.is_closed = False
        self._agent = agent
        self._name = name
        self._installer = installer
        self._callback = callback
        self._options = options
        self._served = served
        self._busy = threading.Lock()  # held by the one phase at work; protects all below but _stop
        limit = max(1, options.keep + (installer.way is Install.SWAP))
        self._slots = Slots(agent, limit, installer.spaces)
        self._cargos: dict[str, ImageCargo] = {}
        self._shards: Shards | None = None
        self._ready: Ready | None = None
        self._filler = Filler(agent, installer, self._slots, options.throttle)
        self._held = ""  # the push that holds the readers
        self._timer: threading.Timer | None = None  # lets them in if nobody else does
        self._stopping = threading.Lock()  # protects _stop
        self._stop = threading.Event()

    def phases(self) -> dict[str, Callable[[str, bytes], bytes]]:
        """Return the handlers of this target's topics."""
        return {
            "target": self._on_describe, "table": self._on_table, "incoming": self._on_incoming,
            "manifest": self._on_manifest, "pull": self._answering(self._on_pull),
            "hold": self._answering(self._on_hold), "let-go": self._answering(self._on_let_go),
            "flip": self._answering(self._on_flip), "return": self._answering(self._on_return),
        }  # fmt: skip

    def prepare(self) -> None:
        """Take memory for a version now, so that no push waits for it, if what is needed does not hang on the source.

        Raises:
            RangeError: the host has too little memory.
        """
        try:
            shards = self._installer.needs(())
            layout = plan([shards], [shards]).images[0]
        except ConfigError:  # a recorded or declared target: only a source says more
            return
        self._slots.make(layout)

    @property
    def held_versions(self) -> list[int]:
        """The versions that lie here whole."""
        return self._slots.versions

    def stop(self) -> threading.Event:
        """End the pull that is at work; return what ends the next one."""
        with self._stopping:
            self._stop.set()
            self._stop = threading.Event()
            return self._stop

    def close(self, timeout: float) -> None:
        """Let go of the memory once no phase works; idempotent."""
        self.is_closed = True
        with self._stopping:
            self._stop.set()
        if self.worker is threading.current_thread():
            return  # called by on_flip: the flip lets go at its end
        if not self._busy.acquire(timeout=timeout):
            logger.warning("a push of %r is still at work; it lets go of the memory at its end", self._name)
            return
        try:
            self._let_go()
        finally:
            self._busy.release()

    # The phases

    def _answering(self, phase: Callable[[str, bytes], Answer]) -> Callable[[str, bytes], bytes]:
        """Return a handler that sends errors whole, tables and names of peers included."""

        def answer(peer: str, payload: bytes) -> bytes:
            try:
                return phase(peer, payload).to_bytes()
            except RaynixlError as exc:
                return Answer(fault=Fault.of(exc), version=self.version).to_bytes()

        return answer

    def _on_describe(self, _peer: str, payload: bytes) -> bytes:
        request = Describe.from_bytes(payload)
        deadline = time.monotonic() + request.seconds
        host = host_identity()
        try:
            with self._working(deadline):
                self._shards = self._installer.needs(self._infos(request, deadline))
                return Subscribed(
                    table=self._shards.table.digest, rank=self._shards.rank, host=host, version=self.version,
                    held=self._slots.held(),
                ).to_bytes()  # fmt: skip
        except RaynixlError as exc:
            return Subscribed(table="0" * 32, rank=0, host=host, version=self.version, fault=Fault.of(exc)).to_bytes()

    def _infos(self, request: Describe, deadline: float) -> Sequence:  # type: ignore[type-arg]
        """Return the tensors of the source, asked for only where a loader is recorded."""
        if not self._installer.is_recorded:
            return ()
        left = max(0.001, deadline - time.monotonic())
        where = topic(self._name, "layout")
        return Table.from_bytes(
            self._agent.ask(request.source, where, request.table.encode(), timeout=left).wait()
        ).tensors

    def _on_table(self, _peer: str, _payload: bytes) -> bytes:
        shards = self._shards
        if shards is None:
            raise PeerRestarted(f"{self._agent.name!r} has not said what it needs", hint="push again")
        return shards.table.to_bytes()

    def _on_incoming(self, _peer: str, payload: bytes) -> bytes:
        cargo = ImageCargo(Incoming.from_bytes(payload))
        with self._busy:
            self._cargos[cargo.plan] = cargo
            while len(self._cargos) > _KEPT_PLANS:
                del self._cargos[next(iter(self._cargos))]
        return b""

    def _on_manifest(self, _peer: str, payload: bytes) -> bytes:
        slot = self._slots.find(int(payload) if payload.isdigit() else 0)
        if slot is None:
            raise PeerRestarted(f"{self._agent.name!r} holds no such version", hint="push again")
        return Manifest(slot.version, slot.arenas.layout.digest, slot.digests).to_bytes()

    def _on_pull(self, peer: str, payload: bytes) -> Answer:
        request = Pull.from_bytes(payload)
        arrived = time.monotonic()
        self._check_version(request.version)  # a late or wrong one ends no pull that is at work
        stop = self.stop()
        with self._working(arrived + request.seconds):
            began = time.monotonic()
            self._check_version(request.version)
            self._let_readers_go_on()
            cargo = self._cargos.get(request.plan)
            if cargo is None:
                raise PeerRestarted(f"{self._agent.name!r} was not told of this plan", hint="push again")
            if self._installer.has_changed():
                self._installer.check(cargo.layout)
            self._ready = None
            self._filler.blobs.release(self._agent)
            work = Pulling(self._agent, self._name, peer, request, arrived + request.seconds, stop)
            slot, times = self._filler.bring(work, cargo)
            self._installer.plan(slot.arenas)  # made here, and so not while readers wait
            self._ready = Ready(
                request.push, request.version, slot, arrived + request.flip_seconds, request.digests, cargo.chunk_nbytes
            )
            return Answer(
                version=self.version, seconds=time.monotonic() - began, pull_seconds=times.pull_seconds,
                verify_seconds=times.verify_seconds, nbytes=cargo.layout.nbytes, origin_nbytes=times.origin_nbytes,
                peer_nbytes=times.peer_nbytes, around=tuple(Fault.of(error) for error in times.failures),
            )  # fmt: skip

    def _on_hold(self, _peer: str, payload: bytes) -> Answer:
        """Keep readers out, as the first half of a flip of several ranks at once."""
        request = Step.from_bytes(payload)
        began = time.monotonic()
        with self._working(began + request.seconds):
            ready = self._prepared(request.push)
            self.lock.hold(min(self._options.flip_timeout, request.seconds))
            self._held = request.push
            left = max(0.0, min(began + request.seconds, ready.until) - time.monotonic())
            self._timer = threading.Timer(left, self._let_readers_in, (request.push,))
            self._timer.daemon = True
            self._timer.start()
            return Answer(version=self.version, seconds=time.monotonic() - began)

    def _let_readers_in(self, push: str) -> None:
        """Nobody said to flip, or not to: whoever pushes is gone."""
        with self._busy:
            if self._held == push:
                self._ready = None
                self._let_readers_go_on()

    def _let_readers_go_on(self) -> None:
        """End a hold, if there is one, whose push is over or was given up."""
        self._forget_timer()
        if self._held:
            self._held = ""
            self.lock.let_go()

    def _forget_timer(self) -> None:
        timer, self._timer = self._timer, None
        if timer is not None:
            timer.cancel()

    def _on_let_go(self, _peer: str, payload: bytes) -> Answer:
        self._let_readers_in(Step.from_bytes(payload).push)
        return Answer(version=self.version)

    def _on_flip(self, _peer: str, payload: bytes) -> Answer:
        request = Step.from_bytes(payload)
        began = time.monotonic()
        with self._working(began + request.seconds):
            ready = self._prepared(request.push)
            self._ready = None
            until = min(began + request.seconds, ready.until)
            with self._alone(request.push, until):
                entered = time.monotonic()
                if entered >= until:  # this process may have been frozen meanwhile, and was given up
                    raise TransferTimeout("the flip came after the push's deadline", hint="push again")
                old = self._install(ready.slot, ready.version, ready)
                note = self._callback.run(ready.version)
                seconds = time.monotonic() - entered
            del old
            self._filler.blobs.release(self._agent)
            return Answer(version=ready.version, seconds=seconds, note=note)

    def _on_return(self, _peer: str, payload: bytes) -> Answer:
        request = Return.from_bytes(payload)
        began = time.monotonic()
        with self._working(began + request.seconds):
            self._let_readers_go_on()
            slot = self._slots.find(request.version)
            if slot is None:
                held = ", ".join(map(str, self._slots.versions)) or "none"
                raise ConfigError(
                    f"{self._agent.name!r} does not hold version {request.version} of {self._name!r}; it holds {held}",
                    hint="subscribe with keep=2 or more",
                )
            with self._alone("", began + request.seconds):
                old = self._install(slot, request.version, None)
                note = self._callback.run(request.version)
            del old
            return Answer(version=request.version, seconds=time.monotonic() - began, note=note)

    # What the phases share

    def _prepared(self, push: str) -> Ready:
        if self._ready is None or self._ready.push != push:
            raise PeerRestarted(f"{self._agent.name!r} has not pulled this push", hint="push again")
        return self._ready

    @contextmanager
    def _alone(self, push: str, until: float) -> Iterator[None]:
        """Have the weights alone: readers have left, or are held already by the first half of this push's flip.

        What they have put on a GPU is through as well, and so is what was put there inside when they go on.
        """
        with self._readers_out(push, until), self._streams.alone(self._patience(until)):
            yield

    @contextmanager
    def _readers_out(self, push: str, until: float) -> Iterator[None]:
        if push and self._held == push:
            self._forget_timer()
            self._held = ""
            self.lock.adopt()
            try:
                yield
            finally:
                self.lock.let_go()
        else:
            with self.lock.writing(self._patience(until)):
                yield

    def _patience(self, until: float) -> float:
        return min(self._options.flip_timeout, max(0.0, until - time.monotonic()))

    def _install(self, slot: Slot, version: int, ready: Ready | None) -> list:  # type: ignore[type-arg]
        """Put a version in place and say so; return the old values.

        From here on the slot counts as holding it: what was pulled and never flipped is no version.

        Raises:
            IntegrityError: that failed midway. The old version is back, if it lies here; the error says if not.
        """
        before = self._slots.find(self.version)
        if self._installer.has_changed():  # since the pull
            self._installer.check(slot.arenas.layout)
        old = self._installer.install(slot.arenas, None if before is None else before.arenas, self._agent)
        if ready is not None:
            self._slots.fill(slot, version, ready.digests, ready.chunk_nbytes)
        if self._installer.way is Install.COPY and not self._installer.is_installed(
            slot.arenas, version, slot.digest, self._agent
        ):
            raise IntegrityError(
                f"the tensors of {self._agent.name!r} do not hold version {version} of {self._name!r} after its flip",
                hint="something else writes them; they are undefined until the next push",
            )
        self.version = version
        if self._installer.way is Install.SWAP:
            self._slots.active = slot
            if not self._slots.has_free():
                layout = slot.arenas.layout
                threading.Thread(target=self._grow, args=(layout,), name="raynixl-slot", daemon=True).start()
        self._served(version)
        return old

    def _grow(self, layout: object) -> None:
        """Make the next slot between two pushes: fresh memory comes at 1 GB/s or less, and a push has a deadline."""
        try:
            with self._working(time.monotonic() + _GROW_SECONDS):
                if not self._slots.has_free():
                    self._slots.make(layout)  # type: ignore[arg-type]
                    if self._agent.is_closed:
                        self._slots.release()
        except RaynixlError as exc:  # the next pull tries again, and tells whoever pushes
            logger.info("no further slot for %r yet: %s", self._name, exc)

    @contextmanager
    def _working(self, deadline: float) -> Iterator[None]:
        """Let one phase work at a time."""
        if not self._busy.acquire(timeout=max(0.0, deadline - time.monotonic())):
            raise TransferTimeout(f"another push is at work at {self._agent.name!r}", hint="push again later")
        self.worker = threading.current_thread()
        try:
            if self.is_closed:
                raise AgentClosed(f"the subscription to {self._name!r} was closed", hint="subscribe again")
            yield
        finally:
            self.worker = None
            if self.is_closed:
                self._let_go()
            self._busy.release()

    def _let_go(self) -> None:
        self._ready = None
        self._let_readers_go_on()
        self._filler.blobs.release(self._agent)
        self._slots.release()

    def _check_version(self, version: int) -> None:
        if version <= self.version:
            raise ConfigError(
                f"{self._agent.name!r} serves version {self.version} of {self._name!r}, {version} is not above it",
                hint="versions go up",
            )
