"""Schedules, checked by an interpreter that moves bytes between ranks in any order the messages allow."""

from collections import defaultdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raynixl.collectives.schedules import (
    Acknowledge,
    Announce,
    Await,
    Buffer,
    Collect,
    Pull,
    Signal,
    allgather,
    barrier,
    broadcast_chain,
    broadcast_direct,
    gather,
    offsets,
    scatter,
)
from raynixl.errors import ConfigError

pytestmark = pytest.mark.pure

WORLDS = range(1, 34)


class Machine:
    """Ranks that follow their schedules; a step that must wait is tried again after the others."""

    def __init__(self, schedules, sources, outs):
        self.schedules, self.sources, self.outs = schedules, sources, outs
        self.written = [bytearray(len(out)) for out in outs]
        self.ready = defaultdict(int)
        self.acknowledged, self.signals = set(), set()

    def run(self, order):
        places = [0] * len(self.schedules)
        while any(place < len(steps) for place, steps in zip(places, self.schedules, strict=True)):
            moved = False
            for rank in order:
                while places[rank] < len(self.schedules[rank]) and self.step(rank, self.schedules[rank][places[rank]]):
                    places[rank] += 1
                    moved = True
            assert moved, f"deadlock at {places}"

    def step(self, rank, step):
        match step:
            case Announce(to, buffer, ready):
                self.ready[rank, to, buffer] = ready
            case Acknowledge(to):
                self.acknowledged.add((rank, to))
            case Collect(source):
                return (source, rank) in self.acknowledged
            case Signal(to, number):
                self.signals.add((rank, to, number))
            case Await(source, number):
                return (source, rank, number) in self.signals
            case Pull():
                return self.pull(rank, step)
        return True

    def pull(self, rank, step):
        end = step.source_offset + step.nbytes
        if step.source != rank and self.ready[step.source, rank, step.buffer] < end:
            return False
        held = self.sources[step.source] if step.buffer is Buffer.SOURCE else self.outs[step.source]
        self.outs[rank][step.offset : step.offset + step.nbytes] = held[step.source_offset : end]
        for place in range(step.offset, step.offset + step.nbytes):
            self.written[rank][place] += 1
        return True


def part(rank, nbytes):
    return bytes((rank * 37 + place) % 251 for place in range(nbytes))


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("kind", ["direct", "chain"])
def test_broadcast_gives_every_rank_every_byte_once(world, kind):
    root, nbytes = world // 2, 23
    outs = [bytearray(part(99, nbytes) if rank == root else bytes(nbytes)) for rank in range(world)]
    if kind == "direct":
        schedules = [broadcast_direct(rank, world, root, nbytes=nbytes) for rank in range(world)]
    else:
        schedules = [broadcast_chain(rank, world, root, nbytes=nbytes, chunk_nbytes=5) for rank in range(world)]
    machine = Machine(schedules, outs, outs)
    machine.run(list(reversed(range(world))) if world % 2 else list(range(world)))
    assert all(out == part(99, nbytes) for out in outs)
    assert all(set(seen) == {1} for rank, seen in enumerate(machine.written) if rank != root)


sizes_of_worlds = st.lists(st.integers(0, 9), min_size=1, max_size=33)


@given(sizes=sizes_of_worlds, data=st.data())
def test_scatter_gather_and_allgather_move_each_byte_once(sizes, data):
    world = len(sizes)
    root = data.draw(st.integers(0, world - 1))
    order = data.draw(st.permutations(range(world)))
    parts = [part(rank, nbytes) for rank, nbytes in enumerate(sizes)]
    whole = b"".join(parts)

    outs = [bytearray(nbytes) for nbytes in sizes]
    sources = [whole if rank == root else b"" for rank in range(world)]
    machine = Machine([scatter(rank, root, sizes) for rank in range(world)], sources, outs)
    machine.run(order)
    assert [bytes(out) for out in outs] == parts
    assert all(set(seen) <= {1} for seen in machine.written)

    outs = [bytearray(len(whole)) if rank == root else bytearray() for rank in range(world)]
    machine = Machine([gather(rank, root, sizes) for rank in range(world)], parts, outs)
    machine.run(order)
    assert bytes(outs[root]) == whole
    assert set(machine.written[root]) <= {1}

    outs = [bytearray(len(whole)) for _ in sizes]
    machine = Machine([allgather(rank, sizes) for rank in range(world)], parts, outs)
    machine.run(order)
    assert all(bytes(out) == whole for out in outs)
    assert all(set(seen) <= {1} for seen in machine.written)


@given(
    world=st.integers(1, 33),
    nbytes=st.integers(0, 60),
    chunk=st.integers(1, 70),
    data=st.data(),
)
def test_broadcasts_work_in_any_order_for_any_root(world, nbytes, chunk, data):
    root = data.draw(st.integers(0, world - 1))
    order = data.draw(st.permutations(range(world)))
    for schedule in (
        lambda rank: broadcast_direct(rank, world, root, nbytes=nbytes),
        lambda rank: broadcast_chain(rank, world, root, nbytes=nbytes, chunk_nbytes=chunk),
    ):
        outs = [bytearray(part(5, nbytes) if rank == root else bytes(nbytes)) for rank in range(world)]
        machine = Machine([schedule(rank) for rank in range(world)], outs, outs)
        machine.run(order)
        assert all(out == part(5, nbytes) for out in outs)
        assert not any(machine.written[root])


@pytest.mark.parametrize("world", WORLDS)
def test_nobody_leaves_a_barrier_before_the_last_has_come(world):
    late = world - 1
    machine = Machine([barrier(rank, world) for rank in range(world)], [b""] * world, [b""] * world)
    places = [0] * world
    for _ in range(2 * world):  # all but the last go as far as they can
        for rank in range(world):
            steps = machine.schedules[rank]
            while rank != late and places[rank] < len(steps) and machine.step(rank, steps[places[rank]]):
                places[rank] += 1
    if world > 1:
        assert all(places[rank] < len(machine.schedules[rank]) for rank in range(world - 1))
    machine = Machine([barrier(rank, world) for rank in range(world)], [b""] * world, [b""] * world)
    machine.run(list(range(world)))


def test_chain_pipelines_chunk_after_chunk():
    assert broadcast_chain(1, 3, 0, nbytes=5, chunk_nbytes=2) == [
        Pull(0, Buffer.OUT, 0, 0, 2),
        Announce(2, Buffer.OUT, 2),
        Pull(0, Buffer.OUT, 2, 2, 2),
        Announce(2, Buffer.OUT, 4),
        Pull(0, Buffer.OUT, 4, 4, 1),
        Announce(2, Buffer.OUT, 5),
        Acknowledge(0),
        Collect(2),
    ]


def test_the_root_of_a_direct_broadcast_announces_and_collects():
    steps = [Announce(2, Buffer.OUT, 7), Announce(0, Buffer.OUT, 7), Collect(2), Collect(0)]
    assert broadcast_direct(1, 3, 1, nbytes=7) == steps


def test_offsets_are_running_sums():
    assert offsets([3, 0, 2]) == [0, 3, 3]
    assert offsets([]) == []


@pytest.mark.parametrize("call", [
    lambda: broadcast_direct(3, 3, 0, nbytes=1),
    lambda: broadcast_direct(0, 3, 3, nbytes=1),
    lambda: broadcast_chain(0, 3, 0, nbytes=1, chunk_nbytes=0),
    lambda: scatter(0, -1, [1]),
    lambda: gather(1, 0, [1]),
    lambda: barrier(0, 0),
])  # fmt: skip
def test_ranks_outside_the_world_are_refused(call):
    with pytest.raises(ConfigError):
        call()
