"""What threads have put on streams of GPUs is waited for: torch's and cupy's current ones, or those that are named."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from raynixl import ConfigError, TransferTimeout, cuda
from raynixl.agents.past import Past, current_streams, streams_of


def module(streams: dict[int, int], *, is_initialized: bool = True) -> Any:
    """What stands for torch and cupy alike: the current stream of each GPU."""
    return SimpleNamespace(
        cuda=SimpleNamespace(
            is_initialized=lambda: is_initialized,
            current_stream=lambda gpu: SimpleNamespace(cuda_stream=streams[gpu]),
            get_current_stream=lambda gpu: SimpleNamespace(ptr=streams[gpu]),
        )
    )


@pytest.mark.parametrize(
    ("torch", "cupy", "found"),
    [
        (module({0: 5, 1: 6}), None, ([5], [6], [5, 6])),
        (module({0: 5, 1: 6}, is_initialized=False), None, ([], [], [])),
        (None, module({0: 0, 1: 7}), ([0], [7], [0, 7])),
        (module({0: 0, 1: 0}), module({0: 0, 1: 8}), ([0], [0, 8], [0, 8])),
        (SimpleNamespace(), SimpleNamespace(), ([], [], [])),  # another thread imports them just now
    ],
)
def test_current_streams_are_those_of_the_libraries_that_are_in_use(
    monkeypatch: pytest.MonkeyPatch, torch: Any, cupy: Any, found: Any
) -> None:
    monkeypatch.setitem(sys.modules, "torch", torch)
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    assert (current_streams(0), current_streams(1), streams_of({1, 0})) == found


@pytest.fixture
def busy(fake_cuda: Any) -> Iterator[Callable[..., None]]:
    """Keep a stream busy until the end of the test."""
    is_over = threading.Event()

    def work() -> Iterator[None]:
        while not is_over.is_set():
            yield

    yield lambda stream: fake_cuda.work.put(stream, work)
    is_over.set()


@pytest.mark.parametrize("is_named", [True, False])
def test_a_stream_of_either_gpu_is_waited_for_and_no_other(
    fake_cuda: Any, busy: Callable[..., None], monkeypatch: pytest.MonkeyPatch, is_named: bool
) -> None:
    streams = [fake_cuda.work.stream(fake_cuda.devices.retain(gpu)) for gpu in (0, 1)]
    monkeypatch.setattr("raynixl.agents.past.current_streams", lambda gpu: [streams[gpu]])
    busy(fake_cuda.work.stream(fake_cuda.devices.retain(0)))
    Past({0, 1}, streams if is_named else None).wait(5.0)
    busy(streams[1])
    Past({0}, streams[0] if is_named else None).wait(5.0)
    with pytest.raises(TransferTimeout, match="GPU 1"):
        Past({1}, streams[1] if is_named else None).wait(0.05)


def test_a_default_stream_is_that_of_the_gpu_that_is_meant(fake_cuda: Any, busy: Callable[..., None]) -> None:
    with cuda.on(1):
        busy(0)
    Past({0}, 0).wait(5.0)
    for gpus in ({1}, {0, 1}):
        with pytest.raises(TransferTimeout, match="GPU 1"):
            Past(gpus, 0).wait(0.05)


def test_a_stream_that_is_captured_is_refused_and_the_graph_goes_on(fake_cuda: Any) -> None:
    stream = fake_cuda.work.stream(fake_cuda.devices.retain(0))
    fake_cuda.work.begin_capture(stream)
    with pytest.raises(ConfigError, match="captured into a CUDA graph"):
        Past({0}, stream)
    fake_cuda.work.end_capture(stream)
    Past({0}, stream).wait(5.0)


def test_no_gpu_is_nothing_to_wait_for(fake_cuda: Any) -> None:
    Past(set()).wait(0.001)
    assert not fake_cuda.calls
