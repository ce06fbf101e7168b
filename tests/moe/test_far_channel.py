"""Ranks whose memory is not mapped to each other: the same programs over UCX, rows one-sided and lines as messages."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from agent_tools import make_agent
from far_channel_tools import rows_of
from moe_programs import Cached, Combine, Dispatch, Program, check, even, play
from moe_random import draw
from moe_tools import Processes, Threads
from weights_nursery import Nursery

from raynixl import ConfigError, Masked
from raynixl.moe.far_channel import pack_line
from raynixl.moe.lines import Cell, Line

SEEDS = range(7000, 7010)
WORLD = 3


class Mixed(Threads):
    """Ranks of which the first two map each other's memory, and the others nobody's."""

    def __init__(self, world: int) -> None:
        super().__init__(world, backends=("ucx",))
        for rank in (0, 1):
            directory = self.agents[rank].directory
            self.agents[rank].close()
            self.agents[rank] = make_agent(self.names[rank], directory=directory, backends=("shm", "ucx"))


@pytest.fixture(scope="module", params=["ucx", "shm and ucx"])
def crew(request: pytest.FixtureRequest) -> Iterator[Threads]:
    """Four ranks of this process."""
    with Threads(4, backends=("ucx",)) if request.param == "ucx" else Mixed(4) as made:
        yield made


def run(crew: Threads, program: Program) -> None:
    """Play a program, and hold what it returns against the reference."""
    with crew.experts(program.world, **program.options()) as layer:
        check(program, layer.run(lambda rank, ep: play(program, rank, ep, layer.groups[rank])))


@pytest.mark.parametrize("seed", SEEDS)
def test_random_programs_give_what_the_reference_gives(crew: Threads, seed: int) -> None:
    program = draw(seed, (2, 3, 4))
    try:
        run(crew, program)
    except BaseException as error:
        error.add_note(f"draw({seed}, (2, 3, 4)): {program}")
        raise


def test_rows_as_wide_as_those_of_models_and_ranks_without_tokens(crew: Threads) -> None:
    steps = []
    for number, (layout, weights_at) in enumerate([("tokens", "holder"), ("experts", "source"), ("slots", "holder")]):
        key = str(number)
        steps += [Dispatch(key, (64, 3, 0, 50), layout, 8, weights_at), Combine(key, 1), Cached(key + "c", key)]
    run(crew, Program(4, even(4, 32), 7168, 6, tuple(steps), max_tokens=64))


def test_lines_of_another_session_and_nonsense_change_nothing(crew: Threads) -> None:
    """Such as those for the session that a rank had before it joined anew, which may come late."""
    with crew.experts(4, experts=8, hidden=64, topk=2, max_tokens=16) as layer:
        program = Program(4, even(4, 8), 64, 2, (Dispatch("a", (3, 4, 5, 6)), Combine("a")), max_tokens=16)
        topic = f"moe/{layer.eps[0].name}/line"
        line = Line(layer.eps[0]._meeting._board.form)
        line.fill(1 << 40, mask=1)  # rank 0 is masked, says
        token = layer.eps[0]._meeting.token
        theirs, others = (layer.eps[rank]._meeting.token for rank in (3, 2))
        former = "0" * 32
        strange = [
            pack_line(*pair, cell, bytes(line.data)) for cell in Cell for pair in ((former, theirs), (token, former))
        ]
        wrong = [
            b"", b"x", bytes.fromhex(token), bytes.fromhex(token + theirs), pack_line(token, theirs, Cell.NOTICE, b""),
            pack_line(token, theirs, 99, bytes(line.data)),
            pack_line(token, theirs, Cell.NOTICE, bytes(line.data)[:-1]),
            *(pack_line(token, others, cell, bytes(line.data)) for cell in Cell),
        ]  # fmt: skip
        for message in [*strange, *wrong]:
            crew.agents[3].send("rank0", topic, message)
        with pytest.raises(ConfigError):  # it is answered after all of them
            crew.agents[3].ask("rank0", f"moe/{layer.eps[0].name}/slot", b"none").wait(20.0)
        check(program, layer.run(lambda rank, ep: play(program, rank, ep, layer.groups[rank])))
        assert layer.eps[0].active == (0, 1, 2, 3)


@pytest.fixture
def ranks(nursery: Nursery, nothing_left: Callable[[], list[str]]) -> Iterator[Processes]:
    """Three processes with one layer, which they have used already."""
    with Processes(WORLD, backends=("ucx",), lent=nursery) as made:
        made.make("layer", experts=WORLD, hidden=512, topk=WORLD, max_tokens=4096, dtype=torch.float32)
        check_step(made, range(WORLD), 20, 20.0)
        yield made


def check_step(crew: Processes, ranks: range, tokens: int, deadline: float) -> list[tuple[float, tuple[int, ...]]]:
    """Have ranks take a step; every sum is exact. Return each rank's seconds, and whom it lost."""
    found = crew.call("far_channel_tools:step", "layer", tokens, deadline, ranks=ranks)
    for rank, (_, _, out) in zip(ranks, found, strict=True):
        assert torch.equal(out, rows_of(rank, tokens) * len(ranks)), f"rank {rank}"
    return [(seconds, lost) for seconds, lost, _ in found]


def test_survivors_of_a_killed_rank_go_on_at_once(ranks: Processes) -> None:
    ranks.kill(2)
    for seconds, lost in check_step(ranks, range(2), 300, 20.0):
        assert lost == (2,)
        assert seconds < 10.0  # its death is heard: nobody waits for the deadline
    assert check_step(ranks, range(2), 4000, 20.0)


def test_a_frozen_rank_costs_its_deadline_once_and_finds_itself_masked(ranks: Processes) -> None:
    ranks.stop(2)
    ranks.tell(2, "far_channel_tools:step", "layer", 300, 20.0)
    for seconds, lost in check_step(ranks, range(2), 300, 1.0):
        assert lost == (2,)
        assert seconds < 5.0
    for _ in range(3):
        check_step(ranks, range(2), 300, 20.0)
    ranks.resume(2)
    with pytest.raises(Masked):
        ranks.hear(2)
    check_step(ranks, range(2), 4000, 20.0)
