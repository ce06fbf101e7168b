"""Agreements: how ranks come to have windows on their GPUs, collectively, by phases of lines on the host.

Four phases: who waits is let in; what all need of a window is told; all have made theirs; all have reached the others'.
A rank that was let in by the first begins with the second.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import astuple, dataclass, field
from typing import TYPE_CHECKING, Final

from raynixl.agents.window import Window
from raynixl.errors import ConfigError, IntegrityError, RaynixlError
from raynixl.moe.calls import number_of
from raynixl.moe.cuda_frame import Frame
from raynixl.moe.cuda_need import Need
from raynixl.moe.cuda_structs import LOCAL_EXPERTS, RANKS, TOPK
from raynixl.moe.hello import Arena, Number
from raynixl.moe.joining import admit, let_in
from raynixl.moe.meeting import Meeting
from raynixl.record import Wire

if TYPE_CHECKING:
    from raynixl.agents import Agent
    from raynixl.moe.lines import Heard
    from raynixl.moe.session import Session
    from raynixl.region import Region

_SIGNATURE: Final = number_of(("synchronise",))
_HAS_GPU, _IS_FRESH, _HAS_WINDOW, _REACHES = 1, 2, 4, 8
_LEAST_SECONDS: Final = 0.5


class Offer(Wire):
    """Where a rank's window is, of which agreement, and how it is laid out."""

    number: Number
    frame: tuple[Number, ...]
    arena: Arena


@dataclass(slots=True)
class Agreed:
    """What the ranks have agreed on: windows by rank, ours left out, or why there are none."""

    number: int = 0
    """Another one for each agreement, growing, the same on all ranks."""
    frame: Frame | None = None
    own: Region | None = None
    windows: dict[int, Window] = field(default_factory=dict)
    sharing: int = 1
    """How many ranks have their windows on our GPU, ours among them."""
    reason: str = ""
    """Why rows go through the host; '' where they do not."""


