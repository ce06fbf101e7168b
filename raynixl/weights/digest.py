"""Digests: one for each chunk, that depends on the chunk's number, and one for a whole version."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from raynixl.weights.workers import run_workers

DIGEST_NBYTES = 16


def chunk_digest(number: int, chunk: Any) -> bytes:
    """Return the digest of one chunk. Its number is the seed, so that swapped chunks do not pass.

    Runs without the interpreter's lock, so several threads digest several chunks.
    """
    return xxhash.xxh3_128_digest(chunk, seed=number)


def version_digest(digests: bytes) -> str:
    """Return the digest of a version from those of its chunks, one after the other."""
    return xxhash.xxh3_128_hexdigest(digests)


def digest_chunks(arenas: Sequence[NDArray[np.uint8]], chunks: NDArray[np.int64], *, threads: int) -> bytes:
    """Return the digests of all chunks of a version, one after the other, made by several threads."""
    out = bytearray(DIGEST_NBYTES * len(chunks))
    table: list[tuple[int, int, int]] = [tuple(row) for row in chunks.tolist()]

    def one(number: int) -> None:
        arena, offset, nbytes = table[number]
        digest = chunk_digest(number, arenas[arena][offset : offset + nbytes])
        out[number * DIGEST_NBYTES : (number + 1) * DIGEST_NBYTES] = digest

    run_workers(one, len(chunks), threads=threads)
    return bytes(out)
