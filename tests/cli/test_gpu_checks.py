"""What doctor says of GPUs: none, some, and which do not reach each other; on a made-up driver."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from vram_tools import made_up_gpus

from raynixl import cuda
from raynixl.cli import gpu_checks
from raynixl.cli.doctor import Finding, Verdict
from raynixl.cli.path_checks import try_backend


def found() -> dict[str, Finding]:
    """What doctor finds, by name."""
    return {one.name: one for one in gpu_checks.check_gpus()}


@pytest.fixture
def no_driver() -> None:
    """Skip where there is a true driver."""
    if cuda.has_driver():
        pytest.skip("there is a driver here")


@pytest.mark.usefixtures("no_driver")
def test_without_a_driver_host_memory_is_all_there_is() -> None:
    assert found()["driver"].verdict is Verdict.MISSING
    assert [one.verdict for one in try_backend("nvlink")] == [Verdict.MISSING]
    assert not gpu_checks.has_gpus()


@pytest.mark.usefixtures("no_driver")
def test_devices_without_a_driver_are_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_checks, "GPU_CONTROL", "/dev/null")
    finding = found()["driver"]
    assert finding.verdict is Verdict.FAILS
    assert "--gpus" in finding.hint


def test_every_gpu_and_who_reaches_whom_is_listed() -> None:
    with made_up_gpus(gpus=3):
        seen = found()
        assert gpu_checks.has_gpus()
    assert {"GPU 0", "GPU 1", "GPU 2", "GPU 0 to GPU 1", "GPU 0 to GPU 2", "cupy"} <= set(seen)
    assert seen["GPU 0 to GPU 1"].verdict is Verdict.WORKS


def test_gpus_that_do_not_reach_each_other_are_slow() -> None:
    with made_up_gpus(has_peer_access=False):
        finding = found()["GPU 0 to GPU 1"]
    assert finding.verdict is Verdict.SLOW
    assert finding.hint


def test_a_driver_without_gpus_is_none() -> None:
    with made_up_gpus(gpus=0):
        assert not gpu_checks.has_gpus()
        assert found()["driver"].verdict is Verdict.MISSING


def test_a_torch_without_cuda_is_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.version.cuda", None)
    with made_up_gpus():
        finding = found()["torch"]
    assert finding.verdict is Verdict.SLOW
    assert "torch with CUDA" in finding.hint


def test_a_torch_that_cannot_be_imported_is_told_of(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise OSError('libcudart.so.13: no such file')\n", encoding="utf-8")
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    with made_up_gpus():
        finding = found()["torch"]
    assert finding.verdict is Verdict.FAILS
    assert "libcudart.so.13" in finding.detail


@pytest.mark.parametrize(
    ("name", "text", "remedy"),
    [
        ("PYTORCH_CUDA_ALLOC_CONF", "max_split_size_mb:64, expandable_segments: True", "expandable_segments:False"),
        ("PYTORCH_ALLOC_CONF", "backend:cudaMallocAsync", "backend:native"),
        ("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:False", ""),
        ("PYTORCH_OTHER", "expandable_segments:True", ""),
    ],
)
def test_what_torch_allocates_so_that_nobody_maps_it_is_told_of(
    monkeypatch: pytest.MonkeyPatch, name: str, text: str, remedy: str
) -> None:
    monkeypatch.setattr("torch.version.cuda", "13.0")
    monkeypatch.setenv(name, text)
    with made_up_gpus():
        seen = found()
    assert seen["torch"].verdict is Verdict.WORKS
    assert ("torch's allocator" in seen) == bool(remedy)
    if remedy:
        assert seen["torch's allocator"].verdict is Verdict.SLOW
        assert seen["torch's allocator"].hint == f"set {name} to {remedy}"
