"""The greeting on a new connection: who are you, prove it, and can we read each other's memory."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Callable
from typing import Annotated, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from raynixl.authentication import Identity, is_proof, prove
from raynixl.backends.base import Local
from raynixl.backends.wire import MAX_GREETING_NBYTES, Wire
from raynixl.errors import ConfigError, IntegrityError, PeerLost, PeerRestarted, RaynixlError, TransferTimeout
from raynixl.reactor import Timer
from raynixl.record import AgentRecord, Incarnation, Name, Unsigned, parse

GREETING_VERSION = 1
GREETING_TIMEOUT = 5.0
MAX_STRANGERS = 256
"""Connections that have not proved themselves yet; more are refused."""

_Hex = Annotated[str, Field(pattern=r"^[0-9a-f]{1,128}$")]


class _Greeting(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class _Hello(_Greeting):
    version: int
    target: Incarnation
    name: Name
    incarnation: Incarnation
    nonce: _Hex


class _Version(BaseModel):
    """What every version's greeting says."""

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)
    version: int


class _Challenge(_Greeting):
    name: Name
    incarnation: Incarnation
    nonce: _Hex
    proof: _Hex
    probe: Unsigned


class _Answer(_Greeting):
    proof: _Hex
    probe: Unsigned


class _Verdict(_Greeting):
    refusal: Annotated[str, Field(max_length=200)] = ""
    kind: Annotated[str, Field(max_length=20)] = ""


class Newcomer:
    """Someone who has connected, from the first byte to the proof; then the socket is the one's who admits them."""

    def __init__(self, local: Local, wire: Wire, probe: int, admit: Callable[[Newcomer], None]) -> None:
        self.local = local
        self.peer_probe = 0
        self.client: Identity | None = None
        self._server = Identity.fresh(local.name, local.incarnation)
        self._wire = wire
        self._probe = probe
        self._admit = admit
        self._timer: Timer = local.reactor.call_later(GREETING_TIMEOUT, self.refuse)
        self.is_open = True
        self.sock.setblocking(False)
        local.reactor.add(self.sock.fileno(), self._on_event)

    @property
    def sock(self) -> socket.socket:
        """The connection."""
        return self._wire.sock

    def refuse(self, reason: str = "timeout", kind: str = "") -> None:
        """Send them away and count it."""
        if self.is_open:
            with contextlib.suppress(OSError):
                self._wire.send(_dump(_Verdict(refusal=reason, kind=kind)))
            self.leave()
            self.sock.close()
            self.local.events.message_dropped(f"greeting: {reason}")

    def leave(self) -> None:
        """Stop listening to them here; the socket stays open."""
        self.is_open = False
        self._timer.cancel()
        self.local.reactor.remove(self.sock.fileno())

    def _on_event(self, _mask: int) -> None:
        try:
            data = self._wire.receive()
        except BlockingIOError:
            return
        except IntegrityError:
            self.refuse("malformed")
            return
        except OSError:
            self.refuse("hung up")
            return
        if data is None:
            return
        try:
            self._hear(data)
        except (IntegrityError, OSError):
            self.refuse("malformed")

    def _hear(self, data: bytes) -> None:
        if self.client is not None:
            self._judge(parse(_Answer, data, what="answer", limit=MAX_GREETING_NBYTES), self.client)
        elif _is_alien(self.local, self._wire):
            self.refuse("another user", "user")
        else:
            self._listen(data)

    def _listen(self, data: bytes) -> None:
        """Take the first words; those of another version may say more than we understand."""
        if parse(_Version, data, what="greeting", limit=MAX_GREETING_NBYTES).version != GREETING_VERSION:
            self.refuse("version", "version")
            return
        self._challenge(parse(_Hello, data, what="greeting", limit=MAX_GREETING_NBYTES))

    def _challenge(self, hello: _Hello) -> None:
        if hello.target != self.local.incarnation:
            self.refuse("another incarnation", "restarted")
            return
        self.client = Identity(hello.name, hello.incarnation, hello.nonce)
        proof = prove(_secret(self.local), "server", self.client, self._server)
        server = self._server
        challenge = _Challenge(
            name=server.name, incarnation=server.incarnation, nonce=server.nonce, proof=proof, probe=self._probe
        )
        self._wire.send(_dump(challenge))

    def _judge(self, answer: _Answer, client: Identity) -> None:
        if not is_proof(_secret(self.local), answer.proof, "client", client, self._server):
            self.refuse("wrong secret", "secret")
            return
        self.peer_probe = answer.probe
        self._wire.send(_dump(_Verdict()))  # fails if they left: then they are refused
        self.leave()
        self._admit(self)


