"""Weight sync on CUDA tensors between processes of one GPU: every byte, no torn version, no second copy, no crash."""

from __future__ import annotations

import base64
import time
from collections.abc import Callable
from typing import Any

import pytest
from gpu_tools import Far, Fars, skip_without_gpu, used_nbytes

from raynixl import Agent

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(180)]

BACKENDS = ["nvlink", "shm"]
MIB = 1 << 20
PAIRS = [("cuda", "cuda"), ("cuda", "cpu"), ("cpu", "cuda")]


@pytest.fixture(autouse=True)
def _needs_torch() -> None:
    skip_without_gpu("torch")


class Pair:
    """A trainer here and rollouts in other processes, which know each other."""

    def __init__(self, near: Agent, *fars: Far, name: str) -> None:
        self.near, self.fars, self.name = near, fars, name
        record = base64.b64encode(near.record()).decode()
        for far in fars:
            near.peer(far.record)
            far.ask("gpu_weights:meet", record=record)
            for other in fars:
                if other is not far:
                    far.ask("gpu_weights:meet", record=base64.b64encode(other.record).decode())
        self._version = 0

    def publish(self, tensors: Any, **options: Any) -> Any:
        from raynixl.weights import publish

        return publish(self.near, self.name, tensors, **options)

    def follow(self, device: str, **options: Any) -> None:
        for far in self.fars:
            far.ask("gpu_weights:follow", name=self.name, device=device, **options)

    def sync(self, **options: Any) -> Any:
        from raynixl.weights import WeightSync

        return WeightSync(
            self.near, self.name, [self.near.name], [far.name for far in self.fars], timeout=60, **options
        )

    def tell(self) -> list[Any]:
        return [far.ask("gpu_weights:tell", name=self.name) for far in self.fars]

    def close(self) -> None:
        for far in self.fars:
            if far.is_alive:
                far.ask("gpu_weights:stop", name=self.name)


@pytest.fixture
def pair(fars: Fars, make_near: Callable[..., Agent], request: pytest.FixtureRequest) -> Any:
    """A trainer and one rollout."""
    made = Pair(make_near(backends=tuple(BACKENDS)), fars(backends=BACKENDS), name=fars.name())
    yield made
    made.close()


def warm_up(pair: Pair) -> None:
    """Push something small: contexts and kernels take memory of their own, once."""
    from gpu_weights import weights

    publication = pair.publish(weights("cuda", 1))
    pair.follow("cuda")
    pair.sync().push(1).raise_for_excluded()
    pair.close()
    publication.close()


def check_same(pair: Pair, tensors: Any, version: int) -> None:
    from gpu_weights import digests

    wanted = digests(tensors)
    for told in pair.tell():
        assert told["version"] == version
        assert told["digests"] == wanted


@pytest.mark.parametrize("install", ["copy", "swap"])
@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_every_byte_of_every_version_arrives(pair: Pair, source: str, target: str, install: str) -> None:
    from gpu_weights import refill, weights

    tensors = weights(source, 1)
    publication = pair.publish(tensors, chunk_nbytes=1 << 18)
    pair.follow(target, install=install)
    sync = pair.sync()
    before = pair.tell()[0]["addresses"]
    for version in (1, 2, 3):
        refill(tensors, version)
        sync.push(version).raise_for_excluded()
        check_same(pair, tensors, version)
    told = pair.tell()[0]
    assert told["spaces"] == [f"{target}:0" if target == "cuda" else target]
    assert publication._copies.first.arenas.space.name == (f"{source}:0" if source == "cuda" else source)
    if install == "copy":
        assert told["addresses"] == before
    publication.close()


def test_published_in_place_they_take_no_second_copy_at_the_trainer(pair: Pair) -> None:
    import torch
    from gpu_weights import plain

    shapes = {f"w{number}": ("float32", (8 * MIB,)) for number in range(8)}  # 256 MiB
    far = pair.fars[0]
    warm_up(pair)
    before = used_nbytes(far)
    tensors = plain("cuda", shapes)
    publication = pair.publish(tensors, copy_out=False)
    assert used_nbytes(far) - before < 1.1 * 256 * MIB
    pair.follow("cuda", shapes=shapes)
    assert used_nbytes(far) - before < 3.2 * 256 * MIB  # the model of the rollout, and its slot
    sync = pair.sync()
    for version in (1, 2):
        with publication.updating():
            for number, tensor in enumerate(tensors.values()):
                tensor.fill_(number + 10 * version)
        sync.push(version).raise_for_excluded()
        values = [number + 10 * version for number in range(len(tensors))]
        assert far.ask("gpu_weights:holds", name=pair.name, values=values)
    publication.close()
    del tensors, publication
    torch.cuda.empty_cache()


