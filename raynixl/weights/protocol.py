"""The protocol: the messages of one push, a request and a reply for each rank and phase, as checked JSON."""

from __future__ import annotations

from typing import Annotated, ClassVar, TypeVar

from pydantic import Field

from raynixl import errors, record
from raynixl.errors import ConfigError, RaynixlError
from raynixl.record import Incarnation, Name, RegionRecord, check_name
from raynixl.region import RemoteRegion

LIMIT = 60 << 20
MAX_NAME_CHARS = 150

Seconds = Annotated[float, Field(ge=0, le=1e6, allow_inf_nan=False)]
Version = Annotated[int, Field(gt=0, lt=1 << 62)]
Push = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
M = TypeVar("M", bound="Wire")


def check_weights_name(name: str) -> str:
    """Return the name if weights can be published under it; regions and topics are named after it."""
    check_name(name, "name of weights")
    if len(name) > MAX_NAME_CHARS:
        raise ConfigError(f"name of weights {name!r:.80} is too long", hint=f"use at most {MAX_NAME_CHARS} characters")
    return name


def topic(name: str, phase: str) -> str:
    """Return the topic under which a rank answers one phase."""
    return f"weights/{name}/{phase}"


def printable(text: str) -> str:
    """Return a text that JSON can carry: names of tensors may hold lone surrogates."""
    return text.encode(errors="replace").decode()


class Wire(record.Wire):
    """A message of a push: plans of large models are long."""

    LIMIT: ClassVar[int] = LIMIT


class Fault(Wire):
    """An error on its way to whoever pushes; `peer` is the agent that it is about."""

    kind: Annotated[str, Field(max_length=64)]
    message: Annotated[str, Field(max_length=20_000)]
    hint: Annotated[str, Field(max_length=2_000)] = ""
    peer: Annotated[str, Field(max_length=200)] = ""

    @staticmethod
    def of(error: RaynixlError) -> Fault:
        """Take an error apart."""
        kind, text = type(error).__name__, printable(error.message)[:20_000]
        return Fault(kind=kind, message=text, hint=printable(error.hint)[:2_000], peer=error.peer[:200])

    def error(self) -> RaynixlError:
        """Put the error together again."""
        kind = getattr(errors, self.kind, RaynixlError)
        if not (isinstance(kind, type) and issubclass(kind, RaynixlError)):
            kind = RaynixlError
        return kind(self.message, hint=self.hint, peer=self.peer)


class Holder(Wire):
    """An agent that holds a version, and the regions that it lies in."""

    name: Name
    incarnation: Incarnation
    regions: Annotated[tuple[RegionRecord, ...], Field(strict=False, max_length=65_536)]

    def remotes(self) -> list[RemoteRegion]:
        """Return the regions as a transfer takes them."""
        return [RemoteRegion(self.name, self.incarnation, record) for record in self.regions]


class Answer(Wire):
    """From a target: how a phase went. `note` is what on_flip raised, `around` how sources failed it that had others.

    `holder` says where all of the image lies after a pull. `has_forgotten`: it was not told of the plan, or long ago.
    """

    fault: Fault | None = None
    version: Annotated[int, Field(ge=0)] = 0
    seconds: Seconds = 0.0
    pull_seconds: Seconds = 0.0
    verify_seconds: Seconds = 0.0
    nbytes: Annotated[int, Field(ge=0)] = 0
    origin_nbytes: Annotated[int, Field(ge=0)] = 0
    peer_nbytes: Annotated[int, Field(ge=0)] = 0
    note: Annotated[str, Field(max_length=2_000)] = ""
    around: Annotated[tuple[Fault, ...], Field(strict=False, max_length=65_536)] = ()
    holder: Holder | None = None
    has_forgotten: bool = False
