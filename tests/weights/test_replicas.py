"""Replicas, the ranks of which flip together: all of them or none, and readers are let in again in any case."""

import threading
import time

import pytest
import torch

from raynixl.errors import IntegrityError, RaynixlError, TransferTimeout
from raynixl.weights import WeightSync, publish, subscribe
from raynixl.weights.flipper import Flipper
from raynixl.weights.protocol import Answer, topic
from raynixl.weights.receiver import Receiver
from raynixl.weights.targeting import Hold, Step

pytestmark = pytest.mark.pure

SECONDS = 20.0


def weights(value):
    return {"a": torch.full((400, 40), float(value))}


class Pairs:
    """A trainer and two replicas of two ranks, all of which follow one tensor of one value."""

    def __init__(self, fleet, *, install="swap", flip_timeout=10.0, keep=1):
        self.fleet = fleet
        self.trainer = fleet("trainer")
        self.source = weights(0)
        publish(self.trainer, "policy", self.source, chunk_nbytes=4096)
        self.replicas = [["p0", "p1"], ["q0", "q1"]]
        self.models, self.subscriptions, self.agents = {}, {}, {}
        for name in ("p0", "p1", "q0", "q1"):
            self.models[name], self.agents[name] = weights(-1), fleet(name)
            self.subscriptions[name] = subscribe(
                self.agents[name], "policy", self.models[name], install=install, flip_timeout=flip_timeout, keep=keep
            )
        self.sync = WeightSync(self.trainer, "policy", ["trainer"], self.replicas, timeout=SECONDS)

    def push(self, version, **options):
        self.source["a"].fill_(version)
        return self.sync.push(version, **options)

    def serve(self, names, version):
        return all(
            self.subscriptions[name].version == version and bool(self.models[name]["a"].eq(version).all())
            for name in names
        )

    def can_be_read(self, names):
        """Whether readers of other threads get in at once."""
        got = []

        def read(name):
            with self.subscriptions[name].pinned() as version:
                got.append(version)

        threads = [threading.Thread(target=read, args=(name,)) for name in names]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(5)
        return len(got) == len(names)


class Reader:
    """A reader of one target that stays in its section until it is told to leave."""

    def __init__(self, subscription):
        self._subscription = subscription
        self._inside, self._leave = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._read)

    def _read(self):
        with self._subscription.pinned():
            self._inside.set()
            self._leave.wait(3 * SECONDS)

    def __enter__(self):
        self._thread.start()
        assert self._inside.wait(SECONDS)
        return self

    def __exit__(self, *_):
        self._leave.set()
        self._thread.join(SECONDS)


@pytest.mark.parametrize("install", ["swap", "copy"])
def test_all_ranks_of_all_replicas_flip(fleet, install):
    pairs = Pairs(fleet, install=install)
    for version in (1, 2, 3):
        assert not pairs.push(version).excluded
        assert pairs.serve(pairs.models, version)
        assert pairs.can_be_read(pairs.models)


@pytest.mark.parametrize("install", ["swap", "copy"])
def test_no_rank_of_a_replica_flips_if_one_cannot_pull(fleet, install, monkeypatch):
    pairs = Pairs(fleet, install=install)
    pairs.push(1)
    real = Receiver.from_origin

    def fail(self, chunk):
        if self.agent.name == "p1":
            raise IntegrityError("a test breaks this chunk", peer="trainer")
        real(self, chunk)

    monkeypatch.setattr(Receiver, "from_origin", fail)
    monkeypatch.setattr(Receiver, "is_whole", lambda *_: True)
    report = pairs.push(2)
    monkeypatch.undo()
    assert set(report.excluded) == {"p0", "p1"}
    assert pairs.serve(["p0", "p1"], 1)
    assert pairs.serve(["q0", "q1"], 2)
    assert pairs.can_be_read(pairs.models)
    assert not pairs.push(3).excluded
    assert pairs.serve(pairs.models, 3)


def test_no_rank_of_a_replica_flips_if_one_is_dead(fleet):
    pairs = Pairs(fleet)
    pairs.push(1)
    pairs.agents["q1"].close()
    report = pairs.push(2)
    assert set(report.excluded) == {"q0", "q1"}
    assert pairs.serve(["p0", "p1"], 2)
    assert pairs.serve(["q0"], 1)
    assert pairs.can_be_read(["p0", "p1", "q0"])


