"""Sealed keys and worker addresses: what was damaged, cut, or is another's is refused before UCX sees it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raynixl import IntegrityError
from raynixl.backends.ucx_key import MAX_RAILS, Keys, seal_workers, unseal_workers

ME, OTHER = "ab" * 16, "cd" * 16
KEYS = Keys(ME, 7, 0x7F00_0000_0000, 1 << 30, (b"first rail's", b"second"))
WORKERS = (b"an address", b"another")


def open_keys(data: bytes) -> Keys:
    """Open what should be the keys of region 7."""
    return Keys.unseal(data, incarnation=ME, region=7, nbytes=1 << 30)


def open_workers(data: bytes) -> tuple[bytes, ...]:
    """Open what should be the workers of that agent."""
    return unseal_workers(data, incarnation=ME)


SEALED: list[Any] = [
    pytest.param(KEYS.seal(), open_keys, id="keys"),
    pytest.param(seal_workers(ME, WORKERS), open_workers, id="workers"),
]


def test_what_was_sealed_is_opened() -> None:
    assert open_keys(KEYS.seal()) == KEYS
    assert open_workers(seal_workers(ME, WORKERS)) == WORKERS


@pytest.mark.parametrize(("sealed", "opener"), SEALED)
def test_a_change_of_any_byte_is_found(sealed: bytes, opener: Callable[[bytes], Any]) -> None:
    for at in range(len(sealed)):
        for flip in (1, 0x80, 0xFF):
            damaged = bytearray(sealed)
            damaged[at] ^= flip
            with pytest.raises(IntegrityError):
                opener(bytes(damaged))


@pytest.mark.parametrize(("sealed", "opener"), SEALED)
def test_every_cut_and_every_addition_is_found(sealed: bytes, opener: Callable[[bytes], Any]) -> None:
    for end in range(len(sealed)):
        with pytest.raises(IntegrityError):
            opener(sealed[:end])
    for more in (b"\0", b"x" * 100, sealed):
        with pytest.raises(IntegrityError):
            opener(sealed + more)


@given(st.binary(max_size=300))
def test_random_bytes_are_refused(data: bytes) -> None:
    for opener in (open_keys, open_workers):
        with pytest.raises(IntegrityError):
            opener(data)


@pytest.mark.parametrize(
    "wanted",
    [
        {"incarnation": OTHER, "region": 7, "nbytes": 1 << 30},
        {"incarnation": ME, "region": 8, "nbytes": 1 << 30},
        {"incarnation": ME, "region": 7, "nbytes": (1 << 30) - 1},
    ],
    ids=["another incarnation", "another region", "another length"],
)
def test_keys_of_something_else_are_refused(wanted: dict[str, Any]) -> None:
    with pytest.raises(IntegrityError, match="came for region"):
        Keys.unseal(KEYS.seal(), **wanted)


def test_workers_of_another_incarnation_are_refused() -> None:
    with pytest.raises(IntegrityError, match="another incarnation"):
        unseal_workers(seal_workers(OTHER, WORKERS), incarnation=ME)


def test_one_is_not_taken_for_the_other() -> None:
    with pytest.raises(IntegrityError):
        open_workers(KEYS.seal())
    with pytest.raises(IntegrityError):
        open_keys(seal_workers(ME, WORKERS))


@pytest.mark.parametrize("parts", [(), (b"",), (b"x", b""), (b"x",) * (MAX_RAILS + 1)], ids=len)
def test_a_count_of_rails_that_makes_no_sense_is_refused(parts: tuple[bytes, ...]) -> None:
    with pytest.raises(IntegrityError):
        open_workers(seal_workers(ME, parts))


def test_a_region_beyond_all_memory_is_refused() -> None:
    keys = Keys(ME, 7, (1 << 64) - 4096, 8192, (b"k",))
    with pytest.raises(IntegrityError, match="beyond all memory"):
        Keys.unseal(keys.seal(), incarnation=ME, region=7, nbytes=8192)
