"""Control: the messages that agents exchange about themselves, their regions, and on behalf of layers above."""

from __future__ import annotations

import itertools
import logging
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated

from pydantic import BaseModel, ConfigDict, Field

from raynixl import errors
from raynixl.agents.connection import Connection
from raynixl.agents.inbox import Inbox, Notification
from raynixl.agents.reply import Reply
from raynixl.agents.topics import Topics
from raynixl.backends.base import Link
from raynixl.errors import (
    AgentClosed,
    ConfigError,
    IntegrityError,
    PeerLost,
    RaynixlError,
    RegionUnknown,
    TransferTimeout,
)
from raynixl.messages import Message, MessageKind, check_payload, check_topic
from raynixl.record import parse

if TYPE_CHECKING:
    from raynixl.agents.agent import Agent

logger = logging.getLogger(__name__)

Handler = Callable[[str, bytes], bytes]
"""Answers a request: (peer's name, payload) -> payload. A RaynixlError that it raises reaches the asker."""

Answer = Callable[[Message, Link], None]
"""Answers a request of the agent's own, at once or later, by `reply`; it runs on the reactor's thread.

A RaynixlError that it raises is the answer.
"""

MAX_HANDLER_THREADS = 64


class _Refusal(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True)
    kind: Annotated[str, Field(max_length=64)]
    message: Annotated[str, Field(max_length=4096)]
    hint: Annotated[str, Field(max_length=1024)] = ""