@pytest.mark.parametrize("install", ["swap", "copy"])
def test_no_rank_of_a_replica_flips_if_a_reader_of_one_does_not_leave(fleet, install):
    pairs = Pairs(fleet, install=install, flip_timeout=0.3)
    pairs.push(1)
    with Reader(pairs.subscriptions["p1"]):
        report = pairs.push(2)
        assert set(report.excluded) == {"p0", "p1"}
        assert isinstance(report.excluded["p1"], TransferTimeout)
        assert pairs.serve(["p0", "p1"], 1)
        assert pairs.serve(["q0", "q1"], 2)
        assert pairs.can_be_read(["p0", "q0", "q1"])
    assert not pairs.push(3).excluded
    assert pairs.serve(pairs.models, 3)


def test_a_reader_of_one_rank_keeps_the_flip_of_its_own_replica_up_and_no_other(fleet):
    pairs = Pairs(fleet, flip_timeout=2 * SECONDS)
    single, fed = weights(-1), fleet("s")
    pairs.subscriptions["s"] = subscribe(fed, "policy", single)
    pairs.sync = WeightSync(pairs.trainer, "policy", ["trainer"], [*pairs.replicas, "s"], timeout=SECONDS)
    assert not pairs.push(1).excluded
    pushing = threading.Thread(target=pairs.push, args=(2,), kwargs={"timeout": 2 * SECONDS})
    with Reader(pairs.subscriptions["p1"]):
        pushing.start()
        assert [pairs.subscriptions[name].wait_version(2, SECONDS) for name in ("q0", "q1", "s")] == [2, 2, 2]
        assert pairs.can_be_read(["q0", "q1", "s"])
        assert pairs.serve(["p0", "p1"], 1)
    pushing.join(SECONDS)
    assert pairs.serve(["p0", "p1", "q0", "q1"], 2)


@pytest.mark.parametrize("install", ["swap", "copy"])
def test_no_rank_of_a_replica_returns_if_a_reader_of_one_does_not_leave(fleet, install):
    pairs = Pairs(fleet, install=install, flip_timeout=0.3, keep=2)
    pairs.push(1)
    pairs.push(2)
    with Reader(pairs.subscriptions["p1"]):
        failed = pairs.sync.roll_back(1)
        assert set(failed) == {"p0", "p1"}
        assert pairs.serve(["p0", "p1"], 2)
        assert pairs.serve(["q0", "q1"], 1)
    assert pairs.can_be_read(pairs.models)
    assert pairs.sync.roll_back(1) == {}
    assert pairs.serve(pairs.models, 1)
    assert not pairs.push(3).excluded
    assert pairs.serve(pairs.models, 3)


def failing_at(monkeypatch, rank):
    """Have a version not be installed at one rank."""
    install = Flipper._install

    def fail(flipper, slot, version, ready):
        if flipper._agent.name == rank and ready is not None:
            raise IntegrityError("a test breaks this install")
        return install(flipper, slot, version, ready)

    monkeypatch.setattr(Flipper, "_install", fail)


@pytest.mark.parametrize(("install", "keep"), [("swap", 1), ("copy", 2)])
def test_a_rank_that_flipped_returns_if_another_of_its_replica_does_not_flip(fleet, install, keep, monkeypatch):
    pairs = Pairs(fleet, install=install, keep=keep)
    pairs.push(1)
    failing_at(monkeypatch, "p1")
    report = pairs.push(2)
    assert set(report.excluded) == {"p0", "p1"}
    assert "is back on its old version" in str(report.excluded["p0"])
    assert pairs.serve(["p0", "p1"], 1)
    assert pairs.serve(["q0", "q1"], 2)
    monkeypatch.undo()
    assert pairs.can_be_read(pairs.models)
    assert not pairs.push(3).excluded
    assert pairs.serve(pairs.models, 3)


def test_a_rank_that_has_its_old_version_no_more_says_so_and_serves_the_new_one(fleet, monkeypatch):
    pairs = Pairs(fleet, install="copy", keep=1)
    pairs.push(1)
    failing_at(monkeypatch, "p1")
    report = pairs.push(2)
    assert "serves the new version" in str(report.excluded["p0"])
    assert pairs.serve(["p0"], 2)
    assert pairs.subscriptions["p1"].version == 1
    monkeypatch.undo()
    assert pairs.can_be_read(pairs.models)
    assert not pairs.push(3).excluded
    assert pairs.serve(pairs.models, 3)


def held_and_left(pairs, monkeypatch, version, timeout):
    """Push, but die between the hold of all ranks and their flip."""
    targets = pairs.sync._targets
    real = targets.ask

    def ask(phase, payloads, deadline, **options):
        if phase in ("flip", "let-go"):
            raise KeyboardInterrupt
        return real(phase, payloads, deadline, **options)

    monkeypatch.setattr(targets, "ask", ask)
    with pytest.raises(KeyboardInterrupt):
        pairs.push(version, timeout=timeout)
    monkeypatch.undo()


