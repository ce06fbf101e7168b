"""What doctor looks at around raynixl: versions, limits, huge pages, Ray."""

from __future__ import annotations

import json
import os
import platform
import resource
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import raynixl
from raynixl.bench.sizes import format_size
from raynixl.cli.doctor import Finding, Verdict
from raynixl.errors import RangeError
from raynixl.memory import allocate, available_nbytes

RAY_SECONDS = 30.0
_ENOUGH_FILES = 4096
_THP = Path("/sys/kernel/mm/transparent_hugepage")


def check_versions() -> Iterator[Finding]:
    """Python, the kernel, and the packages that some parts need."""
    python = f"{platform.python_version()} on Linux {platform.release()}, {len(os.sched_getaffinity(0))} cores"
    yield Finding("versions", "raynixl", Verdict.WORKS, raynixl.__version__)
    yield Finding("versions", "Python", Verdict.WORKS, python)
    for package, use in (("ray", "actors"), ("torch", "modules and tensors")):
        try:
            yield Finding("versions", package, Verdict.WORKS, metadata.version(package))
        except metadata.PackageNotFoundError:
            hint = f"for {use}: pip install {package}"
            yield Finding("versions", package, Verdict.MISSING, "not installed", hint)


def check_limits() -> Iterator[Finding]:
    """Shared memory and the limits that stop large jobs."""
    try:
        memory = allocate(1 << 20)
        os.close(memory.fd)
        detail = f"memfd works; {format_size(available_nbytes())} free"
        yield Finding("memory", "arenas", Verdict.WORKS, detail)
    except RangeError as exc:
        yield Finding("memory", "arenas", Verdict.FAILS, exc.message, exc.hint)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    enough = soft >= _ENOUGH_FILES
    yield Finding(
        "memory", "open files", Verdict.WORKS if enough else Verdict.SLOW, f"{_limit(soft)} (hard {_limit(hard)})",
        "" if enough else f"each peer takes one and each mapped arena one for a moment: ulimit -n {_ENOUGH_FILES}",
    )  # fmt: skip
    locked = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    size = "unlimited" if locked == resource.RLIM_INFINITY else format_size(locked)
    detail = f"{size}; host memory is not pinned, only GPU and RDMA paths will need it"
    yield Finding("memory", "locked memory", Verdict.WORKS, detail)
    yield _check_dev_shm()


def _limit(value: int) -> str:
    return "unlimited" if value == resource.RLIM_INFINITY else f"{value:,}"


def _check_dev_shm() -> Finding:
    try:
        space = os.statvfs("/dev/shm")
    except OSError as exc:
        return Finding("memory", "/dev/shm", Verdict.MISSING, f"{exc.strerror}; raynixl does not use it, Ray does")
    free, size = space.f_bavail * space.f_frsize, space.f_blocks * space.f_frsize
    detail = f"{format_size(free)} free of {format_size(size)}; raynixl does not use it, Ray's object store does"
    return Finding("memory", "/dev/shm", Verdict.WORKS, detail)


def check_huge_pages() -> Iterator[Finding]:
    """Huge pages for arenas and for plain memory: fewer page tables to walk, 1.5x for process_vm."""
    for name, file, wanted in (
        ("for arenas", "shmem_enabled", ("advise", "always", "within_size", "force")),
        ("for other memory", "enabled", ("madvise", "always")),
    ):
        mode = _selected(_THP / file)
        if mode in wanted:
            yield Finding("huge pages", name, Verdict.WORKS, f"{file} is {mode!r}")
        else:
            detail = f"{file} is {mode!r}" if mode else "this kernel has none"
            hint = f"as root: echo {wanted[0]} > {_THP / file}" if mode else ""
            yield Finding("huge pages", name, Verdict.SLOW, detail, hint)


def _selected(path: Path) -> str:
    """Return the word in brackets: the kernel's choice."""
    try:
        text = path.read_text("ascii")
    except OSError:
        return ""
    return text[text.find("[") + 1 : text.find("]")] if "[" in text else ""


_LOOK = """
import json, logging, ray
ray.init(address="auto", logging_level=logging.ERROR, log_to_driver=False, configure_logging=False)
alive = [node for node in ray.nodes() if node["Alive"]]
print(json.dumps({"nodes": len(alive), "address": ray.get_runtime_context().gcs_address}))
"""


def check_ray() -> Iterator[Finding]:
    """Whether a cluster runs; looked for by another process, since looking may take long or end the process."""
    try:
        metadata.version("ray")
    except metadata.PackageNotFoundError:
        return
    hint = "start one with `ray start --head`, or let ray.init() make its own"
    try:
        done = subprocess.run(
            [sys.executable, "-c", _LOOK], capture_output=True, text=True, timeout=RAY_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        detail = f"the cluster at the known address does not answer within {RAY_SECONDS:g} s"
        yield Finding("Ray", "cluster", Verdict.FAILS, detail, "see RAY_ADDRESS, and `ray status`")
        return
    if done.returncode != 0:
        yield Finding("Ray", "cluster", Verdict.MISSING, "none runs here", hint)
        return
    seen = json.loads(done.stdout.strip().splitlines()[-1])
    yield Finding("Ray", "cluster", Verdict.WORKS, f"at {seen['address']}, nodes alive: {seen['nodes']}")