@pytest.mark.parametrize("options", [{"cast": "bfloat16"}, {"quantise": "fp8"}, {"cast": "float16"}])
def test_what_is_converted_on_the_gpu_is_what_the_cpu_makes_of_it(pair: Pair, options: dict[str, str]) -> None:
    import torch
    from gpu_weights import plain

    from raynixl.weights.quantising import quantise

    generator = torch.Generator().manual_seed(5)
    values = {
        "a.weight": torch.randn(300, 513, generator=generator) * 7, "bias": torch.randn(777, generator=generator),
        "b.weight": torch.randn(256, 1024, generator=generator).bfloat16(), "zero.weight": torch.zeros(128, 128),
    }  # fmt: skip
    publication = pair.publish({name: one.cuda() for name, one in values.items()}, **options)
    shapes = {one.name: (one.dtype, list(one.shape)) for one in publication.layout.entries}
    pair.follow("cuda", shapes=shapes)
    pair.sync().push(1).raise_for_excluded()
    wanted = plain("cpu", shapes)
    for name, tensor in values.items():
        if "quantise" in options and name.endswith("weight"):
            quantise(tensor, wanted[name], wanted[f"{name}_scale_inv"])
        else:
            wanted[name].copy_(tensor)
    check_same(pair, wanted, 1)
    publication.close()


