"""The target of a benchmark: the far side of every transfer, in a process of its own or in this one."""

from __future__ import annotations

import base64
import contextlib
import ctypes
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, Protocol

from pydantic import SecretBytes

from raynixl.agents import Agent
from raynixl.bench.ends import bytes_of, fill_end, make_region
from raynixl.bench.layout import Layout, digest
from raynixl.bench.ports import free_port, is_listening
from raynixl.bench.stream import Served
from raynixl.config import from_env
from raynixl.errors import RaynixlError, TransferTimeout
from raynixl.region import Region

Fields = dict[str, Any]
ECHO_SECONDS = 0.2  # how often the echo looks whether it shall stop


class Target:
    """Does what the measuring side asks: one method for each request, JSON values in and out."""

    def __init__(self) -> None:
        self._agents: list[Agent] = []
        self._regions: dict[str, Region] = {}
        self._echo: threading.Thread | None = None
        self._is_closing = False
        self._word = ctypes.create_string_buffer(b"raynixl")

    def ask(self, do: str, **fields: Any) -> Fields:
        """Answer one request."""
        method: Callable[..., Fields] = getattr(self, f"do_{do}")
        return method(**fields)

    def close(self) -> None:
        """Close the agents; idempotent."""
        self._is_closing = True
        if self._echo is not None:
            self._echo.join(5.0)
        for agent in self._agents:
            agent.close()
        self._agents.clear()

    def do_agent(self, name: str, config: Fields) -> Fields:
        """Make an agent; answer with its record. A secret comes through the pipe, where nobody else sees it."""
        secret = {"secret": SecretBytes(bytes.fromhex(config["secret"]))} if "secret" in config else {}
        settings = {**config, "backends": tuple(config["backends"]), **secret}
        agent = Agent(name, config=from_env().model_copy(update=settings))
        self._agents.append(agent)
        return {"record": base64.b64encode(agent.record()).decode(), "core": agent.native_name}

    def do_region(self, name: str, nbytes: int, memory: str, gpu: int = 0) -> Fields:
        """Make a region with the latest agent; answer with its address and descriptor number."""
        region = make_region(self._agents[-1], nbytes, memory=memory, gpu=gpu, name=name)
        self._regions[name] = region
        return {"address": region.memory.address, "fd": region.memory.fd}

    def do_export(self, name: str) -> Fields:
        """Answer with what opens a region of a GPU in another process."""
        from raynixl.backends.nvlink_export import export

        return {"key": export(self._regions[name].memory)}

    def do_drop(self, name: str) -> Fields:
        """Deregister a region."""
        region = self._regions.pop(name)
        next(one for one in self._agents if one.name == region.owner).deregister(region)
        return {}

    def do_fill(self, name: str, seed: int) -> Fields:
        """Fill a region."""
        fill_end(self._regions[name], seed)
        return {}

    def do_digest(self, name: str, moved: list[int] | None) -> Fields:
        """Answer with the digest of a region, or with the one that moving it by a layout must give."""
        view = bytes_of(self._regions[name])
        if moved is None:
            return {"digest": digest(view)}
        return {"digest": Layout.of(moved).digest_moved(view)}

    def do_echo(self, peer: str) -> Fields:
        """Send back every notification from now on."""
        self._echo = threading.Thread(target=self._serve_echo, args=(self._agents[-1], peer), daemon=True)
        self._echo.start()
        return {}

    def do_socket_echo(self, address: str) -> Fields:
        """Send back every packet of a socket from now on: the floor under a notification."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        sock.connect(address)
        threading.Thread(target=_echo_packets, args=(sock,), daemon=True).start()
        return {}

    def do_stream(self, name: str, is_write: bool, address: str) -> Fields:
        """Take or give a region over a plain TCP connection; answer with how to get it."""
        served = Served(self._regions[name].array(), address, is_write=is_write)
        return {"port": served.port, "token": served.token.hex()}

    def do_free_port(self) -> Fields:
        """Answer with a port that nobody has on this side."""
        return {"port": free_port()}

    def do_listens(self, port: int) -> Fields:
        """Answer whether somebody listens on a port on this side."""
        return {"listens": is_listening(port)}

    def do_usage(self) -> Fields:
        """Answer with the processor time used so far."""
        return {"cpu_seconds": time.process_time(), "at": time.monotonic()}

    def do_word(self) -> Fields:
        """Answer with where a word lies that others may try to read."""
        return {"pid": os.getpid(), "address": ctypes.addressof(self._word)}

    def do_peek(self, pid: int, address: int, nbytes: int) -> Fields:
        """Try process_vm_readv on another process; answer with errno, 0 if it worked."""
        return {"errno": peek(pid, address, nbytes)}

    def _serve_echo(self, agent: Agent, peer: str) -> None:
        while not self._is_closing:
            try:
                note = agent.wait_notification(ECHO_SECONDS)
                agent.notify(peer, note.payload)
            except TransferTimeout:
                continue
            except RaynixlError:
                return  # the measuring side is gone; its error is reported there


def _echo_packets(sock: socket.socket) -> None:
    """Runs until the other end closes, which it does when it ends."""
    with sock:
        while data := sock.recv(1 << 16):
            sock.send(data)


class _Iovec(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("nbytes", ctypes.c_size_t))


def peek(pid: int, address: int, nbytes: int) -> int:
    """Read another process's memory; return 0 or the errno that says why not."""
    into = ctypes.create_string_buffer(nbytes)
    libc = ctypes.CDLL(None, use_errno=True)
    libc.process_vm_readv.restype = ctypes.c_ssize_t
    ours, theirs = _Iovec(ctypes.addressof(into), nbytes), _Iovec(address, nbytes)
    one = ctypes.c_ulong(1)
    done = libc.process_vm_readv(
        ctypes.c_int(pid), ctypes.byref(ours), one, ctypes.byref(theirs), one, ctypes.c_ulong(0)
    )
    return 0 if done == nbytes else ctypes.get_errno()


class Answering(Protocol):
    """Something that answers requests in a process of its own."""

    def ask(self, do: str, **fields: Any) -> Fields:
        """Answer one request."""

    def close(self) -> None:
        """Let go of everything; idempotent."""


def answer_requests(target: Answering) -> None:
    """Answer requests, one JSON object a line on standard input, until it ends: nothing outlives the asker."""
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever else prints does not disturb the replies
    try:
        for line in sys.stdin:
            try:
                reply = target.ask(**json.loads(line))
            except RaynixlError as exc:
                reply = {"error": type(exc).__name__, "message": exc.message, "hint": exc.hint}
            with contextlib.suppress(BrokenPipeError):
                replies.write(json.dumps(reply) + "\n")
    finally:
        target.close()


if __name__ == "__main__":
    answer_requests(Target())
