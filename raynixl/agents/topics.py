"""Topics: what becomes of the messages under each: an inbox takes them, a function, or nobody any more."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable

from raynixl.agents.inbox import Inbox, Notification
from raynixl.errors import ConfigError
from raynixl.messages import check_topic
from raynixl.reactor import Reactor

logger = logging.getLogger(__name__)

Receiver = Callable[[str, bytes], object]
"""Takes a message: (peer's name, payload). It runs on the polling thread and must not block."""

MAX_INBOXES = 65_536
MAX_CLOSED = 4096
"""So many closed topics are remembered: a message that comes late must not open one again for good."""


class Topics:
    """The inboxes and receivers of an agent. Any thread may ask; `take` is called on the polling thread only."""

    def __init__(self, reactor: Reactor, dropped: Counter[str]) -> None:
        self._reactor = reactor
        self._dropped = dropped
        self._inboxes: dict[str, Inbox] = {}
        self._receivers: dict[str, Receiver] = {}
        self._closed: dict[str, None] = {}
        self._lock = threading.Lock()  # protects _inboxes, _receivers, _closed

    def inbox(self, topic: str) -> Inbox:
        """Return the queue of messages under a topic.

        Raises:
            ConfigError: they are delivered to a function.
        """
        with self._lock:
            if topic in self._receivers:
                raise ConfigError(f"{topic!r} is delivered to a function", hint="call undeliver(topic) first")
            self._closed.pop(topic, None)
            return self._opened(topic)

    def close_inbox(self, topic: str) -> None:
        """Forget a topic and what lies there; messages that still come are dropped until it is asked for again."""
        with self._lock:
            self._close(topic)

    def deliver(self, topic: str, receiver: Receiver) -> None:
        """Hand messages under a topic to a function; first those that lie in its inbox."""
        if not callable(receiver):
            raise ConfigError(f"{type(receiver).__name__} takes no messages", hint="give a function (peer, payload)")
        with self._lock:
            self._receivers[check_topic(topic)] = receiver
            self._closed.pop(topic, None)
        self._reactor.call_soon(lambda: self._hand_over(topic))

    def undeliver(self, topic: str, timeout: float) -> None:
        """Close a topic that is delivered, and wait until its function is not running, unless it is that which asks."""
        with self._lock:
            if self._receivers.pop(topic, None) is None:
                return
            self._close(topic)
        if not self._reactor.is_dispatching:
            passed = threading.Event()  # callbacks run one at a time: once this one has, the function has ended
            self._reactor.call_soon(passed.set)
            self._reactor.run_until(passed.is_set, time.monotonic() + timeout)

    def close(self) -> None:
        """End every wait and let go of the functions: nothing comes any more."""
        with self._lock:
            self._receivers.clear()
        self.wake()

    def wake(self) -> None:
        """Make everybody who waits look again."""
        with self._lock:
            inboxes = list(self._inboxes.values())
        for inbox in inboxes:
            inbox.wake()

    def take(self, topic: str, note: Notification) -> None:
        """Take a message that came in."""
        if topic in self._receivers:
            self._hand_over(topic)
            self._hand(topic, note)
            return
        with self._lock:
            if topic in self._closed:
                self._dropped["closed topic"] += 1
                return
            if topic not in self._inboxes and len(self._inboxes) >= MAX_INBOXES:
                self._dropped["topic"] += 1
                return
            inbox = self._opened(topic)
        inbox.put(note)

    def _opened(self, topic: str) -> Inbox:
        """Return an inbox, made now if need be; _lock is held."""
        inbox = self._inboxes.get(topic)
        if inbox is None:
            inbox = self._inboxes[topic] = Inbox(topic, self._reactor)
        return inbox

    def _close(self, topic: str) -> None:
        self._inboxes.pop(topic, None)
        self._closed[topic] = None
        while len(self._closed) > MAX_CLOSED:
            del self._closed[next(iter(self._closed))]

    def _hand_over(self, topic: str) -> None:
        """Hand what lies in a topic's inbox to the function that has taken its place."""
        inbox = self._inboxes.get(topic)
        while inbox is not None and topic in self._receivers:
            try:
                note = inbox.take_now()
            except IndexError:
                with self._lock:
                    if self._inboxes.get(topic) is inbox:
                        del self._inboxes[topic]
                return
            self._hand(topic, note)

    def _hand(self, topic: str, note: Notification) -> None:
        receiver = self._receivers.get(topic)
        if receiver is None:  # the message before this one was the last that it wanted
            self._dropped["closed topic"] += 1
            return
        try:
            receiver(note.peer, note.payload)
        except Exception:  # thread edge: nobody waits for it, and one message must not end the service of all others
            logger.exception("the receiver of %r failed", topic)
            self._dropped["receiver failed"] += 1
