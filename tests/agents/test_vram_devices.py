"""Which GPUs reach which memory, on a made-up driver: hidden, without peer access, without a handle."""

from __future__ import annotations

import os
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from agent_process import FarAgent
from agent_tools import KIB, PATIENCE, error_of, introduce, random_bytes
from vram_process import far_vram
from vram_tools import content, gpu_agent, made_up_gpus, make_region

from raynixl import Agent, BackendUnavailable, ConfigError, MemorySpan, PeerLost, RangeError, RegionStale, cuda
from raynixl.cuda import Origin
from raynixl.record import AgentRecord
from raynixl.testing.contents import put

N = 64 * KIB


class Foreign:
    """Memory that the user's program allocated on a GPU in its own way."""

    def __init__(self, address: int, nbytes: int) -> None:
        self.__cuda_array_interface__ = {
            "version": 3, "typestr": "|u1", "shape": (nbytes,), "data": (address, False), "stream": None,
        }  # fmt: skip


@pytest.fixture(scope="module")
def far() -> Iterator[FarAgent]:
    """The agent of another process, which sees two GPUs."""
    with far_vram("far") as started:
        yield started


def read_from(near: Agent, far: FarAgent, device: int) -> np.ndarray:
    """Read a region that the far agent makes on a GPU of its own into one on our first."""
    near.peer(far.record)
    far.ask("region", name="theirs", nbytes=N, memory="vram", seed=3, device=device)
    try:
        mine = make_region(near, "vram", N)
        near.read(near.peer("far")["theirs"], mine).wait(PATIENCE)
        return content(mine)
    finally:
        far.ask("drop")


def test_memory_of_a_gpu_that_is_hidden_here_is_reached_all_the_same(far: FarAgent) -> None:
    with made_up_gpus(visible=(0,)), gpu_agent("near") as near:
        assert np.array_equal(read_from(near, far, device=1), random_bytes(N, 3))


def test_without_a_driver_an_agent_that_names_nvlink_does_all_the_rest() -> None:
    if cuda.has_driver():
        pytest.skip("there is a driver here")
    with gpu_agent("alice") as alice, gpu_agent("bob") as bob:
        introduce(alice, bob)
        theirs = make_region(bob, "arena", N, name="theirs", seed=6)
        mine = make_region(alice, "arena", N)
        alice.read(alice.peer("bob")["theirs"], mine).wait(PATIENCE)
        assert np.array_equal(content(mine), content(theirs))
        assert "nvlink" not in theirs.keys
        with pytest.raises(ConfigError, match="driver"):
            alice.empty(N, kind="vram")
        with pytest.raises(ConfigError, match="driver"):
            alice.read(alice.peer("bob")["theirs"], mine, stream=0)


def test_gpus_are_told_by_their_identity_and_not_by_number(far: FarAgent) -> None:
    with made_up_gpus(visible=(1, 0)), gpu_agent("near") as near:
        assert np.array_equal(read_from(near, far, device=1), random_bytes(N, 3))
        assert np.array_equal(read_from(near, far, device=0), random_bytes(N, 3))


def test_without_peer_access_it_is_refused_with_the_reason(far: FarAgent) -> None:
    with made_up_gpus(has_peer_access=False), gpu_agent("near") as near:
        try:
            read_from(near, far, device=1)
        except BackendUnavailable as exc:
            said = str(exc)
        assert "nvlink: GPU 0 does not reach the memory of GPU 1" in said
        assert np.array_equal(read_from(near, far, device=0), random_bytes(N, 3))


@pytest.mark.parametrize("op", ["read", "write"])
def test_a_process_that_sees_no_gpu_asks_the_next_backend_and_is_told_why(far: FarAgent, op: str) -> None:
    with made_up_gpus(gpus=0), gpu_agent("near") as near:  # as Ray's actors that have asked for none
        near.peer(far.record)
        far.ask("region", name="theirs", nbytes=N, memory="vram", seed=3)
        mine, theirs = make_region(near, "arena", N), near.peer("far")["theirs"]
        error = error_of(near.read(theirs, mine) if op == "read" else near.write(mine, theirs))
        far.ask("drop")
        assert isinstance(error, BackendUnavailable)
        assert "nvlink: this process sees no GPU" in str(error)
        assert "CUDA_VISIBLE_DEVICES" in str(error)
        with pytest.raises(ConfigError) as refused:
            near.empty(N, kind="vram")
        assert "CUDA_VISIBLE_DEVICES" in refused.value.hint


