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
    PeerRestarted,
    RaynixlError,
    TransferTimeout,
)
from raynixl.host import host_identity
from raynixl.weights.callback import FlipCallback
from raynixl.weights.cargo import ImageCargo
from raynixl.weights.filling import Filler
from raynixl.weights.flipper import Flipper
from raynixl.weights.installer import Install, Installer
from raynixl.weights.plan import plan
from raynixl.weights.protocol import Answer, Fault, topic
from raynixl.weights.pulling import Pulling
from raynixl.weights.ranks import incarnation_of
from raynixl.weights.shards import Shards
from raynixl.weights.slots import Ready, Slot, Slots
from raynixl.weights.table import Table
from raynixl.weights.targeting import Describe, Incoming, Manifest, Pull, Subscribed
from raynixl.weights.throttle import Throttle

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
        self.worker: threading.Thread | None = None
        self.is_closed = False
        self._agent = agent
        self._name = name
        self._installer = installer
        self._served = served
        self._busy = threading.Lock()  # held by the one phase at work; protects all below but _stop
        limit = max(1, options.keep + (installer.way is Install.SWAP))
        self._slots = Slots(agent, limit, installer.spaces)
        self._telling = threading.Lock()  # protects _cargos
        self._cargos: dict[str, ImageCargo] = {}
        self._puller = ("", "")  # who has the last pull done, and in which life
        self._shards: Shards | None = None
        self._recorded = ""  # the table of the source over whose tensors the loader was run
        self._filler = Filler(agent, installer, self._slots, options.throttle)
        self._flipper = Flipper(
            agent, name, (installer, self._slots, callback), flip_timeout=options.flip_timeout, working=self._working,
            flipped=self._flipped, after=self._let_blobs_go,
        )  # fmt: skip
        self.lock = self._flipper.lock
        self._stopping = threading.Lock()  # protects _stop
        self._stop = threading.Event()

    def phases(self) -> dict[str, Callable[[str, bytes], bytes]]:
        """Return the handlers of this target's topics."""
        return {
            "target": self._on_describe, "table": self._on_table, "incoming": self._on_incoming,
            "manifest": self._on_manifest, "pull": self._answering(self._on_pull),
            "hold": self._answering(self._flipper.on_hold), "let-go": self._answering(self._flipper.on_let_go),
            "flip": self._answering(self._flipper.on_flip), "return": self._answering(self._flipper.on_return),
            "undo": self._answering(self._flipper.on_undo), "settle": self._flipper.settling.answer,
        }  # fmt: skip

    @property
    def version(self) -> int:
        """The version that is served."""
        return self._flipper.version

    def prepare(self) -> None:
        """Take memory for a version now, so that no push waits for it, if what is needed does not hang on the source.

        Raises:
            ConfigError: what was declared is not what the model has.
            RangeError: the host has too little memory.
        """
        if self._installer.is_recorded:  # only a source says what its loader will need
            return
        shards = self._installer.needs(())
        try:
            layout = plan([shards], [shards]).images[0]
        except ConfigError:  # parts of its tensors are nobody's, such as padding: only with a source it is known how
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

    def _end_orphan(self) -> None:
        """End a pull that nobody waits for: whoever asked for it is gone, and somebody else asks for something."""
        name, life = self._puller
        if life and incarnation_of(self._agent, name) != life:
            self.stop()

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
        self._end_orphan()
        try:
            with self._working(deadline):
                shards = self._shards
                if shards is None or not self._has_recorded(request.table):
                    shards = self._shards = self._installer.needs(self._infos(request, deadline))
                    self._recorded = request.table
                return Subscribed(
                    table=shards.table.digest, rank=shards.rank, host=host, version=self.version,
                    held=self._slots.held(),
                ).to_bytes()  # fmt: skip
        except RaynixlError as exc:
            return Subscribed(table="0" * 32, rank=0, host=host, version=self.version, fault=Fault.of(exc)).to_bytes()

    def _has_recorded(self, table: str) -> bool:
        """Whether the loader has been run over the tensors of such a source: for a large model that takes seconds."""
        return self._installer.is_recorded and self._recorded == table and not self._installer.has_changed()

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
        self._end_orphan()
        cargo = ImageCargo(Incoming.from_bytes(payload))
        with self._telling:
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
        self._flipper.settling.finish()
        with self._working(arrived + request.seconds):
            began = time.monotonic()
            self._check_version(request.version)
            self._puller = (peer, incarnation_of(self._agent, peer))
            self._flipper.let_readers_go_on()
            with self._telling:
                cargo = self._cargos.pop(request.plan, None)
                if cargo is None:
                    return Answer(version=self.version, has_forgotten=True)
                self._cargos[request.plan] = cargo  # as the one that was used last
            self._flipper.ready = None
            self._let_blobs_go()
            work = Pulling(self._agent, self._name, peer, request, arrived + request.seconds, stop)
            slot, times = self._filler.bring(work, cargo)
            if self._installer.has_changed():  # looked at when the bytes are here: it takes a moment for each tensor
                self._installer.check(cargo.layout)
            self._installer.plan(slot.arenas)  # made here, and so not while readers wait
            self._flipper.ready = Ready(
                request.push, request.version, slot, arrived + request.flip_seconds, request.digests, cargo.chunk_nbytes
            )
            return Answer(
                version=self.version, seconds=time.monotonic() - began, pull_seconds=times.pull_seconds,
                verify_seconds=times.verify_seconds, nbytes=cargo.layout.nbytes, origin_nbytes=times.origin_nbytes,
                peer_nbytes=times.peer_nbytes, around=tuple(Fault.of(error) for error in times.failures),
                holder=slot.holder(self._agent),
            )  # fmt: skip

    # What the phases share

    def _flipped(self, version: int, slot: Slot) -> None:
        """Note what is served, while readers are still out."""
        if self._installer.way is Install.SWAP:
            self._slots.active = slot
            if not self._slots.has_free():
                layout = slot.arenas.layout
                threading.Thread(target=self._grow, args=(layout,), name="raynixl-slot", daemon=True).start()
        self._served(version)

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
        self._flipper.ready = None
        self._flipper.let_readers_go_on()
        self._let_blobs_go()
        self._slots.release()

    def _let_blobs_go(self) -> None:
        self._filler.blobs.release(self._agent)

    def _check_version(self, version: int) -> None:
        if version <= self.version:
            raise ConfigError(
                f"{self._agent.name!r} serves version {self.version} of {self._name!r}, {version} is not above it",
                hint="versions go up",
            )
