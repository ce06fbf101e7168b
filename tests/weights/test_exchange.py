"""What whoever coordinates a relay answers to receivers, and what these make of it."""

import threading
import time

import pytest
import torch
from weights_tools import fill

from raynixl.errors import TransferCancelled
from raynixl.weights import WeightSync, publish, subscribe
from raynixl.weights import exchange as module
from raynixl.weights.assignment import Topology, Why
from raynixl.weights.declare import declare
from raynixl.weights.exchange import Exchange
from raynixl.weights.pieces import TensorInfo
from raynixl.weights.placement import Mesh, Shard
from raynixl.weights.protocol import Holder
from raynixl.weights.receiver import Receiver
from raynixl.weights.relay import done_topic, next_topic
from raynixl.weights.relaying import Batch, Failed, Next
from raynixl.weights.swarm import Swarm

pytestmark = pytest.mark.pure

PUSH = "ab" * 16
CHUNKS = 3


class Party:
    """Receivers that ask an exchange by hand."""

    def __init__(self, fleet, count):
        self.coordinator = fleet("coordinator")
        self.receivers = [fleet(f"r{number}") for number in range(count)]
        self.released = []
        self.exchange = Exchange(self.coordinator, "w", PUSH, on_released=lambda: self.released.append(True))
        self.exchange.add(
            Swarm(CHUNKS, origin_hosts=["far"], topology=Topology.RELAY),
            {agent.name: f"host of {agent.name}" for agent in self.receivers}, [["nobody known"]],
        )  # fmt: skip

    def ask(self, agent, where=next_topic, **said):
        """Return the answer that comes."""
        answer = self.send(agent, where, **said).wait()
        return Batch.from_bytes(answer) if answer else None

    def send(self, agent, where=next_topic, **said):
        return agent.ask("coordinator", where("w", PUSH), Next(**said).to_bytes(), timeout=10)


@pytest.fixture
def party(fleet):
    made = []

    def make(count):
        made.append(Party(fleet, count))
        return made[0]

    yield make
    made[0].exchange.close()


def test_a_receiver_cannot_give_itself_out_as_another(party):
    made = party(2)
    one, other = made.receivers
    forged = Holder(name=other.name, incarnation=other.incarnation, regions=())
    chunks = [chunk for chunk, _ in made.ask(one, room=CHUNKS, holder=forged).chunks]
    made.ask(one, done_topic, done=tuple(chunks))
    answer = made.ask(other, room=CHUNKS)
    assert {holder for _, holder in answer.chunks} == {one.name}
    assert answer.holders == ()


def test_a_failure_that_is_told_while_a_question_waits_is_answered_by_that_question(party):
    made = party(1)
    (one,) = made.receivers
    assert len(made.ask(one, room=CHUNKS).chunks) == CHUNKS
    waiting = made.send(one, room=1)
    made.ask(one, done_topic, failed=(Failed(chunk=1, holder="", why=Why.CORRUPT),))
    assert Batch.from_bytes(waiting.wait()).chunks == [(1, "")]


def test_questions_that_wait_take_no_thread_and_are_answered_as_soon_as_there_is_something(party):
    made = party(6)
    first, *others = made.receivers
    assert len(made.ask(first, room=CHUNKS).chunks) == CHUNKS
    before = threading.active_count()
    waiting = [made.send(other, room=1) for other in others]
    made.ask(first, done_topic)  # was heard after them
    assert threading.active_count() == before
    assert not any(reply.done for reply in waiting)
    made.ask(first, done_topic, done=(0,))
    answered = [Batch.from_bytes(reply.wait()).chunks for reply in waiting[:4]]
    assert answered == [[(0, first.name)]] * 4


def test_a_question_for_which_there_is_nothing_is_answered_now_and_then(party, monkeypatch):
    monkeypatch.setattr(module, "_POLL_SECONDS", 0.0)
    made = party(2)
    first, other = made.receivers
    assert len(made.ask(first, room=CHUNKS).chunks) == CHUNKS
    waiting = made.send(other, room=1)
    made.ask(other, done_topic)  # was heard after it
    made.exchange.tick()
    assert Batch.from_bytes(waiting.wait()) == Batch([])


def test_questions_that_wait_when_the_pulls_are_over_are_told_so(party):
    made = party(2)
    first, other = made.receivers
    assert len(made.ask(first, room=CHUNKS).chunks) == CHUNKS
    waiting = made.send(other, room=1)
    made.ask(other, done_topic)
    made.exchange.close()
    assert Batch.from_bytes(waiting.wait()).fault.kind == "PeerLost"


