"""What doctor finds out about UCX: which one ucxx gets, what it can reach, and whether it knows RDMA."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from raynixl.agents import Agent
from raynixl.backends.ucx import UcxBackend
from raynixl.backends.ucx_sockets import why_no_filter
from raynixl.bench.process import with_environment
from raynixl.cli.doctor import Finding, Verdict
from raynixl.config import from_env
from raynixl.errors import RaynixlError

LOOK_SECONDS = 30.0
_AREA = "ucx"
_INSTALL = "for other hosts and GPUs: pip install 'raynixl[ucx]'"
_EMULATION = (
    "let UCX_TLS and RAYNIXL_UCX allow cma for this host; between hosts only RDMA does without the peer: see "
    "docs/networking.md"
)
_INFINIBAND = Path("/sys/class/infiniband")
# Loads the libraries as ucxx does, but in a process that ends: the wheel's, or the system's where the user prefers it.
_LOOK = """
import ctypes, json, libucx
library = libucx.load_library()[-1]
library.ucp_get_version_string.restype = ctypes.c_char_p
with open("/proc/self/maps", encoding="utf-8") as maps:
    path = next(line.split(maxsplit=5)[5].strip() for line in maps if "libucp.so" in line)
print(json.dumps({"version": library.ucp_get_version_string().decode(), "path": path}))
"""


def check_ucx() -> Iterator[Finding]:
    """ucxx, the UCX it will load, its transports and devices, and RDMA."""
    name = next((name for name in ("ucxx-cu13", "ucxx-cu12", "ucxx") if _version(name)), "")
    if not name or importlib.util.find_spec("ucxx") is None:
        yield Finding(_AREA, "ucxx", Verdict.MISSING, "not installed", _INSTALL)
        return
    yield Finding(_AREA, "ucxx", Verdict.WORKS, f"{name} {_version(name)}")
    seen = _look()
    if "error" in seen:
        yield Finding(_AREA, "libucx", Verdict.FAILS, seen["error"], "pip install --force-reinstall libucx-cu13")
        return
    library = Path(seen["path"])
    origin = "the wheel's" if library.is_relative_to(_wheel()) else "the system's"
    yield Finding(_AREA, "libucx", Verdict.WORKS, f"{seen['version']}, {origin}: {library}")
    yield _check_transports(library)
    yield _check_lane()
    yield _check_guard()
    yield _check_rdma(library)


def _check_lane() -> Finding:
    """Start UCX under the user's settings, and see by which lane it reaches this process."""
    config = from_env().model_copy(update={"backends": (UcxBackend.name,)})
    try:
        with Agent(f"doctor-{os.getpid()}-lane", config=config) as agent:
            backend = agent.backend(UcxBackend.name)
            assert isinstance(backend, UcxBackend)
            lanes = backend.own_lanes()
    except RaynixlError as exc:
        return Finding(_AREA, "lane", Verdict.FAILS, exc.message, exc.hint)
    if lanes.is_emulation:
        return Finding(_AREA, "lane", Verdict.SLOW, lanes.explain(), _EMULATION)
    return Finding(_AREA, "lane", Verdict.WORKS, f"to this host by {lanes.explain()}")


def _check_guard() -> Finding:
    reason = why_no_filter()
    if reason:
        return Finding(
            _AREA, "ports", Verdict.FAILS, f"the kernel refuses packet filters: {reason}",
            "UCX's TCP ports are open to whoever reaches them: see Security in docs/networking.md",
        )  # fmt: skip
    return Finding(_AREA, "ports", Verdict.WORKS, "UCX's TCP ports hear the hosts of peers only")


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def _wheel() -> Path:
    found = importlib.util.find_spec("libucx")
    places = found.submodule_search_locations if found is not None else None
    return Path(places[0]).resolve() if places else Path("/nonexistent")


def _look() -> dict[str, Any]:
    """Return version and path of the library, or what went wrong."""
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-c", _LOOK], capture_output=True, text=True, timeout=LOOK_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        return {"error": f"loading libucx takes more than {LOOK_SECONDS:g} s"}
    if done.returncode != 0:
        return {"error": f"libucx cannot be loaded: {(done.stderr.strip().splitlines() or ['no reason given'])[-1]}"}
    seen: dict[str, Any] = json.loads(done.stdout)
    return seen


def _check_transports(library: Path) -> Finding:
    """Ask the ucx_info that came with the library; it counts what it finds under the user's UCX_* variables."""
    beside = library.parent.parent / "bin" / "ucx_info"
    found = str(beside) if beside.exists() else shutil.which("ucx_info")
    if found is None:
        return Finding(_AREA, "transports", Verdict.MISSING, "there is no ucx_info to ask", "it is in UCX's bin")
    command = [*with_environment({"LD_LIBRARY_PATH": str(library.parent)}), found, "-d"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LOOK_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return Finding(_AREA, "transports", Verdict.FAILS, f"ucx_info takes more than {LOOK_SECONDS:g} s")
    offered = parse_transports(done.stdout)
    if done.returncode != 0 or not offered:
        return Finding(_AREA, "transports", Verdict.FAILS, f"ucx_info finds none: {done.stderr.strip()[-200:]}")
    detail = "; ".join(f"{name} ({', '.join(devices)})" for name, devices in offered.items())
    return Finding(_AREA, "transports", Verdict.WORKS, detail)


def parse_transports(text: str) -> dict[str, list[str]]:
    """Return the devices of each transport that `ucx_info -d` lists."""
    offered: dict[str, list[str]] = {}
    transport = ""
    for name, value in re.findall(r"^#\s+(Transport|Device):\s*(\S+)", text, re.MULTILINE):
        if name == "Transport":
            transport = value
        elif value not in offered.setdefault(transport, []):
            offered[transport].append(value)
    return offered


def _check_rdma(library: Path) -> Finding:
    """Whether the modules for InfiniBand and RoCE are there, and something for them to drive."""
    modules = sorted({path.name.split(".")[0] for path in (library.parent / "ucx").glob("libuct_ib*.so*")})
    devices = sorted(path.name for path in _INFINIBAND.iterdir()) if _INFINIBAND.is_dir() else []
    cards = f"devices: {', '.join(devices)}" if devices else "this host has no RDMA device"
    if modules:
        verdict = Verdict.WORKS if devices else Verdict.MISSING
        return Finding(_AREA, "RDMA", verdict, f"{', '.join(modules)}; {cards}")
    hint = "set RAPIDS_LIBUCX_PREFER_SYSTEM_LIBRARY=true to use the UCX of the system, of conda or of HPC-X"
    verdict = Verdict.SLOW if devices else Verdict.MISSING
    return Finding(_AREA, "RDMA", verdict, f"this UCX has no InfiniBand modules; {cards}", hint if devices else "")
