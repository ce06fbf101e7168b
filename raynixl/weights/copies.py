"""The copies of a publication: registered memory for whole versions, each held by one push at a time."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from raynixl.errors import RaynixlError
from raynixl.weights.arenas import Arenas
from raynixl.weights.hold import Holds, WhileBusy
from raynixl.weights.layout import Layout
from raynixl.weights.space import HOST, Space

if TYPE_CHECKING:
    import torch

    from raynixl.agents import Agent
    from raynixl.region import Region
    from raynixl.weights.original import Work
    from raynixl.weights.sourcing import Freeze

logger = logging.getLogger(__name__)


class Copy:
    """One version's bytes in arenas. `version` is 0 while they are none."""

    def __init__(self, arenas: Arenas) -> None:
        self.arenas = arenas
        self.version = 0
        self._views: dict[str, torch.Tensor] = {}
        self.work: Work | None = None
        """What brings tensors into it, kept by whoever does that."""
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
        self.work = None
        self.arenas.release()
        self._let_go_of_delta()

    def _let_go_of_delta(self) -> None:
        if self._delta is not None:
            self._delta.release()
            self._delta = None


class Copies:
    """One copy, or two with `WhileBusy.COPY`, and one more for the base version once a delta was asked for.

    That one is made between two pushes: fresh memory comes at 1 GB/s or less, and a push has a deadline.
    """

    def __init__(
        self, agent: Agent, layout: Layout, name: str, *, while_busy: WhileBusy, keeps_base: bool,
        spaces: Sequence[Space] = (HOST,),
    ) -> None:  # fmt: skip
        self._agent = agent
        self._layout = layout
        self._spaces = spaces
        self._waits = while_busy is not WhileBusy.REFUSE
        self._at_once = 2 if while_busy is WhileBusy.COPY else 1
        self._holds = Holds(self._at_once + keeps_base, at_once=self._at_once)
        self._growing = threading.Lock()  # protects _is_closed, and _copies from growing
        self._may_grow, self._wants_base = keeps_base, False
        self._is_closed = False
        self._copies = [Copy(Arenas(agent, layout, name=name, spaces=spaces))]
        if self._at_once > 1:
            self._copies.append(Copy(Arenas(agent, layout, spaces=spaces)))

    def __repr__(self) -> str:
        return f"Copies({self._copies!r})"

    @property
    def first(self) -> Copy:
        """The copy that is there from the beginning."""
        return self._copies[0]

    def take(self, request: Freeze, is_gone: Callable[[], bool]) -> Copy:
        """Take a copy for a push, and not that of its base version if there is another; its bytes are to be replaced.

        Raises:
            TransferTimeout: other pushes have them, and do not end in time or are not to be waited for.
        """
        self._wants_base = self._wants_base or request.base > 0
        versions = [copy.version for copy in self._copies]
        order = sorted(range(len(versions)), key=lambda place: (versions[place] == request.base > 0, place))
        place = self._holds.take(request.push, request.seconds, is_gone=is_gone, order=order, waits=self._waits)
        copy = self._copies[place]
        copy.version = 0
        return copy

    def base(self, version: int) -> Copy | None:
        """Return the copy that holds a version, if one does."""
        return next((copy for copy in self._copies if version and copy.version == version), None)

    def settle(self, copy: Copy, version: int) -> None:
        """Say that a copy holds a version, and no other copy does: one of the same number was of a push that failed."""
        for other in self._copies:
            if other.version == version:
                other.version = 0
        copy.version = version

    def release(self, push: str) -> bool:
        """Give back what a push has; False if it has nothing, or no more."""
        is_released = self._holds.release(push)
        if is_released and self._wants_base and self._may_grow:
            self._may_grow = False
            threading.Thread(target=self._grow, name="raynixl-spare", daemon=True).start()
        return is_released

    def has(self, push: str) -> bool:
        """Whether a push still has a copy: its time may be over, and another push have taken it."""
        return self._holds.has(push)

    def wait_free(self, timeout: float) -> bool:
        """Wait until no push has a copy; return whether that came in time."""
        return self._holds.wait_free(timeout)

    def close(self) -> None:
        """Let go of all memory; idempotent."""
        with self._growing:
            self._is_closed = True
            for copy in self._copies:
                copy.release()

    def _grow(self) -> None:
        """Make one more copy, which the next push takes in place of its base version's."""
        try:
            with self._growing:
                if not self._is_closed:
                    self._copies.append(Copy(Arenas(self._agent, self._layout, spaces=self._spaces)))
        except RaynixlError as exc:
            logger.info("no second copy of the weights in %r, and so no deltas: %s", self._agent.name, exc)
