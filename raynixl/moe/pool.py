"""The pool: the registered memory of one rank into which others write rows, given out again once nobody uses it."""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from raynixl.errors import AgentClosed, RangeError, RegionStale
from raynixl.memory import PAGE_NBYTES
from raynixl.moe.lines import ranks_of
from raynixl.moe.slot import Ended, Lease, Slot

if TYPE_CHECKING:
    from raynixl.agents import Agent
    from raynixl.region import Region

logger = logging.getLogger(__name__)
KEEP_SECONDS = 60.0
KEEP_TURNS = 2048
"""What is free is kept for this long and for so many turns: fresh memory is several times as slow as used memory."""

_FIRST_WARNING = 16
_HINT = "drop results of earlier dispatches, and what was computed as views of them, once they are used"


class Pool:
    """The slots of one rank. Safe in threads; tensors of leases may end in any thread, and anywhere in it."""

    def __init__(
        self, agent: Agent, nbytes: int, name: str = "moe", *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.nbytes = nbytes
        """A slot has this size at least."""
        self.name = name
        self._agent = agent
        self._clock = clock
        self._lock = threading.Lock()  # protects the slots and what is noted in them; nothing is made or sent under it
        self._slots: dict[int, Slot] = {}
        # Tensors may end amid anything, with the lock held by this very thread: then a slot is only put down here.
        self._ended: deque[Ended] = deque()
        self._numbers = itertools.count(1)
        self._turns = 0
        self._warned = _FIRST_WARNING // 2
        self._droppers: list[threading.Thread] = []
        self._is_closed = False

    def __repr__(self) -> str:
        slots = list(self._slots.values())
        return f"Pool({self.name!r}, {_summary(slots)})"

    def __len__(self) -> int:
        return len(self._slots)

    # What others may write

    def take(self, nbytes: int = 0) -> Slot:
        """Return a slot of that size at least, which the taker keeps until he leases it or puts it back.

        The one that was used last of the smallest that do; one is made where none is free, and what was free for long
        is let go of.

        Raises:
            RangeError: there is no memory for one more.
            AgentClosed: the pool or its agent is closed.
        """
        wanted = max(nbytes, self.nbytes)
        with self._lock:
            self._check_open()
            self._drain()
            free = [slot for slot in self._slots.values() if not (slot.is_kept or slot.writers or slot.lease)]
            slot = None
            for one in free:
                is_better = slot is None or (one.nbytes, -one.turn) < (slot.nbytes, -slot.turn)
                if is_better and one.nbytes >= wanted:
                    slot = one
            if slot is not None:
                self._keep(slot)
            stale = self._forget_stale(free)
        if stale:
            self._drop_aside(stale)
        return self._make(wanted) if slot is None else slot

    def announce(self, slot: Slot, writers: int) -> None:
        """Note, before they are told of it, that these ranks (1 bit each) may write into a slot that was taken."""
        with self._lock:
            assert slot.is_kept, f"{slot} is announced by who has not taken it"
            slot.writers |= writers

    def answered(self, slot: Slot, ranks: int) -> None:
        """Note that ranks (1 bit each) have done what they were told of a slot, and write into it no more."""
        with self._lock:
            self._answer(slot, ranks)

    def gone(self, rank: int) -> None:
        """Note that a rank writes into no slot any more: it ended, or said so."""
        with self._lock:
            for slot in self._slots.values():
                self._answer(slot, 1 << rank)

    def rename(self, rank: int, former: int) -> None:
        """Note that it is a rank's former process, for which the number `former` stands, that may write into slots."""
        with self._lock:
            for slot in self._slots.values():
                if slot.writers >> rank & 1:
                    slot.writers ^= 1 << rank | 1 << former

    def begun(self, rank: int, told: Slot) -> None:
        """Note that a rank has begun, and writes into none of the slots that it was told of before `told`."""
        with self._lock:
            for slot in self._slots.values():
                if slot is not told:
                    self._answer(slot, 1 << rank)

    # What the taker does with it

    def lease(self, slot: Slot) -> Lease:
        """Turn the taker's hold on a slot into one by tensors."""
        owner = slot.bytes[:]
        ended = Ended(owner, self._ended.append)
        ended.number = slot.number
        with self._lock:
            assert slot.is_kept, f"{slot} is leased by who has not taken it"
            slot.is_kept = False
            slot.lease = ended
        return Lease(slot, owner)

    def put_back(self, slot: Slot) -> None:
        """End the taker's hold on a slot that he has no more use of; it is free once nobody may write into it."""
        with self._lock:
            slot.is_kept = False
            self._turn(slot)

    # What there is

    def find(self, number: int) -> Slot | None:
        """Return a slot by number; None if there is none, or no more."""
        with self._lock:
            return self._slots.get(number)

    @property
    def slots(self) -> tuple[Slot, ...]:
        """All of them."""
        with self._lock:
            self._drain()
            return tuple(self._slots.values())

    @property
    def quarantined(self) -> tuple[Slot, ...]:
        """Those that are in use only because a rank may still write into them."""
        return tuple(slot for slot in self.slots if slot.writers and not slot.is_kept and not slot.lease)

    def close(self) -> None:
        """Withdraw all slots from peers; idempotent. Tensors keep their memory, which nobody else is given."""
        with self._lock:
            self._is_closed = True
            slots, droppers = list(self._slots.values()), self._droppers
            self._slots, self._droppers = {}, []
        self._drop(slots)
        for thread in droppers:
            thread.join()  # as long as withdrawing takes, which has a deadline

    # Within

    def _check_open(self) -> None:
        if self._is_closed:
            raise AgentClosed(f"the pool {self.name!r} is closed", hint="make a new ExpertParallel")

    def _drain(self) -> None:
        """Note which leases are over; _lock is held."""
        while self._ended:
            ended = self._ended.popleft()
            slot = self._slots.get(ended.number)
            if slot is not None and slot.lease is ended:
                slot.lease = None
                self._turn(slot)

    def _keep(self, slot: Slot) -> None:
        slot.is_kept = True
        self._turn(slot)

    def _answer(self, slot: Slot, ranks: int) -> None:
        if slot.writers & ranks:
            slot.writers &= ~ranks
            self._turn(slot)

    def _turn(self, slot: Slot) -> None:
        self._turns += 1
        slot.turn, slot.turned_at = self._turns, self._clock()

    def _forget_stale(self, free: Sequence[Slot]) -> list[Slot]:
        """Forget slots that were free for long, to be withdrawn; _lock is held."""
        turn, moment = self._turns - KEEP_TURNS, self._clock() - KEEP_SECONDS
        stale = [slot for slot in free if slot.turn < turn and slot.turned_at < moment]
        for slot in stale:
            del self._slots[slot.number]
        return stale

    def _make(self, nbytes: int) -> Slot:
        region = self._allocate(_rounded(nbytes) if nbytes > self.nbytes else nbytes)
        slot = Slot(next(self._numbers), region)
        with self._lock:
            is_closed = self._is_closed
            if not is_closed:
                self._slots[slot.number] = slot
                self._keep(slot)
            text = self._warning()
        if is_closed:
            self._drop([slot])
            self._check_open()
        if text:
            logger.warning("%s; %s", text, _HINT)
        return slot

    def _allocate(self, nbytes: int) -> Region:
        try:
            return self._agent.empty(nbytes)
        except RangeError:
            with self._lock:
                self._drain()
                free = [slot for slot in self._slots.values() if slot.is_free]
                for slot in free:
                    del self._slots[slot.number]
        self._drop(free)
        try:
            return self._agent.empty(nbytes)
        except RangeError as exc:
            raise RangeError(f"{exc.message}: the pool {self!r}", hint=_HINT) from exc

    def _warning(self) -> str:
        """Say once at 16, 32, 64, ... slots what has use of them; _lock is held."""
        if len(self._slots) < 2 * self._warned:
            return ""
        self._warned *= 2
        return f"the pool {self.name!r} has grown to {_summary(list(self._slots.values()))}"

    def _drop_aside(self, slots: Sequence[Slot]) -> None:
        """Withdraw slots in a thread: a peer that is frozen would hold up the step for as long as one waits for it."""
        thread = threading.Thread(target=self._drop, args=(slots,), name="raynixl-moe-drop", daemon=True)
        with self._lock:
            self._droppers = [one for one in self._droppers if one.is_alive()]
            self._droppers.append(thread)
        thread.start()

    def _drop(self, slots: Sequence[Slot]) -> None:
        for slot in slots:
            try:
                self._agent.deregister(slot.region)
            except (AgentClosed, RegionStale):
                continue  # the agent was closed before us and has withdrawn it


def _rounded(nbytes: int) -> int:
    """Return a size of at most a quarter more, of few different ones: sizes that creep up need few new slots."""
    step = max(PAGE_NBYTES, 1 << max(0, nbytes.bit_length() - 3))
    return -(-nbytes // step) * step


def _summary(slots: Sequence[Slot]) -> str:
    waits: dict[int, int] = {}
    for slot in slots:
        for rank in ranks_of(slot.writers):
            waits[rank] = waits.get(rank, 0) + 1
    leased = sum(slot.is_leased for slot in slots)
    kept = sum(slot.is_kept for slot in slots)
    told = ", ".join(f"rank {rank} may write into {count}" for rank, count in sorted(waits.items()))
    nbytes = sum(slot.nbytes for slot in slots)
    return f"{len(slots)} slots, {nbytes} bytes: {leased} held by tensors, {kept} by steps under way" + (
        f"; {told}" if told else ""
    )
