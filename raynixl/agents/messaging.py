"""Messaging: what an agent says to its peers, and hears from them."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from raynixl.agents.connection import Connection
from raynixl.agents.consent import left
from raynixl.agents.control import Control, Handler
from raynixl.agents.inbox import Inbox, Notification
from raynixl.agents.peer import Peer, name_of
from raynixl.agents.reply import Reply
from raynixl.agents.topics import Receiver
from raynixl.config import check_timeout
from raynixl.messages import Message, MessageKind, check_payload, check_topic, notification_bytes

if TYPE_CHECKING:
    from raynixl.agents.connector import Connector
    from raynixl.config import AgentConfig


class Messaging:
    """The part of `Agent` that has to do with messages."""

    control: Control
    connector: Connector
    config: AgentConfig

    if TYPE_CHECKING:

        def check_open(self) -> None: ...

    def notifications(self) -> list[Notification]:
        """Take all notifications that have come, without waiting."""
        return self.control.notifications.drain()

    def wait_notification(self, timeout: float) -> Notification:
        """Take the next notification, waiting for it.

        Raises:
            TransferTimeout: none came in time.
        """
        return self.control.notifications.wait(timeout)

    async def next_notification(self, timeout: float) -> Notification:
        """Take the next notification, from an event loop. See `wait_notification`."""
        return await self.control.notifications.take(timeout)

    def notify(self, peer: str | Peer, payload: bytes, *, timeout: float | None = None) -> None:
        """Send a notification alone; connects first if need be.

        Raises:
            PeerUnknown, PeerLost, TransferTimeout: it could not be sent.
        """
        check_payload(payload, self.config.max_message_nbytes, what="notification")
        self.control.notify(self._connection(peer, timeout).link, notification_bytes(payload))

    def send(self, peer: str | Peer, topic: str, payload: bytes, *, timeout: float | None = None) -> None:
        """Put a message into a peer's inbox of that topic; connects first if need be."""
        self._check_message(topic, payload)
        self._connection(peer, timeout).link.send(Message(MessageKind.SEND, 0, topic, payload).to_bytes())

    def ask(self, peer: str | Peer, topic: str, payload: bytes = b"", *, timeout: float | None = None) -> Reply:
        """Send a request to a peer's handler of that topic; the reply is waited for or awaited."""
        self._check_message(topic, payload)
        deadline = time.monotonic() + check_timeout(timeout, self.config.request_timeout)
        return self.control.ask(self._connection(peer, timeout), topic, payload, left(deadline))

    def serve(self, topic: str, handler: Handler, *, threaded: bool = True) -> None:
        """Answer peers' requests of a topic on threads of the agent, so also while the process's own code is busy.

        With threaded=False the polling thread itself calls the handler: faster, but the handler must not block.
        """
        self.control.serve(topic, handler, threaded=threaded)

    def inbox(self, topic: str) -> Inbox:
        """Return the inbox of a topic.

        Raises:
            ConfigError: the topic's messages are delivered to a function.
        """
        return self.control.topics.inbox(check_topic(topic))

    def deliver(self, topic: str, receiver: Receiver) -> None:
        """Hand what peers `send` under a topic to a function (peer, payload) instead of its inbox.

        Those that lie in the inbox come first: none is lost, and each peer's keep their order. The polling thread
        calls the function, which must not block. What it raises is logged, counted, and stops nothing.

        Raises:
            ConfigError: that is no function, or no topic.
        """
        self.check_open()
        self.control.topics.deliver(topic, receiver)

    def undeliver(self, topic: str) -> None:
        """Deliver a topic no more; what still comes is dropped until `deliver` or `inbox` asks for it again.

        When this returns the function is not running, unless it is the function itself that calls.
        """
        self.control.topics.undeliver(topic, self.config.request_timeout)

    def _connection(self, peer: str | Peer, timeout: float | None) -> Connection:
        self.check_open()
        deadline = time.monotonic() + check_timeout(timeout, self.config.connect_timeout)
        return self.connector.connect(name_of(peer), deadline)

    def _check_message(self, topic: str, payload: bytes) -> None:
        self.check_open()
        check_topic(topic)
        check_payload(payload, self.config.max_message_nbytes)
