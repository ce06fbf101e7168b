"""Connections: what an agent holds for one incarnation of a peer."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence

from raynixl.backends.base import Binding, Link
from raynixl.errors import PeerLost, RaynixlError
from raynixl.native import CLOSED, LOST, STALE
from raynixl.record import AgentRecord
from raynixl.region import RemoteRegion

logger = logging.getLogger(__name__)


class Connection:
    """One incarnation of a peer: its links, and its regions that we have made reachable."""

    def __init__(self, name: str, incarnation: str, record: AgentRecord | None) -> None:
        self.name = name
        self.incarnation = incarnation
        self.record = record
        self.links: list[Link] = []
        self._silent: list[Link] = []  # those of `links` that carry no messages
        self.lost: RaynixlError | None = None
        self.heard = time.monotonic()
        self.regions: dict[str, RemoteRegion] = {}  # by name, as the peer told us
        self.bindings: dict[tuple[int, int, str], Binding] = {}  # by region id, generation and backend
        self.refusals: dict[tuple[int, int, str], str] = {}  # likewise: why backends refused to bind regions
        self.withdrawals = 0  # how often the peer has withdrawn a region
        self.lock = threading.Lock()  # protects links, regions, bindings, refusals, withdrawals, lost
        self.binding = threading.Lock()  # held while a region is bound, so that it is bound once

    def __repr__(self) -> str:
        return f"Connection({self.name!r}, {self.incarnation[:8]}, {self.lost or 'open'})"

    @property
    def link(self) -> Link:
        """The link that carries messages."""
        for link in self.messengers:
            if link.lost is None:
                return link
        raise self.lost.afresh() if self.lost else PeerLost(f"peer {self.name!r} is lost", peer=self.name)

    @property
    def messengers(self) -> list[Link]:
        """The links that carry messages, whether they stand or not."""
        with self.lock:
            return [link for link in self.links if link not in self._silent]

    @property
    def is_awake(self) -> bool:
        """Whether it stands and its peer is not known to be stopped."""
        with self.lock:
            links = list(self.links)
        return self.lost is None and not any(link.is_frozen() for link in links)

    @property
    def has_let_go(self) -> bool:
        """Whether the peer has said that it ends, and hence has let go of our memory."""
        return any(getattr(link, "has_let_go", False) for link in self.messengers)

    def let_go(self, deadline: float) -> bool:
        """End what GPUs of ours do in the peer's memory; whether that is over by the monotonic deadline.

        Only then may the peer be told that this agent ends: it would free that memory. Other backends stop at once.
        """
        with self.lock:
            bindings = [binding for binding in self.bindings.values() if binding.link in self._silent]
        for binding in bindings:
            binding.gate.close(CLOSED)
        return all(binding.gate.drain(max(0.0, deadline - time.monotonic())) for binding in bindings)

    def add_link(self, link: Link, *, is_silent: bool = False) -> bool:
        """Take one more link, unless the connection is lost; a silent one carries no messages."""
        with self.lock:
            if self.lost is None:
                self.links.append(link)
                if is_silent:
                    self._silent.append(link)
            return self.lost is None

    def remember(self, name: str, region: RemoteRegion, withdrawals: int) -> None:
        """Keep a region that the peer named, unless it has withdrawn any since `withdrawals` was read."""
        with self.lock:
            if self.lost is None and self.withdrawals == withdrawals:
                self.regions[name] = region

    def forget_region(self, region_id: int) -> None:
        """Look a region up again at its next use by name."""
        with self.lock:
            self.regions = {name: region for name, region in self.regions.items() if region.id != region_id}

    def held(self, remote: RemoteRegion, backend: str) -> Binding | None:
        """Return how a region is bound over a backend, if it is and may be used."""
        with self.lock:
            binding = self.bindings.get((remote.id, remote.generation, backend))
        return binding if binding is not None and binding.is_usable else None

    def refused(self, remotes: Sequence[RemoteRegion], backend: str, reason: str) -> None:
        """Remember why a backend did not bind these regions; those that it had bound before stay bound."""
        with self.lock:
            keys = {(remote.id, remote.generation, backend) for remote in remotes}
            self.refusals |= dict.fromkeys(keys - self.bindings.keys(), reason)

    def why_refused(self, remote: RemoteRegion, backend: str) -> str:
        """Return why a backend did not bind a region; '' if it has not refused to."""
        with self.lock:
            return self.refusals.get((remote.id, remote.generation, backend), "")

    def add_binding(self, binding: Binding, withdrawals: int) -> bool:
        """Take a binding; False if the peer has withdrawn a region since `withdrawals` was read: ask it again.

        Raises:
            RaynixlError: the connection is lost.
        """
        with self.lock:
            if self.lost is not None:
                raise self.lost.afresh()
            if self.withdrawals != withdrawals:
                return False
            key = (binding.remote.id, binding.remote.generation, binding.link.backend)
            self.refusals.pop(key, None)
            old, self.bindings[key] = self.bindings.get(key), binding
        if old is not None:
            old.gate.close(LOST)
            _release([old])
        return True

    def lose(self, error: RaynixlError) -> None:
        """Close every gate to the peer, end what is in flight, and unmap its memory."""
        with self.lock:
            if self.lost is not None:
                return
            self.lost = error
            bindings, links = list(self.bindings.values()), list(self.links)
            self.bindings.clear()
            self.regions.clear()
        for binding in bindings:
            binding.gate.close(LOST)
        for link in links:
            link.close(error)
        _release(bindings)

    def withdraw(self, region_id: int) -> list[Binding]:
        """Refuse new transfers with a region that its owner withdraws; return what is still bound to it."""
        with self.lock:
            self.withdrawals += 1
            gone = {key: binding for key, binding in self.bindings.items() if key[0] == region_id}
            for key in gone:
                del self.bindings[key]
            self.refusals = {key: why for key, why in self.refusals.items() if key[0] != region_id}
        self.forget_region(region_id)
        for binding in gone.values():
            binding.gate.close(STALE, abort=False)
        return list(gone.values())

    def withdraw_all(self) -> list[Binding]:
        """Refuse new transfers with a peer that is about to close; return what is still bound."""
        with self.lock:
            self.withdrawals += 1
            gone = list(self.bindings.values())
            self.bindings.clear()
            self.regions = {}
        for binding in gone:
            binding.gate.close(LOST, abort=False)
        return gone


def _release(bindings: list[Binding]) -> None:
    """Unmap as soon as no thread is inside; at once if possible, so that nothing of the dead stays mapped."""
    busy = []
    for binding in bindings:
        if binding.gate.drain(0.0):
            _unmap(binding)
        else:
            busy.append(binding)
    if busy:
        threading.Thread(target=drain_and_release, args=(busy,), name="raynixl-release", daemon=True).start()


def drain_and_release(bindings: Sequence[Binding]) -> None:
    """Unmap once no thread is inside, however long that takes."""
    for binding in bindings:
        while not binding.gate.drain(60.0):
            logger.warning("a transfer with %s does not end", binding.remote.label)
        _unmap(binding)


def _unmap(binding: Binding) -> None:
    """Let go of one mapping; what goes wrong with it concerns no other, nor the peer who waits to hear of the end."""
    try:
        binding.release()
    except RaynixlError:
        logger.exception("%s was not let go of", binding.remote.label)
