"""Mutual proof that both ends of a connection know the job's secret; nothing secret crosses the wire.

Challenge and response with HMAC-SHA256 (RFC 2104) over both nonces, names and incarnations, with a label for
each direction, so that neither a replay nor a reflection passes.
"""

from __future__ import annotations

import hashlib
import hmac
import os
from dataclasses import dataclass

NONCE_NBYTES = 16
_PURPOSE = b"raynixl link 1"


@dataclass(frozen=True, slots=True)
class Identity:
    """Who stands at one end of a connection."""

    name: str
    incarnation: str
    nonce: str

    @staticmethod
    def fresh(name: str, incarnation: str) -> Identity:
        """Return an identity with a nonce never used before."""
        return Identity(name, incarnation, os.urandom(NONCE_NBYTES).hex())


def prove(secret: bytes, role: str, client: Identity, server: Identity) -> str:
    """Return the proof that the holder of `secret` gives in `role` ('client' or 'server')."""
    parts = (
        role,
        client.name,
        client.incarnation,
        client.nonce,
        server.name,
        server.incarnation,
        server.nonce,
    )
    text = b"".join(len(part.encode()).to_bytes(4, "big") + part.encode() for part in parts)
    return hmac.new(hashlib.sha256(_PURPOSE + secret).digest(), text, hashlib.sha256).hexdigest()


def is_proof(secret: bytes, proof: str, role: str, client: Identity, server: Identity) -> bool:
    """Compare a proof in constant time."""
    return hmac.compare_digest(prove(secret, role, client, server), proof)
