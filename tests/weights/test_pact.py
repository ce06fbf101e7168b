"""The pact: how the ranks of a replica end a flip that nobody leads any more, whoever asks whom, in any order."""

import itertools

import pytest

from raynixl.weights.pact import Pact, Stage, Terms, ending

pytestmark = pytest.mark.pure

HELD, FLIPPED, BACK, UNKNOWN = Stage.HELD, Stage.FLIPPED, Stage.BACK, Stage.UNKNOWN


def pact():
    return Pact(Terms("p" * 32, "q" * 32, ("leader", "1"), ("other",), 0.0, 1))


def flipped():
    made = pact()
    assert made.begin()
    made.reach(FLIPPED)
    return made


@pytest.mark.parametrize(
    ("mine", "others", "end"),
    [
        (HELD, [HELD, HELD], BACK),
        (HELD, [HELD, FLIPPED], FLIPPED),
        (HELD, [UNKNOWN], BACK),
        (HELD, [], BACK),
        (HELD, [BACK, FLIPPED], BACK),
        (FLIPPED, [HELD, HELD], FLIPPED),
        (FLIPPED, [FLIPPED, UNKNOWN], FLIPPED),
        (FLIPPED, [BACK, FLIPPED], BACK),
    ],
)
def test_one_that_flipped_takes_all_forward_and_one_that_is_back_takes_all_back(mine, others, end):
    assert ending(mine, others) is end


def test_whoever_pushes_is_not_heard_any_more_once_another_rank_has_asked():
    one = pact()
    assert one.asked(HELD) is HELD
    assert not one.begin()
    assert one.settle([HELD]) is BACK
    assert one.stage is BACK


def test_a_flip_is_taken_back_only_while_it_is_led():
    one = flipped()
    assert one.begin_back()
    one.reach(BACK)
    other = flipped()
    assert other.asked(HELD) is FLIPPED
    assert not other.begin_back()
    assert other.stage is FLIPPED


def test_who_has_told_one_that_flipped_that_it_holds_flips_whatever_else_it_hears():
    one = pact()
    assert one.asked(FLIPPED) is HELD
    assert one.settle([HELD, UNKNOWN]) is FLIPPED


def test_a_flip_that_is_led_is_begun_once():
    one = pact()
    assert one.begin()
    assert not one.begin()


def test_a_hold_that_ends_without_more_is_back():
    one = pact()
    one.end()
    assert one.stage is BACK
    assert one.wait(0.0)


@pytest.mark.parametrize("leads", list(itertools.product([False, True], repeat=3)))
@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_ranks_that_ask_one_after_the_other_all_end_alike(leads, order):
    """Some were flipped by whoever pushed before it went; each asks the others, and ends, in any order."""
    ranks = [flipped() if lead else pact() for lead in leads]
    ends = {}
    for number in order:
        mine = ranks[number].claim()
        heard = [other.asked(mine) for other in ranks if other is not ranks[number]]
        ends[number] = ranks[number].settle(heard)
        if ranks[number].stage is Stage.FLIPPING:
            ranks[number].reach(FLIPPED)
    assert set(ends.values()) == {FLIPPED if any(leads) else BACK}


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_ranks_that_ask_at_once_all_end_alike(order):
    ranks = [flipped(), pact(), pact()]
    mine = [rank.claim() for rank in ranks]
    heard = {n: [o.asked(mine[n]) for o in ranks if o is not ranks[n]] for n in order}
    assert {ranks[n].settle(heard[n]) for n in order} == {FLIPPED}
