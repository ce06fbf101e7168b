"""The far process of the GPU tests: one agent and its memory, asked by JSON lines on a pipe; and memory of any kind."""

from __future__ import annotations

import base64
import importlib
import json
import os
import sys
import traceback
from typing import Any

import numpy as np
import xxhash

from raynixl import Agent, AgentConfig, Region

PATIENCE = 60.0


def some_bytes(nbytes: int, seed: int) -> Any:
    """Bytes in host memory that no other seed gives; zeros for seed 0."""
    if seed == 0:
        return np.zeros(nbytes, np.uint8)
    words = np.random.default_rng(seed).integers(0, 1 << 64, -(-nbytes // 8), dtype=np.uint64)  # many times faster
    return words.view(np.uint8)[:nbytes]


def filled(kind: str, nbytes: int, seed: int, *, device: int = 0) -> Any:
    """Memory of the user's own: 'host' (numpy), 'pinned' (numpy), 'gpu' (cupy) or 'torch' (a CUDA tensor)."""
    source = some_bytes(nbytes, seed)
    if kind == "host":
        return source
    if kind == "torch":
        import torch

        return torch.from_numpy(source).to(f"cuda:{device}")
    import cupy

    if kind == "pinned":
        pinned = np.frombuffer(cupy.cuda.alloc_pinned_memory(max(1, nbytes)), np.uint8, nbytes)
        pinned[:] = source
        return pinned
    assert kind == "gpu", kind
    with cupy.cuda.Device(device):
        made = cupy.asarray(source)
        cupy.cuda.Stream.null.synchronize()
    return made


def registered(agent: Agent, kind: str, nbytes: int, seed: int, *, name: str = "", device: int = 0) -> Region:
    """A region over filled memory: of `filled`'s kinds, or 'arena' and 'vram', which the agent allocates."""
    if kind not in ("arena", "vram"):
        return agent.register(filled(kind, nbytes, seed, device=device), name=name)
    if kind == "arena":
        region = agent.empty(nbytes, name=name)
    else:
        region = agent.empty(nbytes, kind="vram", device=device, name=name)
    fill(region, seed)
    return region


def on_gpu(region: Region) -> Any:
    """A cupy view of a region on a GPU, whoever allocated it."""
    import cupy

    memory = region.memory
    whole = cupy.cuda.UnownedMemory(memory.address, memory.nbytes, region, region.device)
    return cupy.ndarray(memory.nbytes, cupy.uint8, cupy.cuda.MemoryPointer(whole, 0))


def fill(region: Region, seed: int) -> None:
    """Fill a region of any kind with what `some_bytes` gives; it is there on return."""
    source = some_bytes(region.nbytes, seed)
    if region.kind.value == "dram":
        region.array()[:] = source
        return
    import cupy

    on_gpu(region).set(source)
    cupy.cuda.Stream.null.synchronize()


def content(memory: Any) -> Any:
    """The bytes of a region, or of memory of any kind, as a flat array in host memory."""
    if isinstance(memory, Region):
        memory = memory.array() if memory.kind.value == "dram" else on_gpu(memory)
    if hasattr(memory, "cpu"):
        import torch

        return memory.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
    if not isinstance(memory, np.ndarray):
        import cupy

        memory = cupy.asnumpy(memory)
    return np.ascontiguousarray(memory).reshape(-1).view(np.uint8)


def digest(memory: Any) -> str:
    """A digest of a region or of memory of any kind that notices every changed, moved or missing byte."""
    return xxhash.xxh3_128_hexdigest(content(memory).tobytes())


class World:
    """What the far process has: its agent, its regions by name, and whatever a test's own functions keep in `kept`."""

    def __init__(self, settings: dict[str, Any]) -> None:
        settings = {name: tuple(one) if isinstance(one, list) else one for name, one in settings.items()}
        self.agent = Agent(settings.pop("name", f"far-{os.getpid()}"), config=AgentConfig(**settings))
        self.regions: dict[str, Region] = {}
        self.kept: dict[str, Any] = {}

    def answer(self, do: str, fields: dict[str, Any]) -> Any:
        """Do one thing: a method `do_...`, or 'module:function', which is called with this world and the fields."""
        module, _, function = do.partition(":")
        if function:
            return getattr(importlib.import_module(module), function)(self, **fields)
        return getattr(self, f"do_{do}")(**fields)

    def do_make(self, name: str, kind: str, nbytes: int, seed: int = 0, device: int = 0) -> str:
        """Register memory under a name; its digest."""
        self.regions[name] = registered(self.agent, kind, nbytes, seed, name=name, device=device)
        return digest(self.regions[name])

    def do_fill(self, name: str, seed: int) -> str:
        """Fill a region anew; its digest."""
        fill(self.regions[name], seed)
        return digest(self.regions[name])

    def do_digest(self, name: str) -> str:
        """The digest of a region."""
        return digest(self.regions[name])

    def do_drop(self, name: str) -> None:
        """Deregister a region and let go of its memory."""
        self.agent.deregister(self.regions.pop(name))

    def do_meet(self, record: str) -> str:
        """Learn of the near agent; its name."""
        return self.agent.peer(base64.b64decode(record)).name

    def do_write(self, peer: str, ours: str, theirs: str) -> None:
        """Write a region of ours into one of a peer's."""
        self.agent.write(self.regions[ours], self.agent.peer(peer)[theirs]).wait(PATIENCE)

    def do_read(self, peer: str, ours: str, theirs: str) -> None:
        """Read a region of a peer's into one of ours."""
        self.agent.read(self.agent.peer(peer)[theirs], self.regions[ours]).wait(PATIENCE)

    def do_statistics(self) -> str:
        """What the agent has counted, as text."""
        return repr(self.agent.statistics())

    def do_trim(self) -> None:
        """Give back what the allocators keep, so that the memory in use can be compared."""
        trim()


def trim() -> None:
    """Give back what allocators of this process keep for later: cupy's pools, torch's cache."""
    if cupy := sys.modules.get("cupy"):
        cupy.get_default_memory_pool().free_all_blocks()
        cupy.get_default_pinned_memory_pool().free_all_blocks()
    if torch := sys.modules.get("torch"):
        torch.cuda.empty_cache()


def main(settings: dict[str, Any]) -> None:
    """Answer until the pipe closes. What goes wrong is told to the asker, traceback and all."""
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever else prints does not disturb the replies
    world = World(settings)
    with world.agent:
        print(json.dumps({"record": base64.b64encode(world.agent.record()).decode(), "pid": os.getpid()}), file=replies)
        for line in sys.stdin:
            ask = json.loads(line)
            try:
                reply = {"value": world.answer(ask["do"], ask["fields"])}
            except Exception as exc:  # noqa: BLE001 - the one who asked raises it
                reply = {"error": type(exc).__name__, "message": str(exc), "traceback": traceback.format_exc()}
            print(json.dumps(reply), file=replies)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
