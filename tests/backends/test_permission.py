"""Plain memory of peers: allowed where Yama leaves that to the process, and switched off by the configuration."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from agent_tools import PATIENCE, error_of, introduce, make_agent

from raynixl import BackendUnavailable
from raynixl.backends import permission


class Libc:
    """Takes prctl's arguments and answers."""

    def __init__(self, answer: int, error: int = 0) -> None:
        self.calls: list[tuple[int, ...]] = []
        self._answer = answer
        self._error = error

    def __call__(self, _name: None, *, use_errno: bool) -> Libc:
        assert use_errno
        return self

    def prctl(self, option: int, *arguments: ctypes.c_ulong) -> int:
        self.calls.append((option, *(argument.value for argument in arguments)))
        ctypes.set_errno(self._error)
        return self._answer


def yama(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, scope: str, libc: Any) -> None:
    """Pretend that the kernel has Yama with this ptrace_scope."""
    file = tmp_path / "ptrace_scope"
    file.write_text(f"{scope}\n")
    monkeypatch.setattr(permission, "SCOPE", file)
    monkeypatch.setattr(permission.ctypes, "CDLL", libc)


@pytest.mark.parametrize(("scope", "asked"), [("0", False), ("1", True), ("2", False), ("3", False)])
def test_a_process_allows_what_is_its_own_to_allow(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, scope: str, asked: bool
) -> None:
    libc = Libc(0)
    yama(monkeypatch, tmp_path, scope, libc)
    assert permission.scope() == scope
    assert permission.allow_same_user() == ""
    assert libc.calls == ([(0x59616D61, 2**64 - 1, 0, 0, 0)] if asked else [])


def test_a_refusal_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    yama(monkeypatch, tmp_path, "1", Libc(-1, 1))
    assert permission.allow_same_user() == "Operation not permitted"


def test_without_yama_there_is_nothing_to_ask(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(permission, "SCOPE", tmp_path / "none")
    assert permission.scope() == "absent"
    assert permission.allow_same_user() == ""


def test_switched_off_arenas_alone_are_reached(nothing_left: Callable[[], list[str]]) -> None:
    settings: dict[str, Any] = {"backends": ("shm",), "process_vm": False}
    with make_agent("a", **settings) as a, make_agent("b", **settings) as b:
        introduce(a, b)
        arena, plain = b.empty(64, name="arena"), b.register(np.full(64, 5, np.uint8), name="plain")
        arena.array()[:] = 7
        mine = a.register(np.zeros(64, np.uint8))
        a.read(a.peer("b")["arena"], mine).wait(PATIENCE)
        assert mine.array().tolist() == [7] * 64
        error = error_of(a.read(a.peer("b")["plain"], mine))
        assert isinstance(error, BackendUnavailable)
        assert "AgentConfig.process_vm" in str(error)
        assert plain.array().tolist() == [5] * 64
