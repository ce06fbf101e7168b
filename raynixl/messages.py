"""Messages between agents: a small binary header, a topic, and a payload."""

from __future__ import annotations

import enum
import struct
from dataclasses import dataclass

from raynixl.errors import ConfigError, IntegrityError, RangeError

MESSAGE_VERSION = 1
_HEADER = struct.Struct("<BBHQ")  # version, kind, topic length, id
MAX_TOPIC_NBYTES = 1024
OVERHEAD_NBYTES = _HEADER.size + MAX_TOPIC_NBYTES
"""What a message may have beside its payload."""


def check_topic(topic: str) -> str:
    """Return a topic if it can travel: 1 to 1024 bytes of text.

    Raises:
        ConfigError: it cannot.
    """
    try:
        usable = isinstance(topic, str) and 0 < len(topic.encode()) <= MAX_TOPIC_NBYTES
    except UnicodeEncodeError:
        usable = False
    if not usable:
        raise ConfigError(f"topic {topic!r:.80} is not usable", hint=f"use text of 1 to {MAX_TOPIC_NBYTES} bytes")
    return topic


def check_payload(payload: bytes, limit: int, *, what: str = "message") -> bytes:
    """Return a payload if it can travel in one message of at most `limit` bytes.

    Raises:
        ConfigError: it is not bytes.
        RangeError: it is too long.
    """
    if not isinstance(payload, bytes):
        raise ConfigError(f"a {what} is bytes, not {type(payload).__name__}", hint="encode it")
    if len(payload) > limit - OVERHEAD_NBYTES:
        raise RangeError(
            f"a {what} of {len(payload)} bytes is longer than {limit - OVERHEAD_NBYTES}",
            hint="write large data as a transfer, or raise AgentConfig.max_message_nbytes",
        )
    return payload


class MessageKind(enum.IntEnum):
    """What a message is."""

    NOTIFY = 1
    SEND = 2
    REQUEST = 3
    REPLY = 4
    REFUSAL = 5
    PING = 6
    PONG = 7
    BYE = 8


_KINDS = {int(kind): kind for kind in MessageKind}


@dataclass(frozen=True, slots=True)
class Message:
    """One message; `id` pairs requests with replies."""

    kind: MessageKind
    id: int = 0
    topic: str = ""
    payload: bytes = b""

    def to_bytes(self) -> bytes:
        """Return the wire form."""
        topic = self.topic.encode()
        return b"".join((_HEADER.pack(MESSAGE_VERSION, self.kind, len(topic), self.id), topic, self.payload))

    @staticmethod
    def from_bytes(data: bytes) -> Message:
        """Parse a message.

        Raises:
            IntegrityError: it is truncated, of another version or of no known kind.
        """
        if len(data) < _HEADER.size:
            raise IntegrityError(f"message of {len(data)} bytes is truncated")
        version, kind, topic_nbytes, number = _HEADER.unpack_from(data)
        end = _HEADER.size + topic_nbytes
        if version != MESSAGE_VERSION or topic_nbytes > MAX_TOPIC_NBYTES or end > len(data):
            raise IntegrityError(f"message of version {version} with a topic of {topic_nbytes} bytes is malformed")
        try:
            topic = data[_HEADER.size : end].decode() if topic_nbytes else ""
            return Message(_KINDS[kind], number, topic, data[end:])
        except (KeyError, UnicodeDecodeError) as exc:
            raise IntegrityError(f"message of kind {kind} is malformed") from exc


def notification_bytes(payload: bytes) -> bytes:
    """Return the wire form of a notification, without building a Message."""
    return _HEADER.pack(MESSAGE_VERSION, MessageKind.NOTIFY, 0, 0) + payload
