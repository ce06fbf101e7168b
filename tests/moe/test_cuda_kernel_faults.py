"""Kernels whose peers do not come, come late, say something else, or have given us up: they end, and all agree."""

from __future__ import annotations

import ctypes
import time

import pytest
import torch
from moe_kernel_crew import Crew, Gpu, add_up, give, poisoned, send, take
from moe_kernel_steps import check_arrived, draw, expert, frame_for, play, same_sums
from moe_programs import even

from raynixl.moe import reference
from raynixl.moe.cuda_structs import Kind, Line, Refusal
from raynixl.moe.reference import Setting

pytestmark = pytest.mark.pure
LAYOUTS = ["tokens", "experts", "slots"]
every_layout = pytest.mark.parametrize("layout", LAYOUTS)


def setting_of(layout="tokens", world=4, lost=(), **more):
    return Setting(world, even(world, 8), 8, layout, 2, lost=frozenset(lost), **more)


def crew_of(setting, deadline=0.3, **more):
    return Crew(frame_for(setting, 16, 3), deadline=deadline, **more)


def step(gpu: Gpu, setting, given, *, waits=True, signature=0, status=0):
    """A dispatch and its combine, with whoever comes; (held, out)."""
    held = send(gpu, setting, given, signature=signature, status=status)
    take(gpu, setting, given, held, waits=waits and setting.layout == "slots", signature=signature)
    y = reference.run_experts(setting, gpu.me, held, expert, torch.bfloat16)
    give(gpu, y, held)
    return held, add_up(gpu, y, held, waits=waits)[0]


