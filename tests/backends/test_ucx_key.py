"""Sealed keys and worker addresses: what was sealed comes out, and whatever else arrives is an IntegrityError."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

import pytest
import xxhash
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from raynixl import IntegrityError
from raynixl.backends.ucx_key import MAX_KEY_NBYTES, MAX_RAILS, Keys, seal_workers, unseal_workers

pytestmark = pytest.mark.pure

incarnations = st.binary(min_size=16, max_size=16).map(bytes.hex)
parts = st.lists(st.binary(min_size=1, max_size=80), min_size=1, max_size=MAX_RAILS).map(tuple)


@st.composite
def keys(draw: st.DrawFn) -> Keys:
    """Any keys that an agent can have."""
    nbytes = draw(st.integers(1, 2**63 - 1))
    return Keys(
        draw(incarnations), draw(st.integers(0, 2**63 - 1)), draw(st.integers(0, 2**64 - nbytes)), nbytes, draw(parts)
    )


def unseal(data: bytes, like: Keys, **other: Any) -> Keys:
    """Open a seal as one who expects these keys, but for what is said otherwise."""
    expected = {"incarnation": like.incarnation, "region": like.region, "nbytes": like.nbytes, **other}
    return Keys.unseal(data, **expected)


ONE = Keys("00112233445566778899aabbccddeeff", 7, 0x7F0000001000, 4096, (b"rail 0", b"rail 1"))


@settings(deadline=None)
@given(keys())
def test_keys_survive_the_way(sealed: Keys) -> None:
    assert unseal(sealed.seal(), sealed) == sealed


@settings(deadline=None)
@given(incarnations, parts)
def test_worker_addresses_survive_the_way(incarnation: str, workers: tuple[bytes, ...]) -> None:
    assert unseal_workers(seal_workers(incarnation, workers), incarnation=incarnation) == workers


def test_the_largest_keys_survive_the_way() -> None:
    large = Keys(ONE.incarnation, 0, 2**64 - 1, 1, (b"k" * MAX_KEY_NBYTES,) * MAX_RAILS)
    assert unseal(large.seal(), large) == large


@pytest.mark.parametrize("mask", [0x01, 0x80, 0xFF])
def test_any_flipped_byte_is_found_out(mask: int) -> None:
    sealed, workers = ONE.seal(), seal_workers(ONE.incarnation, ONE.packed)
    for at in range(len(sealed)):
        with pytest.raises(IntegrityError):
            unseal(sealed[:at] + bytes([sealed[at] ^ mask]) + sealed[at + 1 :], ONE)
    for at in range(len(workers)):
        with pytest.raises(IntegrityError):
            unseal_workers(workers[:at] + bytes([workers[at] ^ mask]) + workers[at + 1 :], incarnation=ONE.incarnation)


def test_every_truncation_is_found_out() -> None:
    sealed, workers = ONE.seal(), seal_workers(ONE.incarnation, ONE.packed)
    for end in range(len(sealed)):
        with pytest.raises(IntegrityError):
            unseal(sealed[:end], ONE)
    for end in range(len(workers)):
        with pytest.raises(IntegrityError):
            unseal_workers(workers[:end], incarnation=ONE.incarnation)


@settings(deadline=None)
@given(st.binary(min_size=1, max_size=200))
def test_every_extension_is_found_out(more: bytes) -> None:
    for data in (ONE.seal() + more, more + ONE.seal()):
        with pytest.raises(IntegrityError):
            unseal(data, ONE)


@settings(deadline=None)
@given(st.binary(max_size=300))
def test_random_bytes_are_found_out(data: bytes) -> None:
    with pytest.raises(IntegrityError):
        unseal(data, ONE)
    with pytest.raises(IntegrityError):
        unseal_workers(data, incarnation=ONE.incarnation)


@settings(deadline=None)
@given(keys(), keys())
def test_keys_of_something_else_are_refused(one: Keys, other: Keys) -> None:
    assume((one.incarnation, one.region, one.nbytes) != (other.incarnation, other.region, other.nbytes))
    with pytest.raises(IntegrityError):
        unseal(one.seal(), other)


@pytest.mark.parametrize("other", [{"incarnation": "ff" * 16}, {"region": 8}, {"nbytes": 4095}])
def test_another_incarnation_region_or_length_is_refused(other: dict[str, Any]) -> None:
    with pytest.raises(IntegrityError, match="region 7 of 4096 bytes"):
        unseal(ONE.seal(), ONE, **other)


def test_workers_of_another_incarnation_are_refused() -> None:
    with pytest.raises(IntegrityError, match="another incarnation"):
        unseal_workers(seal_workers("ff" * 16, [b"w"]), incarnation=ONE.incarnation)


def test_one_sort_is_not_taken_for_the_other() -> None:
    with pytest.raises(IntegrityError):
        unseal_workers(ONE.seal(), incarnation=ONE.incarnation)
    with pytest.raises(IntegrityError):
        unseal(seal_workers(ONE.incarnation, ONE.packed), ONE)


def forged(change: Callable[[bytearray], object]) -> bytes:
    """The seal of ONE with a change, and a checksum that is right for it: what only a faulty agent sends."""
    body = bytearray(ONE.seal()[:-16])
    change(body)
    struct.pack_into("<I", body, 8, len(body) + 16)
    return bytes(body) + xxhash.xxh3_128_digest(bytes(body))


@pytest.mark.parametrize(
    "change",
    [
        lambda body: struct.pack_into("<H", body, 4, 2),
        lambda body: struct.pack_into("<H", body, 6, 0),
        lambda body: struct.pack_into("<H", body, 6, 1),
        lambda body: struct.pack_into("<H", body, 6, 3),
        lambda body: struct.pack_into("<H", body, 6, 0xFFFF),
        lambda body: struct.pack_into("<H", body, 52, 0xFFFF),
        lambda body: struct.pack_into("<H", body, 52, 5),
        lambda body: struct.pack_into("<Q", body, 36, 2**64 - 4095),
        lambda body: body.extend(b"\0"),
        lambda body: (body.extend(b"\0\0"), struct.pack_into("<H", body, 6, 3)),
    ],
    ids=["version", "no rails", "fewer rails", "more rails", "too many rails", "long part", "short part",
         "ends beyond all memory", "trailing byte", "empty part"],
)  # fmt: skip
def test_what_was_sealed_wrongly_is_refused_although_its_checksum_is_right(
    change: Callable[[bytearray], object],
) -> None:
    assert unseal(forged(lambda _: None), ONE) == ONE
    with pytest.raises(IntegrityError):
        unseal(forged(change), ONE)
