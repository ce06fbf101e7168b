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


def test_what_comes_beyond_the_bounds_is_not_kept_so_that_the_next_pull_finds_the_rest(monkeypatch):
    monkeypatch.setattr(module, "_MOST_BLOCKS", 10)
    reads = Reads()
    for _ in range(3):
        reads.begin()
        made = []
        for name in "abcde":
            reads.get(name, lambda made=made: made.append(1) or Read(3))
        assert len(reads) == 3
    assert len(made) == 2


def test_those_that_some_pulls_have_not_used_make_way(monkeypatch):
    monkeypatch.setattr(module, "_MOST_READS", 3)
    reads = Reads()
    reads.begin()
    for name in "abc":
        reads.get(name, lambda: Read(1))
    for _ in range(module._KEPT_PULLS - 1):
        reads.begin()
        reads.get("a", lambda: pytest.fail("it was there"))
        reads.get("d", lambda: Read(1))
        assert len(reads) == 3
    reads.begin()
    reads.get("a", lambda: pytest.fail("it was there"))
    kept = Read(1)
    assert reads.get("d", lambda: kept) is kept
    assert reads.get("d", lambda: pytest.fail("there is room now")) is kept
    assert len(reads) == 2


def test_a_read_larger_than_the_bound_is_made_each_time(monkeypatch):
    monkeypatch.setattr(module, "_MOST_BLOCKS", 10)
    reads = Reads()
    reads.begin()
    assert reads.get("huge", lambda: Read(1000)).count == 1000
    assert len(reads) == 0
