"""How long kernels wait for whom: what one CTA decides counts for all; masks and lines that do not fit what is told."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch
from moe_kernel_crew import Crew, Gpu, add_up, give, send, take
from moe_kernel_steps import draw, expert, frame_for
from moe_programs import even

from raynixl.moe import reference
from raynixl.moe.cuda_structs import Kind, Line, Refusal
from raynixl.moe.reference import Setting

pytestmark = pytest.mark.pure
CAME, LOST = 1, 2


def crew_of(world: int, deadline: float, layout: str = "slots"):
    setting = Setting(world, even(world, 8), 8, layout, 2)
    tokens = draw(setting, (5, 8, 3, 6)[:world], 16, 3)
    return setting, tokens, Crew(frame_for(setting, 16, 3), deadline=deadline)


def test_a_line_that_comes_after_its_sender_was_given_up_counts_for_nobody():
    setting, tokens, crew = crew_of(2, 30.0)
    held = crew.each(lambda gpu: send(gpu, setting, tokens[gpu.me]))[0]
    gpu = crew.gpus[0]
    gpu.layer.began -= 50 * 10**6  # another CTA has given it up, long after the operation began
    gpu.layer.verdicts[1] = LOST
    take(gpu, setting, tokens[0], held, waits=True)
    assert held.rows_by_source[1] == 0
    assert gpu.page.lost == gpu.layer.mask == 0b10


def test_a_line_that_another_cta_has_seen_counts_for_all():
    setting, tokens, crew = crew_of(2, 0.05)
    held = crew.each(lambda gpu: send(gpu, setting, tokens[gpu.me]))[0]
    gpu = crew.gpus[0]
    gpu.layer.began -= 10**9
    gpu.layer.since, gpu.layer.verdicts[1] = 1, CAME  # the deadline has passed since
    take(gpu, setting, tokens[0], held, waits=True)
    assert held.rows_by_source[1] == int((tokens[1].topk_idx < 4).any(1).sum())
    assert gpu.page.lost == gpu.layer.mask == 0


def test_nobody_is_lost_while_a_line_of_theirs_would_be_taken_unasked():
    """The host says that a rank is gone, whose line another CTA may have seen a moment ago."""
    setting, tokens, crew = crew_of(2, 30.0)
    gpu = crew.gpus[0]
    gpu.page.excused = 0b10
    began = time.monotonic()
    send(gpu, setting, tokens[0])
    gpu.arrive(Kind.DISPATCH)
    assert 0.04 <= time.monotonic() - began < 20
    assert gpu.layer.came == 0b01


@pytest.mark.parametrize("waits", [False, True])
def test_who_waits_in_the_operation_before_for_somebody_else_is_waited_for(waits):
    """Rank 2 has sent to rank 1 alone. Rank 0 waits for it in the dispatch longer than rank 1 waits in the combine."""
    setting, tokens, crew = crew_of(3, 1.2)
    nowhere = np.zeros(crew.gpus[0].frame.nbytes, np.uint8)
    crew.gpus[2].layer.windows[0] = nowhere.ctypes.data
    send(crew.gpus[2], setting, tokens[2])

    def work(gpu: Gpu) -> None:
        held = send(gpu, setting, tokens[gpu.me])
        take(gpu, setting, tokens[gpu.me], held, waits=waits)
        gpu.deadline = 0.3
        y = reference.run_experts(setting, gpu.me, held, expert, tokens[0].x.dtype)
        give(gpu, y, held)
        add_up(gpu, y, held, waits=waits)

    crew.each(work, [0, 1])
    assert [crew.gpus[rank].layer.mask for rank in (0, 1)] == [0b100] * 2
    assert [crew.gpus[rank].page.masked for rank in (0, 1)] == [0, 0]


@pytest.mark.parametrize("waits", [False, True])
def test_rows_that_come_back_are_refused_unless_they_are_as_many_as_went(waits):
    setting, tokens, crew = crew_of(2, 20.0, "tokens")
    held = crew.each(lambda gpu: take(gpu, setting, tokens[gpu.me], send(gpu, setting, tokens[gpu.me])))[0]
    gpu = crew.gpus[0]
    give(gpu, torch.zeros_like(held.x), held)
    line = Line.from_address(gpu.window.ctypes.data + gpu.frame.lines_at[1] + 64 * 2)
    line.count, line.number = int(held.sent[1]) + 1, gpu.layer.operation + 1
    add_up(gpu, held.x, held, waits=waits)
    assert gpu.refusals == {1: Refusal.DAMAGED}


def test_masks_add_up():
    _, _, crew = crew_of(3, 20.0)
    crew.gpus[0].mask(0b010)
    crew.gpus[0].mask(0b100)
    assert crew.gpus[0].layer.mask == 0b110