def test_few_changes_travel_as_a_delta_found_and_applied_on_the_gpu(pair: Pair) -> None:
    import torch
    from gpu_weights import weights

    tensors = weights("cuda", 1, scale=8)
    publication = pair.publish(tensors)
    pair.follow("cuda", scale=8)
    sync = pair.sync()
    for version in (1, 2):
        sync.push(version).raise_for_excluded()
    deadline = time.monotonic() + 30
    while len(publication._copies._copies) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    for version in (3, 4, 5):
        flat = tensors["half"].view(-1).view(torch.int16)
        flat[torch.randint(0, flat.numel(), (flat.numel() // 100,), device="cuda")] ^= 1
        tensors["counts"][1] = version
        report = sync.push(version)
        report.raise_for_excluded()
        check_same(pair, tensors, version)
    assert report.deltas == 1
    assert report.origin_nbytes < 0.1 * report.nbytes
    publication.close()


@pytest.mark.parametrize("install", ["copy", "swap"])
def test_no_kernel_of_a_reader_sees_two_versions(pair: Pair, install: str) -> None:
    import torch
    from gpu_weights import plain

    shapes = {f"w{number}": ("float32", (MIB,)) for number in range(8)}
    tensors = plain("cuda", shapes)
    publication = pair.publish(tensors)
    pair.follow("cuda", shapes=shapes, install=install)
    far, sync = pair.fars[0], pair.sync()
    sync.push(1).raise_for_excluded()
    far.ask("gpu_weights:read", name=pair.name)
    for version in range(2, 22):
        with publication.updating():
            torch._foreach_add_(list(tensors.values()), 1.0)
        sync.push(version).raise_for_excluded()
    seen = far.ask("gpu_weights:seen", name=pair.name)
    assert all(len(values) == 1 for values in seen)
    assert len({values[0] for values in seen}) > 3
    publication.close()


def test_a_step_that_still_runs_on_a_stream_of_the_trainers_is_in_the_version(pair: Pair) -> None:
    import torch
    from gpu_weights import weights

    tensors = weights("cuda", 1)
    publication = pair.publish(tensors)
    pair.follow("cuda")
    sync = pair.sync()
    stream = torch.cuda.Stream()
    for version in (1, 2, 3):
        with torch.cuda.stream(stream), publication.updating():
            torch.cuda._sleep(50_000_000)  # about 30 ms
            tensors["plain"].fill_(float(version))
        sync.push(version).raise_for_excluded()
        check_same(pair, tensors, version)
    publication.close()


def test_captured_graphs_replay_with_the_new_version(pair: Pair) -> None:
    from gpu_weights import refill, weights

    tensors = weights("cuda", 1)
    publication = pair.publish(tensors)
    pair.follow("cuda")
    sync = pair.sync()
    sync.push(1).raise_for_excluded()
    refill(tensors, 2)
    pair.fars[0].tell("gpu_weights:capture", name=pair.name, seconds=1.0)
    sync.push(2).raise_for_excluded()  # pulled and checked meanwhile, which must not break the capture
    pair.fars[0].hear()
    for version in (3, 4):
        refill(tensors, version)
        sync.push(version).raise_for_excluded()
        assert pair.fars[0].ask("gpu_weights:replay", name=pair.name)
    publication.close()


def test_versions_are_kept_on_the_gpu_and_returned_to(pair: Pair) -> None:
    from gpu_weights import digests, refill, weights

    tensors = weights("cuda", 1)
    publication = pair.publish(tensors)
    pair.follow("cuda", keep=2)
    sync = pair.sync()
    known = {}
    for version in (1, 2, 3):
        refill(tensors, version)
        known[version] = digests(tensors)
        sync.push(version).raise_for_excluded()
    assert pair.tell()[0]["held"] == [2, 3]
    assert sync.roll_back(2) == {}
    told = pair.tell()[0]
    assert told["version"] == 2
    assert told["digests"] == known[2]
    publication.close()


def test_rollouts_on_one_gpu_feed_each_other_and_a_process_that_is_killed_takes_nobody_along(
    fars: Fars, make_far: Callable[..., Far], make_near: Callable[..., Agent]
) -> None:
    from gpu_weights import digests, refill, weights

    from raynixl.errors import RaynixlError
    from raynixl.weights import WeightSync, subscribe

    doomed, stays = make_far(backends=BACKENDS), fars(backends=BACKENDS)
    pair = Pair(make_near(backends=tuple(BACKENDS)), doomed, stays, name=fars.name())
    tensors = weights("cuda", 1, scale=16)
    publication = pair.publish(tensors, chunk_nbytes=1 << 20)
    pair.follow("cuda", scale=16)
    sync = pair.sync(topology="relay")
    for version in (1, 2):
        refill(tensors, version, scale=16)
        sync.push(version).raise_for_excluded()
        check_same(pair, tensors, version)

    doomed.ask("gpu_weights:offer", name="theirs", device="cuda", seed=4, copy_out=False)
    followed = weights("cuda", 0)
    followed["strided"] = followed["strided"].contiguous()
    subscription = subscribe(pair.near, "theirs", followed)
    from_doomed = WeightSync(pair.near, "theirs", [doomed.name], [pair.near.name], timeout=20)
    from_doomed.push(1).raise_for_excluded()
    wanted = digests(weights("cpu", 4))
    assert digests(followed) == wanted

    doomed.kill()
    with pytest.raises(RaynixlError):
        from_doomed.push(2)
    assert subscription.version == 1
    assert digests(followed) == wanted
    refill(tensors, 3, scale=16)
    report = sync.push(3)
    assert set(report.excluded) == {doomed.name}
    pair.fars = (stays,)
    check_same(pair, tensors, 3)
    publication.close()
    pair.close()


def test_digests_of_tensors_on_the_gpu_are_those_of_the_cpu() -> None:
    import numpy as np
    from gpu_weights import weights

    from raynixl.native import load
    from raynixl.weights.layout import build_layout
    from raynixl.weights.tensor_digest import digest_tensors
    from raynixl.weights.tensors import describe

    there, here = weights("cuda", 6), weights("cpu", 6)
    layout = build_layout(describe(here))
    both = [
        digest_tensors(
            [(one[entry.name], entry) for entry in layout.entries if entry.nbytes], seed=9, native=load(native=True)
        )
        for one in (there, here)
    ]
    assert both[0].any()
    assert np.array_equal(*both)


def test_a_large_push_and_what_it_takes(pair: Pair, capsys: pytest.CaptureFixture[str]) -> None:
    """Two gigabytes, printed beside a plain copy on the device: figures for docs/performance.md."""
    import torch
    from gpu_weights import plain

    shapes = {f"w{number}": ("bfloat16", (128 * MIB,)) for number in range(8)}  # 2 GiB
    tensors = plain("cuda", shapes)
    spare = torch.empty_like(tensors["w0"])
    lines, total = [], 0
    for in_place in (False, True):
        publication = pair.publish(tensors, copy_out=not in_place)
        pair.follow("cuda", shapes=shapes)
        sync = pair.sync(delta="off")
        for version in range(1, 5):
            with publication.updating():
                torch._foreach_add_(list(tensors.values()), 1.0)
            report = sync.push(version)
            report.raise_for_excluded()
            total += 1
        assert pair.fars[0].ask("gpu_weights:holds", name=pair.name, values=[total] * len(shapes))
        lines.append(f"in place: {in_place}\n{report}")
        pair.close()
        publication.close()
        pair.name += "-again"
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for tensor in tensors.values():
        spare.copy_(tensor)
    end.record()
    end.synchronize()
    lines.append(f"plain copies of as many bytes: {begin.elapsed_time(end):.2f} ms")
    with capsys.disabled():
        print("\n" + "\n".join(lines))
    pair.fars = ()


def test_ucx_carries_them_too(fars: Fars, make_near: Callable[..., Agent]) -> None:
    from gpu_weights import refill, weights

    skip_without_gpu("torch", "ucxx")
    pair = Pair(make_near(backends=("ucx",)), fars(backends=["ucx"]), name=fars.name())
    tensors = weights("cuda", 1)
    publication = pair.publish(tensors)
    pair.follow("cuda")
    sync = pair.sync()
    for version in (1, 2):
        refill(tensors, version)
        sync.push(version).raise_for_excluded()
        check_same(pair, tensors, version)
    publication.close()
    pair.close()
