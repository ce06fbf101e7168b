"""The version lock: a flip waits for readers and goes before new ones; nobody waits for ever."""

import threading

import pytest

from raynixl.errors import TransferTimeout
from raynixl.weights.versionlock import VersionLock


def start(action):
    thread = threading.Thread(target=action)
    thread.start()
    return thread


def test_a_reader_that_stays_ends_the_flip_with_an_error_and_readers_go_on():
    lock, inside, leave = VersionLock(), threading.Event(), threading.Event()

    def read():
        pinned = lock.pin(1.0)
        inside.set()
        leave.wait(10)
        lock.unpin(pinned)

    reader = start(read)
    assert inside.wait(5)
    with pytest.raises(TransferTimeout, match="did not leave"), lock.writing(0.05):
        raise AssertionError("the reader is still inside")
    lock.unpin(lock.pin(1.0))
    leave.set()
    reader.join(5)
    with lock.writing(1.0):
        pass


def test_pins_nest_while_a_flip_waits():
    lock, inside, wrote = VersionLock(), threading.Event(), threading.Event()

    def write():
        inside.wait(5)
        with lock.writing(5.0):
            wrote.set()

    writer = start(write)
    outer = lock.pin(1.0)
    inside.set()
    while not lock._waiting:
        inside.wait(0.001)
    lock.unpin(lock.pin(1.0))
    assert not wrote.is_set()
    lock.unpin(outer)
    assert wrote.wait(5)
    writer.join(5)


def test_the_flips_own_thread_may_read():
    lock = VersionLock()
    with lock.writing(1.0):
        lock.unpin(lock.pin(0.1))


def test_readers_in_a_tight_loop_do_not_starve_a_flip():
    lock, stop = VersionLock(), threading.Event()

    def read():
        while not stop.is_set():
            lock.unpin(lock.pin(5.0))

    readers = [start(read) for _ in range(3)]
    try:
        for _ in range(20):
            with lock.writing(5.0):
                pass
    finally:
        stop.set()
    for reader in readers:
        reader.join(5)


def test_a_flip_that_hangs_keeps_a_reader_only_until_its_deadline():
    lock, inside, leave = VersionLock(), threading.Event(), threading.Event()

    def write():
        with lock.writing(1.0):
            inside.set()
            leave.wait(10)

    writer = start(write)
    assert inside.wait(5)
    with pytest.raises(TransferTimeout, match="kept readers waiting"):
        lock.pin(0.05)
    leave.set()
    writer.join(5)


def test_the_pin_of_a_thread_that_ended_counts_no_more():
    lock = VersionLock()
    start(lambda: lock.pin(1.0)).join(5)
    with lock.writing(5.0):
        pass


def test_unpinning_too_often_is_harmless():
    lock = VersionLock()
    pinned = lock.pin(1.0)
    lock.unpin(pinned)
    lock.unpin(pinned)
    with lock.writing(1.0):
        pass


def test_a_reader_that_fails_to_say_so_has_left_all_the_same():
    def fail():
        raise ZeroDivisionError

    lock = VersionLock(fail)
    thread = lock.pin(1.0)
    with pytest.raises(ZeroDivisionError):
        lock.unpin(thread)
    with lock.writing(0.5):
        pass
