"""Control: the messages that agents exchange about themselves, their regions, and on behalf of layers above."""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Generator, Sequence
from typing import TYPE_CHECKING, Annotated

from pydantic import BaseModel, ConfigDict, Field

from raynixl import errors
from raynixl.agents.connection import Connection
from raynixl.agents.inbox import Inbox, Notification
from raynixl.backends.base import Link
from raynixl.errors import IntegrityError, PeerLost, RaynixlError, RegionStale, RegionUnknown, TransferTimeout
from raynixl.messages import Message, MessageKind
from raynixl.native import STALE
from raynixl.record import AgentRecord, RegionRecord, Unsigned, parse
from raynixl.region import MAX_REGION_NBYTES, RemoteRegion, check_descriptor

if TYPE_CHECKING:
    from raynixl.agents.agent import Agent

logger = logging.getLogger(__name__)

Handler = Callable[[str, bytes], bytes]
"""Answers a request: (peer's name, payload) -> payload. A RaynixlError that it raises reaches the asker."""

_SMALL = 4096
MAX_HANDLER_THREADS = 64
MAX_INBOXES = 65_536
_REGION, _BIND, _GONE, _RECORD = "raynixl.region", "raynixl.bind", "raynixl.gone", "raynixl.record"


class _RegionKey(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)
    id: Unsigned
    generation: Unsigned


class _Refusal(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True)
    kind: Annotated[str, Field(max_length=64)]
    message: Annotated[str, Field(max_length=4096)]
    hint: Annotated[str, Field(max_length=1024)] = ""


class Reply:
    """The answer to one request, when it has come: `wait(timeout=)` or `await`."""

    __slots__ = (
        "_control",
        "_deadline",
        "_error",
        "_futures",
        "_payload",
        "_seconds",
        "connection",
        "fds",
        "topic",
    )

    def __init__(self, control: Control, connection: Connection, topic: str, timeout: float) -> None:
        self.connection = connection
        self.topic = topic
        self.fds: Sequence[int] = ()
        self._control = control
        self._seconds = timeout
        self._deadline = time.monotonic() + timeout
        self._payload: bytes | None = None
        self._error: RaynixlError | None = None
        self._futures: list[tuple[asyncio.AbstractEventLoop, asyncio.Future[None]]] = []

    @property
    def done(self) -> bool:
        """Whether an answer or an error is here."""
        return self._payload is not None or self._error is not None or time.monotonic() > self._deadline

    def wait(self, timeout: float | None = None) -> bytes:
        """Return the answer.

        Raises:
            TransferTimeout: none came in time.
            PeerLost: the peer went away first.
            RaynixlError: what the peer's handler raised.
        """
        until = self._deadline if timeout is None else min(self._deadline, time.monotonic() + timeout)
        self._control.reactor.run_until(lambda: self._payload is not None or self._error is not None, until)
        return self._result()

    def __await__(self) -> Generator[object, None, bytes]:
        """Return the answer, from an event loop."""
        if self._payload is None and self._error is None:
            yield from self._arrival().__await__()
        return self._result()

    async def _arrival(self) -> None:
        loop = asyncio.get_running_loop()
        future: asyncio.Future[None] = loop.create_future()
        self._futures.append((loop, future))
        if self._payload is None and self._error is None:
            try:
                await asyncio.wait_for(future, max(0.0, self._deadline - time.monotonic()))
            except TimeoutError:
                return

    def _result(self) -> bytes:
        if self._error is not None:
            raise self._error
        if self._payload is None:
            self._control.forget(self)
            name = self.connection.name
            raise TransferTimeout(
                f"peer {name!r} did not answer {self.topic!r} within {self._seconds:g} s",
                hint="it is frozen or overloaded", peer=name,
            )  # fmt: skip
        return self._payload

    def resolve(self, payload: bytes | None, error: RaynixlError | None = None, fds: Sequence[int] = ()) -> None:
        """Take the answer; on the reactor's thread."""
        self.fds = fds
        self._payload, self._error = payload, error
        for loop, future in self._futures:
            if not loop.is_closed():
                loop.call_soon_threadsafe(_resolve, future)


