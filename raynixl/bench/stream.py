"""The baseline `socket`: one plain TCP connection between the very same memory, which is what the network gives.

A transfer is done when the other side has said that all bytes are there (write), or when they are here (read). Blocks
go as one stream, whatever their order, so scattered ones arrive in the order of the stream and are not checked.
"""

from __future__ import annotations

import contextlib
import secrets
import socket
import threading
import time
from time import perf_counter_ns
from typing import Any

from raynixl.bench.layout import Bytes
from raynixl.bench.scene import REGION, Contender, Scene
from raynixl.bench.spec import TransferSpec
from raynixl.errors import PeerLost, TransferTimeout

PATIENCE = 60.0
"""No transfer takes longer."""
_GO = b"\1"
_TOKEN_NBYTES = 16


class Stream:
    """Connects to the target for each scene."""

    def __init__(self, spec: TransferSpec) -> None:
        self._runner: StreamRunner | None = None

    def contend(self, scene: Scene) -> list[Contender]:
        """Have the target serve its region over a socket; return who uses it."""
        self.close()
        made = scene.target.ask("stream", name=REGION, is_write=scene.is_write, address=scene.address)
        began = time.perf_counter()
        sock = socket.create_connection((scene.address, made["port"]), PATIENCE)
        sock.sendall(bytes.fromhex(made["token"]))
        runner = self._runner = StreamRunner(sock, scene, time.perf_counter() - began)

        def check() -> bool | None:
            return scene.check(lambda: runner.sample(1)) if scene.layout.is_contiguous else None

        return [Contender(runner, check, "tcp")]

    def close(self) -> None:
        """Close the connection, upon which the target ends its side."""
        runner, self._runner = self._runner, None
        if runner is not None:
            runner.sock.close()


class StreamRunner:
    """Moves the whole of our memory over a connection, again and again."""

    impl = "socket"

    def __init__(self, sock: socket.socket, scene: Scene, prepare_seconds: float) -> None:
        self.sock, self.prepare_seconds = sock, prepare_seconds
        self._memory, self._is_write = scene.ours.data, scene.is_write
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def sample(self, count: int) -> list[int]:
        """Run it `count` times; return the nanoseconds of each.

        Raises:
            PeerLost: the target is gone.
            TransferTimeout: it does not answer.
        """
        times = []
        try:
            for _ in range(count):
                start = perf_counter_ns()
                self._move()
                times.append(perf_counter_ns() - start)
        except TimeoutError as exc:
            raise TransferTimeout(f"a stream did not end within {PATIENCE:g} s", hint="is the target stopped?") from exc
        except OSError as exc:
            raise PeerLost(f"the target's stream is gone: {exc}", hint="run the command again", peer="target") from exc
        return times

    def _move(self) -> None:
        if self._is_write:
            self.sock.sendall(self._memory)
            fill_from(self.sock, memoryview(bytearray(1)))
        else:
            self.sock.sendall(_GO)
            fill_from(self.sock, self._memory)


def fill_from(sock: socket.socket, memory: memoryview[Any]) -> None:
    """Receive as many bytes as the memory holds.

    Raises:
        ConnectionError: the other end closed before.
    """
    at = 0
    while at < len(memory):
        count = sock.recv_into(memory[at:], 0, socket.MSG_WAITALL)
        if count == 0:
            raise ConnectionResetError("it closed")
        at += count


class Served:
    """The target's side: takes or gives a region for one connection that knows the token, until that closes."""

    def __init__(self, region: Bytes, address: str, *, is_write: bool) -> None:
        self.token = secrets.token_bytes(_TOKEN_NBYTES)
        self._region, self._is_write = region.data, is_write
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        self._server = socket.create_server((address, 0), family=family)
        self._server.settimeout(PATIENCE)
        self._thread = threading.Thread(target=self._serve, name="bench-stream", daemon=True)
        self._thread.start()

    @property
    def port(self) -> int:
        """Where it listens."""
        port: int = self._server.getsockname()[1]
        return port

    def _serve(self) -> None:
        with contextlib.suppress(OSError), self._server:  # the measuring side is gone; its error is reported there
            sock, _ = self._server.accept()
            with sock:
                self._talk(sock)

    def _talk(self, sock: socket.socket) -> None:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        token, go = bytearray(_TOKEN_NBYTES), memoryview(bytearray(1))
        fill_from(sock, memoryview(token))
        if not secrets.compare_digest(token, self.token):
            return
        while True:
            if self._is_write:
                fill_from(sock, self._region)
                sock.sendall(_GO)
            else:
                fill_from(sock, go)
                sock.sendall(self._region)
