"""Messages between agents: a small binary header, a topic, and a payload."""

from __future__ import annotations

import enum
import struct
from dataclasses import dataclass

from raynixl.errors import IntegrityError

MESSAGE_VERSION = 1
_HEADER = struct.Struct("<BBHQ")  # version, kind, topic length, id
MAX_TOPIC_NBYTES = 1024


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
