"""Holds: places that pushes take and give back, one at a time or two, and what frees a place by itself."""

import threading

import pytest

from raynixl.errors import TransferTimeout
from raynixl.weights.hold import Holds


def test_a_place_is_taken_once_and_free_after_its_release():
    holds = Holds(1)
    assert holds.take("a", 10) == 0
    with pytest.raises(TransferTimeout, match="not over"):
        holds.take("b", 0.05)
    with pytest.raises(TransferTimeout, match="still being pulled"):
        holds.take("b", 10, waits=False)
    assert not holds.release("b")
    assert holds.release("a")
    assert not holds.release("a")
    assert holds.take("b", 10, waits=False) == 0


def test_only_so_many_are_taken_at_once_and_the_order_decides_which():
    holds = Holds(3, at_once=2)
    assert holds.take("a", 10, order=[2, 0, 1]) == 2
    assert holds.take("b", 10, order=[2, 0, 1]) == 0
    with pytest.raises(TransferTimeout):
        holds.take("c", 10, order=[0, 1, 2], waits=False)
    holds.release("b")
    assert holds.take("c", 10, order=[1, 0], waits=False) == 1


def test_a_place_is_free_once_its_time_is_over_or_whoever_pushes_is_gone():
    holds, gone = Holds(1), threading.Event()
    holds.take("a", 0.05)
    assert holds.take("b", 10, is_gone=gone.is_set) == 0
    with pytest.raises(TransferTimeout):
        holds.take("c", 10, waits=False)
    gone.set()
    assert holds.take("c", 10) == 0


def test_who_waits_goes_on_when_a_place_is_released():
    holds, taken = Holds(1), threading.Event()
    holds.take("a", 10)
    waiter = threading.Thread(target=lambda: (holds.take("b", 10), taken.set()))
    waiter.start()
    assert not taken.wait(0.05)
    holds.release("a")
    assert taken.wait(5)
    waiter.join(5)


def test_waiting_until_nobody_has_a_place():
    holds = Holds(2, at_once=2)
    assert holds.wait_free(0.0)
    holds.take("a", 10)
    holds.take("b", 10)
    assert not holds.wait_free(0.05)
    free = []
    waiter = threading.Thread(target=lambda: free.append(holds.wait_free(10)))
    waiter.start()
    holds.release("a")
    holds.release("b")
    waiter.join(5)
    assert free == [True]