class Agreement:
    """Comes to agreements with the other ranks of a session, and offers them our window."""

    def __init__(self, session: Session, meeting: Meeting, capacity: int, topk: int, *, let_in_at: int) -> None:
        self._session, self._meeting, self._capacity, self._topk = session, meeting, capacity, topk
        self._agent: Agent = session.agent
        self._topic = Meeting.topic(meeting.name, "window")
        self._offer: Offer | None = None
        self._let_in_at = let_in_at
        """The phase from which on we took part; 0 for a founder."""
        self._agent.serve(self._topic, self._answer)

    def come_to(
        self, former: Agreed, need: Need, device: int | None, *, placement: int, until: float,
        settle: Callable[[], None], prepare: Callable[[Agreed], None],
    ) -> Agreed:  # fmt: skip
        """Agree anew, all ranks at the same time. `device`: the GPU that our windows are to lie on, if there is one.

        `settle` is called before anything of the former agreement is touched: what was put on streams is over then.
        `prepare` makes all that kernels need, before any other rank's kernels may wait for ours.
        The former windows stay the caller's to close; they may be those that are returned, too.

        Raises:
            Masked: the others have gone on without us.
            ConfigError: another rank calls something else.
        """
        session = self._session
        is_new = session.phase == self._let_in_at > 0
        self._let_in_at = 0
        if not is_new:
            self._exchange(until)
            let_in(session, self._meeting)
            admit(session, placement)
        settle()
        is_fresh = is_new or bool(session.members.fresh) or former.own is None
        asked = self._exchange(until, need, _HAS_GPU * (device is not None) | _IS_FRESH * is_fresh)
        for line in asked.values():
            need = need.with_(Need(line.offset, line.back, line.count, line.total >> 8))
            is_fresh = is_fresh or bool(line.total & _IS_FRESH)
        made = Agreed(number=session.phase)
        if device is None or not all(line.total & _HAS_GPU for line in asked.values()):
            made.reason = "not all ranks give tensors on a GPU"
        elif max(session.members.names) >= RANKS:
            made.reason = f"there are more than {RANKS} ranks"
        elif self._topk > TOPK:
            made.reason = f"tokens have more than {TOPK} experts"
        elif need.experts > LOCAL_EXPERTS:
            made.reason = f"a rank has more than {LOCAL_EXPERTS} experts"
        else:
            self._make(former, made, need, device, is_fresh=is_fresh)
        has_window = made.own is not None
        heard = self._exchange(until, flags=_HAS_WINDOW * has_window)
        if has_window and all(line.total & _HAS_WINDOW for line in heard.values()):
            self._reach_all(made, device or 0, until)
            if not made.reason:
                self._prepare(made, prepare)
        else:
            made.reason = made.reason or self._without(heard, _HAS_WINDOW, "has no window")
        heard = self._exchange(until, flags=_REACHES * (not made.reason))
        if not made.reason:
            made.reason = self._without(heard, _REACHES, "does not reach all others")
        session.is_amid = False
        return made

    def close(self) -> None:
        """Offer nothing more."""
        self._agent.control.unserve(self._topic)

    def _exchange(self, until: float, need: Need | None = None, flags: int = 0) -> dict[int, Heard]:
        session = self._session
        line = session.line(_SIGNATURE, None)
        asked = Need() if need is None else need
        line.rows(
            session.landing.number, offset=asked.row_nbytes, count=asked.items, back=asked.item_nbytes,
            total=flags | asked.experts << 8,
        )  # fmt: skip
        for rank in session.members.in_turn:
            session.post(rank, line)
        heard, _ = session.gather(_SIGNATURE, until)
        session.is_amid = True
        return heard

    def _make(self, former: Agreed, made: Agreed, need: Need, device: int, *, is_fresh: bool) -> None:
        """Make our window, or go on with the former one if it serves."""
        frame = need.frame(max(self._session.members.names) + 1, self._capacity)
        if not is_fresh and former.own is not None and former.frame == frame and not former.reason:
            made.frame, made.own = frame, former.own
        else:
            try:
                made.own = self._agent.empty(frame.nbytes, kind="vram", device=device)
                made.frame = frame
            except RaynixlError as exc:
                made.reason = f"rank {self._session.members.me} has no window: {exc}"
                return
        self._offer = Offer(number=made.number, frame=_numbers(frame), arena=Arena.of(made.own))

    def _prepare(self, made: Agreed, prepare: Callable[[Agreed], None]) -> None:
        try:
            prepare(made)
        except RaynixlError as exc:
            made.reason = f"rank {self._session.members.me} is not ready: {exc}"

    def _reach_all(self, made: Agreed, device: int, until: float) -> None:
        assert made.own is not None
        for rank in self._session.members.ranks:
            try:
                offer = self._ask(rank, made, until)
                timeout = max(_LEAST_SECONDS, until - time.monotonic())
                made.windows[rank] = self._agent.window(offer.arena.remote, timeout=timeout, device=device)
                made.sharing += _gpu_of(offer.arena) == _gpu_of(Arena.of(made.own))
            except RaynixlError as exc:
                if not self._session.is_gone(rank):
                    made.reason = f"rank {rank} is not reached: {exc}"
                    return

    def _ask(self, rank: int, made: Agreed, until: float) -> Offer:
        name = self._session.channels[rank].name
        timeout = max(_LEAST_SECONDS, until - time.monotonic())
        asked = self._agent.peer(name).ask(self._topic, str(made.number).encode(), timeout=timeout)
        offer = Offer.from_bytes(asked.wait())
        assert made.frame is not None
        if (offer.number, offer.frame, offer.arena.owner) != (made.number, _numbers(made.frame), name):
            raise IntegrityError(f"{name!r} offers another window", hint="make the layer anew", peer=name)
        return offer

    def _answer(self, _peer: str, payload: bytes) -> bytes:
        offer = self._offer
        if offer is None or payload != str(offer.number).encode():
            raise ConfigError(f"{self._agent.name!r} has no window of agreement {payload[:20]!r}")
        return offer.to_bytes()

    def _without(self, heard: dict[int, Heard], flag: int, what: str) -> str:
        names = self._session.members.names
        lacking = [f"rank {rank} ({names.get(rank)!r})" for rank, line in heard.items() if not line.total & flag]
        return f"{', '.join(lacking)} {what}" if lacking else ""


def _numbers(frame: Frame) -> tuple[int, ...]:
    """Return what tells frames apart."""
    return (*astuple(frame), frame.nbytes)


def _gpu_of(window: Arena) -> object:
    """Return the GPU that a window is on, as all processes know it."""
    return window.record.keys.get("nvlink", {}).get("uuid")
