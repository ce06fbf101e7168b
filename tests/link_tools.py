"""Ends of TCP links without agents: what a backend sees of its agent, and strangers who speak the greeting by hand."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from agent_tools import PATIENCE, eventually, make_config
from stranger import Stranger

from raynixl import RaynixlError, native
from raynixl.backends.base import Link, Local
from raynixl.backends.greeting import Newcomer, greet
from raynixl.backends.link import Links
from raynixl.backends.listener import Endpoint, Listener, dial
from raynixl.backends.stream_link import StreamLink
from raynixl.backends.wire import StreamWire
from raynixl.host import host_identity
from raynixl.reactor import Reactor
from raynixl.record import AgentRecord

LOOPBACK = ("127.0.0.1", "::1")
SECRET = b"of this job"


class End:
    """One process's side of TCP links: listens, connects, and notes what it hears."""

    def __init__(self, name: str, *, hosts: Sequence[str] = LOOPBACK, **settings: Any) -> None:
        config = make_config(**settings)
        core = native.load(config.native)
        self.engine = core.Engine(1)
        self.reactor = Reactor(name)
        self.incarnation = secrets.token_hex(16)
        self.local = Local(
            name, self.incarnation, host_identity(), config, core, self.engine, self.reactor, events=self
        )  # fmt: skip
        self.dropped: Counter[str] = Counter()
        self.heard: list[bytes] = []
        self.controls: list[bytes] = []
        self.opened: list[StreamLink] = []
        self.lost: list[RaynixlError] = []
        self.history: list[str] = []  # "opened" and "lost", in the order in which they came
        self.flushes = 0
        self.on_message: Callable[[Link, bytes], None] = lambda _link, message: self.heard.append(message)
        self.on_control: Callable[[StreamLink, bytes], None] = lambda _link, body: self.controls.append(body)
        self.links = Links(self.local)
        self.listener = Listener(self.local, hosts=hosts, port=0, admit=self._admit, probe=7)

    def __enter__(self) -> End:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def endpoint(self) -> Endpoint:
        """Where it listens, first of all."""
        return self.listener.endpoints[0]

    @property
    def record(self) -> AgentRecord:
        """What peers know of it."""
        return AgentRecord(
            name=self.local.name, incarnation=self.incarnation, host=self.local.host, pid=os.getpid(), started=0.0
        )  # fmt: skip

    def connect(self, record: AgentRecord, endpoints: Sequence[Endpoint], timeout: float = PATIENCE) -> StreamLink:
        """Dial, greet and open a link."""
        deadline = time.monotonic() + timeout
        sock = dial(endpoints, peer=record.name, deadline=deadline)
        try:
            assert greet(self.local, StreamWire(sock), record, probe=9, deadline=deadline) == 7
        except BaseException:
            sock.close()
            raise
        return self._open(sock, record.name, record.incarnation)

    def meet(self, other: End) -> tuple[StreamLink, StreamLink]:
        """Connect to another end; return both ends of the link."""
        count = len(other.opened)
        mine = self.connect(other.record, other.listener.endpoints)
        eventually(lambda: len(other.opened) > count, "the other end to be opened")
        return mine, other.opened[-1]

    def wait(self, is_so: Callable[[], Any], what: str) -> None:
        """Wait, serving the reactor, until something is so."""
        assert self.reactor.run_until(lambda: bool(is_so()), time.monotonic() + PATIENCE), f"not in time: {what}"

    def close(self) -> None:
        """Close everything; idempotent."""
        self.listener.close()
        self.links.close()
        self.reactor.close()
        self.engine.close(PATIENCE)

    def _open(self, sock: socket.socket, peer: str, incarnation: str) -> StreamLink:
        link = StreamLink(self.local, sock, peer=peer, incarnation=incarnation, on_control=self._hear_control)
        self.links.add(link)
        link.open()
        return link

    def _hear_control(self, link: StreamLink, body: bytes) -> None:
        self.on_control(link, body)

    def _admit(self, newcomer: Newcomer) -> None:
        assert newcomer.client is not None
        client = newcomer.client

        def take_in() -> None:
            if self.listener.is_closed:
                newcomer.sock.close()
            else:
                self.history.append("opened")
                self.opened.append(self._open(newcomer.sock, client.name, client.incarnation))

        self.links.admit(client.incarnation, take_in)

    # What the backend tells its agent

    def link_opened(self, link: Link) -> None:
        """Not called: this is the backend, too."""

    def message_received(self, link: Link, message: bytes, fds: Sequence[int]) -> None:
        """Take a message."""
        assert not fds
        self.on_message(link, message)

    def link_lost(self, link: Link, error: RaynixlError) -> None:
        """Note it."""
        self.history.append("lost")
        self.lost.append(error)
        self.reactor.wake()

    def link_flushed(self, link: Link) -> None:
        """Count it."""
        self.flushes += 1
        self.reactor.wake()

    def message_dropped(self, reason: str) -> None:
        """Count it."""
        self.dropped[reason] += 1


class TcpStranger(Stranger):
    """A stranger at an end's TCP port."""

    agent: Any

    def _connect(self) -> socket.socket:
        return socket.create_connection(self.agent.endpoint, PATIENCE)

    def say(self, words: dict[str, Any]) -> None:
        """Send one greeting."""
        self.sock.sendall(framed(json.dumps(words).encode()))

    def hear(self) -> dict[str, Any]:
        """Receive one greeting; empty if they hung up."""
        data = self._read(4)
        return json.loads(self._read(struct.unpack("<I", data)[0])) if data else {}

    def reset(self) -> None:
        """Leave without a good-bye of TCP's."""
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.sock.close()

    def _read(self, nbytes: int) -> bytes:
        data = b""
        with contextlib.suppress(ConnectionResetError):
            while len(data) < nbytes and (more := self.sock.recv(nbytes - len(data))):
                data += more
        return data


def framed(greeting: bytes) -> bytes:
    """A greeting as it travels on a stream."""
    return struct.pack("<I", len(greeting)) + greeting


def frame(body: bytes, channel: int = 0) -> bytes:
    """A frame of a link."""
    return struct.pack("<IB", len(body), channel) + body


@contextlib.contextmanager
def busy_reactor(end: End) -> Iterator[None]:
    """Keep an end from hearing anything meanwhile."""
    is_busy, goes_on = threading.Event(), threading.Event()
    end.reactor.call_soon(lambda: (is_busy.set(), goes_on.wait(PATIENCE), None)[-1])
    assert is_busy.wait(PATIENCE)
    try:
        yield
    finally:
        goes_on.set()
