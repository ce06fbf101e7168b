"""Deltas end to end: little that has changed costs few bytes, bit by bit, and whatever is no base heals by itself."""

import threading
import time

import pytest
import torch

from raynixl.weights import WeightSync, publish, subscribe

SECONDS = 20.0
CHUNK_NBYTES = 64 << 10


def model(seed=0):
    torch.manual_seed(seed)
    return {"w": torch.randn(600, 512).bfloat16(), "b": torch.randn(40_000).bfloat16()}


def touch(tensors, share, seed):
    """Change this share of all elements, and each of them for sure."""
    generator = torch.Generator().manual_seed(seed)
    for tensor in tensors.values():
        raw = tensor.view(torch.int16)
        raw[torch.rand(tensor.shape, generator=generator) < share] ^= 1


def is_same(one, other):
    return all(torch.equal(one[name].view(torch.int16), other[name].view(torch.int16)) for name in one)


def nbytes(tensors):
    return sum(tensor.nbytes for tensor in tensors.values())


class Line:
    """A trainer and rollouts, past the pushes after which sources have room for a base version."""

    def __init__(self, fleet, count=1, *, delta="auto", topology="direct", **options):
        self.fleet, self.options = fleet, options
        self.source = model()
        self.publication = publish(fleet("trainer"), "policy", self.source, chunk_nbytes=CHUNK_NBYTES)
        self.models, self.subscriptions = {}, {}
        for number in range(count):
            self.add(f"rollout-{number}")
        self.sync = WeightSync(
            fleet.agents[0], "policy", ["trainer"], list(self.models), delta=delta, topology=topology, timeout=SECONDS
        )

    def add(self, name):
        self.models[name] = model(1)
        self.subscriptions[name] = subscribe(self.fleet(name), "policy", self.models[name], **self.options)

    def warm(self):
        """Push two versions; the source makes room for the next base in the background."""
        self.sync.push(1)
        self.sync.push(2)
        deadline = time.monotonic() + SECONDS
        while len(self.publication._copies._copies) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert not self.push(3, 0.01).excluded

    def push(self, version, share):
        touch(self.source, share, version)
        return self.sync.push(version)

    def all_same(self):
        return all(is_same(self.source, target) for target in self.models.values())


@pytest.mark.parametrize("install", ["swap", "copy"])
@pytest.mark.parametrize("keep", [1, 2])
def test_a_chain_of_small_changes_costs_little_and_is_bit_exact(fleet, install, keep):
    line = Line(fleet, 2, install=install, keep=keep)
    line.warm()
    for version in range(4, 9):
        report = line.push(version, 0.01)
        assert not report.excluded
        assert report.deltas == 2
        assert report.origin_nbytes + report.peer_nbytes <= 2 * 0.025 * nbytes(line.source)
        assert line.all_same()
    most = keep + (install == "swap")  # copies of the model besides the one that is read, where that is copied into
    assert all(len(one.held_versions) == most for one in line.subscriptions.values())


def test_deltas_that_are_off_are_never_sent(fleet):
    line = Line(fleet, delta="off")
    for version in range(1, 5):
        report = line.push(version, 0.01)
        assert report.deltas == 0
        assert report.origin_nbytes >= nbytes(line.source)
        assert line.all_same()


def test_large_changes_come_whole(fleet):
    line = Line(fleet)
    line.warm()
    report = line.push(4, 0.9)
    assert report.deltas == 0
    assert line.all_same()


@pytest.mark.parametrize("install", ["swap", "copy"])
def test_a_target_with_another_base_gets_everything(fleet, install):
    line = Line(fleet, 2, install=install, flip_timeout=0.2)
    line.warm()
    inside, leave = threading.Event(), threading.Event()

    def read():
        with line.subscriptions["rollout-1"].pinned():
            inside.set()
            leave.wait(SECONDS)

    reader = threading.Thread(target=read)
    reader.start()
    assert inside.wait(SECONDS)
    assert set(line.push(4, 0.01).excluded) == {"rollout-1"}
    leave.set()
    reader.join(SECONDS)
    report = line.push(5, 0.01)
    assert not report.excluded
    assert report.deltas == 1
    assert line.all_same()
    assert line.push(6, 0.01).deltas == 2
    assert line.all_same()


@pytest.mark.parametrize("install", ["swap", "copy"])
def test_after_a_push_that_nobody_took_everything_comes(fleet, install):
    line = Line(fleet, install=install, flip_timeout=0.2)
    line.warm()
    inside, leave = threading.Event(), threading.Event()

    def read():
        with line.subscriptions["rollout-0"].pinned():
            inside.set()
            leave.wait(SECONDS)

    reader = threading.Thread(target=read)
    reader.start()
    assert inside.wait(SECONDS)
    assert line.push(4, 0.01).excluded
    leave.set()
    reader.join(SECONDS)
    for version in (5, 6, 7):
        assert not line.push(version, 0.01).excluded
        assert line.all_same()


def test_after_a_roll_back_everything_comes_and_then_deltas_again(fleet):
    line = Line(fleet, keep=2)
    line.warm()
    assert line.sync.roll_back(2) == {}
    for version in (4, 5, 6):
        assert not line.push(version, 0.01).excluded
        assert line.all_same()
    assert line.push(7, 0.01).deltas == 1


@pytest.mark.parametrize("install", ["swap", "copy"])
def test_weights_that_were_changed_at_the_target_heal(fleet, install):
    line = Line(fleet, install=install)
    line.warm()
    line.models["rollout-0"]["w"][3] = 77
    assert not line.push(4, 0.01).excluded
    assert line.all_same()


def test_deltas_go_through_relays(fleet):
    line = Line(fleet, 3, topology="relay")
    line.warm()
    for version in (4, 5):
        report = line.push(version, 0.01)
        assert not report.excluded
        assert report.deltas == 3
        assert line.all_same()


def test_a_pull_is_held_to_its_rate(fleet):
    line = Line(fleet, max_gbps=0.02)
    began = time.monotonic()
    assert not line.sync.push(1).excluded
    took = time.monotonic() - began
    rest = nbytes(line.source) - CHUNK_NBYTES  # the first chunk does not wait
    assert took >= rest * 8e-9 / 0.02 * 0.9
    assert line.all_same()
