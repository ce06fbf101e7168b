"""Messages survive their bytes; anything else is refused."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raynixl import ConfigError, IntegrityError, RangeError
from raynixl.messages import (
    MAX_TOPIC_NBYTES,
    OVERHEAD_NBYTES,
    Message,
    MessageKind,
    check_payload,
    check_topic,
    notification_bytes,
)

pytestmark = pytest.mark.pure

messages = st.builds(
    Message, st.sampled_from(MessageKind), st.integers(0, 2**64 - 1),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=20), st.binary(max_size=100),
)  # fmt: skip


@given(messages)
def test_messages_survive_their_bytes(message: Message) -> None:
    assert Message.from_bytes(message.to_bytes()) == message


@given(messages, st.data())
def test_damaged_messages_are_refused_or_still_messages(message: Message, data: st.DataObject) -> None:
    whole = message.to_bytes()
    header = len(whole) - len(message.payload)
    with pytest.raises(IntegrityError):
        Message.from_bytes(whole[: data.draw(st.integers(0, header - 1))])
    at, value = data.draw(st.integers(0, len(whole) - 1)), data.draw(st.integers(0, 255))
    try:
        Message.from_bytes(whole[:at] + bytes([value]) + whole[at + 1 :])
    except IntegrityError:
        return


@given(st.binary(max_size=64))
def test_random_bytes_are_messages_or_refused(data: bytes) -> None:
    try:
        found = Message.from_bytes(data)
    except IntegrityError:
        return
    assert found.to_bytes() == data


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x01",
        Message(MessageKind.PING).to_bytes()[:-1],
        b"\x02" + Message(MessageKind.PING).to_bytes()[1:],
        b"\x01\x00" + bytes(10),
        b"\x01\x09" + bytes(10),
        b"\x01\x02\xff\xff" + bytes(8) + b"x" * 70_000,
        b"\x01\x02\x01\x00" + bytes(8) + b"\xff",
    ],
)
def test_malformed_messages_are_refused(data: bytes) -> None:
    with pytest.raises(IntegrityError):
        Message.from_bytes(data)


def test_a_notification_has_the_wire_form_of_its_message() -> None:
    assert Message.from_bytes(notification_bytes(b"x")) == Message(MessageKind.NOTIFY, 0, "", b"x")


@pytest.mark.parametrize("topic", ["", "x" * (MAX_TOPIC_NBYTES + 1), "é" * MAX_TOPIC_NBYTES, "\ud800", None, 5, b"x"])
def test_topics_that_cannot_travel_are_refused(topic: object) -> None:
    with pytest.raises(ConfigError):
        check_topic(topic)  # type: ignore[arg-type]


def test_payloads_are_bytes_of_a_limited_length() -> None:
    limit = OVERHEAD_NBYTES + 8
    assert check_payload(b"x" * 8, limit) == b"x" * 8
    with pytest.raises(RangeError, match="9 bytes is longer than 8"):
        check_payload(b"x" * 9, limit)
    for payload in ("text", None, 5, bytearray(1), memoryview(b"x")):
        with pytest.raises(ConfigError, match="is bytes, not"):
            check_payload(payload, limit)  # type: ignore[arg-type]
    assert check_topic("é" * (MAX_TOPIC_NBYTES // 2))
