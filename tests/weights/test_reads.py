"""Reads that are posted at every push are resolved once, and forgotten with what they read into."""

import pytest

from raynixl.weights import reads as module
from raynixl.weights.reads import Reads

pytestmark = pytest.mark.pure


class Read:
    def __init__(self, count):
        self.count = count


def test_a_read_is_made_once_and_found_again():
    reads = Reads()
    made = []

    def make():
        made.append(Read(3))
        return made[-1]

    assert reads.get("one", make) is reads.get("one", make)
    assert reads.get("other", make) is made[1]
    assert len(made) == len(reads) == 2
    reads.clear()
    assert len(reads) == 0
    assert reads.get("one", make) is made[2]


def test_those_used_last_stay_within_the_bounds(monkeypatch):
    monkeypatch.setattr(module, "_MOST_BLOCKS", 10)
    reads = Reads()
    for name in "abc":
        reads.get(name, lambda: Read(3))
    again = reads.get("a", lambda: pytest.fail("it was there"))
    reads.get("d", lambda: Read(4))
    assert reads.get("a", lambda: pytest.fail("it was used last")) is again
    assert len(reads) == 3
    made = Read(3)
    assert reads.get("b", lambda: made) is made
    huge = Read(1000)
    assert reads.get("huge", lambda: huge) is huge
    assert len(reads) == 1


def test_the_number_of_reads_is_bounded_too(monkeypatch):
    monkeypatch.setattr(module, "_MOST_READS", 4)
    reads = Reads()
    for number in range(10):
        reads.get(number, lambda: Read(1))
    assert len(reads) == 4