def greet(local: Local, wire: Wire, record: AgentRecord, *, probe: int, deadline: float) -> int:
    """Prove ourselves on a connected wire and hear the peer's proof; return the peer's probe address.

    Raises:
        PeerRestarted, PeerLost, ConfigError, TransferTimeout: as the backend contract says.
    """
    client = Identity.fresh(local.name, local.incarnation)
    hello = _Hello(
        version=GREETING_VERSION, target=record.incarnation,
        name=client.name, incarnation=client.incarnation, nonce=client.nonce,
    )  # fmt: skip
    try:
        _send(wire, hello, deadline)
        challenge = _expect(wire, _Challenge, record, deadline)
        if _is_alien(local, wire):  # not before they have answered: until it is accepted a connection is nobody's
            raise _other_user(record)
        server = Identity(challenge.name, challenge.incarnation, challenge.nonce)
        if server.incarnation != record.incarnation or not is_proof(
            _secret(local), challenge.proof, "server", client, server
        ):
            raise _stranger(record)
        _send(wire, _Answer(proof=prove(_secret(local), "client", client, server), probe=probe), deadline)
        _expect(wire, _Verdict, record, deadline)
    except TimeoutError as exc:
        raise TransferTimeout(
            f"peer {record.name!r} (pid {record.pid}) did not answer the greeting in time",
            hint="it is frozen or overloaded", peer=record.name,
        ) from exc  # fmt: skip
    except OSError as exc:
        raise PeerLost(f"peer {record.name!r} hung up during the greeting", peer=record.name) from exc
    return challenge.probe


def _is_alien(local: Local, wire: Wire) -> bool:
    """Whether the other end is another user's, and no secret is there to prove that it may come all the same."""
    return not _secret(local) and not wire.is_own_user()


def _other_user(record: AgentRecord) -> ConfigError:
    return ConfigError(
        f"peer {record.name!r} belongs to another user of this host, or is on another host",
        hint="agents of several users or hosts need one AgentConfig.secret", peer=record.name,
    )  # fmt: skip


def _secret(local: Local) -> bytes:
    return local.config.secret.get_secret_value()


def _stranger(record: AgentRecord) -> ConfigError:
    return ConfigError(
        f"peer {record.name!r} does not share our secret",
        hint="agents of one job share AgentConfig.secret; the Ray layer sets it", peer=record.name,
    )  # fmt: skip


def _dump(greeting: BaseModel) -> bytes:
    return greeting.model_dump_json().encode()


def _remaining(deadline: float) -> float:
    remaining = deadline - time.monotonic()
    if remaining <= 0:
        raise TimeoutError
    return remaining


def _send(wire: Wire, greeting: _Greeting, deadline: float) -> None:
    wire.sock.settimeout(_remaining(deadline))
    wire.send(_dump(greeting))


_G = TypeVar("_G", bound=_Greeting)


def _expect(wire: Wire, model: type[_G], record: AgentRecord, deadline: float) -> _G:
    try:
        data = None
        while data is None:
            wire.sock.settimeout(_remaining(deadline))
            data = wire.receive()
        return _parse(data, model, record)
    except IntegrityError as exc:
        raise PeerLost(f"peer {record.name!r} answered nonsense", peer=record.name) from exc


def _parse(data: bytes, model: type[_G], record: AgentRecord) -> _G:
    with contextlib.suppress(ValidationError):
        verdict = _Verdict.model_validate_json(data)
        if verdict.refusal:
            raise _refusal(verdict, record)
    return parse(model, data, what="greeting", limit=MAX_GREETING_NBYTES)


def _refusal(verdict: _Verdict, record: AgentRecord) -> RaynixlError:
    if verdict.kind == "restarted":
        return PeerRestarted(f"peer {record.name!r} lives as another incarnation", peer=record.name)
    if verdict.kind == "secret":
        return _stranger(record)
    if verdict.kind == "user":
        return _other_user(record)
    if verdict.kind == "version":
        return ConfigError(
            f"peer {record.name!r} runs another version of raynixl", hint="run one version everywhere", peer=record.name
        )
    return PeerLost(f"peer {record.name!r} refused the connection: {verdict.refusal}", peer=record.name)
