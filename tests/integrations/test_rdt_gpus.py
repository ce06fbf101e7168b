"""Ray Direct Transport with tensors on GPUs, which host memory takes the place of: what streams are waited for."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("ray")
import torch
from agent_tools import PATIENCE, eventually, introduce, make_agent
from cuda_fake import Mode
from cuda_fixtures import fake_driver
from device_stand_in import GPU

from raynixl.agents import past
from raynixl.errors import ConfigError, PeerLost, TransferCancelled, TransferTimeout
from raynixl.integrations import rdt_memory, rdt_transport
from raynixl.integrations.rdt_transport import Desk, RaynixlTransport

N = 1 << 16


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A made-up driver; all tensors count as on GPU 0, and this thread has a stream there."""
    with fake_driver(mode=Mode.DELAYED, delay=0.005) as fake:
        stream = fake.work.stream(fake.devices.retain(0))
        monkeypatch.setattr(past, "current_streams", lambda _gpu: [stream])
        monkeypatch.setattr("raynixl.weights.space.device_of", lambda _tensor: GPU.name)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: pytest.fail("a whole device is waited for"))
        fake.current = stream
        yield fake


@pytest.fixture
def ends(gpus: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[RaynixlTransport, RaynixlTransport]]:
    """The transports of a source and of a receiver."""
    with make_agent("source", backends=("shm",)) as source, make_agent("taker", backends=("shm",)) as taker:
        introduce(source, taker)
        made = []
        for agent in (source, taker):
            transport = RaynixlTransport()
            transport._desk = Desk(agent)
            monkeypatch.setattr(transport, "desk", lambda one=transport: one._desk)
            monkeypatch.setattr(transport, "_note_borrowed", lambda _object: None)
            made.append(transport)
        yield made[0], made[1]


def later(gpus: Any, what: Callable[[], object], seconds: float = 0.2) -> None:
    """Put something on this thread's stream that happens a while later."""
    due = time.monotonic() + seconds

    def run() -> Iterator[None]:
        while time.monotonic() < due:
            yield
        what()

    gpus.work.put(gpus.current, run)


def when_free(gpus: Any, what: Callable[[], object]) -> threading.Event:
    """Put something on this thread's stream that happens when the event is set."""
    is_free = threading.Event()

    def run() -> Iterator[None]:
        while not is_free.is_set():
            yield
        what()

    gpus.work.put(gpus.current, run)
    return is_free


def test_an_object_is_given_once_the_streams_of_its_thread_have_made_it(gpus: Any, ends: Any) -> None:
    source, taker = ends
    tensor = torch.zeros(N)
    later(gpus, lambda: tensor.fill_(3.0))
    meta = source.extract_tensor_transport_metadata("a", [tensor])
    (found,) = taker.recv_multiple_tensors("a", meta, None)
    assert found.unique().tolist() == [3.0]
    source.garbage_collect("a", meta, [tensor])


def test_other_streams_are_not_waited_for(gpus: Any, ends: Any) -> None:
    source, _ = ends
    busy = gpus.work.stream(gpus.devices.retain(0))
    is_free = threading.Event()

    def run() -> Iterator[None]:
        while not is_free.is_set():
            yield

    gpus.work.put(busy, run)
    meta = source.extract_tensor_transport_metadata("a", [torch.zeros(N)])
    source.garbage_collect("a", meta, [])
    is_free.set()


