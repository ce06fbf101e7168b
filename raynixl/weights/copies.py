"""The copies of a publication: registered memory for whole versions, each held by one push at a time."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

from raynixl.errors import AgentClosed, RangeError
from raynixl.weights.arenas import Arenas
from raynixl.weights.hold import Holds, WhileBusy
from raynixl.weights.layout import Layout

if TYPE_CHECKING:
    import torch

    from raynixl.agents import Agent
    from raynixl.region import Region
    from raynixl.weights.sourcing import Freeze

logger = logging.getLogger(__name__)


class Copy:
    """One version's bytes in arenas. `version` is 0 while they are none."""

    def __init__(self, arenas: Arenas) -> None:
        self.arenas = arenas
        self.version = 0
        self._views: dict[str, torch.Tensor] = {}
        self._delta: Arenas | None = None

    def __repr__(self) -> str:
        return f"Copy(version {self.version}, {self.arenas!r})"

    def view(self, name: str) -> torch.Tensor:
        """Return where a tensor lies; made once."""
        view = self._views.get(name)
        if view is None:
            view = self._views[name] = self.arenas.tensor(self.arenas.layout.by_name[name])
        return view

    def delta_region(self, agent: Agent, nbytes: int) -> Region:
        """Return memory for what changed in this version: that of an earlier one, or larger.

        Raises:
            RangeError: the host has too little.
        """
        if self._delta is None or self._delta.layout.nbytes < nbytes:
            self._let_go_of_delta()
            self._delta = Arenas(agent, Layout((), (nbytes + nbytes // 2,)))
        return self._delta.regions[0]

    def release(self) -> None:
        """Let go of the memory."""
        self.version = 0
        self._views = {}
        self.arenas.release()
        self._let_go_of_delta()

    def _let_go_of_delta(self) -> None:
        if self._delta is not None:
            self._delta.release()
            self._delta = None


class Copies:
    """One copy, or two with `WhileBusy.COPY`, and one more for the base version once a delta is asked for.

    The first is made at once, others when they are needed.
    """

    def __init__(self, agent: Agent, layout: Layout, name: str, *, while_busy: WhileBusy, keeps_base: bool) -> None:
        self._agent = agent
        self._layout = layout
        self._waits = while_busy is not WhileBusy.REFUSE
        self._at_once = 2 if while_busy is WhileBusy.COPY else 1
        self._keeps_base = keeps_base
        self._holds = Holds(self._at_once + keeps_base, at_once=self._at_once)
        self._growing = threading.Lock()  # protects _copies and _is_closed
        self._copies: dict[int, Copy] = {0: Copy(Arenas(agent, layout, name=name))}
        self._is_closed = False

    def __repr__(self) -> str:
        return f"Copies({list(self._copies.values())!r})"

    @property
    def only(self) -> Copy:
        """The first copy, which is the only one while nothing more is asked for."""
        return self._copies[0]

    def take(self, request: Freeze, is_gone: Callable[[], bool]) -> Copy:
        """Take a copy for a push, and not that of its base version if there is another; its bytes are to be replaced.

        Raises:
            TransferTimeout: other pushes have them, and do not end in time or are not to be waited for.
            RangeError: the host has too little memory for one more copy.
        """
        order = self._order(request.base)
        place = self._holds.take(request.push, request.seconds, is_gone=is_gone, order=order, waits=self._waits)
        try:
            copy = self._at(place)
        except RangeError as exc:
            self._holds.release(request.push)
            if place < self._at_once:
                raise
            logger.info("no memory for a base version, and so no deltas: %s", exc)
            self._keeps_base = False
            return self.take(request, is_gone)
        except BaseException:
            self._holds.release(request.push)
            raise
        copy.version = 0
        return copy

    def base(self, version: int) -> Copy | None:
        """Return the copy that holds a version, if one does."""
        copies = list(self._copies.values())
        return next((copy for copy in copies if version and copy.version == version), None)

    def settle(self, copy: Copy, version: int) -> None:
        """Say that a copy holds a version, and no other copy does: one of the same number was of a push that failed."""
        for other in list(self._copies.values()):
            if other.version == version:
                other.version = 0
        copy.version = version

    def release(self, push: str) -> bool:
        """Give back what a push has; False if it has nothing, or no more."""
        return self._holds.release(push)

    def wait_free(self, timeout: float) -> bool:
        """Wait until no push has a copy; return whether that came in time."""
        return self._holds.wait_free(timeout)

    def close(self) -> None:
        """Let go of all memory; idempotent."""
        with self._growing:
            self._is_closed = True
            copies = list(self._copies.values())
        for copy in copies:
            copy.release()

    def _order(self, base: int) -> list[int]:
        """Return the places in the order in which they are to be taken: that of the base version last."""
        places = self._at_once + (self._keeps_base and base > 0)
        known = {number: copy.version for number, copy in self._copies.items()}
        return sorted(range(places), key=lambda number: (base > 0 and known.get(number) == base, number))

    def _at(self, place: int) -> Copy:
        with self._growing:
            if self._is_closed:
                raise AgentClosed("the publication was closed", hint="publish it again")
            if place not in self._copies:
                self._copies[place] = Copy(Arenas(self._agent, self._layout))
            return self._copies[place]
