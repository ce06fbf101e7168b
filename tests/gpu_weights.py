"""What the far process of the GPU tests does with weights: it follows or publishes, reads, and tells what it has.

Functions take the far process's world; `far.ask("gpu_weights:follow", ...)` calls them there, and tests call some here.
"""

from __future__ import annotations

import base64
import threading
import time
from typing import Any

import torch
import xxhash
from gpu_far import World

from raynixl.weights import publish, subscribe

SHAPES = {"plain": (300, 257), "half": (1024, 513), "strided": (65, 129), "counts": (3,), "empty": (0, 4)}
_AHEAD = 4
DTYPES = {"half": torch.bfloat16, "counts": torch.int64}


def weights(device: str, seed: int, *, scale: int = 1) -> dict[str, torch.Tensor]:
    """Return tensors of several kinds, one tied and one strided, with the values of a seed; zeros for seed 0."""
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for name, shape in SHAPES.items():
        wide = (shape[0] * scale, *shape[1:])
        values = torch.randint(-1000, 1000, wide, generator=generator) * (seed != 0)
        made[name] = values.to(DTYPES.get(name, torch.float32)).to(device)
    made["strided"] = made["strided"].t().contiguous().t()
    made["tied"] = made["plain"]
    return made


def refill(tensors: dict[str, torch.Tensor], seed: int, *, scale: int = 1) -> None:
    """Give tensors the values of another seed, where they lie."""
    for name, values in weights("cpu", seed, scale=scale).items():
        tensors[name].copy_(values)


def digests(tensors: dict[str, torch.Tensor]) -> dict[str, str]:
    """Return what tells the bytes of tensors apart."""
    plain = {name: one.detach().cpu().contiguous().view(-1).view(torch.uint8) for name, one in tensors.items()}
    return {name: xxhash.xxh3_128_hexdigest(one.numpy().tobytes()) for name, one in plain.items()}


def follow(world: World, name: str, device: str, *, scale: int = 1, shapes: Any = None, **options: Any) -> list[str]:
    """Subscribe with zeros on a device; return where versions are to lie."""
    tensors = weights(device, 0, scale=scale) if shapes is None else plain(device, shapes)
    subscription = subscribe(world.agent, name, tensors, **options)
    world.kept[name] = (tensors, subscription)
    return [space.name for space in subscription._installer.spaces]


def plain(device: str, shapes: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Return zeros of these dtypes and shapes."""
    return {
        key: torch.zeros(shape, dtype=getattr(torch, dtype), device=device) for key, (dtype, shape) in shapes.items()
    }


def offer(world: World, name: str, device: str, seed: int, **options: Any) -> None:
    """Publish tensors of a seed."""
    tensors = weights(device, seed)
    if not options.get("copy_out", True):
        tensors["strided"] = tensors["strided"].contiguous()
    world.kept[name] = (tensors, publish(world.agent, name, tensors, **options))


def tell(world: World, name: str) -> dict[str, Any]:
    """Return the version, the digests, the addresses and where versions lie."""
    tensors, subscription = world.kept[name]
    with subscription.pinned() as version:
        return {
            "version": version, "digests": digests(tensors), "held": subscription.held_versions,
            "addresses": [one.data_ptr() for one in tensors.values()],
            "spaces": sorted({slot.arenas.space.name for slot in subscription._follower._slots}),
        }  # fmt: skip


def holds(world: World, name: str, values: list[float]) -> bool:
    """Return whether all elements of each tensor have the value that is named for it, as the device sees them."""
    tensors, subscription = world.kept[name]
    with subscription.pinned():
        return all(bool((one == value).all()) for one, value in zip(tensors.values(), values, strict=True))


def stop(world: World, name: str) -> None:
    """Follow or publish no more, and let go of the tensors."""
    world.kept.pop(name)[1].close()


def meet(world: World, record: str) -> None:
    """Learn of an agent."""
    world.agent.peer(base64.b64decode(record))


class Reader:
    """Reads all weights again and again, by kernels on a stream of its own that run long after their section."""

    def __init__(self, tensors: dict[str, torch.Tensor], subscription: Any) -> None:
        self._tensors, self._subscription = tensors, subscription
        self._seen: list[torch.Tensor] = []
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        ends: list[torch.cuda.Event] = []
        with torch.cuda.stream(stream), torch.no_grad():
            while not self._is_over.is_set() or len(self._seen) < 10:
                with self._subscription.pinned():
                    first = [one.view(-1)[:1] for one in self._tensors.values()]
                    torch.cuda._sleep(2_000_000)  # about 1 ms: the flip is waiting for us by now
                    last = [one.max().view(1) for one in self._tensors.values()]
                    self._seen.append(torch.cat([*first, *last]))
                ends.append(stream.record_event())
                if len(ends) > _AHEAD:  # else a thousand sections would be under way, and a flip wait for them all
                    ends.pop(0).synchronize()
            stream.synchronize()

    def stop(self) -> list[list[float]]:
        """End it; return the distinct values that each look saw."""
        self._is_over.set()
        self._thread.join(60)
        assert not self._thread.is_alive()
        return [sorted(set(one.tolist())) for one in self._seen]


def read(world: World, name: str) -> None:
    """Begin to read."""
    world.kept[f"reader of {name}"] = Reader(*world.kept[name])


def seen(world: World, name: str) -> list[list[float]]:
    """End that; return what was seen."""
    reader: Reader = world.kept.pop(f"reader of {name}")
    return reader.stop()


def capture(world: World, name: str, seconds: float) -> None:
    """Capture a graph that doubles a tensor, in the mode in which any thread can break it, and take time over that."""
    tensors, subscription = world.kept[name]
    out = torch.zeros_like(tensors["plain"])
    graph = torch.cuda.CUDAGraph()  # type: ignore[no-untyped-call]
    with subscription.pinned(), torch.cuda.graph(graph, capture_error_mode="global"):  # type: ignore[no-untyped-call]
        out.copy_(tensors["plain"] * 2)
        time.sleep(seconds)
    world.kept[f"graph of {name}"] = (graph, out)


def replay(world: World, name: str) -> bool:
    """Replay it; return whether it doubled what the tensor is now."""
    tensors, subscription = world.kept[name]
    graph, out = world.kept[f"graph of {name}"]
    with subscription.pinned():
        graph.replay()
        return bool(torch.equal(out, tensors["plain"] * 2)) and bool(out.any())
