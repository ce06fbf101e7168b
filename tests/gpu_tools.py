"""The near side of the GPU tests: why there is nothing to test, the far process, and memory that must not grow.

Nothing here needs a GPU to be imported. Records travel over pipes; there is no Ray and no directory.
"""

from __future__ import annotations

import base64
import functools
import gc
import importlib.util
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from gpu_far import PATIENCE, trim

from raynixl.cuda import has_driver

MIB = 1 << 20
_FAR = str(Path(__file__).with_name("gpu_far.py"))
_SLACK = 4 * MIB
"""The driver gives memory in pieces of 2 MiB; what it keeps for itself moves by one or two of them."""


@functools.cache
def why_no_gpu(*modules: str) -> str:
    """Why there is nothing to test here, or ''. `modules` are needed beyond cupy."""
    if missing := [name for name in ("cupy", *modules) if importlib.util.find_spec(name) is None]:
        return f"needs {' and '.join(missing)}"
    if not has_driver():
        return "needs the NVIDIA driver (libcuda.so.1)"
    import cupy

    try:
        return "" if cupy.cuda.runtime.getDeviceCount() else "needs a GPU"
    except cupy.cuda.runtime.CUDARuntimeError as exc:
        return f"needs a GPU: {exc}"


def skip_without_gpu(*modules: str) -> None:
    """Skip the test where there is no GPU, or where one of `modules` is missing."""
    if reason := why_no_gpu(*modules):
        pytest.skip(reason)


def has_cuda_torch() -> bool:
    """Whether torch is here and has CUDA."""
    if importlib.util.find_spec("torch") is None:
        return False
    import torch

    return bool(torch.cuda.is_available())


class FarError(AssertionError):
    """What went wrong in the far process; `kind` is the name of its exception."""

    def __init__(self, kind: str, message: str, traceback: str) -> None:
        super().__init__(f"{kind}: {message}\n{traceback}")
        self.kind, self.message = kind, message


class Far:
    """The other process: its agent's record, and what it is asked. See `gpu_far.World` for what it can do."""

    def __init__(self, *, environment: dict[str, str] | None = None, **settings: Any) -> None:
        paths = (str(Path(__file__).parent), os.environ.get("PYTHONPATH", ""))
        path = os.pathsep.join(one for one in paths if one)
        self.process = subprocess.Popen(
            [sys.executable, _FAR, json.dumps(settings)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": path, **(environment or {})},
        )  # fmt: skip
        self.name = settings.get("name", f"far-{self.process.pid}")
        try:
            self.record = base64.b64decode(self._read_line()["record"])
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Far:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def is_alive(self) -> bool:
        """Whether the process runs."""
        return self.process.poll() is None

    def ask(self, do: str, *, patience: float = PATIENCE, **fields: Any) -> Any:
        """Have something done there, and return what it answers: a `do_...` of World, or 'module:function'.

        Raises:
            FarError: it went wrong there.
        """
        self.tell(do, **fields)
        return self.hear(patience)

    def tell(self, do: str, **fields: Any) -> None:
        """Have something begun there; `hear` its end before anything else is asked."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"do": do, "fields": fields}).encode() + b"\n")
        self.process.stdin.flush()

    def hear(self, patience: float = PATIENCE) -> Any:
        """Return the answer to what was told. Raises as `ask` does."""
        reply = self._read_line(patience)
        if "error" in reply:
            raise FarError(reply["error"], reply["message"], reply["traceback"])
        return reply["value"]

    def kill(self) -> None:
        """Kill it at once, as the kernel would; its parent knows it on return."""
        self.process.kill()
        self.process.wait(PATIENCE)

    def stop(self) -> None:
        """Freeze it."""
        self.process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        """Let it go on."""
        self.process.send_signal(signal.SIGCONT)

    def close(self) -> None:
        """End it and reap it; idempotent."""
        if self.process.stdin is not None and not self.process.stdin.closed:
            self.process.kill()
            self.process.communicate()

    def _read_line(self, patience: float = PATIENCE) -> dict[str, Any]:
        assert self.process.stdout is not None
        assert select.select([self.process.stdout], [], [], patience)[0], "the far process does not answer"
        line = self.process.stdout.readline()
        assert line, f"the far process ended: {self.process.wait(PATIENCE)}"
        told: dict[str, Any] = json.loads(line)
        return told


class Fars:
    """Far processes by their settings: starting one, with its CUDA context, takes seconds, so tests share them."""

    def __init__(self) -> None:
        self._made: dict[str, Far] = {}
        self._count = 0

    def __call__(self, **settings: Any) -> Far:
        """The far process with these settings; a new one if it has ended."""
        key = json.dumps(settings, sort_keys=True)
        far = self._made.get(key)
        if far is None or not far.is_alive:
            if far is not None:
                far.close()
            far = self._made[key] = Far(**settings)
        return far

    def name(self) -> str:
        """A name for a region that no other test has."""
        self._count += 1
        return f"memory-{self._count}"

    def close(self) -> None:
        """End them all."""
        for far in self._made.values():
            far.close()
        self._made.clear()


def used_nbytes(*fars: Far, device: int = 0) -> int:
    """Bytes of a GPU in use by all processes, after these and this one have given back what allocators keep."""
    import cupy

    gc.collect()
    for far in fars:
        far.ask("trim")
    trim()
    with cupy.cuda.Device(device):
        free, total = cupy.cuda.runtime.memGetInfo()
    return int(total - free)


@contextmanager
def no_growth(*fars: Far, device: int = 0, slack: int = _SLACK, patience: float = 10.0) -> Iterator[None]:
    """Fail if more memory of the GPU is in use after than before, by whatever process; warm everything up before."""
    before = used_nbytes(*fars, device=device)
    yield
    deadline = time.monotonic() + patience
    while (grown := used_nbytes(*fars, device=device) - before) > slack and time.monotonic() < deadline:
        time.sleep(0.05)
    assert grown <= slack, f"{grown / MIB:.1f} MiB more of GPU {device} are in use than before"


def repeat_without_growth(
    run: Callable[[int], object], cycles: int, fars: Sequence[Far] = (), *, warm: int = 20
) -> None:
    """Call run(number) `cycles` times after `warm` more, and fail if memory of the GPU grew over the cycles."""
    for number in range(warm):
        run(number)
    with no_growth(*fars):
        for number in range(warm, warm + cycles):
            run(number)
