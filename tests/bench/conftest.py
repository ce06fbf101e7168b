"""Targets and ranks of benchmarks are forked from a warm Python; how they are really started is for `test_launch`."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Any

import pytest
import warm

from raynixl.bench import process

_WITH_TORCH = ("raynixl.bench.weights_rank", "raynixl.bench.moe_rank", "raynixl.bench.member")


@pytest.fixture(scope="session", autouse=True)
def _ready() -> None:
    """Have the warm Pythons before a test looks at what runs."""
    for torch in (False, True):
        warm.ready(torch=torch)


@pytest.fixture(autouse=True)
def _warm_targets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fork what would be started by this interpreter, unless UCX is to be loaded with other settings."""
    start = process.start

    def fork(command: Sequence[str], **options: Any) -> Any:
        words, given = list(command), {}
        if words[0] == "env":
            words = words[1:]
            while "=" in words[0]:
                name, _, given[name] = words.pop(0).partition("=")
        if words[:3] != [sys.executable, "-P", process._START] or any(name.startswith("UCX_") for name in given):
            return start(command, **options)
        is_with_torch = words[3] in _WITH_TORCH
        return warm.popen(words, env={**os.environ, **given}, start_new_session=True, torch=is_with_torch, **options)

    monkeypatch.setattr(process, "start", fork)
