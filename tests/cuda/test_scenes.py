"""The fake driver does what the true one does: the same scenes are played on a GPU by tests/gpu/test_driver.py."""

from __future__ import annotations

from collections.abc import Callable

import cuda_scenes
import pytest
from cuda_fake import FakeCuda
from cuda_far import FarCuda

pytestmark = pytest.mark.pure


@pytest.mark.parametrize("scene", cuda_scenes.ALONE, ids=lambda scene: scene.__name__)
def test_alone(fake_cuda: FakeCuda, nothing_left, scene: Callable[[], None]):
    scene()


@pytest.mark.parametrize("scene", cuda_scenes.TOGETHER, ids=lambda scene: scene.__name__)
def test_with_another_process(fake_cuda: FakeCuda, nothing_left, scene: Callable[..., None]):
    with FarCuda() as far:
        scene(far.ask)


def test_a_handle_is_not_opened_where_it_was_made(fake_cuda: FakeCuda):
    cuda_scenes.a_handle_is_not_opened_where_it_was_made()
    assert "in the process that made it" in fake_cuda.misuses.pop()
