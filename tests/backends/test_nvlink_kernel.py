"""The compiling of the kernels: once, kept for the next process, and said clearly where it cannot be done."""

from __future__ import annotations

import re
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from raynixl import BackendUnavailable
from raynixl.backends import nvlink_kernel
from raynixl.backends.nvlink_kernel import NAMES, image_for

SOURCE = Path(nvlink_kernel.__file__).with_name("nvlink_kernels.cu")


class NvrtcError(RuntimeError):
    """What cupy raises."""


class Nvrtc(types.ModuleType):
    """Stands for cupy's module of that name; a program is the list of what was asked of it."""

    NVRTCError = NvrtcError

    def __init__(self) -> None:
        super().__init__("nvrtc")
        self.compiled: list[tuple[str, ...]] = []
        self.destroyed = 0
        self.fails = False

    def getVersion(self) -> tuple[int, int]:  # noqa: N802
        return 13, 0

    def createProgram(self, source: str, name: str, headers: list[str], names: list[str]) -> Any:  # noqa: N802
        assert source == SOURCE.read_text()
        return [name]

    def compileProgram(self, program: Any, options: list[str]) -> None:  # noqa: N802
        self.compiled.append(tuple(options))
        if self.fails:
            raise NvrtcError("NVRTC_ERROR_COMPILATION")

    def getCUBIN(self, program: Any) -> bytes:  # noqa: N802
        return b"cubin %d" % len(self.compiled)

    def getProgramLog(self, program: Any) -> str:  # noqa: N802
        return "line 7: no such thing"

    def destroyProgram(self, program: Any) -> None:  # noqa: N802
        self.destroyed += 1


@pytest.fixture
def nvrtc(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Nvrtc]:
    """A compiler, and a home without anything kept."""
    made = Nvrtc()
    cupy, cupy_cuda = types.ModuleType("cupy"), types.ModuleType("cupy.cuda")
    cupy_cuda.nvrtc = made  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    monkeypatch.setitem(sys.modules, "cupy.cuda", cupy_cuda)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(nvlink_kernel, "_images", {})
    return made


def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    """As another process starts."""
    monkeypatch.setattr(nvlink_kernel, "_images", {})


def test_each_kind_of_gpu_is_compiled_for_once(nvrtc: Nvrtc) -> None:
    assert image_for("sm_90") == image_for("sm_90") == b"cubin 1"
    assert image_for("sm_80") == b"cubin 2"
    assert image_for("sm_90", ["-DCTAS=2"]) == b"cubin 3"
    assert nvrtc.compiled[0] == ("--gpu-architecture=sm_90", "--std=c++17")
    assert nvrtc.compiled[2] == ("--gpu-architecture=sm_90", "--std=c++17", "-DCTAS=2")
    assert nvrtc.destroyed == 3


def test_the_next_process_finds_what_was_compiled(
    nvrtc: Nvrtc, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    image_for("sm_90")
    forget(monkeypatch)
    assert image_for("sm_90") == b"cubin 1"
    assert len(nvrtc.compiled) == 1
    assert [path.suffix for path in (tmp_path / ".cupy" / "raynixl").iterdir()] == [".cubin"]


def test_another_compiler_compiles_anew(nvrtc: Nvrtc, monkeypatch: pytest.MonkeyPatch) -> None:
    image_for("sm_90")
    forget(monkeypatch)
    monkeypatch.setattr(nvrtc, "getVersion", lambda: (13, 1))
    assert image_for("sm_90") == b"cubin 2"


def test_a_home_that_takes_nothing_is_no_hindrance(
    nvrtc: Nvrtc, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / ".cupy").write_text("in the way")
    assert image_for("sm_90") == b"cubin 1"


def test_what_was_kept_and_is_empty_is_compiled_anew(
    nvrtc: Nvrtc, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    image_for("sm_90")
    (kept,) = (tmp_path / ".cupy" / "raynixl").iterdir()
    kept.write_bytes(b"")
    for _ in range(2):
        forget(monkeypatch)
        assert image_for("sm_90") == b"cubin 2"
    assert kept.read_bytes() == b"cubin 2"


def test_a_user_without_a_home_compiles_all_the_same(nvrtc: Nvrtc, monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    assert image_for("sm_90") == b"cubin 1"


def test_a_failure_of_the_compiler_is_told_with_its_log(nvrtc: Nvrtc, tmp_path: Path) -> None:
    nvrtc.fails = True
    with pytest.raises(BackendUnavailable, match=r"sm_90.*\n.*no such thing"):
        image_for("sm_90")
    assert nvrtc.destroyed == 1
    assert not (tmp_path / ".cupy").exists()
    nvrtc.fails = False
    assert image_for("sm_90") == b"cubin 2"


def test_without_cupy_it_is_said_what_to_install(nvrtc: Nvrtc, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy.cuda", None)
    with pytest.raises(BackendUnavailable, match="pip install"):
        image_for("sm_90")


def test_the_names_are_those_in_the_source() -> None:
    found = re.findall(r"__global__ void (?:__launch_bounds__\([^)]*\) )?(raynixl_\w+)\(", SOURCE.read_text())
    assert sorted(found) == sorted(NAMES)
