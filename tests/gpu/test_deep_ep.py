"""DeepEP's interface on tensors of a real GPU, in processes that share it: the bits of the host, streams and graphs."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from deep_ep_calls import WORLD, case_of
from gpu_deep_ep import MOST, DeepEpCrew, deep_ep_crew

pytestmark = [
    pytest.mark.gpu, pytest.mark.timeout(300),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs torch with CUDA"),
]  # fmt: skip

ELASTIC = {"num_max_tokens_per_rank": MOST, "hidden": 256, "num_cpu_timeout_secs": 60}


@pytest.fixture(scope="module")
def crew() -> Iterator[DeepEpCrew]:
    with deep_ep_crew() as made:
        yield made


@pytest.mark.parametrize(("form", "is_async"), [("bf16", True), ("fp8", False), ("strided", False)])
def test_the_normal_mode_has_the_bits_of_the_host(crew: DeepEpCrew, form: str, is_async: bool) -> None:
    crew.buffers("Buffer", deadline=60.0)
    for tokens, worst in ((33, 0), (33, 99), (5, 0), (5, 99)):  # with 5 tokens the last rank has none
        crew.call("do_normal", case=case_of(tokens=tokens), form=form, worst=worst, is_async=is_async)


@pytest.mark.parametrize("form", ["bf16", "fp8"])
@pytest.mark.parametrize("reduces", [True, False], ids=["by rank", "at the source"])
def test_v2_has_the_bits_of_the_host(crew: DeepEpCrew, form: str, reduces: bool) -> None:
    crew.buffers("ElasticBuffer", allow_multiple_reduction=reduces, **ELASTIC)
    for expands in (False, True):
        for waits in (True, False):
            crew.call("do_elastic", case=case_of(), form=form, expands=expands, waits=waits)


@pytest.mark.parametrize("worst", [0, 99])
def test_gradients_and_late_rows_come_in_the_order_of_events(crew: DeepEpCrew, worst: int) -> None:
    crew.buffers("Buffer", deadline=60.0)
    crew.call("do_train", case=case_of(missing=0.0, tokens=20), worst=worst)
    crew.call("do_late", case=case_of(), worst=worst)


@pytest.mark.parametrize("kind", ["normal", "cached", "plain", "expanded"])
def test_steps_are_captured_in_a_graph_and_replayed(crew: DeepEpCrew, kind: str) -> None:
    if kind in ("normal", "cached"):
        crew.buffers("Buffer", deadline=60.0)
    else:
        crew.buffers("ElasticBuffer", **ELASTIC)
    crew.call("do_graph", case=case_of(), kind=kind, replays=5)
    crew.buffers("Buffer", deadline=60.0)


def test_a_rank_that_is_killed_is_named() -> None:
    with deep_ep_crew() as crew:
        crew.buffers("Buffer", deadline=60.0)
        for worst in (0, 99):
            assert crew.call("do_lost", case=case_of(), worst=worst) == ["nothing"] * WORLD
        crew.fars[2].kill()
        for worst in (99, 0):
            told = crew.call("do_lost", [0, 1], case=case_of(), worst=worst)
            assert all(one.startswith("PeerLost: ranks [2] (rank-2) are lost") for one in told)
