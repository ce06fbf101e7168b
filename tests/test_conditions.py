"""A condition's lock is never left held, wherever an interrupt strikes."""

from __future__ import annotations

import threading

import pytest
from interrupt_tools import interrupts

from raynixl.conditions import Condition

pytestmark = pytest.mark.pure


def test_no_interrupt_leaves_the_lock_held():
    own = threading.RLock()
    changed = Condition(own)

    def enter_wait_and_tell():
        with changed:
            changed.notify_all()
            changed.wait_for(lambda: False, 0.001)

    places = []
    for place in interrupts(enter_wait_and_tell):
        taken = []
        thread = threading.Thread(target=lambda own=own, taken=taken: taken.append(own.acquire(timeout=5.0)))
        thread.start()
        thread.join()
        assert taken == [True], place
        own = threading.RLock()
        changed = Condition(own)
        places.append(place)
    assert len(places) > 10


def test_a_lock_that_knows_no_owner_is_refused():
    with pytest.raises(TypeError, match="RLock"):
        Condition(threading.Lock())


def test_whoever_waits_is_told():
    changed, told = Condition(), []

    def wait():
        with changed:
            told.append(changed.wait_for(lambda: told, 10.0))

    thread = threading.Thread(target=wait)
    thread.start()
    with changed:
        told.append("now")
        changed.notify_all()
    thread.join(10.0)
    assert len(told) == 2
