"""Compiled kernels, nvlink_kernels.cu before others: by NVRTC, as it comes with cupy, once for each kind of GPU."""

from __future__ import annotations

import hashlib
import logging
import os
import tempfile
import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from raynixl import cuda
from raynixl.errors import BackendUnavailable

logger = logging.getLogger(__name__)

_SOURCE = Path(__file__).with_name("nvlink_kernels.cu")
_CAPABILITY_MAJOR, _CAPABILITY_MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_*
_HINT = "pip install 'raynixl[cu13]' (or [cu12]): cupy compiles the kernels"

_lock = threading.Lock()  # protects _images
_images: dict[tuple[tuple[Path, ...], str, tuple[str, ...]], bytes] = {}


@dataclass(frozen=True, slots=True)
class Kernels:
    """The kernels, loaded into the primary context of a GPU: their functions by name."""

    module: int
    functions: dict[str, int]


def load_kernels(device: int, options: Sequence[str] = ()) -> Kernels:
    """Return the kernels for a GPU, loaded; the caller unloads the module.

    `options` are for the compiler. The first process on a host compiles, which takes about a second.

    Raises:
        BackendUnavailable: cupy or NVRTC is not there, or what was compiled does not load.
    """
    image = image_for(architecture_of(device), options)
    with cuda.on(device):
        module = cuda.module_load(image)
        return Kernels(module, {name: cuda.module_function(module, name) for name in NAMES})


NAMES = (
    "raynixl_copy_small",
    "raynixl_copy_range",
    "raynixl_copy_tiles",
    "raynixl_copy_narrow",
    "raynixl_signal",
    "raynixl_digest",
    "raynixl_quantise_float32",
    "raynixl_quantise_bfloat16",
    "raynixl_quantise_float16",
)


def architecture_of(device: int) -> str:
    """Return what the compiler calls a GPU's kind."""
    major = cuda.device_attribute(device, _CAPABILITY_MAJOR)
    return f"sm_{major}{cuda.device_attribute(device, _CAPABILITY_MINOR)}"


def image_for(architecture: str, options: Sequence[str] = (), *, sources: tuple[Path, ...] = (_SOURCE,)) -> bytes:
    """Return the kernels of sources, which are put together, compiled for an architecture such as 'sm_90'.

    Raises:
        BackendUnavailable: cupy or NVRTC is not there.
    """
    key = sources, architecture, tuple(options)
    with _lock:
        if key not in _images:
            _images[key] = _cached(sources, architecture, options)
        return _images[key]


def joined(sources: Sequence[Path]) -> str:
    """Return what is compiled, in which the compiler finds its way to each file's lines."""
    first, *others = sources
    return "\n".join([first.read_text(), *(f'#line 1 "{path.name}"\n{path.read_text()}' for path in others)])


def _cached(sources: Sequence[Path], architecture: str, options: Sequence[str]) -> bytes:
    source = joined(sources)
    text = "\n".join([source, architecture, *options, _version()])
    try:
        path = _cache_folder() / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.cubin"
    except RuntimeError:  # a user without a home, as some containers have
        return _compile(source, sources[0].name, architecture, options)
    with suppress(OSError):
        if image := path.read_bytes():  # empty where the host went down before it was on the disk
            return image
    image = _compile(source, sources[0].name, architecture, options)
    _keep(path, image)
    return image


def _cache_folder() -> Path:
    """Beside what cupy keeps."""
    return Path.home() / ".cupy" / "raynixl"


def _keep(path: Path, image: bytes) -> None:
    """Write it for the next process, whole or not at all; without a place for it each process compiles anew."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(dir=path.parent)
        with os.fdopen(descriptor, "wb") as file:
            file.write(image)
        Path(name).replace(path)
    except OSError as exc:
        logger.info("the compiled kernels are not kept: %s", exc)


def _version() -> str:
    try:
        from cupy.cuda import nvrtc

        return ".".join(map(str, nvrtc.getVersion()))
    except (ImportError, RuntimeError) as exc:
        raise BackendUnavailable(f"no compiler for kernels of GPUs: {exc}", hint=_HINT) from exc


def _compile(source: str, name: str, architecture: str, options: Sequence[str]) -> bytes:
    from cupy.cuda import nvrtc

    program = nvrtc.createProgram(source, name, [], [])
    try:
        nvrtc.compileProgram(program, [f"--gpu-architecture={architecture}", "--std=c++17", *options])
        image: bytes = nvrtc.getCUBIN(program)
    except nvrtc.NVRTCError as exc:
        log = nvrtc.getProgramLog(program)
        raise BackendUnavailable(f"the kernels were not compiled for {architecture}: {exc}\n{log}", hint=_HINT) from exc
    finally:
        nvrtc.destroyProgram(program)
    return image
