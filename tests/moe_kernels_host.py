"""The kernels of raynixl/moe/kernels, compiled for the host."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
import threading
import time
from ctypes import c_char_p, c_int, c_uint, c_void_p
from pathlib import Path

import pytest

from raynixl.backends.nvlink_kernel import joined
from raynixl.moe.cuda_kernel import SOURCES

_HERE = Path(__file__).parent
_HOST = _HERE / "moe_kernels_on_host.cpp"
_KEPT_SECONDS = 86400
_FLAGS = ["-std=c++20", "-O1", "-pthread", "-shared", "-fPIC", "-w", "-ffp-contract=off"]
WATCHERS = {
    "thread": [
        "-g", "-fsanitize=thread", "--param=tsan-distinguish-volatile=1",
        "--param=tsan-instrument-func-entry-exit=0",  # threads change stacks between the two
    ],
    "address": ["-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"],
}  # fmt: skip
"""What compiles the kernels for a sanitizer; who loads them begins with its library: `LD_PRELOAD`."""

_lock = threading.Lock()  # one thread compiles


def library() -> ctypes.CDLL:
    """The kernels: raynixl_moe_host(name, grid, threads, arguments), from any number of threads at a time.

    Compiled once for each state of the sources, and kept among the temporary files of this user.
    """
    with _lock:
        return _made()


@functools.cache
def _made() -> ctypes.CDLL:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs g++")
    source, flags = joined(SOURCES), _FLAGS + WATCHERS.get(os.environ.get("KERNELS_WATCHED_FOR", ""), [])
    headers = [(_HERE / f"kernels_{name}.h").read_text() for name in ("on_host", "watched")]
    texts = [source, _HOST.read_text(), *headers, *flags]
    digest = hashlib.sha256("\0".join(texts).encode()).hexdigest()[:24]
    folder = Path(tempfile.gettempdir()) / f"raynixl-kernels-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    made = folder / f"moe-{digest}.so"
    if not made.exists():
        fresh = folder / f"{made.stem}-{os.getpid()}.so"
        kernels = fresh.with_suffix(".cu")
        kernels.write_text(source)
        command = [compiler, *flags, f'-DKERNELS="{kernels}"', str(_HOST), "-o", str(fresh)]
        subprocess.run(command, check=True, timeout=200)
        fresh.replace(made)
        kernels.unlink()
        for old in folder.glob("moe-*.so"):
            if time.time() - old.stat().st_mtime > _KEPT_SECONDS:
                old.unlink(missing_ok=True)
    loaded = ctypes.CDLL(str(made))
    loaded.raynixl_moe_host.argtypes = (c_char_p, c_uint, c_uint, c_void_p)
    loaded.raynixl_moe_host.restype = c_int
    loaded.raynixl_moe_host_wide.argtypes = (c_char_p, c_uint, c_uint, c_uint, c_void_p)
    loaded.raynixl_moe_host_wide.restype = c_int
    return loaded


def run_kernel(name: str, grid: int, threads: int, arguments: ctypes.Structure, at_once: int = 1) -> None:
    """Run a kernel to its end, in this thread, and in others if it is to have several CTAs at once."""
    at = ctypes.addressof(arguments)
    assert library().raynixl_moe_host_wide(name.encode(), grid, threads, at_once, at), name
