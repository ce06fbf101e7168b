"""A stranger at an agent's socket: speaks the greeting by hand, rightly or wrongly."""

from __future__ import annotations

import json
import secrets
import socket
from types import TracebackType
from typing import Any

from raynixl import Agent
from raynixl.authentication import Identity, prove

PATIENCE = 20.0


def address(agent: Agent) -> str:
    """Where the agent listens."""
    return f"\0raynixl/{agent.incarnation}"


class Stranger:
    """One connection to an agent's socket."""

    def __init__(self, agent: Agent, *, name: str = "stranger") -> None:
        self.agent = agent
        self.me = Identity.fresh(name, secrets.token_hex(16))
        self.sock = self._connect()

    def __enter__(self) -> Stranger:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.sock.close()

    def _connect(self) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        sock.settimeout(PATIENCE)
        sock.connect(address(self.agent))
        return sock

    def hello(self, **changes: Any) -> dict[str, Any]:
        """What a greeting begins with."""
        said = {"version": 1, "target": self.agent.incarnation, "name": self.me.name,
                "incarnation": self.me.incarnation, "nonce": self.me.nonce}  # fmt: skip
        return said | changes

    def say(self, words: dict[str, Any]) -> None:
        """Send one packet of the greeting."""
        self.sock.send(json.dumps(words).encode())

    def hear(self) -> dict[str, Any]:
        """Receive one packet of the greeting; empty if the agent hung up."""
        try:
            data = self.sock.recv(4096)
        except ConnectionResetError:
            return {}
        return json.loads(data) if data else {}

    def challenge(self) -> dict[str, Any]:
        """Say hello and return the agent's challenge."""
        self.say(self.hello())
        return self.hear()

    def proof(self, challenge: dict[str, Any], secret: bytes, role: str = "client") -> str:
        """The proof that the holder of a secret gives."""
        server = Identity(challenge["name"], challenge["incarnation"], challenge["nonce"])
        return prove(secret, role, self.me, server)

    def enter(self, secret: bytes = b"", probe: int = 0) -> None:
        """Go through the whole greeting, as somebody who knows the secret."""
        challenge = self.challenge()
        self.say({"proof": self.proof(challenge, secret), "probe": probe})
        assert self.hear() == {"refusal": "", "kind": ""}
