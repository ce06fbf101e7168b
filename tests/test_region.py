"""Region descriptors travel whole, or are refused."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from record_strategies import regions

from raynixl import IntegrityError, RemoteRegion
from raynixl.region import MAX_REGION_NBYTES, check_descriptor

pytestmark = pytest.mark.pure

names = st.text(st.characters(exclude_categories=["C", "Z"]), min_size=1, max_size=20)
remotes = st.builds(RemoteRegion, names, st.binary(min_size=16, max_size=16).map(bytes.hex), regions)


@given(remotes)
def test_descriptors_survive_their_bytes(remote: RemoteRegion) -> None:
    assert RemoteRegion.from_bytes(remote.to_bytes()) == remote


@given(remotes, st.data())
def test_damaged_descriptors_are_refused_or_noticed_by_the_owner(remote: RemoteRegion, data: st.DataObject) -> None:
    whole = remote.to_bytes()
    with pytest.raises(IntegrityError):
        RemoteRegion.from_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
    at, value = data.draw(st.integers(0, len(whole) - 1)), data.draw(st.integers(0, 255))
    try:
        found = RemoteRegion.from_bytes(whole[:at] + bytes([value]) + whole[at + 1 :])
    except IntegrityError:
        return
    if found.record != remote.record:
        with pytest.raises(IntegrityError, match="not its owner's"):
            check_descriptor(found, remote.record)


@given(st.binary(max_size=300))
def test_random_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(IntegrityError):
        RemoteRegion.from_bytes(data)


@pytest.mark.parametrize(
    "data", [None, "text", 5, 10**9, ["bytes"], object(), b"a\nb\n" + b" " * MAX_REGION_NBYTES * 2]
)
def test_what_is_not_a_descriptor_is_refused(data: object) -> None:
    with pytest.raises(IntegrityError):
        RemoteRegion.from_bytes(data)  # type: ignore[arg-type]