@every_layout
@pytest.mark.parametrize("waits", [False, True])
def test_a_rank_that_never_comes_is_masked_by_all(layout, waits):
    setting = setting_of(layout, lost=[2])
    tokens = draw(setting, (5, 8, 3, 6), 16, 3)
    crew, others = crew_of(setting), [0, 1, 3]
    arrived = reference.dispatch(setting, tokens)
    crew.each(lambda gpu: step(gpu, setting_of(layout), tokens[gpu.me], waits=waits), others)
    for rank in others:
        assert crew.gpus[rank].layer.mask == crew.gpus[rank].page.lost == 1 << 2
        assert crew.gpus[rank].page.masked == 0
    began = time.monotonic()
    found = crew.each(lambda gpu: step(gpu, setting_of(layout), tokens[gpu.me], waits=waits), others)
    ys = [reference.run_experts(setting, r, one, expert, torch.bfloat16) for r, one in enumerate(arrived)]
    outs = reference.combine(setting, tokens, ys)
    for rank in others:
        held, out = found[rank]
        check_arrived(setting, crew.gpus[rank], held, arrived[rank])
        same_sums(out, outs[rank], f"out of {rank}")
        assert int((held.holder_of == -2).sum()) == int(((tokens[rank].topk_idx // 2) == 2).sum())
    assert time.monotonic() - began < 20


@every_layout
def test_a_rank_that_ends_behind_its_dispatch_is_missing_in_sums(layout):
    whole, setting = setting_of(layout), setting_of(layout, lost=[1])
    tokens = draw(whole, (5, 8, 3, 6), 16, 3)
    crew = crew_of(whole)
    arrived = reference.dispatch(whole, tokens)
    ys = [reference.run_experts(whole, r, one, expert, torch.bfloat16) for r, one in enumerate(arrived)]
    outs = reference.combine(whole, tokens, [y if r != 1 else torch.zeros_like(y) for r, y in enumerate(ys)])

    def work(gpu: Gpu):
        held = send(gpu, whole, tokens[gpu.me])
        take(gpu, whole, tokens[gpu.me], held)
        check_arrived(whole, gpu, held, arrived[gpu.me])
        if gpu.me == 1:
            return None
        give(gpu, ys[gpu.me], held)
        return add_up(gpu, ys[gpu.me], held)[0]

    found = crew.each(work)
    for rank in (0, 2, 3):
        same_sums(found[rank], outs[rank], f"out of {rank}")
        assert crew.gpus[rank].page.lost == 1 << 1
    assert setting.active == [0, 2, 3]


def test_a_rank_that_wakes_finds_itself_masked_and_changes_nothing():
    setting = setting_of()
    tokens = draw(setting, (5, 8, 3, 6), 16, 3)
    crew, others = crew_of(setting), [0, 1, 3]
    for _ in range(3):
        crew.each(lambda gpu: step(gpu, setting, tokens[gpu.me]), others)
    before = [(gpu.layer.mask, gpu.layer.operation) for gpu in crew.gpus]
    gpu = crew.gpus[2]
    gpu.deadline = 30.0
    began = time.monotonic()
    held, out = step(gpu, setting, tokens[2])
    assert time.monotonic() - began < 10, "a notice is heard at once"
    assert gpu.page.masked in (1, 2, 4)
    assert gpu.page.lost == 0
    held, out = step(gpu, setting, tokens[2])  # all kernels end, and nobody is told of anything
    assert (held.row_ids.numel(), int(held.counts.sum()), int(out.count_nonzero())) == (0, 0, 0)
    assert [(gpu.layer.mask, gpu.layer.operation) for gpu in crew.gpus if gpu.me != 2] == [before[r] for r in others]
    found = crew.each(lambda gpu: step(gpu, setting, tokens[gpu.me]), others)
    assert all(found[rank] is not None for rank in others)
    assert [crew.gpus[rank].page.masked for rank in others] == [0, 0, 0]


@every_layout
def test_once_masked_whatever_is_taken_is_empty(layout):
    setting = setting_of(layout)
    tokens = draw(setting, (5, 8, 3, 6), 16, 3)
    crew = crew_of(setting)
    gpu = crew.gpus[1]
    gpu.layer.masked = 1
    before = [bytes(other.window) for other in crew.gpus]
    held, out = step(gpu, setting, tokens[1])
    assert (held.row_of == -1).all()
    assert (held.holder_of == -2).all()
    assert not held.sent.any()
    assert (held.row_ids == -1).all()
    assert not held.rows_by_source.any()
    assert not out.any()
    assert [bytes(other.window) for other in crew.gpus] == before


def test_masks_of_others_are_learnt_an_operation_later():
    """Only rank 0 misses rank 2, which sends to the others, and to it too late."""
    setting = setting_of()
    tokens = draw(setting, (5, 8, 3, 6), 16, 3)
    crew = crew_of(setting)
    crew.gpus[0].layer.mask = 1 << 2
    crew.each(lambda gpu: step(gpu, setting, tokens[gpu.me]), [0, 1, 3])
    for rank in (0, 1, 3):
        assert crew.gpus[rank].layer.mask == 1 << 2


def test_of_two_that_mask_each_other_the_lower_stays():
    setting = setting_of()
    tokens = draw(setting, (5, 8, 3, 6), 16, 3)
    crew = crew_of(setting)
    crew.gpus[1].layer.mask, crew.gpus[2].layer.mask = 1 << 2, 1 << 1

    def dispatch(gpu: Gpu):
        held = send(gpu, setting, tokens[gpu.me])
        take(gpu, setting, tokens[gpu.me], held)

    crew.each(dispatch)
    assert [gpu.layer.mask for gpu in crew.gpus] == [1 << 2, 1 << 2, 1 << 1, 1 << 2]
    assert [gpu.page.lost for gpu in crew.gpus] == [1 << 2, 0, 0, 1 << 2]


def test_who_waits_for_another_is_waited_for():
    """Rank 2 never comes. Rank 0 waits for it in the dispatch, rank 1 knows already, and waits for rank 0 in vain
    until well after its own deadline has passed."""
    setting = setting_of(world=3)
    tokens = draw(setting, (5, 8, 3), 16, 3)
    crew = crew_of(setting, deadline=1.0)
    crew.gpus[1].layer.mask = 1 << 2
    crew.gpus[1].deadline = 0.4

    def work(gpu: Gpu):
        if gpu.me == 1:
            gpu.deadline = 30.0
        held = send(gpu, setting, tokens[gpu.me])
        take(gpu, setting, tokens[gpu.me], held)
        if gpu.me == 1:
            gpu.deadline = 0.4
        y = reference.run_experts(setting, gpu.me, held, expert, torch.bfloat16)
        give(gpu, y, held)
        add_up(gpu, y, held)

    crew.each(work, [0, 1])
    assert [crew.gpus[rank].layer.mask for rank in (0, 1)] == [1 << 2] * 2


def test_a_mask_by_hand_is_heard_of_by_who_is_masked():
    setting = setting_of(world=3)
    tokens = draw(setting, (5, 8, 3), 16, 3)
    crew = crew_of(setting, deadline=50.0)
    crew.gpus[0].mask(0b110, told=0b100)
    crew.gpus[0].mask(0b110, told=0b010)  # it takes no part any more: its memory is let alone
    began = time.monotonic()
    crew.each(lambda gpu: step(gpu, setting, tokens[gpu.me]), [0, 2])
    assert time.monotonic() - began < 20
    assert [gpu.page.masked for gpu in crew.gpus] == [0, 0, 1]
    at = crew.gpus[1].frame.notices_at
    assert not crew.gpus[1].window[at : at + 24].any()


def test_the_host_excuses_who_is_dead():
    setting = setting_of(world=3)
    tokens = draw(setting, (5, 8, 3), 16, 3)
    crew = crew_of(setting, deadline=50.0)
    began = time.monotonic()
    for rank in (0, 1):
        crew.gpus[rank].page.excused = 1 << 2
    before = bytes(crew.gpus[2].window[crew.gpus[2].frame.notices_at :][:24])
    crew.each(lambda gpu: step(gpu, setting, tokens[gpu.me]), [0, 1])
    assert time.monotonic() - began < 20
    assert [crew.gpus[rank].page.lost for rank in (0, 1)] == [1 << 2] * 2
    assert bytes(crew.gpus[2].window[crew.gpus[2].frame.notices_at :][:24]) == before, "the dead are told nothing"


@every_layout
@pytest.mark.parametrize(("waits", "wrong"), [(False, 8), (True, -2), (True, 1 << 60)])
def test_what_is_wrong_with_a_call_is_told_to_all(layout, waits, wrong):
    setting = setting_of(layout)
    tokens = draw(setting, (5, 8, 3, 6), 16, 3)
    tokens[2].topk_idx[1, 1] = wrong

    def work(gpu: Gpu):
        held = send(gpu, setting, tokens[gpu.me])
        take(gpu, setting, tokens[gpu.me], held, waits=waits and layout == "slots")
        return held

    crew = crew_of(setting, deadline=20.0)
    for gpu, held in zip(crew.gpus, crew.each(work), strict=True):
        assert gpu.refusals == {2: Refusal.RANGE}
        assert gpu.page.status[2] == (0 if waits and layout == "slots" else Refusal.RANGE)
        assert held.rows_by_source[2] == 0
        assert gpu.layer.mask == 0
    tokens[2].topk_idx[1, 1] = -1
    play(setting, tokens, crew=crew, fused=waits)


def test_an_erring_rank_takes_part_with_nothing():
    setting = setting_of(world=3)
    tokens = draw(setting, (5, 8, 3), 16, 3)
    crew = crew_of(setting, deadline=20.0)

    def work(gpu: Gpu):
        held = send(gpu, setting, tokens[gpu.me], status=Refusal.CONFIG if gpu.me == 1 else 0)
        take(gpu, setting, tokens[gpu.me], held)
        refusals = gpu.refusals
        y = torch.zeros((len(held.row_ids), 16), dtype=torch.bfloat16)
        give(gpu, y, held, status=Refusal.CONFIG if gpu.me == 2 else 0)
        add_up(gpu, y, held)
        return refusals, gpu.refusals

    both = ({1: Refusal.CONFIG}, {1: Refusal.CONFIG, 2: Refusal.CONFIG})
    assert crew.each(work) == [both] * 3
    play(setting, tokens, crew=crew)


@pytest.mark.parametrize("is_combine", [False, True])
def test_more_than_a_window_holds_is_written_nowhere(is_combine):
    setting = setting_of(world=2)
    tokens = draw(setting, (8, 8), 16, 3)
    small = crew_of(setting, deadline=20.0)
    for gpu in small.gpus:
        if is_combine:
            gpu.layer.back_nbytes = 64
        else:
            gpu.layer.capacity = 7
    before = [gpu.window[gpu.frame.head_nbytes :].copy() for gpu in small.gpus]

    def work(gpu: Gpu):
        held = send(gpu, setting, tokens[gpu.me])
        take(gpu, setting, tokens[gpu.me], held)
        y = torch.zeros((len(held.row_ids), 16), dtype=torch.bfloat16)
        if is_combine:
            give(gpu, y, held)
            add_up(gpu, y, held)
        return gpu.refusals

    assert small.each(work) == [{0: Refusal.RANGE, 1: Refusal.RANGE}] * 2
    for gpu, was in zip(small.gpus, before, strict=True):
        at = gpu.frame.back_at - gpu.frame.head_nbytes if is_combine else 0
        assert (gpu.window[gpu.frame.head_nbytes :][at:] == was[at:]).all()


@pytest.mark.parametrize("layout", ["tokens", "experts"])
@pytest.mark.parametrize("weights_at", ["holder", "source"])
def test_rows_that_y_has_not_are_not_read(layout, weights_at):
    setting = setting_of(layout, world=2, weights_at=weights_at)
    tokens = draw(setting, (5, 8), 16, 3)
    crew = crew_of(setting, deadline=20.0)

    def work(gpu: Gpu):
        held = send(gpu, setting, tokens[gpu.me])
        take(gpu, setting, tokens[gpu.me], held)
        y = reference.run_experts(setting, gpu.me, held, expert, torch.bfloat16)
        give(gpu, y if gpu.me == 0 else y[:1], held)
        refusals = gpu.refusals
        out, _ = add_up(gpu, y, held)
        return refusals, gpu.refusals, bool(torch.isfinite(out.float()).all())

    first, second = crew.each(work)
    assert first == ({}, {1: Refusal.CONFIG}, True)
    assert second == ({1: Refusal.CONFIG}, {1: Refusal.CONFIG}, True)
    assert [list(gpu.layer.counters) for gpu in crew.gpus] == [[0] * 64] * 2
    play(setting, tokens, crew=crew)


def test_why_a_line_was_refused_is_known_until_the_host_has_heard_of_it():
    setting = setting_of("slots", world=2)
    tokens = draw(setting, (5, 8), 16, 3)
    crew = crew_of(setting, deadline=20.0)

    def work(gpu: Gpu):
        for waits, status in ((True, Refusal.RANGE if gpu.me == 1 else 0), (False, 0)):
            held = send(gpu, setting, tokens[gpu.me], status=status)
            take(gpu, setting, tokens[gpu.me], held, waits=waits)
        return gpu.refusals

    assert crew.each(work) == [{1: Refusal.RANGE}] * 2


def test_calls_that_differ_are_seen_by_all():
    setting = setting_of(world=3)
    tokens = draw(setting, (5, 8, 3), 16, 3)
    crew = crew_of(setting, deadline=20.0)

    def work(gpu: Gpu):
        signature = 7 if gpu.me == 2 else 6
        held = send(gpu, setting, tokens[gpu.me], signature=signature)
        take(gpu, setting, tokens[gpu.me], held, signature=signature)
        return gpu.refusals

    differs = Refusal.DIFFERS
    assert crew.each(work) == [{2: differs}, {2: differs}, {0: differs, 1: differs}]


def test_a_line_of_more_rows_than_can_be_is_refused():
    setting = setting_of(world=2)
    tokens = draw(setting, (5, 8), 16, 3)
    crew = crew_of(setting, deadline=20.0)
    gpu = crew.gpus[0]
    held = send(gpu, setting, tokens[0])
    gpu_line = Line.from_address(gpu.window.ctypes.data + gpu.frame.lines_at[0] + 64 * 2)
    gpu_line.count, gpu_line.number = 1 << 30, gpu.layer.operation + 1
    take(gpu, setting, tokens[0], held)
    assert gpu.refusals == {1: Refusal.DAMAGED}
    assert held.rows_by_source[1] == 0


def test_a_rank_that_is_ahead_has_masked_us():
    setting = setting_of(world=2)
    tokens = draw(setting, (5, 8), 16, 3)
    crew = crew_of(setting, deadline=20.0)
    gpu = crew.gpus[0]
    line = Line.from_address(gpu.window.ctypes.data + gpu.frame.lines_at[0] + 64 * 2)
    line.number = gpu.layer.operation + 3
    step(gpu, setting, tokens[0])
    assert (gpu.page.masked, gpu.page.lost) == (2, 0)


def test_lines_of_a_former_agreement_do_not_count():
    setting = setting_of(world=2)
    tokens = draw(setting, (5, 8), 16, 3)
    crew = crew_of(setting, deadline=20.0)
    crew.each(lambda gpu: step(gpu, setting, tokens[gpu.me]))
    for gpu in crew.gpus:  # notices, too
        ctypes.c_uint64.from_address(gpu.window.ctypes.data + gpu.frame.notices_at + 8 * (1 - gpu.me)).value = 2 << 32
        gpu.begin(crew.windows, operation=2 << 32)
    play(setting, tokens, crew=crew, fused=True, rounds=2)


def test_missing_rows_of_a_handle_are_zeros_in_their_places():
    setting = setting_of(world=3)
    tokens = draw(setting, (5, 8, 3), 16, 3)
    crew = crew_of(setting, deadline=0.3)
    first = crew.each(lambda gpu: step(gpu, setting, tokens[gpu.me])[0])
    counts = [held.rows_by_source.clone() for held in first]
    xs = [held.x.clone() for held in first]

    def again(gpu: Gpu):
        held = send(gpu, setting, tokens[gpu.me])
        return take(gpu, setting, tokens[gpu.me], held, waits=True, expected=counts[gpu.me])

    for rank, held in enumerate(crew.each(again, [0, 2])):
        if held is None:
            continue
        begin, end = int(counts[rank][:1].sum()), int(counts[rank][:2].sum())
        assert torch.equal(held.x[:begin], xs[rank][:begin])
        assert not held.x[begin:end].any()
        assert torch.equal(held.x[end:], xs[rank][end:])


def test_an_arrive_that_waits_in_vain_ends_by_its_deadline():
    setting = setting_of(world=3)
    crew = crew_of(setting, deadline=0.2)
    began = time.monotonic()
    crew.gpus[0].arrive(Kind.DISPATCH)
    assert 0.2 <= time.monotonic() - began < 10
    assert not poisoned(0, dtype=torch.uint8).any()
