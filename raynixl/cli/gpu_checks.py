"""What doctor finds out about GPUs: the driver, which GPUs there are, who reaches whom, and what compiles kernels."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator, Sequence
from importlib import metadata

from raynixl import cuda
from raynixl.cli.doctor import Finding, Verdict
from raynixl.config import GPU_CONTROL, variables
from raynixl.errors import RaynixlError

_AREA = "gpu"
_PROCESSORS, _MAJOR, _MINOR = 16, 75, 76  # CU_DEVICE_ATTRIBUTE_*
_ALLOCATOR_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
_UNMAPPABLE = {
    "expandable_segments:True": "expandable_segments:False", "backend:cudaMallocAsync": "backend:native",
}  # fmt: skip
_CUPY = "kernels for block lists need cupy: pip install 'raynixl[cu13]' (or cu12)"


def has_gpus() -> bool:
    """Whether there is a driver and it sees a GPU."""
    try:
        return cuda.has_driver() and bool(cuda.devices())
    except RaynixlError:
        return False


def check_gpus() -> Iterator[Finding]:
    """The driver, every GPU, peer access of the first to the others, cupy, and torch."""
    if not cuda.has_driver():
        if os.path.exists(GPU_CONTROL):
            hint = "in containers: --gpus all, or NVIDIA_DRIVER_CAPABILITIES=compute,utility"
            yield Finding(_AREA, "driver", Verdict.FAILS, f"{GPU_CONTROL} is there, libcuda.so.1 is not", hint)
        else:
            yield Finding(_AREA, "driver", Verdict.MISSING, "no NVIDIA driver (libcuda.so.1): host memory only")
        return
    try:
        found = cuda.devices()
        yield Finding(_AREA, "driver", Verdict.WORKS if found else Verdict.MISSING, f"{len(found)} GPUs are seen")
        for device in found:
            yield _describe(device)
        yield from _check_peers(found)
    except RaynixlError as exc:
        yield Finding(_AREA, "driver", Verdict.FAILS, exc.message, exc.hint)
        return
    if found:
        yield _check_cupy()
        yield from _check_torch()


def _describe(device: cuda.Device) -> Finding:
    major, minor, count = (cuda.device_attribute(device.index, one) for one in (_MAJOR, _MINOR, _PROCESSORS))
    detail = f"{cuda.bus_id(device.index)}, sm_{major}{minor}, {count} multiprocessors, {device.uuid}"
    return Finding(_AREA, f"GPU {device.index}", Verdict.WORKS, detail)


def _check_peers(devices: Sequence[cuda.Device]) -> Iterator[Finding]:
    for device in devices[1:]:
        what = f"GPU 0 to GPU {device.index}"
        try:
            cuda.enable_peer(0, device.index)
            yield Finding(_AREA, what, Verdict.WORKS, "peer access")
        except RaynixlError as exc:
            yield Finding(_AREA, what, Verdict.SLOW, f"{exc.message}: through host memory, by ucx", exc.hint)


def _check_cupy() -> Finding:
    if importlib.util.find_spec("cupy") is None:
        return Finding(_AREA, "cupy", Verdict.MISSING, "not installed", _CUPY)
    names = [name for name in ("cupy-cuda13x", "cupy-cuda12x", "cupy") if _version(name)]
    return Finding(_AREA, "cupy", Verdict.WORKS, " ".join(f"{name} {_version(name)}" for name in names) or "here")


def _check_torch() -> Iterator[Finding]:
    """Whether torch has CUDA, and allocates what other processes can map."""
    if importlib.util.find_spec("torch") is None:
        return
    try:
        import torch
    except (ImportError, OSError) as exc:  # a library of CUDA's that it needs is not there, or of another version
        yield Finding(
            _AREA, "torch", Verdict.FAILS, f"torch cannot be imported: {exc}", "install it anew: see pytorch.org"
        )
        return
    if torch.version.cuda is None:
        detail = f"torch {torch.__version__} is built without CUDA: tensors are in host memory only"
        yield Finding(_AREA, "torch", Verdict.SLOW, detail, "install a torch with CUDA: see pytorch.org")
        return
    yield Finding(_AREA, "torch", Verdict.WORKS, f"torch {torch.__version__} with CUDA {torch.version.cuda}")
    for name, text in sorted(variables("PYTORCH_").items()):
        for part, remedy in _UNMAPPABLE.items():
            if name in _ALLOCATOR_VARIABLES and part in text.replace(" ", ""):
                detail = (
                    f"{name}={text}: other processes do not map such tensors, and most are not moved from GPU to GPU"
                )
                yield Finding(_AREA, "torch's allocator", Verdict.SLOW, detail, f"set {name} to {remedy}")


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""