@pytest.mark.parametrize("origin", [Origin.VIRTUAL, Origin.POOL], ids=lambda origin: origin.name.lower())
def test_memory_that_has_no_handle_serves_here_and_is_refused_elsewhere_with_the_setting(
    far: FarAgent, origin: Origin
) -> None:
    with made_up_gpus() as fake:
        address = fake.make(N, origin=origin)
        with gpu_agent("alice") as alice, gpu_agent("bob") as bob:
            introduce(alice, bob)
            bob.register(Foreign(address, N), name="theirs")
            alice.write(make_region(alice, "vram", N, seed=5), alice.peer("bob")["theirs"]).wait(PATIENCE)
            assert np.array_equal(fake.view(address, N), random_bytes(N, 5))
            far.ask("region", name="into", nbytes=N, memory="vram")
            refusal = far.ask("try_copy", op="read", mine="into", record=bob.record().decode(), theirs="theirs")
            assert "BackendUnavailable" in refusal
            assert "PYTORCH_CUDA_ALLOC_CONF" in refusal
            far.ask("drop")
        fake.drop(address)


def default_stream(device: int) -> Any:
    """The default stream of a GPU, as torch shows it: the handle is the same for all."""
    return SimpleNamespace(cuda_stream=0, device=SimpleNamespace(index=device))


@pytest.mark.parametrize("sort", ["arena", "vram"])
def test_the_default_stream_of_another_gpu_is_followed(far: FarAgent, sort: str) -> None:
    with made_up_gpus() as fake, gpu_agent("near") as near:
        near.peer(far.record)
        far.ask("region", name="theirs", nbytes=N, memory="vram", device=1)
        mine = make_region(near, sort, N, seed=5)
        plan = near.prepare("write", mine, near.peer("far")["theirs"])
        plan.post().wait(PATIENCE)
        into, after = mine.array() if sort == "arena" else fake.view(mine.memory.address, N), random_bytes(N, 6)
        with fake.held():
            with cuda.on(1):
                fake.work.put(0, lambda: np.copyto(into, after))
            transfer = plan.post(stream=default_stream(1))
            while fake.step():
                pass
        transfer.wait(PATIENCE)
        assert far.ask("content", name="theirs") == after.tobytes().hex()
        far.ask("drop")
        del mine, plan, transfer


@pytest.mark.parametrize(("ours", "followers"), [(0, 1), (1, 0)])
def test_the_default_stream_of_another_gpu_follows(far: FarAgent, ours: int, followers: int) -> None:
    with made_up_gpus() as fake, gpu_agent("near") as near:
        near.peer(far.record)
        far.ask("region", name="theirs", nbytes=N, memory="vram", seed=3)
        mine, found = make_region(near, "vram", N, device=ours), []
        plan = near.prepare("read", near.peer("far")["theirs"], mine)
        plan.post().wait(PATIENCE)
        put(mine.memory, np.zeros(N, np.uint8))
        seen = fake.view(mine.memory.address, N)
        with fake.held():
            transfer = plan.post()
            transfer.wait(stream=default_stream(followers))
            with cuda.on(followers):
                fake.work.put(0, lambda: found.append(seen.copy()))
            while fake.step():
                pass
        transfer.wait(PATIENCE)
        assert np.array_equal(found[0], random_bytes(N, 3))
        far.ask("drop")
        del mine, plan, transfer


def test_a_process_that_works_with_one_gpu_makes_no_context_on_another(far: FarAgent) -> None:
    with made_up_gpus() as fake:
        address = fake.make(N, device=1)
        with gpu_agent("near") as near:
            near.peer(far.record)
            mine = near.register(Foreign(address, N))
            far.ask("region", name="host", nbytes=N, memory="arena", seed=3)
            near.read(near.peer("far")["host"], mine, stream=default_stream(1)).wait(PATIENCE)
            far.ask("region", name="gpu", nbytes=N, memory="vram", device=1)
            for sort in ("arena", "user"):
                near.read(near.peer("far")["gpu"], make_region(near, sort, N), stream=0).wait(PATIENCE)
            assert np.array_equal(fake.view(address, N), random_bytes(N, 3))
            assert set(fake.devices.retained) == {1}
            far.ask("drop")
        fake.drop(address)


