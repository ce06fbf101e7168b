"""Conducting: what the leader of a council does, from what it has heard to the next view."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Final

from raynixl.moe.view import NOT_YET, Answer, Ask, Member, View

if TYPE_CHECKING:
    from raynixl.moe.seat import Seat

PATIENCE: Final = 0.5
"""Seconds that those have to answer whom we take for lost, where there is nobody else to ask."""


class Conductor:
    """Takes ranks out that are lost, and lets those in that apply; in whatever thread hears of them, one at a time."""

    def __init__(self, council: Seat) -> None:
        self._council = council
        self._turn = threading.Lock()  # held through each change of the view
        self._is_closed = False

    def run(self, *, waits: bool = True) -> None:
        """Bring the view up to date, if that is for us to do."""
        if not self._turn.acquire(blocking=waits):
            return
        try:
            while not self._is_closed and self._change():
                pass
        finally:
            self._turn.release()

    def close(self) -> None:
        """Conduct no more; waits for what is under way."""
        self._is_closed = True
        with self._turn:
            pass

    def _change(self) -> bool:
        """Change the view once; return whether there may be more to do."""
        council = self._council
        with council.changed:
            view, lost = council.view, council.lost_of_view()
            coming = dict(council.applicants)
            if view is None or not view.has(council.rank, council.token) or not (lost or coming):
                return False
            if min(rank for rank in view.live if rank not in lost) != council.rank:
                return False
            if not council.promise(view.number + 1, council.rank):
                return False
        try:
            return self._conduct(view, lost, {} if lost else coming)
        finally:
            with council.changed:
                if council.view == view:
                    council.release()

    def _conduct(self, view: View, lost: dict[int, str], coming: dict[int, Ask]) -> bool:
        council = self._council
        rest = [rank for rank in view.live if rank not in lost and rank != council.rank]
        answers = self._prepare(view, lost, rest, coming)
        heard = {rank: one for rank, one in answers.items() if isinstance(one, Answer)}
        latest = max((one.view for one in heard.values() if one.view is not None), default=view, key=_order)
        if latest.order > view.order:
            council.take(latest)
            if latest.has(council.rank, council.token):
                self._commit(latest, latest.live)
            return True
        council.put_off(rank for rank in coming if rank not in heard)
        silent = {rank for rank in rest if rank not in heard}
        for rank in silent:
            council.suspect({rank}, f"it does not prepare a view: {answers[rank]}", view)
        if silent or any(one.is_refused for one in heard.values()):
            self._commit(view, rest)  # they may go on
            return bool(silent)
        let_in = self._eligible(coming, [heard[rank] for rank in rest], heard)
        if not lost and not let_in:
            council.put_off(coming)
            self._commit(view, rest)
            return False
        since = max(one.position for one in [*(heard[rank] for rank in rest), self._own()])
        members = _members(view, council.names, lost, let_in)
        is_awaited = view.is_joining and any(heard[rank].adopted != view.number for rank in rest)
        made = view.changed(
            leader=council.rank, since=since, members=members, is_joining=bool(let_in) or is_awaited
        )  # fmt: skip
        if not council.commit(made, council.rank):
            return False
        self._commit(made, made.live)
        for rank in lost:
            council.asking.tell(rank, council.ask("commit", view=made))
        return True

    def _prepare(self, view: View, lost: dict[int, str], rest: list[int], coming: dict[int, Ask]) -> dict[int, object]:
        """Have the others prepare the next view; where nobody else is left, look whether it is us who are lost."""
        council = self._council
        ask = council.ask("prepare", number=view.number + 1, suspects=tuple(lost.items()))
        asked = {rank: (ask, view.token(rank)) for rank in rest}
        asked |= {rank: (ask, one.token) for rank, one in coming.items()}
        answers: dict[int, object] = dict(council.asking.all(asked, council.deadline))
        if not rest:
            answers |= council.asking.all({rank: (ask, token) for rank, token in lost.items()}, PATIENCE)
        return answers

    def _own(self) -> Answer:
        return self._council.said(self._council.ask("state"), False)

    def _eligible(self, coming: dict[int, Ask], rest: list[Answer], heard: dict[int, Answer]) -> dict[int, Ask]:
        """Return whom all would let in."""
        barred = self._council.barred.union(*(one.barred for one in rest))
        known = min([len(self._council.names), *(len(one.names) for one in rest)])
        return {rank: one for rank, one in coming.items() if rank in heard and rank not in barred and rank < known}

    def _commit(self, view: View, ranks: object) -> None:
        """Tell ranks of a view; who cannot be told is lost."""
        council = self._council
        ask = council.ask("commit", view=view)
        told = {rank: (ask, view.token(rank)) for rank in ranks if rank != council.rank}  # type: ignore[attr-defined]
        answers = council.asking.all(told, council.deadline)
        for rank, one in answers.items():
            if not isinstance(one, Answer):
                council.suspect({rank}, f"it cannot be told of a view: {one}", view)


def _order(view: View) -> tuple[int, int]:
    return view.order


def _members(view: View, names: list[str], lost: dict[int, str], let_in: dict[int, Ask]) -> tuple[Member, ...]:
    """Return the members of the next view."""
    world = max([len(view.members), *(rank + 1 for rank in let_in)])
    members = [*view.members, *(Member(name=name) for name in names[len(view.members) : world])]
    for rank in lost:
        members[rank] = Member(name=members[rank].name, host=members[rank].host)
    for rank, ask in let_in.items():
        members[rank] = Member(name=members[rank].name, host=ask.host, token=ask.token)
    return tuple(members)


assert NOT_YET < 0  # so that who has just come does not count
