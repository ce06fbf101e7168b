"""Givers: whom of a part's sources a pull asks, and how long it waits for one, by what it has seen so far."""

import pytest

from raynixl.errors import IntegrityError, PeerLost, TransferTimeout
from raynixl.weights.cargo import Giver
from raynixl.weights.givers import Givers
from raynixl.weights.pace import STALL_SECONDS, Pace

pytestmark = pytest.mark.pure

MIB = 1 << 20


def givers(*names):
    return Givers({0: [Giver(name, ()) for name in names]}, 0)


def asked(made, chunks=6, tried=(), gone=()):
    return {made.choose(0, chunk, dict(tried), set(gone)).name for chunk in range(chunks)}


def test_chunks_are_spread_over_the_replicas_of_a_part():
    assert asked(givers("a", "b", "c")) == {"a", "b", "c"}


@pytest.mark.parametrize("error", [TransferTimeout("slow"), PeerLost("gone"), IntegrityError("wrong")])
def test_one_that_has_failed_is_asked_after_the_others_and_before_nobody(error):
    made = givers("a", "b", "c")
    made.note("b", error)
    assert asked(made) == {"a", "c"}
    assert asked(made, gone=["a", "c"]) == {"b"}
    assert made.failures == (error,)


def test_that_a_source_lied_outweighs_that_it_was_slow_and_stays():
    made, slow, wrong = givers("a", "b"), TransferTimeout("slow"), IntegrityError("wrong")
    for error in (slow, wrong, slow):
        made.note("a", error)
    assert made.failures == (wrong,)
    assert asked(made, tried={"b": 3}) == {"b"}


def test_who_was_tried_for_a_chunk_takes_turns_with_the_others():
    made = givers("a", "b")
    assert asked(made, tried={"a": 1}) == {"b"}
    assert asked(made, tried={"a": 1, "b": 2}) == {"a"}


def test_a_part_of_which_all_are_gone_is_an_error():
    made = givers("a")
    assert made.is_alone(0, set())
    with pytest.raises(PeerLost, match="nobody gives part 0"):
        made.choose(0, 0, {}, {"a"})
    with pytest.raises(PeerLost, match="nobody gives part 7"):
        made.choose(7, 0, {}, set())


@pytest.mark.parametrize(("slowest", "seconds"), [(0.0, STALL_SECONDS), (0.001, 2.0), (0.2, 4.0), (3.0, STALL_SECONDS)])
def test_the_faster_reads_were_the_sooner_one_counts_as_stalled(slowest, seconds):
    pace = Pace()
    if slowest:
        pace.landed(slowest)
    assert pace.patience(0) == pytest.approx(seconds)


def test_more_bytes_get_more_time():
    assert Pace().patience(100 * MIB) == pytest.approx(STALL_SECONDS + 1.05, abs=0.01)


def test_while_nothing_comes_the_time_doubles_once_for_all_that_were_under_way():
    pace = Pace()
    usual = pace.patience(MIB)
    pace.stalled(began=0.0, now=5.0)
    pace.stalled(began=0.1, now=5.1)
    assert pace.patience(MIB) == 2 * usual
    pace.stalled(began=5.2, now=15.0)
    assert pace.patience(MIB) == 4 * usual
    pace.landed(1.0)
    assert pace.patience(MIB) == usual
