"""Wire-up: what two agents tell each other over an authenticated link so that UCX can reach the other's memory."""

from __future__ import annotations

import base64
import itertools
import threading
from ipaddress import ip_address
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from raynixl import errors
from raynixl.backends.ucx_key import MAX_KEY_NBYTES, MAX_RAILS
from raynixl.errors import IntegrityError, RaynixlError
from raynixl.record import Unsigned

MAX_WIREUP_NBYTES = 1 << 20
MAX_ADDRESSES = 64
MAX_WORDS = 512
MAX_PID = 1 << 22  # of Linux
_Bytes = Annotated[str, Field(max_length=2 * MAX_RAILS * MAX_KEY_NBYTES)]


class _Wireup(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


def _is_address(text: str) -> str:
    if "%" in text:
        raise ValueError("a scope means nothing on another host")
    ip_address(text)
    return text


class Hello(_Wireup):
    """Where the sender runs, so that a peer on the same host can see its process, and from where its UCX may connect.

    Sent before anything else: whoever has it has admitted the sender to the ports of his own UCX.
    """

    kind: Literal["hello"] = "hello"
    host: Annotated[str, Field(max_length=200)]
    pid: Annotated[int, Field(ge=1, le=MAX_PID)]
    addresses: Annotated[
        tuple[Annotated[str, Field(max_length=45), AfterValidator(_is_address)], ...],
        Field(strict=False, max_length=MAX_ADDRESSES),
    ] = ()


class Ask(_Wireup):
    """Please let me reach this region of yours."""

    kind: Literal["ask"] = "ask"
    number: Unsigned
    region: Unsigned


class Answer(_Wireup):
    """The sealed keys of the region, and the sealed addresses of the workers that they belong to."""

    kind: Literal["answer"] = "answer"
    number: Unsigned
    sealed: _Bytes
    workers: _Bytes
    window: Unsigned
    """How many bytes may be asked for at a time where UCX emulates reads."""
    slow: Annotated[str, Field(max_length=MAX_WORDS)] = ""
    """Why the region is reached only slowly, for people."""


class Refusal(_Wireup):
    """No, and why."""

    kind: Literal["refusal"] = "refusal"
    number: Unsigned
    error: Annotated[str, Field(max_length=64)]
    message: Annotated[str, Field(max_length=4096)]
    hint: Annotated[str, Field(max_length=1024)] = ""

    def to_error(self, peer: str) -> RaynixlError:
        """Return what the peer said as an error of that kind."""
        kind = getattr(errors, self.error, RaynixlError)
        if not (isinstance(kind, type) and issubclass(kind, RaynixlError)):
            kind = RaynixlError
        return kind(self.message, hint=self.hint, peer=peer)


Message = Annotated[Hello | Ask | Answer | Refusal, Field(discriminator="kind")]
_MESSAGE: TypeAdapter[Hello | Ask | Answer | Refusal] = TypeAdapter(Message)


def parse_wireup(body: bytes) -> Hello | Ask | Answer | Refusal:
    """Parse what came over a link's control channel.

    Raises:
        IntegrityError: it is nothing that an agent sends.
    """
    if len(body) > MAX_WIREUP_NBYTES:
        raise IntegrityError(f"a wire-up message of {len(body)} bytes", hint="it does not come from raynixl")
    try:
        return _MESSAGE.validate_json(body)
    except ValidationError as exc:
        raise IntegrityError("a wire-up message is malformed", hint="it does not come from raynixl") from exc


def pack(data: bytes) -> str:
    """Return bytes as they travel in a message."""
    return base64.b64encode(data).decode()


def unpack(text: str) -> bytes:
    """Return the bytes of a message.

    Raises:
        IntegrityError: it is not base64.
    """
    try:
        return base64.b64decode(text, validate=True)
    except ValueError as exc:
        raise IntegrityError("a wire-up message does not hold base64", hint="it does not come from raynixl") from exc


class Question:
    """One `Ask` that has been sent, and what came back."""

    def __init__(self, link: Any) -> None:
        self.link = link
        self.answer: Answer | Refusal | None = None

    @property
    def is_over(self) -> bool:
        """Whether it was answered, or never will be."""
        return self.answer is not None or self.link.lost is not None


class Questions:
    """The questions that are open, by number."""

    def __init__(self) -> None:
        self._numbers = itertools.count(1)
        self._lock = threading.Lock()  # protects _open
        self._open: dict[int, Question] = {}

    def add(self, link: Any) -> tuple[int, Question]:
        """Return a new question to ask over a link, and its number."""
        question = Question(link)
        with self._lock:
            number = next(self._numbers)
            self._open[number] = question
        return number, question

    def drop(self, number: int) -> None:
        """Await no answer any more."""
        with self._lock:
            self._open.pop(number, None)

    def take(self, link: Any, answer: Answer | Refusal) -> bool:
        """Hand an answer to who asked; False if nobody did, of this peer."""
        with self._lock:
            question = self._open.get(answer.number)
            if question is None or question.link is not link:
                return False
            del self._open[answer.number]
        question.answer = answer
        return True
