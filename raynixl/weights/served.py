"""What is served: the plans that a source was told, and what it says of each version under them."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from raynixl.errors import PeerRestarted, RangeError
from raynixl.record import RegionRecord
from raynixl.weights.bank import Bank
from raynixl.weights.changes import Changes, room
from raynixl.weights.copyout import Digests
from raynixl.weights.layout import Layout
from raynixl.weights.outgoing import OutgoingRows
from raynixl.weights.sourcing import DeltaOffer, Freeze, Outgoing, Partial

if TYPE_CHECKING:
    from raynixl.agents import Agent
    from raynixl.weights.copies import Copies, Copy

_KEPT_PLANS = 4
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ServedPlan:
    """A plan's rows at this source, and what encodes their changes, prepared when it is first needed."""

    rows: OutgoingRows
    layout: Layout

    @cached_property
    def changes(self) -> Changes | None:
        """What encodes changes, or None where chunks cut elements."""
        return Changes(self.rows, self.layout) if Changes.can(self.rows.chunk_nbytes) else None


@dataclass(frozen=True, slots=True)
class Said:
    """What a source says of a version under a plan, and how long that took."""

    partials: Mapping[int, Partial]
    deltas: Mapping[int, DeltaOffer]
    delta_region: RegionRecord | None
    seconds: float


class Served:
    """The last plans that a source was told."""

    def __init__(self, agent: Agent, layout: Layout, *, threads: int) -> None:
        self._agent = agent
        self._layout = layout
        self._threads = threads
        self._learning = threading.Lock()  # protects _plans
        self._plans: dict[str, ServedPlan] = {}

    def learn(self, message: Outgoing) -> None:
        """Prepare what a plan wants of this source.

        Raises:
            IntegrityError: it wants what this source does not have.
        """
        plan = ServedPlan(OutgoingRows(message, self._layout.arenas), self._layout)
        with self._learning:
            self._plans.pop(message.plan, None)
            self._plans[message.plan] = plan
            while len(self._plans) > _KEPT_PLANS:
                del self._plans[next(iter(self._plans))]

    def plan(self, digest: str) -> ServedPlan:
        """Return a plan that it was told.

        Raises:
            PeerRestarted: it was not, or in an earlier life.
        """
        plan = self._plans.get(digest)
        if plan is None:
            raise PeerRestarted(f"{self._agent.name!r} does not know the plan", hint="send it its rows of the plan")
        return plan

    def digests(self, request: Freeze) -> Digests:
        """Return what is to be digested of a version, to be begun while it is copied out.

        Raises:
            PeerRestarted: the plan is not known here.
        """
        return Digests.of(self.plan(request.plan).rows, request.version, self._threads)

    def say(self, request: Freeze, copy: Copy, bank: Bank, copies: Copies, digests: Digests) -> Said:
        """Digest the rest of a version that lies in a copy, and encode what changed since its base, if that is here."""
        began = time.monotonic()
        digests.finish(bank)
        deltas, region = self._encode(request, copy, bank, copies)
        return Said(digests.rows.partials(digests.sums), deltas, region, time.monotonic() - began)

    def _encode(
        self, request: Freeze, copy: Copy, bank: Bank, copies: Copies
    ) -> tuple[Mapping[int, DeltaOffer], RegionRecord | None]:
        base, changes = copies.base(request.base), self.plan(request.plan).changes
        if base is None or base is copy or changes is None:
            return {}, None
        old = base.arenas.bank
        if not len(old.sizes) or old.space != bank.space:
            return {}, None
        try:
            blobs = changes.encode(old, bank, threads=self._threads)
        except RangeError as exc:  # as below
            logger.info("no delta of %r: %s", self._agent.name, exc)
            return {}, None
        if not blobs or base.version != request.base:  # another push has taken the base meanwhile
            return {}, None
        try:
            region = copy.delta_region(self._agent, sum(room(blob) for blob in blobs.values()))
        except RangeError:  # no memory for it: the version is pulled in full
            return {}, None
        offers = changes.offers(blobs, region.array(), base=request.base, seed=request.version)
        return offers, region.record()