def test_what_stalls_at_a_receiver_that_asks_on_is_brought_in_by_others(party, monkeypatch):
    monkeypatch.setattr(module, "_POLL_SECONDS", 60.0)
    made = party(2)
    stalled, other = made.receivers
    assert len(made.ask(stalled, room=CHUNKS).chunks) == CHUNKS
    waiting = made.send(other, room=1)
    deadline = time.monotonic() + 20
    while not waiting.done:
        assert time.monotonic() < deadline
        made.send(stalled, room=1)
        made.exchange.tick()
        time.sleep(0.05)
    assert Batch.from_bytes(waiting.wait()).chunks[0][1] == ""


def test_sources_are_kept_for_those_who_pull_by_themselves(party):
    made = party(1)
    (one,) = made.receivers
    made.exchange.expect(["alone"])
    made.ask(one, room=CHUNKS)
    made.ask(one, done_topic, done=tuple(range(CHUNKS)))
    assert made.released == []
    made.exchange.over(["alone"], [])
    deadline = time.monotonic() + 10
    while not made.released:
        assert time.monotonic() < deadline
    made.exchange.over([one.name], [])
    assert made.released == [True]


def holding(made):
    """Have receivers share an image whose sources are asked for nothing yet."""
    swarm = Swarm(CHUNKS, origin_hosts=["far"], topology=Topology.RELAY, holds_origin=True)
    made.exchange.close()
    made.exchange = Exchange(made.coordinator, "w", PUSH, on_released=lambda: made.released.append(True))
    made.exchange.add(swarm, {agent.name: f"host of {agent.name}" for agent in made.receivers}, [["nobody known"]])
    return swarm


def test_receivers_wait_for_who_is_to_have_everything_and_get_it_there(party):
    made = party(2)
    delta, other = made.receivers
    swarm = holding(made)
    made.exchange.hope(swarm, [delta.name], 60.0)
    waiting = made.send(other, room=1)
    made.ask(other, done_topic)
    made.ask(delta, done_topic)
    made.exchange.tick()
    assert not waiting.done
    whole = Holder(name=delta.name, incarnation=delta.incarnation, regions=())
    made.exchange.over([delta.name], [], {delta.name: whole})
    answer = Batch.from_bytes(waiting.wait())
    assert [holder for _, holder in answer.chunks] == [delta.name]
    assert answer.holders == (whole,)


@pytest.mark.parametrize("how", ["it fails", "it lacks something itself", "it takes too long"])
def test_receivers_get_from_the_sources_what_who_was_to_have_everything_does_not(party, how):
    made = party(2)
    delta, other = made.receivers
    seconds = 0.0 if how == "it takes too long" else 60.0
    swarm = holding(made)
    made.exchange.hope(swarm, [delta.name], seconds)
    waiting = made.send(other, room=CHUNKS)
    made.ask(other, done_topic)
    if how == "it fails":
        made.exchange.over([delta.name], [delta.name])
    elif how == "it lacks something itself":
        whole = Holder(name=delta.name, incarnation=delta.incarnation, regions=())
        made.send(delta, done=(0, 1), room=1, holder=whole)
    given = dict(Batch.from_bytes(waiting.wait()).chunks)
    assert given.pop(2) == ""
    assert set(given.values()) <= {"", delta.name}


def test_reads_of_a_chunk_do_not_outlast_a_pull_that_ends_while_they_are_begun(fleet, monkeypatch):
    halves, target = [{"w": torch.zeros(40_000)} for _ in range(2)], {"w": torch.zeros(80_000)}
    infos = [TensorInfo("w", "float32", (80_000,))]
    for rank, own in enumerate(halves):
        shards = declare(infos, Mesh((("fsdp", 2),)), (Shard(0),), (rank,))
        publish(fleet(f"half{rank}"), "w", own, shards=shards, chunk_nbytes=1 << 19)
    rollout = fleet("rollout")
    subscription = subscribe(rollout, "w", target)
    sync = WeightSync(rollout, "w", ["half0", "half1"], ["rollout"], timeout=10)
    begun, start = [], Receiver._start

    def interrupted(receiver, read, share):
        if begun:
            raise TransferCancelled("a newer push has begun")
        begun.append(start(receiver, read, share)[1])
        return None, begun[0]

    monkeypatch.setattr(Receiver, "_start", interrupted)
    assert isinstance(sync.push(1).excluded["rollout"], TransferCancelled)
    assert [transfer.done for transfer in begun] == [True]
    monkeypatch.undo()
    for own in halves:
        fill(torch.nn.ParameterDict(own), 2.0)
    assert not sync.push(2).excluded
    assert subscription.version == 2