def test_a_hold_that_comes_after_it_was_given_up_keeps_nobody_out(fleet):
    pairs = Pairs(fleet)
    pairs.push(1)
    push, pact = "a" * 32, "b" * 32

    def ask(phase, request):
        return pairs.trainer.ask("p1", topic("policy", phase), request.to_bytes(), timeout=SECONDS)

    with Reader(pairs.subscriptions["p1"]):
        holding = ask("hold", Hold(push=push, pact=pact, seconds=SECONDS, version=1, ranks=("p0", "p1")))
        wait_until(pairs.subscriptions["p1"]._follower._busy.locked)
        assert Answer.from_bytes(ask("let-go", Step(push=push, seconds=0.1)).wait()).fault is not None
    assert Answer.from_bytes(holding.wait()).fault is not None
    assert pairs.can_be_read(["p1"])
    assert not pairs.push(2).excluded


def wait_until(is_so):
    deadline = time.monotonic() + SECONDS
    while not is_so():
        assert time.monotonic() < deadline


def test_readers_are_let_in_by_time_if_whoever_pushes_dies_between_hold_and_flip(fleet, monkeypatch):
    pairs = Pairs(fleet)
    pairs.push(1)
    held_and_left(pairs, monkeypatch, 2, timeout=2.0)
    began = time.monotonic()
    assert pairs.can_be_read(pairs.models)  # it waits for them
    assert time.monotonic() - began < 5
    assert pairs.serve(pairs.models, 1)


def test_another_push_does_not_wait_for_a_hold_whose_push_is_gone(fleet, monkeypatch):
    pairs = Pairs(fleet)
    pairs.push(1)
    held_and_left(pairs, monkeypatch, 2, timeout=300.0)
    fresh = WeightSync(pairs.trainer, "policy", ["trainer"], pairs.replicas, timeout=SECONDS)
    pairs.source["a"].fill_(3)
    assert not fresh.push(3).excluded
    assert pairs.serve(pairs.models, 3)
    assert pairs.can_be_read(pairs.models)


def test_a_replica_joins_as_a_whole_or_not_at_all(fleet):
    pairs = Pairs(fleet)
    pairs.push(1)
    models = {name: weights(-1) for name in ("r0", "r1")}
    held = {name: subscribe(fleet(name), "policy", model) for name, model in models.items()}
    held["r1"].close()
    assert set(pairs.sync.join([["r0", "r1"]], timeout=2.0)) == {"r0", "r1"}
    assert held["r0"].version == 0
    pairs.sync.leave(["r0", "r1"])
    held["r1"] = subscribe(fleet.agents[-1], "policy", models["r1"])
    assert pairs.sync.join([["r0", "r1"]]) == {}
    assert {one.version for one in held.values()} == {1}
    assert all(bool(model["a"].eq(1).all()) for model in models.values())


def test_a_replica_rolls_back_as_a_whole_or_not_at_all(fleet):
    pairs = Pairs(fleet, keep=2)
    pairs.push(1)
    models = {name: weights(-1) for name in ("r0", "r1")}
    held = {name: subscribe(fleet(name), "policy", model, keep=2) for name, model in models.items()}
    assert pairs.sync.join([["r0"]]) == {}
    pairs.sync.leave(["r0"])
    pairs.push(2)
    assert pairs.sync.join([["r0", "r1"]]) == {}
    failed = pairs.sync.roll_back(1)
    assert set(failed) == {"r0", "r1"}
    assert all(isinstance(error, RaynixlError) for error in failed.values())
    assert {one.version for one in held.values()} == {2}
    assert pairs.serve(["p0", "p1", "q0", "q1"], 1)
    assert pairs.can_be_read(pairs.models)


def test_tensors_that_do_not_hold_what_was_copied_into_them_are_reported(fleet, monkeypatch):
    pairs = Pairs(fleet, install="copy")
    pairs.push(1)
    monkeypatch.setattr("raynixl.weights.installer.Steps.run", lambda *_: [])
    report = pairs.push(2)
    monkeypatch.undo()
    assert set(report.excluded) == set(pairs.models)
    assert all(isinstance(error, IntegrityError) for error in report.excluded.values())
    assert not pairs.push(3).excluded
    assert pairs.serve(pairs.models, 3)
    assert pairs.can_be_read(pairs.models)
