"""Wire-up messages: what agents send is understood, all else is refused, and only who was asked answers."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from raynixl import IntegrityError, PeerLost, RaynixlError, RegionStale, errors
from raynixl.backends.ucx_key import MAX_KEY_NBYTES, MAX_RAILS, Keys, seal_workers, unseal_workers
from raynixl.backends.ucx_wireup import (
    MAX_ADDRESSES,
    MAX_WIREUP_NBYTES,
    Answer,
    Ask,
    Hello,
    Questions,
    Refusal,
    pack,
    parse_wireup,
    unpack,
)

pytestmark = pytest.mark.pure

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)
numbers = st.integers(0, 2**63 - 1)
ips = st.ip_addresses().map(str).filter(lambda text: "%" not in text)
data = st.binary(max_size=200).map(pack)
messages = st.one_of(
    st.builds(Hello, host=texts, pid=st.integers(1, 1 << 22), addresses=st.lists(ips, max_size=4).map(tuple)),
    st.builds(Ask, number=numbers, region=numbers),
    st.builds(Answer, number=numbers, sealed=data, workers=data),
    st.builds(Refusal, number=numbers, error=texts, message=texts, hint=texts),
)
json_values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), texts),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(texts, inner, max_size=4)),
    max_leaves=12,
)
FIELDS = ("kind", "number", "region", "host", "pid", "addresses", "sealed", "workers", "error", "message", "hint")
nearly = st.dictionaries(
    st.sampled_from(FIELDS), st.one_of(json_values, st.sampled_from(["hello", "ask", "answer", "refusal"]))
)


def refused_or_sound(body: bytes) -> None:
    """What is understood says the same again; all else is an IntegrityError."""
    try:
        message = parse_wireup(body)
    except IntegrityError:
        return
    assert parse_wireup(message.model_dump_json().encode()) == message


@settings(deadline=None)
@given(messages)
def test_what_agents_send_is_understood(message: BaseModel) -> None:
    assert parse_wireup(message.model_dump_json().encode()) == message


@settings(deadline=None)
@given(st.binary(max_size=300))
def test_random_bytes_are_never_more_than_an_integrity_error(body: bytes) -> None:
    refused_or_sound(body)


@settings(deadline=None)
@given(st.one_of(json_values, nearly))
def test_random_json_is_never_more_than_an_integrity_error(value: Any) -> None:
    refused_or_sound(json.dumps(value).encode())


@settings(deadline=None)
@given(messages, st.integers(0, 10_000), st.integers(1, 255))
def test_a_flipped_byte_is_never_more_than_an_integrity_error(message: BaseModel, at: int, mask: int) -> None:
    body = bytearray(message.model_dump_json().encode())
    body[at % len(body)] ^= mask
    refused_or_sound(bytes(body))


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{", b"null", b"[]", b'"ask"', b"\xff\xfe", b'{"kind":"ask"', b"[" * 200_000, b'{"a":' * 100_000,
        b'{"kind":"refusal","number":1,"error":"\\ud800","message":""}', b'{"kind":"ask","number":1e3,"region":1}',
        b"9" * 5000, b'{"kind":"ask","number":NaN,"region":1}', b'{"kind":"ask","number":1,"region":1,"kind":"x"}',
    ],
    ids=lambda body: repr(body[:30]),
)  # fmt: skip
def test_malformed_messages_are_refused(body: bytes) -> None:
    with pytest.raises(IntegrityError, match="malformed") as caught:
        parse_wireup(body)
    assert caught.value.hint


@pytest.mark.parametrize(
    "fields",
    [
        {"kind": "ask", "number": -1, "region": 1},
        {"kind": "ask", "number": 2**63, "region": 1},
        {"kind": "ask", "number": "1", "region": 1},
        {"kind": "ask", "number": True, "region": 1},
        {"kind": "ask", "number": 1},
        {"kind": "ask", "number": 1, "region": 1, "more": 1},
        {"kind": "shout", "number": 1, "region": 1},
        {"number": 1, "region": 1},
        {"kind": "hello", "host": "h" * 201, "pid": 1},
        {"kind": "hello", "host": "h", "pid": 0},
        {"kind": "hello", "host": "h", "pid": (1 << 22) + 1},
        {"kind": "hello", "host": "h", "pid": 1, "addresses": ["10.0.0.1"] * (MAX_ADDRESSES + 1)},
        {"kind": "hello", "host": "h", "pid": 1, "addresses": ["10.0.0.256"]},
        {"kind": "hello", "host": "h", "pid": 1, "addresses": ["fe80::1%eth0"]},
        {"kind": "hello", "host": "h", "pid": 1, "addresses": ["example.org"]},
        {"kind": "hello", "host": "h", "pid": 1, "addresses": [1]},
        {"kind": "answer", "number": 1, "sealed": "", "workers": [""]},
        {"kind": "answer", "number": 1, "sealed": "A" * (2 * MAX_RAILS * MAX_KEY_NBYTES + 1), "workers": ""},
        {"kind": "refusal", "number": 1, "error": "E" * 65, "message": ""},
        {"kind": "refusal", "number": 1, "error": "E", "message": "m" * 4097},
        {"kind": "refusal", "number": 1, "error": "E", "message": "", "hint": "h" * 1025},
    ],
    ids=lambda fields: json.dumps(fields)[:60],
)
def test_what_is_beyond_a_limit_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(IntegrityError):
        parse_wireup(json.dumps(fields).encode())


def test_a_message_that_is_too_long_is_refused_unread() -> None:
    body = Ask(number=1, region=1).model_dump_json().encode()
    assert parse_wireup(body + b" " * (MAX_WIREUP_NBYTES - len(body))) == Ask(number=1, region=1)
    with pytest.raises(IntegrityError, match=f"{MAX_WIREUP_NBYTES + 1} bytes"):
        parse_wireup(body + b" " * (MAX_WIREUP_NBYTES + 1 - len(body)))


def test_the_largest_answer_that_an_agent_gives_is_within_the_limits() -> None:
    keys = Keys("ab" * 16, 2**63 - 1, 0, 2**63 - 1, (b"k" * MAX_KEY_NBYTES,) * MAX_RAILS)
    workers = seal_workers("ab" * 16, [b"w" * MAX_KEY_NBYTES] * MAX_RAILS)
    answer = Answer(window=2**63 - 1, number=2**63 - 1, sealed=pack(keys.seal()), workers=pack(workers))
    heard = parse_wireup(answer.model_dump_json().encode())
    assert isinstance(heard, Answer)
    assert unseal_workers(unpack(heard.workers), incarnation="ab" * 16)[-1] == b"w" * MAX_KEY_NBYTES


@settings(deadline=None)
@given(st.binary(max_size=300))
def test_bytes_survive_as_text(raw: bytes) -> None:
    assert unpack(pack(raw)) == raw


@settings(deadline=None)
@given(texts)
def test_text_that_holds_no_bytes_is_an_integrity_error(text: str) -> None:
    try:
        raw = unpack(text)
    except IntegrityError:
        return
    assert len(raw) <= len(text)


@pytest.mark.parametrize("name", [name for name in vars(errors) if isinstance(vars(errors)[name], type)])
def test_a_refusal_is_raised_as_the_error_that_it_names(name: str) -> None:
    error = Refusal(number=1, error=name, message="no", hint="ask again").to_error("bob")
    assert type(error).__name__ == (name if issubclass(vars(errors)[name], RaynixlError) else "RaynixlError")
    assert (error.message, error.hint, error.peer) == ("no", "ask again", "bob")


@pytest.mark.parametrize("name", ["", "_rebuild", "__builtins__", "__name__", "SystemExit", "annotations"])
def test_a_refusal_that_names_no_error_of_ours_is_a_plain_one(name: str) -> None:
    assert type(Refusal(number=1, error=name, message="no").to_error("bob")) is RaynixlError


def make_link() -> Any:
    """What a question needs of a link."""
    return SimpleNamespace(lost=None)


def test_only_the_link_that_was_asked_answers() -> None:
    questions, asked, other = Questions(), make_link(), make_link()
    number, question = questions.add(asked)
    answer = Answer(window=0, number=number, sealed="", workers="")
    assert not questions.take(other, answer)
    assert not question.is_over
    assert not questions.take(asked, Answer(window=0, number=number + 1, sealed="", workers=""))
    assert questions.take(asked, answer)
    assert (question.answer, question.is_over) == (answer, True)


def test_a_question_is_answered_once_and_not_after_it_was_dropped() -> None:
    questions, link = Questions(), make_link()
    first, question = questions.add(link)
    refusal = Refusal(number=first, error=RegionStale.__name__, message="gone")
    assert questions.take(link, refusal)
    assert not questions.take(link, Answer(window=0, number=first, sealed="", workers=""))
    assert question.answer is refusal
    second, dropped = questions.add(link)
    assert second != first
    questions.drop(second)
    questions.drop(second)
    assert not questions.take(link, Answer(window=0, number=second, sealed="", workers=""))
    assert dropped.answer is None


def test_a_question_is_over_when_its_link_is_lost() -> None:
    link = make_link()
    _, question = Questions().add(link)
    assert not question.is_over
    link.lost = PeerLost("gone")
    assert question.is_over
