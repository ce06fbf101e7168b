"""Crews for the tests of faults: processes with a layer that is in use, of which nothing is left afterwards."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
from agent_tools import eventually
from moe_faults import OPTIONS, Report, Where
from moe_tools import Processes

from raynixl import Masked
from raynixl.host import process_state

WORLD, VICTIM, REST = 4, 2, (0, 1, 3)
LONG = 20.0
"""A deadline that is never reached where all is well: who comes by far earlier has not waited for it."""

SOON = 8.0
"""Seconds within which what needs no waiting is done, on a busy machine."""


def mostly_slow(cases: Sequence[Any], every: int) -> list[Any]:
    """Return cases for parametrize, of which one in so many is run each time, and all by `make soak`."""
    return [
        pytest.param(
            *(case if isinstance(case, tuple) else (case,)), marks=() if number % every == 0 else pytest.mark.slow
        )
        for number, case in enumerate(cases)
    ]


def alive(crew: Processes) -> list[int]:
    """The ranks whose processes live."""
    return [rank for rank, child in enumerate(crew.children) if child.is_alive]


@contextlib.contextmanager
def layer(crew: Processes, ranks: Sequence[int] | None = None, **options: Any) -> Iterator[Processes]:
    """The crew with a layer that it has used; nothing is left of it afterwards, and who was killed is replaced."""

    def begin() -> None:
        crew.make("layer", ranks=ranks, **{**OPTIONS, **options})
        check(crew.call("moe_faults:steps", "layer", 3, ranks=ranks))

    with begun(crew, begin):
        yield crew


@contextlib.contextmanager
def begun(crew: Processes, begin: Callable[[], None]) -> Iterator[None]:
    """Make a layer; nothing is left of it afterwards, and who was killed is replaced."""
    try:
        before = crew.call("moe_faults:footprint")
        begin()
        yield
        left = alive(crew)
        crew.call("moe_faults:drop", "layer", ranks=left)
        eventually(lambda: not left_behind(crew, left, before), f"nothing is left of {before}")
    except BaseException:
        for rank in alive(crew):  # what they are amid nobody knows
            crew.kill(rank)
        raise
    finally:
        for rank in set(range(len(crew.children))) - set(alive(crew)):
            crew.restart(rank)


def left_behind(crew: Processes, ranks: Sequence[int], before: list[Any]) -> list[Any]:
    """Return what ranks hold beyond what they held before."""
    now = crew.call("moe_faults:footprint", ranks=ranks)
    pairs = [(held, before[rank]) for rank, held in zip(ranks, now, strict=True)]
    return [held for held, former in pairs if held[0] or held[1] > former[1] or held[2] > former[2]]


def check(found: Sequence[Sequence[Report]], *, gone: Sequence[int] = ()) -> None:
    """Fail unless steps were whole, but for the ranks that were gone before."""
    for reports in found:
        for number, report in enumerate(reports):
            assert set(report.lost) <= (set(gone) if number == 0 else set()), report  # some hear of it in the next step
            assert set(report.missing) == set(gone), report
            assert set(report.unheard) == set(gone), report


def check_harmed(report: Report, where: Where, victims: Sequence[int] = (VICTIM,)) -> None:
    """Fail unless a step in which ranks came to harm lacks at most what is theirs, and says so."""
    assert set(report.missing) <= set(victims)
    assert set(report.unheard) <= set(victims)
    assert set(report.lost) <= set(victims)
    assert not set(report.active) & set(report.missing)
    assert set(report.unheard) <= set(report.lost)
    if where.operation == "dispatch":
        assert set(report.missing) == set(victims)  # nothing was sent back
    else:
        assert report.unheard == ()


def come_back(crew: Processes, rank: int, rest: Sequence[int] = REST) -> float:
    """Have a rank rejoin beside others that go on; all steps are whole. Return the seconds that it took."""
    crew.tell(rank, "moe_faults:rejoin", "layer")
    everybody = tuple(sorted([rank, *rest]))
    for other in rest:
        crew.tell(other, "moe_faults:steps_until", "layer", everybody)
    found = [crew.hear(other) for other in rest]
    seconds, report = crew.hear(rank)
    check([each[:-1] for each in found], gone=[rank])
    check([[report], *(each[-1:] for each in found)])
    check(crew.call("moe_faults:steps", "layer", 3, ranks=everybody))
    return float(seconds)


def hear_masked(crew: Processes, rank: int) -> None:
    """Have a rank learn that it is masked: in its step, or in the next if all others did their part in that one."""
    with contextlib.suppress(Masked):
        crew.hear(rank)
    with pytest.raises(Masked, match="rejoin"):
        crew.call("moe_faults:step", "layer", ranks=[rank])


def harm(
    crew: Processes, where: Where, number: int, *, deadline: float = LONG, rest: Sequence[int] = REST, **options: Any
) -> list[Report]:
    """Have the victim come to harm at a place of a step; return what the others say of that step, which they keep."""
    crew.call("moe_faults:harm", where, number, ranks=[VICTIM])
    crew.tell(VICTIM, "moe_faults:step", "layer", LONG, **options)
    for rank in rest:
        crew.tell(rank, "moe_faults:step", "layer", deadline, True, **options)
    found = [crew.hear(rank) for rank in rest]
    if number == signal.SIGKILL:
        crew.children[VICTIM].wait_ended()
    else:
        eventually(lambda: process_state(crew.children[VICTIM].pid) == "T", "the victim stands")
    return found


def come_back_beside(crew: Processes, victim: int, rest: Sequence[int], function: str, *args: object) -> None:
    """Have a rank of two stages come in by a function beside the others, which go on until all ranks are active."""
    everybody = tuple(range(len(crew.names)))
    crew.tell(victim, function, *args)
    for rank in rest:
        crew.tell(rank, "moe_staged_faults:steps_until", "layer", everybody)
    for rank in everybody:
        crew.hear(rank)
    for reports in crew.call("moe_faults:steps", "layer", 2):
        assert all(report.missing == report.unheard == report.lost == () for report in reports)
