"""Operations on a GPU go on the caller's stream, asynchronous ones on one beside it, in the order that events say."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
import torch

from raynixl.compat.deep_ep import Buffer, ElasticBuffer, EventHandle, EventOverlap
from raynixl.compat.deep_ep.streams import Streams
from raynixl.moe import cuda_device


class Recorder:
    """A GPU that writes down what is asked of it, and on which stream."""

    number = 3

    def __init__(self):
        self.now, self.said, self.marks = "caller's", [], 0

    def say(self, *words):
        self.said.append((self.now, *words))

    def mark(self):
        self.marks += 1
        name = f"mark {self.marks}"
        self.say(name)
        return lambda: self.say("follows", name)

    def use(self, tensors):
        self.say("uses", len(list(tensors)))

    def another(self):
        return "beside"

    @contextlib.contextmanager
    def on(self, stream) -> Iterator[None]:
        before, self.now = self.now, stream
        yield
        self.now = before

    def finish(self):
        self.say("waits")


@pytest.fixture
def gpu(monkeypatch):
    made = Recorder()
    monkeypatch.setattr(cuda_device, "gpu", {3: made}.__getitem__)
    monkeypatch.setattr(cuda_device, "gpu_of", lambda value: 3 if isinstance(value, torch.Tensor) else None)
    monkeypatch.setattr(cuda_device, "used_gpu", lambda: 3)
    return made


def put(gpu, **options):
    given = (torch.ones(1), None, [torch.ones(1)], "x")
    settings = {"uses": given, "after": None, "is_async": False, **options}

    def operation():
        gpu.say("works")
        return (torch.ones(1), 5)

    return Streams().put(3, operation, **settings)


def test_an_operation_that_is_waited_for_is_on_the_callers_stream(gpu):
    _, event = put(gpu)
    assert event.event is None
    assert gpu.said == [("caller's", "works")]


def test_it_comes_after_the_event_that_it_is_given(gpu):
    put(gpu, after=EventOverlap(EventHandle()))
    assert gpu.said == [("caller's", "mark 1"), ("caller's", "follows", "mark 1"), ("caller's", "works")]


def test_an_asynchronous_operation_is_beside_the_callers_stream_and_comes_after_it(gpu):
    (_, number), event = put(gpu, is_async=True)
    assert number == 5
    assert gpu.said == [
        ("caller's", "mark 1"), ("beside", "follows", "mark 1"), ("beside", "uses", 2), ("beside", "works"),
        ("beside", "mark 2"), ("caller's", "uses", 1),
    ]  # fmt: skip
    gpu.said.clear()
    event.current_stream_wait()
    assert gpu.said == [("caller's", "follows", "mark 2")]


@pytest.mark.parametrize("kind", [Buffer, ElasticBuffer])
def test_with_an_event_it_comes_after_that_alone(gpu, kind):
    before = kind.capture()
    gpu.say("goes on")
    put(gpu, is_async=True, after=before)
    assert gpu.said[1:4] == [("caller's", "goes on"), ("beside", "follows", "mark 1"), ("beside", "uses", 2)]


def test_an_overlap_without_an_event_is_none(gpu):
    put(gpu, is_async=True, after=EventOverlap())
    assert gpu.said[:2] == [("caller's", "mark 1"), ("beside", "follows", "mark 1")]


def test_all_of_a_buffers_streams_are_waited_for(gpu):
    streams = Streams()
    streams.finish(3)
    assert gpu.said == [("caller's", "waits")]
    assert streams.beside(3) == streams.beside(3) == "beside"
    streams.finish(3)
    assert gpu.said[1:] == [("caller's", "waits"), ("beside", "waits")]


def test_for_the_host_an_operation_is_through_when_it_returns():
    done = []
    result, event = Streams().put(None, lambda: done.append(1) or 7, uses=(), after=None, is_async=True)
    assert (result, done) == (7, [1])
    event.current_stream_wait()
    assert isinstance(Streams().beside(None), torch.cpu.Stream)
