"""The cost model that chooses how to broadcast. Pure."""

from __future__ import annotations

from dataclasses import dataclass

CHUNK_NBYTES = 8 << 20


@dataclass(frozen=True, slots=True)
class Links:
    """What moves bytes between the ranks of a group.

    `source_gbps` is what one source can give to all its readers together, `link_gbps` what one reader gets alone,
    `step_seconds` what one message and one read cost before the first byte moves.
    """

    source_gbps: float
    link_gbps: float
    step_seconds: float


ONE_HOST = Links(source_gbps=40.0, link_gbps=10.0, step_seconds=100e-6)
"""Readers on one host copy with cores of their own; memory, not the source, is what they share."""
NETWORK = Links(source_gbps=10.0, link_gbps=10.0, step_seconds=100e-6)
"""Every byte leaves through the source's own network card."""


def direct_seconds(nbytes: int, world: int, links: Links) -> float:
    """Predict a direct broadcast: all readers share what the source gives."""
    readers = max(1, world - 1)
    gbps = min(links.link_gbps, links.source_gbps / readers)
    return links.step_seconds + nbytes / (gbps * 1e9)


def chain_seconds(nbytes: int, world: int, links: Links, *, chunk_nbytes: int = CHUNK_NBYTES) -> float:
    """Predict a pipelined chain: the chunks one after the other, plus one chunk for each further rank."""
    gbps = min(links.link_gbps, links.source_gbps)
    chunk = min(nbytes, chunk_nbytes)
    slots = max(1, -(-nbytes // max(1, chunk))) + max(0, world - 2)
    return slots * (links.step_seconds + chunk / (gbps * 1e9))


def choose_broadcast(nbytes: int, world: int, links: Links) -> str:
    """Return 'direct' or 'chain', whichever is predicted to end first; direct where they tie."""
    return "chain" if chain_seconds(nbytes, world, links) < direct_seconds(nbytes, world, links) else "direct"
