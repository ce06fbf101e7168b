"""Gradients between processes over shared memory, ranks without tokens among them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from moe_autograd import LAYOUTS, dense, matrices, tokens_of
from moe_tools import Processes
from weights_nursery import Nursery

COUNTS = (6, 0, 9)
SIZES = {"experts": 5, "hidden": 8, "topk": 3}


def test_gradients_between_processes_are_those_of_the_dense_layer(nursery: Nursery) -> None:
    with Processes(3, lent=nursery) as crew:
        crew.make("grads", **SIZES, max_tokens=16, dtype=torch.float64)
        for layout, weights_at in LAYOUTS * 2:
            for rank, count in enumerate(COUNTS):
                crew.tell(rank, "moe_autograd:gradients_of", "grads", count, layout, weights_at)
            _check([crew.hear(rank) for rank in range(3)])
        crew.drop("grads")


def _check(results: list[dict[str, Any]]) -> None:
    everybody = matrices(SIZES["experts"], SIZES["hidden"])
    for rank, (count, result) in enumerate(zip(COUNTS, results, strict=True)):
        x, idx, weights = tokens_of(rank, count, **SIZES)
        out = dense(x, idx, weights, everybody)
        out.sum().backward()
        for name, expected, error in (
            ("out", out.detach(), 1e-12),
            ("x", x.grad, 1e-12),
            ("weights", weights.grad, 1e-5),
        ):
            assert expected is not None
            np.testing.assert_allclose(result[name], expected.numpy(), rtol=error, atol=error)
    held = {name: grad for result in results for name, grad in result["held"].items()}
    for name, matrix in everybody.items():
        assert matrix.grad is not None
        np.testing.assert_allclose(held[name], matrix.grad.numpy(), rtol=0, atol=1e-12)