@pytest.mark.parametrize("origin", [Origin.VIRTUAL, Origin.POOL], ids=lambda origin: origin.name.lower())
def test_memory_of_another_gpu_that_peer_access_does_not_extend_to_is_refused(origin: Origin) -> None:
    with made_up_gpus() as fake:
        address = fake.make(N, device=1, origin=origin)
        with gpu_agent("alice") as alice, gpu_agent("bob") as bob:
            introduce(alice, bob)
            bob.register(Foreign(address, N), name="theirs")
            said = str(error_of(alice.read(alice.peer("bob")["theirs"], make_region(alice, "vram", N))))
            assert f"no access to another GPU's memory by {origin.value}" in said
        fake.drop(address)


def test_memory_is_not_copied_onto_itself_under_the_name_of_a_peer() -> None:
    with made_up_gpus() as fake:
        address = fake.make(2 * N)
        with gpu_agent("alice") as alice, gpu_agent("bob") as bob:
            introduce(alice, bob)
            bob.register(Foreign(address, 2 * N), name="theirs")
            theirs, mine = alice.peer("bob")["theirs"], alice.register(Foreign(address, 2 * N))
            assert isinstance(error_of(alice.read(theirs.span(0, N), mine.span(N - 1, N))), RangeError)
            alice.read(theirs.span(0, N), mine.span(N, N)).wait(PATIENCE)
        fake.drop(address)


def test_kernels_of_another_gpu_do_not_reach_a_hidden_one(far: FarAgent) -> None:
    with made_up_gpus(visible=(5, 6)), gpu_agent("near") as near:
        near.peer(far.record)
        far.ask("region", name="theirs", nbytes=N, memory="vram")
        remote = near.peer("far")["theirs"]
        assert near.window(remote, device=0).address
        with pytest.raises(BackendUnavailable, match=r"does not see, opened for GPU 0.*CUDA_VISIBLE_DEVICES"):
            near.window(remote, device=1)
        far.ask("drop")


def test_host_memory_that_its_owner_pinned_is_not_staged(far: FarAgent) -> None:
    with made_up_gpus(), gpu_agent("near") as near:
        near.peer(far.record)
        far.ask("region", name="theirs", nbytes=N, memory="vram", seed=3)
        with cuda.on(0):
            address = cuda.host_alloc(N)
            seen = np.frombuffer(cuda.host_bytes(address, N), np.uint8)
        mine = near.register(MemorySpan(address, N))
        remote = near.peer("far")["theirs"]
        near.read(remote, mine).wait(PATIENCE)
        assert np.array_equal(seen, random_bytes(N, 3))
        assert "staged" not in str(near.explain(remote, mine))
        near.deregister(mine)
        del seen
        with cuda.on(0):
            cuda.host_free(address)
        far.ask("drop")


def test_memory_that_is_withdrawn_and_made_anew_is_not_mistaken(far: FarAgent) -> None:
    with made_up_gpus(), gpu_agent("near") as near:
        near.peer(far.record)
        far.ask("region", name="theirs", nbytes=N, memory="vram", seed=3)
        plan = near.prepare("read", near.peer("far")["theirs"], make_region(near, "vram", N))
        plan.post().wait(PATIENCE)
        far.ask("deregister", name="theirs")
        far.ask("region", name="theirs", nbytes=N, memory="vram", seed=4)
        assert isinstance(error_of(plan.post()), RegionStale)
        mine = make_region(near, "vram", N)
        near.read(near.peer("far")["theirs"], mine).wait(PATIENCE)
        assert np.array_equal(content(mine), random_bytes(N, 4))
        far.ask("drop")
        del plan, mine


def test_a_peer_that_claims_to_be_in_this_process_gets_none_of_its_memory(far: FarAgent) -> None:
    with made_up_gpus(), gpu_agent("near") as near:
        record = AgentRecord.from_bytes(far.record)
        near.peer(record.model_copy(update={"pid": os.getpid()}).to_bytes())
        far.ask("region", name="theirs", nbytes=N, memory="user")
        kind = type(error_of(near.write(make_region(near, "vram", N, seed=1), near.peer("far")["theirs"])))
        assert kind is PeerLost
        far.ask("drop")