class Control:
    """Sends, receives and answers messages; the agent's side of every link."""

    def __init__(self, agent: Agent) -> None:
        self._agent = agent
        self.reactor = agent.reactor
        self.notifications = Inbox("", agent.reactor)
        self.dropped: Counter[str] = Counter()
        self.received = 0
        self.sent = 0
        self.topics = Topics(agent.reactor, self.dropped)
        self._counts: Counter[str] = Counter()
        self._handlers: dict[str, tuple[Handler, bool]] = {}
        self._answers: dict[str, Answer] = {}
        self._replies: dict[int, Reply] = {}
        self._numbers = itertools.count(1)
        self._busy = 0  # handler threads that run
        self._lock = threading.Lock()  # protects _counts, _handlers, _busy

    # What the layers above use

    def count(self, what: str) -> int:
        """Return how often this was called for `what` before: a number for each use of a name."""
        with self._lock:
            self._counts[what] += 1
            return self._counts[what] - 1

    def serve(self, topic: str, handler: Handler, *, threaded: bool) -> None:
        """Answer requests under a topic; a threaded handler may block."""
        if not callable(handler):
            raise ConfigError(
                f"{type(handler).__name__} is not a handler", hint="give a function (peer, payload) -> bytes"
            )
        with self._lock:
            self._handlers[check_topic(topic)] = (handler, threaded)

    def serves(self, topic: str) -> bool:
        """Whether requests under a topic are answered."""
        with self._lock:
            return topic in self._handlers

    def unserve(self, topic: str) -> None:
        """Answer a topic no more."""
        with self._lock:
            self._handlers.pop(topic, None)

    def ask(
        self, connection: Connection, topic: str, payload: bytes, timeout: float, *, takes_fds: bool = False
    ) -> Reply:
        """Send a request; the reply comes later."""
        number = next(self._numbers)
        reply = Reply(
            self.reactor, connection, topic, timeout=timeout, forget=lambda: self._expected(number) is not None,
            takes_fds=takes_fds,
        )  # fmt: skip
        self._replies[number] = reply
        try:
            connection.link.send(Message(MessageKind.REQUEST, number, topic, payload).to_bytes())
        except RaynixlError as exc:
            self._end(number, exc)
        return reply

    def notify(self, link: Link, message: bytes) -> None:
        """Send a notification in its wire form, and count it."""
        link.send(message)
        self.sent += 1  # one bytecode sequence that no thread switch cuts

    # What the agent's own parts use

    def answer(self, topic: str, answer: Answer) -> None:
        """Answer a topic of the agent's own, which users cannot take over."""
        self._answers[topic] = answer

    def unanswer(self, topic: str) -> None:
        """Answer a topic of the agent's own no more."""
        self._answers.pop(topic, None)

    def reply(self, link: Link, request: Message, payload: bytes, fds: Sequence[int] = ()) -> None:
        """Answer a request; an asker that is gone needs no answer."""
        try:
            link.send(Message(MessageKind.REPLY, request.id, "", payload).to_bytes(), fds)
        except (PeerLost, OSError) as exc:
            logger.debug("could not answer %s: %s", link.peer, exc)

    def try_send(self, link: Link, message: Message) -> None:
        """Send if the link still stands; whoever waits for the peer hears of its loss by link_lost."""
        try:
            link.send(message.to_bytes())
        except PeerLost as exc:
            logger.debug("did not send to %s: %s", link.peer, exc)

    def expire_replies(self, now: float) -> None:
        """End requests that nobody has answered in time, so that an answer that comes later is dropped."""
        for number, reply in list(self._replies.items()):
            if reply.is_overdue(now):
                self._end(number, reply.overdue())

    def say_bye(self) -> None:
        """Tell every peer that this agent ends of its own will, but those in whose memory a GPU of ours still works."""
        deadline = time.monotonic() + self._agent.config.deregister_timeout
        for connection in self._agent.connector.all():
            if connection.lost is None and connection.let_go(deadline):
                for link in connection.messengers:
                    self.try_send(link, Message(MessageKind.BYE))

    def close(self) -> None:
        """End every wait; the reactor is closed."""
        for number in list(self._replies):
            self._end(number, AgentClosed(f"agent {self._agent.name!r} was closed while waiting for an answer"))
        self.notifications.wake()
        self.topics.close()

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
                self._end(number, (reply.connection.lost or error).afresh())
        self._agent.regions.forget_importer(link)
        self._agent.publisher.suspect(link.peer)
        self._wake_inboxes()
        self._agent.link_moved_on()
        self.reactor.wake()

    def link_flushed(self, link: Link) -> None:
        """See to the transfers that wait for their notification to leave this process."""
        self._agent.link_moved_on()
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
                self.topics.take(message.topic, Notification(link.peer, message.payload))
            case MessageKind.REQUEST:
                self._take_request(message, link)
            case MessageKind.PING:
                self.try_send(link, Message(MessageKind.PONG))
            case MessageKind.BYE:
                say_bye = getattr(link, "say_bye", None)
                if say_bye is not None:
                    say_bye()

    def _take_reply(self, message: Message, link: Link, fds: Sequence[int]) -> None:
        reply = self._replies.get(message.id)
        if reply is None or link not in reply.connection.links or self._expected(message.id) is None:
            self.dropped["late reply"] += 1
            _close_all(fds)
            return
        if message.kind is MessageKind.REPLY and reply.takes_fds:
            reply.resolve(message.payload, fds=fds)
            return
        _close_all(fds)
        if message.kind is MessageKind.REPLY:
            reply.resolve(message.payload)
        else:
            reply.resolve(None, _parse_refusal(message.payload, link.peer))

    def _expected(self, number: int) -> Reply | None:
        """Take a reply off the list of those expected: whoever gets it here resolves it, or gives it up."""
        return self._replies.pop(number, None)

    def _end(self, number: int, error: RaynixlError) -> None:
        reply = self._expected(number)
        if reply is not None:
            reply.resolve(None, error)

    def _wake_inboxes(self) -> None:
        self.notifications.wake()
        self.topics.wake()

    def _take_request(self, message: Message, link: Link) -> None:
        answer = self._answers.get(message.topic)
        if answer is not None:
            try:
                answer(message, link)
            except RaynixlError as exc:
                self._refuse(link, message, exc)
            return
        with self._lock:
            handler, threaded = self._handlers.get(message.topic, (None, False))
            crowded = threaded and self._busy >= MAX_HANDLER_THREADS
            self._busy += threaded and not crowded
        if handler is None:
            error = RegionUnknown(
                f"{self._agent.name!r} serves no {message.topic!r}", hint="call agent.serve(topic, handler) at the peer"
            )
            self._refuse(link, message, error)
        elif crowded:
            self._refuse(link, message, TransferTimeout(f"{self._agent.name!r} is overloaded", hint="retry later"))
        elif threaded:
            self._start(handler, message, link)
        else:
            self._run(handler, message, link, False)

    def _start(self, handler: Handler, message: Message, link: Link) -> None:
        """Run a handler on a thread of its own, for which _busy has been counted."""
        name = f"raynixl-{message.topic}"[:15]
        try:
            threading.Thread(target=self._run, args=(handler, message, link, True), name=name, daemon=True).start()
        except RuntimeError as exc:  # the process may have no more threads
            with self._lock:
                self._busy -= 1
            self._refuse(link, message, TransferTimeout(f"{self._agent.name!r}: {exc}", hint="retry later"))

    def _run(self, handler: Handler, message: Message, link: Link, threaded: bool) -> None:
        try:
            answer = handler(link.peer, message.payload)
            limit = self._agent.config.max_message_nbytes
            self.reply(link, message, check_payload(answer, limit, what="handler's answer"))
        except RaynixlError as exc:
            self._refuse(link, message, exc)
        except Exception as exc:  # thread edge: the asker gets it, and we say where it happened
            logger.exception("the handler of %r failed", message.topic)
            self._refuse(link, message, RaynixlError(f"{message.topic!r} failed at {self._agent.name!r}: {exc!r}"))
        finally:
            if threaded:
                with self._lock:
                    self._busy -= 1

    def _refuse(self, link: Link, message: Message, error: RaynixlError) -> None:
        refusal = _Refusal(
            kind=type(error).__name__, message=_printable(error.message[:4000]), hint=_printable(error.hint[:1000])
        )
        text = refusal.model_dump_json().encode()
        self.try_send(link, Message(MessageKind.REFUSAL, message.id, "", text))


def _parse_refusal(payload: bytes, peer: str) -> RaynixlError:
    try:
        refusal = parse(_Refusal, payload, what="refusal", limit=16_384)
    except IntegrityError as exc:
        return exc
    kind = getattr(errors, refusal.kind, RaynixlError)
    if not (isinstance(kind, type) and issubclass(kind, RaynixlError)):
        kind = RaynixlError
    if kind is AgentClosed:  # the peer's, not ours
        return PeerLost(f"peer {peer!r}: {refusal.message}", peer=peer)
    return kind(refusal.message, hint=refusal.hint, peer=peer)


def _printable(text: str) -> str:
    return text.encode(errors="replace").decode()


def _close_all(fds: Sequence[int]) -> None:
    for fd in fds:
        os.close(fd)
