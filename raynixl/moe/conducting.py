"""Conducting: what the leader of a council does, from what it has heard to the next view."""

from __future__ import annotations

import threading
from collections.abc import Iterable
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
        self._number = NOT_YET  # the highest of which we have heard that somebody has promised it
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
            number = council.next_number(self._number)
            if not council.promise(number, council.rank):
                return False
        try:
            return self._conduct(view, number, lost, {} if lost else coming)
        finally:
            council.release(leader=council.rank)

    def _conduct(self, view: View, number: int, lost: dict[int, str], coming: dict[int, Ask]) -> bool:
        council = self._council
        rest = [rank for rank in view.live if rank not in lost and rank != council.rank]
        answers = self._prepare(number, view, lost, rest, coming)
        heard = {rank: one for rank, one in answers.items() if isinstance(one, Answer)}
        self._number = max([self._number, *(one.granted for one in heard.values())])
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
            self._commit(view, heard)  # they may go on
            return bool(silent)
        others = [heard[rank] for rank in rest]
        is_due = all(one.adopted == view.number for one in [*others, self._own()])
        let_in = self._eligible(coming, others, heard) if is_due else {}  # the operation under way is done in it first
        if not lost and not let_in:
            council.put_off(coming)
            self._commit(view, rest)
            return False
        known = [*others, self._own()]
        since = max(one.position for one in known)
        if since == NOT_YET:  # nobody is left that was there before, as in `Council.learn`
            since = view.since
        elif not any(one.adopted == view.number and one.position != NOT_YET for one in known):
            # what is under way may be no dispatch: who was to come in with the next one must ask again
            lost = lost | {one.rank: one.token for one in known if one.position == NOT_YET}
        members = _members(view, council.names, lost, let_in)
        made = view.changed(
            number=number, leader=council.rank, since=since, members=members, is_joining=bool(let_in)
        )  # fmt: skip
        if not council.commit(made, council.rank):
            return True  # somebody else is at it, or we were frozen, and others have gone on
        self._commit(made, made.live)
        for rank in lost:
            council.asking.tell(rank, council.ask("commit", view=made))
        return True

    def _prepare(
        self, number: int, view: View, lost: dict[int, str], rest: list[int], coming: dict[int, Ask]
    ) -> dict[int, object]:
        """Have the others prepare the next view; where nobody else is left, look whether it is us who are lost."""
        council = self._council
        ask = council.ask("prepare", number=number, suspects=tuple(lost.items()))
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

    def _commit(self, view: View, ranks: Iterable[int]) -> None:
        """Tell ranks of a view; who cannot be told is lost, and who knows of a later one tells us."""
        council = self._council
        ask = council.ask("commit", view=view)
        told = {rank: (ask, view.token(rank)) for rank in ranks if rank != council.rank and view.token(rank)}
        answers = council.asking.all(told, council.deadline)
        for rank, one in answers.items():
            if not isinstance(one, Answer):
                council.suspect({rank}, f"it cannot be told of a view: {one}", view)
            elif one.view is not None:
                council.take(one.view)


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
