"""Records: what an agent publishes about itself and its regions, as small versioned JSON that is never trusted."""

from __future__ import annotations

import json
import re
import secrets
import time
from typing import Annotated, Any, ClassVar, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from raynixl.errors import ConfigError, IntegrityError
from raynixl.memory import MemoryKind

RECORD_VERSION = 1
MAX_RECORD_NBYTES = 60_000
"""The GCS is meant for small values; records stay below 64 KiB with room for keys."""

_NAME = re.compile(
    r"[^\x00-\x1f\x7f-\x9f\s\ud800-\udfff]"
    r"(?:[^\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]*[^\x00-\x1f\x7f-\x9f\s\ud800-\udfff])?"
)
MAX_NAME_CHARS = 200

Name = Annotated[str, Field(min_length=1, max_length=MAX_NAME_CHARS)]
Incarnation = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
"""One life of an agent: 16 hex digits of when it began, in nanoseconds of its host's clock, and 16 that are random."""
Unsigned = Annotated[int, Field(ge=0, lt=1 << 63)]
Fields = Annotated[dict[str, str | int], Field(max_length=32)]
Labels = Annotated[
    dict[Annotated[str, Field(max_length=200)], Annotated[str, Field(max_length=200)]], Field(max_length=16)
]
_LABELS = TypeAdapter(Labels, config=ConfigDict(strict=True))


def new_incarnation() -> str:
    """Return the name of a life that begins now. Of two of one host the later one is the greater text."""
    return f"{time.time_ns():016x}{secrets.token_hex(8)}"


def check_name(name: str, what: str = "name") -> str:
    """Return the name if it can be published: 1 to 200 characters, none of control, no space at the ends.

    Raises:
        ConfigError: it cannot.
    """
    if not isinstance(name, str) or len(name) > MAX_NAME_CHARS or not _NAME.fullmatch(name):
        hint = f"use 1 to {MAX_NAME_CHARS} printable characters with no space at the ends"
        if not isinstance(name, str):
            hint = "give a text; of an actor's handle raynixl.actors.agent_name(handle) tells it"
        raise ConfigError(f"{what} {name!r:.80} is not usable", hint=hint)
    return name


def check_labels(labels: dict[str, str] | None) -> dict[str, str]:
    """Return a copy of an agent's labels if they can be published: up to 16, each text of up to 200 characters.

    Raises:
        ConfigError: they cannot.
    """
    try:
        found = _LABELS.validate_python({} if labels is None else labels)
        json.dumps(found, ensure_ascii=False).encode()
    except (ValidationError, UnicodeEncodeError) as exc:
        raise ConfigError(
            "the labels are not usable", hint="give up to 16 texts under texts, of up to 200 characters each"
        ) from exc
    return dict(found)


class RegionRecord(BaseModel):
    """What travels of a region; `keys` holds what each backend needs to reach it."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    id: Unsigned
    generation: Unsigned
    name: Annotated[str, Field(max_length=MAX_NAME_CHARS)] = ""
    kind: Annotated[MemoryKind, Field(strict=False)]
    device: Annotated[int, Field(ge=0, le=1023)] = 0
    nbytes: Annotated[int, Field(gt=0, lt=1 << 63)]
    writable: bool = True
    keys: Annotated[dict[str, Fields], Field(max_length=16)] = {}


class AgentRecord(BaseModel):
    """What an agent publishes: who it is, where it runs, how each backend reaches it, its named regions."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    version: int = RECORD_VERSION
    name: Name
    incarnation: Incarnation
    host: Annotated[str, Field(max_length=200)]
    pid: Unsigned
    started: float
    expires: float = 0.0
    """Wall-clock second at which the lease ends; 0 for records that have none."""
    labels: Labels = {}
    """What the layer above adds, such as actor and node ids."""
    backends: Annotated[dict[str, Fields], Field(max_length=16)] = {}
    regions: Annotated[tuple[RegionRecord, ...], Field(strict=False, max_length=4096)] = ()
    """Named regions, as many as fit; peers ask the agent itself for the rest."""

    def to_bytes(self) -> bytes:
        """Return the record as JSON, without those regions that would make it too large."""
        data = self.model_dump_json(exclude_defaults=True).encode()
        if len(data) > MAX_RECORD_NBYTES:
            kept = self.regions[: len(self.regions) // 2] if len(self.regions) > 1 else ()
            if not self.regions:
                raise ConfigError(f"the record of agent {self.name!r} has {len(data)} bytes", hint="shorten its labels")
            return self.model_copy(update={"regions": kept}).to_bytes()
        return data

    @staticmethod
    def from_bytes(data: bytes) -> AgentRecord:
        """Parse a record.

        Raises:
            IntegrityError: it is truncated, too large, of another version, or not a record at all.
        """
        record = parse(AgentRecord, data, what="agent record", limit=MAX_RECORD_NBYTES)
        if record.version != RECORD_VERSION:
            raise IntegrityError(
                f"record of {record.name!r} has version {record.version}, not {RECORD_VERSION}",
                hint="run one version of raynixl in the whole cluster",
            )
        return record


T = TypeVar("T", bound=BaseModel)


def check_bytes(data: Any, *, what: str, limit: int) -> bytes:
    """Return foreign bytes of a limited length.

    Raises:
        IntegrityError: they are too many, or no bytes.
    """
    if not isinstance(data, bytes | bytearray | memoryview):
        raise IntegrityError(f"{what} is {type(data).__name__}, not bytes", hint="pass the bytes as they came")
    if len(data) > limit:
        raise IntegrityError(f"{what} has {len(data)} bytes, more than {limit}", hint="it does not come from raynixl")
    return bytes(data)


def parse(model: type[T], data: Any, *, what: str, limit: int) -> T:
    """Parse foreign JSON bytes as `model`.

    Raises:
        IntegrityError: too large, or not what the model says.
    """
    raw = check_bytes(data, what=what, limit=limit)
    try:
        return model.model_validate_json(raw)
    except ValidationError as exc:
        first = exc.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "text"
        raise IntegrityError(
            f"{what} is malformed at {where}: {first['msg']}", hint="it is truncated or not from raynixl"
        ) from exc


class Wire(BaseModel):
    """A message that travels as JSON, in at most `LIMIT` bytes, and is never trusted."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    LIMIT: ClassVar[int] = 1 << 20

    def to_bytes(self) -> bytes:
        """Return the wire form."""
        return self.model_dump_json().encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """Parse a message.

        Raises:
            IntegrityError: it is malformed.
        """
        return parse(cls, data, what=cls.__name__, limit=cls.LIMIT)