class Control:
    """Sends, receives and answers messages; the agent's side of every link."""

    def __init__(self, agent: Agent) -> None:
        self._agent = agent
        self.reactor = agent.reactor
        self.notifications = Inbox("", agent.reactor)
        self.dropped: Counter[str] = Counter()
        self.sent = 0
        self.received = 0
        self._inboxes: dict[str, Inbox] = {}
        self._counts: Counter[str] = Counter()
        self._handlers: dict[str, tuple[Handler, bool]] = {}
        self._replies: dict[int, Reply] = {}
        self._numbers = itertools.count(1)
        self._busy = 0  # handler threads that run
        self._lock = threading.Lock()  # protects _inboxes, _handlers, _busy
        self._beat_timer = self.reactor.call_later(agent.config.heartbeat_interval, self._beat)
        self.serve(_REGION, self._answer_region, threaded=False)
        self.serve(_GONE, self._answer_gone, threaded=True)
        self.serve(_RECORD, lambda _peer, _payload: agent.record(), threaded=False)

    # What the layers above use

    def inbox(self, topic: str) -> Inbox:
        """Return the queue of messages under a topic."""
        with self._lock:
            inbox = self._inboxes.get(topic)
            if inbox is None:
                inbox = self._inboxes[topic] = Inbox(topic, self.reactor)
            return inbox

    def close_inbox(self, topic: str) -> None:
        """Forget a topic and what lies there."""
        with self._lock:
            self._inboxes.pop(topic, None)

    def count(self, what: str) -> int:
        """Return how often this was called for `what` before: a number for each use of a name."""
        with self._lock:
            self._counts[what] += 1
            return self._counts[what] - 1

    def serve(self, topic: str, handler: Handler, *, threaded: bool) -> None:
        """Answer requests under a topic; a threaded handler may block."""
        with self._lock:
            self._handlers[topic] = (handler, threaded)

    def serves(self, topic: str) -> bool:
        """Whether requests under a topic are answered."""
        with self._lock:
            return topic in self._handlers

    def unserve(self, topic: str) -> None:
        """Answer a topic no more."""
        with self._lock:
            self._handlers.pop(topic, None)

    def ask(self, connection: Connection, topic: str, payload: bytes, timeout: float) -> Reply:
        """Send a request; the reply comes later."""
        number = next(self._numbers)
        reply = self._replies[number] = Reply(self, connection, topic, timeout)
        try:
            connection.link.send(Message(MessageKind.REQUEST, number, topic, payload).to_bytes())
        except RaynixlError as exc:
            self._replies.pop(number, None)
            reply.resolve(None, exc)
        return reply

    def forget(self, reply: Reply) -> None:
        """Expect an answer no more."""
        for number in [number for number, other in list(self._replies.items()) if other is reply]:
            self._replies.pop(number, None)

    # What the agent itself asks its peers

    def ask_for_region(self, connection: Connection, name: str, deadline: float) -> RemoteRegion:
        """Look a region up by name at its owner."""
        payload = self.ask(connection, _REGION, name.encode(), _left(deadline)).wait()
        what = f"region {name!r} of {connection.name!r}"
        record = parse(RegionRecord, payload, what=what, limit=MAX_REGION_NBYTES)
        return RemoteRegion(connection.name, connection.incarnation, record)

    def ask_to_bind(self, connection: Connection, remote: RemoteRegion, deadline: float) -> Sequence[int]:
        """Announce that we shall use a region; return the descriptors that come with the consent.

        The consent carries the region as its owner knows it. A descriptor that says anything else is refused.
        """
        payload = _RegionKey(id=remote.id, generation=remote.generation).model_dump_json().encode()
        reply = self.ask(connection, _BIND, payload, _left(deadline))
        answer = reply.wait()
        try:
            what = f"the consent of {remote.owner!r} to {remote.label}"
            check_descriptor(remote, parse(RegionRecord, answer, what=what, limit=MAX_REGION_NBYTES))
        except RaynixlError:
            _close_all(reply.fds)
            raise
        return reply.fds

    def ask_for_record(self, connection: Connection, deadline: float) -> AgentRecord:
        """Return the record of a peer that connected to us."""
        return AgentRecord.from_bytes(self.ask(connection, _RECORD, b"", _left(deadline)).wait())

    def announce_gone(self, region_id: int, importers: Sequence[Connection], timeout: float) -> None:
        """Tell peers that a region goes and wait until they have let go; cut off those who do not answer."""
        payload = str(region_id).encode()
        deadline = time.monotonic() + timeout
        replies = [self.ask(connection, _GONE, payload, timeout) for connection in importers]
        for reply in replies:
            try:
                reply.wait(_left(deadline))
            except PeerLost:
                continue
            except RaynixlError:
                name = reply.connection.name
                reply.connection.lose(
                    PeerLost(f"peer {name!r} did not let go of a deregistered region in {timeout:g} s", peer=name)
                )

    # What comes in, on the reactor's thread

    def link_opened(self, link: Link) -> None:
        """Take a link that a peer opened."""
        self._agent.connector.accept(link)

    def link_lost(self, link: Link, error: RaynixlError) -> None:
        """Give the peer up when its link is down, and whoever waits for it."""
        connection = self._agent.connector.by_link(link)
        if connection is not None and link in connection.links:
            connection.lose(error)
        for number, reply in list(self._replies.items()):
            if link in reply.connection.links:
                self._replies.pop(number, None)
                reply.resolve(None, reply.connection.lost or error)
        self._agent.forget_importer(link)
        with self._lock:
            inboxes = list(self._inboxes.values())
        for inbox in inboxes:
            inbox.wake()
        self._agent.connection_lost(link.peer)
        self.reactor.wake()

    def message_dropped(self, reason: str) -> None:
        """Count what was malformed or unwanted."""
        self.dropped[reason] += 1

    def message_received(self, link: Link, message: bytes, fds: Sequence[int]) -> None:
        """Take one message apart and do what it says."""
        try:
            parsed = Message.from_bytes(message)
        except IntegrityError as exc:
            logger.debug("dropped a message from %s: %s", link.peer, exc)
            self.dropped["message"] += 1
            _close_all(fds)
            return
        connection = self._agent.connector.by_link(link)
        if connection is not None:
            connection.heard = time.monotonic()
        if parsed.kind in (MessageKind.REPLY, MessageKind.REFUSAL):
            self._take_reply(parsed, link, fds)
            return
        _close_all(fds)
        self._take(parsed, link)

    def _take(self, message: Message, link: Link) -> None:
        match message.kind:
            case MessageKind.NOTIFY:
                self.received += 1
                self.notifications.put(Notification(link.peer, message.payload))
            case MessageKind.SEND:
                if message.topic in self._inboxes or len(self._inboxes) < MAX_INBOXES:
                    self.inbox(message.topic).put(Notification(link.peer, message.payload))
                else:
                    self.dropped["topic"] += 1
            case MessageKind.REQUEST:
                self._take_request(message, link)
            case MessageKind.PING:
                _try_send(link, Message(MessageKind.PONG))
            case MessageKind.BYE:
                say_bye = getattr(link, "say_bye", None)
                if say_bye is not None:
                    say_bye()

    def _take_reply(self, message: Message, link: Link, fds: Sequence[int]) -> None:
        reply = self._replies.get(message.id)
        if reply is None or link not in reply.connection.links:
            self.dropped["late reply"] += 1
            _close_all(fds)
            return
        del self._replies[message.id]
        if message.kind is MessageKind.REPLY:
            reply.resolve(message.payload, fds=fds)
        else:
            _close_all(fds)
            reply.resolve(None, _parse_refusal(message.payload, link.peer))

    def _take_request(self, message: Message, link: Link) -> None:
        if message.topic == _BIND:
            self._answer_bind(message, link)
            return
        with self._lock:
            handler, threaded = self._handlers.get(message.topic, (None, False))
            crowded = threaded and self._busy >= MAX_HANDLER_THREADS
            self._busy += threaded and not crowded
        if handler is None:
            _refuse(link, message, RegionUnknown(f"{self._agent.name!r} serves no {message.topic!r}"))
        elif crowded:
            _refuse(link, message, TransferTimeout(f"{self._agent.name!r} is overloaded", hint="retry later"))
        elif threaded:
            name = f"raynixl-{message.topic}"[:15]
            threading.Thread(target=self._run, args=(handler, message, link, True), name=name, daemon=True).start()
        else:
            self._run(handler, message, link, False)

    def _run(self, handler: Handler, message: Message, link: Link, threaded: bool) -> None:
        try:
            answer = handler(link.peer, message.payload)
            _try_send(link, Message(MessageKind.REPLY, message.id, "", answer))
        except RaynixlError as exc:
            _refuse(link, message, exc)
        except Exception as exc:  # thread edge: the asker gets it, and we say where it happened
            logger.exception("the handler of %r failed", message.topic)
            _refuse(link, message, RaynixlError(f"{message.topic!r} failed at {self._agent.name!r}: {exc!r}"))
        finally:
            if threaded:
                with self._lock:
                    self._busy -= 1

    def _answer_region(self, _peer: str, payload: bytes) -> bytes:
        region = self._agent.region(payload.decode(errors="replace"))
        return region.record().model_dump_json().encode()

    def _answer_bind(self, message: Message, link: Link) -> None:
        try:
            key = parse(_RegionKey, message.payload, what="bind request", limit=_SMALL)
            region = self._agent.region_by_id(key.id)
            if region.generation != key.generation:
                raise RegionStale(f"{region.label} was registered anew", hint="look it up again")
            self._agent.add_importer(region.id, link)
            fds = (region.memory.fd,) if region.memory.fd >= 0 else ()
            record = region.record().model_dump_json(exclude_defaults=True).encode()
            link.send(Message(MessageKind.REPLY, message.id, "", record).to_bytes(), fds)
        except (PeerLost, OSError) as exc:
            logger.debug("could not answer %s: %s", link.peer, exc)
        except RaynixlError as exc:
            _refuse(link, message, exc)

    def _answer_gone(self, peer: str, payload: bytes) -> bytes:
        """A peer withdraws a region: let transfers in flight end, unmap, and say so."""
        connection = self._agent.connector.current(peer)
        if connection is None or not payload.isdigit() or len(payload) > 20:
            return b""
        deadline = time.monotonic() + self._agent.config.deregister_timeout
        for binding in connection.withdraw(int(payload)):
            if not binding.gate.drain(_left(deadline)):
                binding.gate.close(STALE)
                binding.gate.drain(self._agent.config.transfer_timeout)
            binding.release()
        return b""

    # Liveness

    def _beat(self) -> None:
        """Ask silent peers whether they are there; give up those that are frozen."""
        config = self._agent.config
        now = time.monotonic()
        for connection in self._agent.connector.all():
            silence = now - connection.heard
            if connection.lost is not None or silence < config.heartbeat_interval:
                continue
            try:
                link = connection.link
            except RaynixlError:
                continue
            if silence > config.heartbeat_timeout and link.is_frozen():
                error = PeerLost(
                    f"peer {connection.name!r} is frozen: stopped, and silent for {silence:.1f} s",
                    hint="resume it with SIGCONT; the next use connects again", peer=connection.name,
                )  # fmt: skip
                link.close(error)
                continue
            _try_send(link, Message(MessageKind.PING))
        self._expire_replies(now)
        if not self.reactor.is_closed:
            self._beat_timer = self.reactor.call_later(config.heartbeat_interval, self._beat)

    def _expire_replies(self, now: float) -> None:
        for number, reply in list(self._replies.items()):
            if now > reply._deadline:
                self._replies.pop(number, None)

    def say_bye(self) -> None:
        """Tell every peer that this agent ends of its own will."""
        self._beat_timer.cancel()
        for connection in self._agent.connector.all():
            if connection.lost is None:
                for link in list(connection.links):
                    _try_send(link, Message(MessageKind.BYE))


def _left(deadline: float) -> float:
    return max(0.001, deadline - time.monotonic())


def _resolve(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


def _try_send(link: Link, message: Message) -> None:
    """Send if the link still stands; whoever waits for the peer hears of its loss by link_lost."""
    try:
        link.send(message.to_bytes())
    except PeerLost as exc:
        logger.debug("did not send to %s: %s", link.peer, exc)


def _refuse(link: Link, message: Message, error: RaynixlError) -> None:
    refusal = _Refusal(kind=type(error).__name__, message=error.message[:4000], hint=error.hint[:1000])
    _try_send(link, Message(MessageKind.REFUSAL, message.id, "", refusal.model_dump_json().encode()))


def _parse_refusal(payload: bytes, peer: str) -> RaynixlError:
    try:
        refusal = parse(_Refusal, payload, what="refusal", limit=16_384)
    except IntegrityError as exc:
        return exc
    kind = getattr(errors, refusal.kind, RaynixlError)
    if not (isinstance(kind, type) and issubclass(kind, RaynixlError)):
        kind = RaynixlError
    return kind(refusal.message, hint=refusal.hint, peer=peer)


def _close_all(fds: Sequence[int]) -> None:
    for fd in fds:
        os.close(fd)
