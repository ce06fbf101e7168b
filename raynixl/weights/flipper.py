"""The flipper: how a target comes to serve another version, by itself or together with the ranks of its replica."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING

from raynixl.errors import ConfigError, IntegrityError, PeerRestarted, RaynixlError, TransferTimeout
from raynixl.weights.callback import FlipCallback
from raynixl.weights.installer import Install, Installer
from raynixl.weights.pact import Pact, Stage, Terms
from raynixl.weights.protocol import Answer
from raynixl.weights.ranks import incarnation_of
from raynixl.weights.settling import Settling
from raynixl.weights.slots import Ready, Slot, Slots
from raynixl.weights.streams import Streams
from raynixl.weights.targeting import Hold, Return, Step
from raynixl.weights.versionlock import VersionLock

if TYPE_CHECKING:
    from raynixl.agents import Agent

logger = logging.getLogger(__name__)
_SETTLE_SECONDS = 60.0  # for which a flip that ranks have settled waits for its turn


class Flipper:
    """Flips one target. One phase works at a time: `working` lets it, until a deadline.

    `flipped` is called with the version and its slot while readers are still out, `after` once they may go on.
    """

    def __init__(
        self, agent: Agent, name: str, parts: tuple[Installer, Slots, FlipCallback], *, flip_timeout: float,
        working: Callable[[float], AbstractContextManager[None]], flipped: Callable[[int, Slot], None],
        after: Callable[[], None],
    ) -> None:  # fmt: skip
        self._installer, self._slots, self._callback = parts
        self._streams = Streams(self._installer.tensors)
        self.version = 0
        self.lock = VersionLock(self._streams.note)
        self.ready: Ready | None = None
        self._agent = agent
        self._name = name
        self._flip_timeout = flip_timeout
        self._working = working
        self._flipped = flipped
        self._after = after
        self._held = ""  # the push that holds the readers
        self._given_up = ""  # the last one that was told to let them go on: it may have come too soon
        self.settling = Settling(agent, name, self._conclude)

    # The phases

    def on_hold(self, peer: str, payload: bytes) -> Answer:
        """Keep readers out, as the first half of a flip of several ranks at once."""
        request = Hold.from_bytes(payload)
        began = time.monotonic()
        with self._working(began + request.seconds):
            self.let_readers_go_on()
            if request.version:
                slot = self._slot(request.version)
                until = began + request.seconds
                self.ready = Ready(request.push, request.version, slot, until, slot.digests, slot.chunk_nbytes)
            ready = self._prepared(request.push)
            self.lock.hold(min(self._flip_timeout, request.seconds))
            self._held = request.push
            if self._given_up == request.push:
                self.let_readers_go_on()
                raise PeerRestarted(f"{self._agent.name!r} was told to let its readers go on", hint="push again")
            others = tuple(name for name in request.ranks if name != self._agent.name)
            leader, until = (peer, incarnation_of(self._agent, peer)), min(began + request.seconds, ready.until)
            self.settling.begin(Pact(Terms(request.pact, request.push, leader, others, until, self.version)))
            return Answer(version=self.version, seconds=time.monotonic() - began)

    def on_let_go(self, _peer: str, payload: bytes) -> Answer:
        """Let readers in again: with the version that was flipped to, or with the old one if that has not been."""
        request = Step.from_bytes(payload)
        self._given_up = request.push
        pact = self.settling.of(request.push)
        if pact is not None and pact.stage is Stage.FLIPPED:
            pact.end()
        else:
            self._let_readers_in(request.push, request.seconds)
        return Answer(version=self.version)

    def on_flip(self, _peer: str, payload: bytes) -> Answer:
        """Serve what was pulled, or held for."""
        request = Step.from_bytes(payload)
        began = time.monotonic()
        pact = self.settling.of(request.push)
        if pact is not None and not pact.begin():
            return self._settled(pact, request.seconds)
        try:
            with self._working(began + request.seconds):
                ready = self._prepared(request.push)
                answer = self._flip(ready, min(began + request.seconds, ready.until))
        except BaseException:
            if pact is not None:
                pact.reach(Stage.BACK)
            raise
        if pact is not None:
            pact.reach(Stage.FLIPPED)
        return answer

    def on_undo(self, _peer: str, payload: bytes) -> Answer:
        """Go back to the version before a flip: another rank of the replica did not flip."""
        request = Step.from_bytes(payload)
        began = time.monotonic()
        pact = self.settling.of(request.push)
        if pact is None:
            raise PeerRestarted(f"{self._agent.name!r} has not held for this push", hint="push again")
        with self._working(began + request.seconds):
            is_led = pact.begin_back()
            if is_led and pact.stage is Stage.FLIPPING:
                try:
                    self._return(pact.terms.before, began + request.seconds)
                except BaseException:
                    pact.reach(Stage.FLIPPED)
                    raise
                pact.reach(Stage.BACK)
            if is_led:
                self.ready = None
                self.let_readers_go_on()
        pact.wait_over(request.seconds)
        if pact.stage is Stage.FLIPPED:
            raise PeerRestarted(f"{self._agent.name!r} and its replica serve the new version", hint="push again")
        return Answer(version=self.version)

    def on_return(self, _peer: str, payload: bytes) -> Answer:
        """Serve a version again that lies here."""
        request = Return.from_bytes(payload)
        began = time.monotonic()
        with self._working(began + request.seconds):
            self.let_readers_go_on()
            note = self._return(request.version, began + request.seconds)
            return Answer(version=request.version, seconds=time.monotonic() - began, note=note)

    # What others need

    def let_readers_go_on(self) -> None:
        """End a hold, if there is one, whose push is over or was given up. The one phase at work may do so."""
        self.settling.end()
        if self._held:
            self._held = ""
            self.lock.let_go()

    # How it is done

    def _settled(self, pact: Pact, seconds: float) -> Answer:
        """Tell whoever pushes how the ranks have settled a flip without it: it was not heard of for some time."""
        pact.wait_over(seconds)
        if pact.stage is not Stage.FLIPPED:
            raise PeerRestarted(f"{self._agent.name!r} has gone back with its replica", hint="push again")
        return Answer(version=self.version)

    def _conclude(self, pact: Pact, end: Stage) -> None:
        """End a flip that nobody leads any more, as all ranks do."""
        name, push = self._agent.name, pact.terms.push
        level = logging.INFO if pact.stage is end else logging.WARNING
        logger.log(level, "whoever flipped %r at %r is gone; its ranks end it: %s", self._name, name, end)
        try:
            if pact.stage is Stage.FLIPPING:
                with self._working(time.monotonic() + _SETTLE_SECONDS):
                    self._flip(self._prepared(push), time.monotonic() + self._flip_timeout)
                    pact.reach(Stage.FLIPPED)
            elif pact.stage is Stage.FLIPPED and end is Stage.BACK:
                with self._working(time.monotonic() + _SETTLE_SECONDS):
                    self._return(pact.terms.before, time.monotonic() + self._flip_timeout)
                    pact.reach(Stage.BACK)
            else:
                self._let_readers_in(push, _SETTLE_SECONDS)
        except RaynixlError as exc:
            pact.reach(Stage.BACK if pact.stage is Stage.FLIPPING else pact.stage)
            logger.error("%r alone of its replica serves version %d of %r: %s", name, self.version, self._name, exc)

    def _let_readers_in(self, push: str, seconds: float) -> None:
        with self._working(time.monotonic() + seconds):
            if self._held == push:
                self.ready = None
                self.let_readers_go_on()

    def _flip(self, ready: Ready, until: float) -> Answer:
        self.ready = None
        with self._alone(ready.push, until):
            entered = time.monotonic()
            if entered >= until:  # this process may have been frozen meanwhile, and was given up
                raise TransferTimeout("the flip came after the push's deadline", hint="push again")
            old = self._install(ready.slot, ready.version, ready)
            note = self._callback.run(ready.version)
            seconds = time.monotonic() - entered
        del old
        self._after()
        return Answer(version=ready.version, seconds=seconds, note=note)

    def _return(self, version: int, until: float) -> str:
        """Serve a version again; return what on_flip raised."""
        slot = self._slot(version)
        with self._alone("", until):
            old = self._install(slot, version, None)
            note = self._callback.run(version)
        del old
        return note

    def _slot(self, version: int) -> Slot:
        slot = self._slots.find(version)
        if slot is None:
            held = ", ".join(map(str, self._slots.versions)) or "none"
            raise ConfigError(
                f"{self._agent.name!r} does not hold version {version} of {self._name!r}; it holds {held}",
                hint="subscribe with keep=2 or more",
            )
        return slot

    def _prepared(self, push: str) -> Ready:
        if self.ready is None or self.ready.push != push:
            raise PeerRestarted(f"{self._agent.name!r} has not pulled this push", hint="push again")
        return self.ready

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
        return min(self._flip_timeout, max(0.0, until - time.monotonic()))

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
        self._flipped(version, slot)
        return old
