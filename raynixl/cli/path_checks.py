"""What doctor tries for real: the copying core, ptrace permission, and every backend between two processes."""

from __future__ import annotations

import base64
import ctypes
import importlib
import os
from collections.abc import Iterator

from raynixl.agents import Agent
from raynixl.backends import permission, table
from raynixl.bench.ends import make_region
from raynixl.bench.layout import digest, fill
from raynixl.bench.process import Asked, TargetProcess
from raynixl.bench.target import Target, peek
from raynixl.cli.doctor import Finding, Verdict
from raynixl.cli.gpu_checks import has_gpus
from raynixl.config import from_env
from raynixl.errors import RaynixlError

_NBYTES = 1 << 18
_HERE = ("loopback",)
"""Backends whose peers are in the same process."""
_SILENT = {"nvlink": "shm"}
"""Backends that carry no messages, and who does that for them here."""
_MEMORIES = {"arena": "arenas", "user": "plain memory", "vram": "GPU memory"}


def check_core() -> Iterator[Finding]:
    """Which core copies, and why."""
    if not from_env().native:
        hint = "unset RAYNIXL_NATIVE"
        yield Finding("core", "native", Verdict.SLOW, "switched off: the ctypes twin runs", hint)
        return
    try:
        importlib.import_module("raynixl._native")
    except ImportError as exc:
        hint = "with a C++ compiler: pip install --force-reinstall --no-deps raynixl"
        yield Finding("core", "native", Verdict.SLOW, f"not there ({exc}): the ctypes twin runs", hint)
    else:
        yield Finding("core", "native", Verdict.WORKS, "the compiled core runs")


def check_backends() -> Iterator[Finding]:
    """Try process_vm, then every backend that can be named."""
    try:
        with TargetProcess() as process:
            yield from _check_process_vm(process)
    except RaynixlError as exc:
        yield Finding("process_vm", "second process", Verdict.FAILS, exc.message, exc.hint)
    for name in table.names():
        yield from try_backend(name)


def _check_process_vm(process: TargetProcess) -> Iterator[Finding]:
    """Try a child's memory from here, and ours from the child, which for it is no child."""
    scope = permission.scope()
    permission.allow_same_user()  # as an agent does
    word = process.ask("word")
    child = peek(word["pid"], word["address"], 8)
    mine = ctypes.create_string_buffer(b"raynixl")
    other = process.ask("peek", pid=os.getpid(), address=ctypes.addressof(mine), nbytes=8)["errno"]
    hint = "plain memory between unrelated workers needs it: sysctl kernel.yama.ptrace_scope=0; arenas do not"
    for name, number in (("of a child", child), ("of a process that is not a child", other)):
        detail = f"process_vm_readv works (yama ptrace_scope: {scope})"
        if number:
            detail = f"process_vm_readv fails: {os.strerror(number)} (yama ptrace_scope: {scope})"
        yield Finding("process_vm", name, Verdict.FAILS if number else Verdict.WORKS, detail, hint if number else "")


def try_backend(name: str) -> Iterator[Finding]:
    """Write and read memory of every sort over one backend; the bytes are compared."""
    is_gpu = name == "nvlink"
    if is_gpu and not has_gpus():
        yield Finding("backend", name, Verdict.MISSING, "there is no GPU here")
        return
    try:
        target: Asked = Target() if name in _HERE else TargetProcess()
        try:
            for memory in ("vram",) if is_gpu else ("arena", "user"):
                yield _try_memory(name, target, memory)
        finally:
            target.close()
    except (RaynixlError, ImportError) as exc:
        yield Finding("backend", name, Verdict.FAILS, str(exc), getattr(exc, "hint", ""))


def _try_memory(name: str, target: Asked, memory: str) -> Finding:
    what = f"{name}, {_MEMORIES[memory]}"
    where = "in one process" if name in _HERE else "between two processes"
    try:
        path = _move(name, target, memory)
    except RaynixlError as exc:
        return Finding("backend", what, Verdict.FAILS, exc.message, exc.hint)
    if not path:
        return Finding("backend", what, Verdict.FAILS, "bytes arrived changed", "this is a bug: report it")
    return Finding("backend", what, Verdict.WORKS, f"{path}; written, read and compared {where}")


def _move(name: str, target: Asked, memory: str) -> str:
    """Write and read back; return the path that the bytes took, or '' if they came changed."""
    config = {
        "backends": tuple(filter(None, (name, _SILENT.get(name)))),
        "connect_timeout": 5.0,
        "transfer_timeout": 5.0,
    }
    with Agent(f"doctor-{os.getpid()}-{memory}", config=from_env().model_copy(update=config)) as agent:
        made = target.ask("agent", name=f"doctor-target-{os.getpid()}-{memory}", config=config)
        target.ask("region", name=memory, nbytes=_NBYTES, memory=memory)
        remote = agent.peer(base64.b64decode(made["record"])).region(memory)
        ours = "arena" if memory == "vram" else memory  # which is filled and compared without a GPU's help
        source, back = (make_region(agent, _NBYTES, memory=ours) for _ in range(2))
        fill(source.array(), 3)
        agent.write(source, remote).wait()
        agent.read(remote, back).wait()
        digests = {
            digest(source.array()),
            digest(back.array()),
            target.ask("digest", name=memory, moved=None)["digest"],
        }
        return " + ".join(agent.explain(source, remote).paths) if len(digests) == 1 else ""
