"""The kernels of kernels/*.cu, loaded into the primary context of a GPU, and how many CTAs of each a launch has."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

from raynixl import cuda
from raynixl.backends import nvlink_kernel

_FILES: Final = ("structs", "copies", "lines", "adding", "dispatch", "order", "combine")
SOURCES: Final = tuple(Path(__file__).parent / "kernels" / f"{name}.cu" for name in _FILES)
"""In the order in which they are put together."""

THREADS: Final = 512
"""Of a CTA: kThreads in structs.cu bounds them."""

NAMES: Final = ("send", "arrive", "order", "take", "give", "sum", "mask")
_MULTIPROCESSORS: Final = 16  # CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT
_RESIDENT: Final = 2
"""CTAs that a multiprocessor holds at a time."""

_PIECE_NBYTES: Final = 512
"""What a warp moves at once."""

_WARPS: Final = THREADS // 32


@dataclass(frozen=True, slots=True)
class Kernels:
    """The kernels of a GPU: kernels[name] is the function and its threads. `close` unloads them.

    sharing: how many ranks have kernels on this GPU at a time, in this process or by MPS. Those that wait for others
    leave them room.
    """

    module: int
    device: int
    functions: dict[str, int]
    multiprocessors: int
    sharing: int = 1

    def __getitem__(self, name: str) -> tuple[int, int]:
        return self.functions[name], 32 if name == "mask" else THREADS

    def grid(self, name: str, ranks: int, rows: int, nbytes: int, *, waits: bool = True) -> int:
        """Return how many CTAs a launch has, for so many rows of so many bytes with each rank ("sum": in all).

        waits: whether "take" or "sum" wait for lines themselves.
        """
        resident = _RESIDENT * self.multiprocessors
        return grid_of(name, ranks, rows, nbytes, resident=resident, waiting=self._waiting() if waits else resident)

    def _waiting(self) -> int:
        """Return how many CTAs may wait: where ranks share the GPU, half of it is left to what they wait for."""
        shared = 1 if self.sharing <= 1 else 2 * self.sharing
        return max(1, self.multiprocessors // shared)

    def close(self) -> None:
        """Unload them; none of them runs any more."""
        with cuda.on(self.device):
            cuda.module_unload(self.module)


def grid_of(name: str, ranks: int, rows: int, nbytes: int, *, resident: int, waiting: int) -> int:
    """Return how many CTAs a launch has where so many are resident at a time, and so many may wait for others."""
    if name in ("arrive", "mask"):
        return 1
    if name == "order":
        return max(1, min(rows, resident))
    if name == "sum":
        pieces = rows * max(1, nbytes // _PIECE_NBYTES)
        return max(1, min(-(-pieces // _WARPS), waiting))
    most = waiting if name == "take" else resident
    return max(1, min(most // ranks, rows)) * ranks if most >= ranks else most


def load_kernels(device: int, *, sharing: int = 1) -> Kernels:
    """Return the kernels for a GPU, loaded; to be closed. The first process on a host compiles, which takes seconds.

    Raises:
        BackendUnavailable: cupy or NVRTC is not there, or what was compiled does not load.
    """
    image = nvlink_kernel.image_for(nvlink_kernel.architecture_of(device), sources=SOURCES)
    multiprocessors = cuda.device_attribute(device, _MULTIPROCESSORS)
    with cuda.on(device):
        module = cuda.module_load(image)
        functions = {name: cuda.module_function(module, f"raynixl_moe_{name}") for name in NAMES}
    return Kernels(module, device, functions, multiprocessors, sharing)