def test_a_copy_that_is_made_for_others_is_waited_for_too(
    gpus: Any, ends: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def late(tensor: Any) -> Any:
        plain = tensor.detach().resolve_conj()
        copy = torch.zeros_like(plain)
        later(gpus, lambda: copy.copy_(plain))
        return copy

    source, taker = ends
    monkeypatch.setattr(rdt_memory, "_readable", late)
    tensor = torch.complex(torch.ones(N), torch.full((N,), 2.0)).conj()
    meta = source.extract_tensor_transport_metadata("a", [tensor])
    (found,) = taker.recv_multiple_tensors("a", meta, None)
    assert torch.equal(found, tensor.resolve_conj())
    source.garbage_collect("a", meta, [tensor])


def test_a_stream_that_hangs_is_told_of_and_nothing_stays_registered(
    gpus: Any, ends: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, _ = ends
    monkeypatch.setattr(rdt_memory, "MADE_SECONDS", 0.1)
    is_free = when_free(gpus, lambda: None)
    with pytest.raises(TransferTimeout, match="GPU 0"):
        source.extract_tensor_transport_metadata("a", [torch.zeros(N)])
    is_free.set()
    assert len(source.desk().shelf) == 0


def test_a_fetch_begins_after_what_still_uses_its_memory_and_returns_before_that(gpus: Any, ends: Any) -> None:
    source, taker = ends
    meta = source.extract_tensor_transport_metadata("a", [torch.full((N,), 4.0)])
    target = torch.zeros(N)
    seen: list[float] = []
    step = lambda: (seen.extend(target.unique().tolist()), target.fill_(9.0))  # noqa: E731 - enqueued before
    is_free = when_free(gpus, step)
    fetch = taker.fetch_multiple_tensors("a", meta, None, [target])
    assert seen == []
    is_free.set()
    (found,) = taker.wait_fetch_complete(fetch)
    assert found is target
    assert seen == [0.0]
    assert target.unique().tolist() == [4.0]
    source.garbage_collect("a", meta, [])


def test_a_fetch_that_is_aborted_before_its_stream_comes_to_it_writes_nothing(gpus: Any, ends: Any) -> None:
    source, taker = ends
    meta = source.extract_tensor_transport_metadata("a", [torch.full((N,), 4.0)])
    target = torch.zeros(N)
    is_free = when_free(gpus, lambda: None)
    fetch = taker.fetch_multiple_tensors("a", meta, None, [target])
    taker.abort_transport("a", None)
    with pytest.raises(TransferCancelled):
        taker.wait_fetch_complete(fetch, PATIENCE)
    is_free.set()
    eventually(lambda: not gpus.work.streams[gpus.current].pieces, "the stream goes on")
    assert target.unique().tolist() == [0.0]
    source.garbage_collect("a", meta, [])


def test_tensors_of_host_memory_ask_no_gpu_for_anything(gpus: Any, ends: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    source, taker = ends
    monkeypatch.setattr("raynixl.weights.space.device_of", lambda tensor: str(tensor.device))
    before = gpus.calls.total()
    meta = source.extract_tensor_transport_metadata("a", [torch.full((N,), 4.0)])
    assert taker.recv_multiple_tensors("a", meta, None)[0].unique().tolist() == [4.0]
    source.garbage_collect("a", meta, [])
    assert gpus.calls.total() == before


@pytest.mark.parametrize("kind", ["conj", "strided"])
def test_a_target_is_filled_where_it_lies_or_refused(gpus: Any, ends: Any, kind: str) -> None:
    source, taker = ends
    values = torch.complex(torch.randn(9000), torch.randn(9000))
    meta = source.extract_tensor_transport_metadata("a", [values])
    memory = torch.zeros(18000, dtype=torch.complex64)
    target = memory[:9000].conj() if kind == "conj" else memory[::2]
    if kind == "conj":
        with pytest.raises(ConfigError, match="conjugate"):
            taker.recv_multiple_tensors("a", meta, None, [target])
    else:
        taker.recv_multiple_tensors("a", meta, None, [target])
        assert torch.equal(target, values)
        assert not memory[1::2].any()
    assert len(taker.desk().shelf) == 0
    source.garbage_collect("a", meta, [])


def test_metadata_of_tensors_on_no_device_that_can_be_read_is_refused(ends: Any) -> None:
    source, _ = ends
    with pytest.raises(ConfigError, match="meta"):
        source.extract_tensor_transport_metadata("a", [torch.zeros(3, device="meta")])
    assert len(source.desk().shelf) == 0
    assert rdt_transport.NAME == "raynixl"


def test_a_fetch_that_has_failed_is_over_when_nothing_of_it_writes_any_more(
    gpus: Any, ends: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, taker = ends
    meta = source.extract_tensor_transport_metadata("a", [torch.full((N,), 4.0)])
    fetch = taker.fetch_multiple_tensors("a", meta, None)
    taker.wait_fetch_complete(fetch)
    waited: list[float] = []
    late = SimpleNamespace(wait_settled=waited.append)
    fetch.flight.transfer = SimpleNamespace(jobs=[late], done=True, wait=lambda _timeout: pytest.fail("it has ended"))
    fetch.flight.held = taker.desk().shelf.pin([torch.zeros(N)])
    taker._end("a", fetch.flight)
    assert waited == [rdt_transport._SETTLE_SECONDS]
    assert len(taker.desk().shelf) == 0
    source.garbage_collect("a", meta, [])


@pytest.mark.parametrize("is_through", [True, False])
def test_the_next_holder_is_read_from_when_nothing_writes_what_a_lost_one_gave(
    ends: Any, monkeypatch: pytest.MonkeyPatch, is_through: bool
) -> None:
    source, taker = ends
    meta = source.extract_tensor_transport_metadata("a", [torch.full((N,), 4.0)])
    fetch = taker.fetch_multiple_tensors("a", meta, None)
    taker.wait_fetch_complete(fetch)
    happened: list[str] = []

    def wait_settled(_seconds: float) -> bool:
        happened.append("waited")
        return is_through

    def lose(_timeout: float | None) -> None:
        raise PeerLost("gone")

    fetch.tried.clear()
    fetch.flight.transfer = SimpleNamespace(jobs=[SimpleNamespace(wait_settled=wait_settled)], wait=lose)
    fetch.flight.held = taker.desk().shelf.pin(fetch.tensors)
    post = taker._post
    monkeypatch.setattr(taker, "_post", lambda one: (happened.append("posted"), post(one)))
    if is_through:
        taker.wait_fetch_complete(fetch)
    else:
        with pytest.raises(PeerLost):
            taker.wait_fetch_complete(fetch)
    assert happened == (["waited", "posted"] if is_through else ["waited", "waited"])
    assert len(taker.desk().shelf) == 0
    source.garbage_collect("a", meta, [])
