"""One side of the NIXL baseline: a process that loads NIXL and nothing of ours that loads UCX."""

from __future__ import annotations

import base64
import ctypes
import importlib
import os
import signal
import time
from collections.abc import Callable
from contextlib import nullcontext
from time import perf_counter_ns
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raynixl.bench.busy import busy_thread
from raynixl.bench.layout import Bytes, Layout, digest, fill
from raynixl.bench.pages import huge_memory, user_memory
from raynixl.bench.target import Fields, answer_requests
from raynixl.bench.timing import quiet
from raynixl.errors import BackendUnavailable, PeerLost, TransferTimeout
from raynixl.memory import allocate

RUN_SECONDS = 60.0
"""NIXL has no deadline of its own."""
_SOME = 64  # looks at the state between two looks at the clock


class NixlSide:
    """Does what the measuring side asks: one method for each request, JSON values in and out."""

    def __init__(self) -> None:
        self._agent: Any = None
        self._registered: Any = None
        self._memory: Bytes = np.empty(0, np.uint8)
        self._peer, self._there = "", 0
        self._handles: list[Any] = []
        self._errors: tuple[type[Exception], ...] = ()

    def ask(self, do: str, **fields: Any) -> Fields:
        """Answer one request.

        Raises:
            RaynixlError: NIXL has failed; it names no more than a code, and says the rest on standard error.
        """
        try:
            answer: Fields = getattr(self, f"do_{do}")(**fields)
        except self._errors as exc:
            raise BackendUnavailable(f"NIXL cannot {do}: {exc}", hint="see what it wrote above, and --ucx") from exc
        return answer

    def close(self) -> None:
        """Release what is prepared; the rest ends with the process."""
        while self._handles:
            self._handles.pop().release()

    def do_start(self, name: str, package: str) -> Fields:
        """Make an agent over UCX."""
        try:
            nixl, core = importlib.import_module(package), importlib.import_module(f"{package}._bindings")
        except ImportError as exc:
            hint = "pip install --force-reinstall --no-deps nixl-cu13"
            raise BackendUnavailable(f"NIXL cannot be loaded: {exc}", hint=hint) from exc
        _die_with_parent()
        self._errors = tuple(value for key, value in vars(core).items() if key.endswith("Error"))
        self._agent = nixl.nixl_agent(name, nixl.nixl_agent_config(backends=["UCX"]))
        if "UCX" not in self._agent.backends:
            raise BackendUnavailable("this NIXL has no UCX", hint="pip install nixl-cu13")
        return {}

    def do_memory(self, nbytes: int, memory: str) -> Fields:
        """Register memory in place of what there was."""
        self.close()
        if self._registered is not None:
            self._agent.deregister_memory(self._registered)
        self._memory = _MAKERS[memory](nbytes)
        span = [(self._memory.ctypes.data, nbytes, 0, "")]
        self._registered = self._agent.register_memory(self._agent.get_reg_descs(span, "DRAM"))
        return {}

    def do_metadata(self) -> Fields:
        """Answer with what the other side needs to know."""
        metadata = base64.b64encode(self._agent.get_agent_metadata()).decode()
        return {"metadata": metadata, "address": self._memory.ctypes.data}

    def do_connect(self, metadata: str, address: int) -> Fields:
        """Learn of the other side's present memory."""
        self._peer = self._agent.add_remote_agent(base64.b64decode(metadata))
        self._there = address
        return {}

    def do_prepare(self, layout: list[int], is_write: bool) -> Fields:
        """Prepare both lists and the transfer, once without and once with the clock; answer with the seconds."""
        made = Layout.of(layout)
        ours, theirs = (made.source_ids, made.target_ids) if is_write else (made.target_ids, made.source_ids)
        for _ in range(2):
            self.close()
            start = time.perf_counter()
            here = self._prepare("NIXL_INIT_AGENT", self._memory.ctypes.data, ours, made)
            there = self._prepare(self._peer, self._there, theirs, made)
            everything = np.arange(made.blocks)
            name = "WRITE" if is_write else "READ"
            transfer = self._agent.make_prepped_xfer(name, here, everything, there, everything)
            seconds = time.perf_counter() - start
            self._handles = [here, there, transfer]  # released from the end
        return {"seconds": seconds}

    def _prepare(self, owner: str, address: int, ids: NDArray[np.int64], layout: Layout) -> Any:
        rows = np.zeros((layout.blocks, 3), np.uint64)
        rows[:, 0] = ids * layout.block_nbytes + address
        rows[:, 1] = layout.block_nbytes
        return self._agent.prep_xfer_dlist(owner, self._agent.get_xfer_descs(rows, "DRAM"))

    def do_run(self, count: int, is_busy: bool) -> Fields:
        """Post and wait `count` times, perhaps beside a busy thread; answer with the nanoseconds of each."""
        transfer, times = self._handles[-1], []
        with quiet(), busy_thread() if is_busy else nullcontext():
            for _ in range(count):
                start = perf_counter_ns()
                self._move(transfer)
                times.append(perf_counter_ns() - start)
        return {"times": times}

    def _move(self, transfer: Any) -> None:
        look, state = self._agent.check_xfer_state, self._agent.transfer(transfer)
        deadline = 0.0
        while state == "PROC":
            for _ in range(_SOME):
                state = look(transfer)
                if state != "PROC":
                    break
            else:
                deadline = deadline or time.monotonic() + RUN_SECONDS
                if time.monotonic() > deadline:
                    raise TransferTimeout(f"NIXL did not end a transfer within {RUN_SECONDS:g} s", hint="see --ucx")
        if state != "DONE":
            raise PeerLost("a transfer of NIXL failed; it does not say why", hint="see --ucx", peer="target")

    def do_fill(self, seed: int) -> Fields:
        """Fill the memory; seed 0 clears it."""
        fill(self._memory, seed)
        return {}

    def do_digest(self, moved: list[int] | None) -> Fields:
        """Answer with the digest of the memory, or with the one that moving it by a layout must give."""
        return {"digest": digest(self._memory) if moved is None else Layout.of(moved).digest_moved(self._memory)}


def _die_with_parent() -> None:
    """Have the kernel end this process when the measuring one ends: stopped as it may be, it would not notice."""
    pdeathsig = 1
    ctypes.CDLL(None).prctl(pdeathsig, signal.SIGKILL)


def _arena(nbytes: int) -> Bytes:
    """Return memory like that of agent.empty()."""
    memory = allocate(nbytes)
    os.close(memory.fd)
    return np.frombuffer(memory.owner, np.uint8, nbytes)


_MAKERS: dict[str, Callable[[int], Bytes]] = {"arena": _arena, "user": user_memory, "huge": huge_memory}


if __name__ == "__main__":
    answer_requests(NixlSide())
