"""Records are parsed or refused: truncated, oversized, of another version, mutated, random."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from record_strategies import fields, regions, texts

from raynixl import ConfigError, IntegrityError, MemoryKind
from raynixl.record import MAX_RECORD_NBYTES, RECORD_VERSION, AgentRecord, RegionRecord, check_labels, check_name

pytestmark = pytest.mark.pure

records = st.builds(
    AgentRecord, name=texts.filter(bool), incarnation=st.binary(min_size=16, max_size=16).map(bytes.hex), host=texts,
    pid=st.integers(0, 2**31), started=st.floats(0, 2e9), expires=st.floats(0, 2e9),
    labels=st.dictionaries(texts, texts, max_size=3), backends=st.dictionaries(texts, fields, max_size=3),
    regions=st.lists(regions, max_size=3).map(tuple),
)  # fmt: skip
ONE = AgentRecord(name="alice", incarnation="0" * 32, host="here", pid=1, started=1.0)


@given(records)
def test_records_survive_their_bytes(record: AgentRecord) -> None:
    assert AgentRecord.from_bytes(record.to_bytes()) == record


@given(records, st.data())
def test_damaged_records_are_refused_or_still_records(record: AgentRecord, data: st.DataObject) -> None:
    whole = record.to_bytes()
    cut = data.draw(st.integers(0, len(whole) - 1))
    with pytest.raises(IntegrityError):
        AgentRecord.from_bytes(whole[:cut])
    at, value = data.draw(st.integers(0, len(whole) - 1)), data.draw(st.integers(0, 255))
    try:
        AgentRecord.from_bytes(whole[:at] + bytes([value]) + whole[at + 1 :])
    except IntegrityError:
        return


@given(st.one_of(st.binary(max_size=300), st.text().map(lambda text: text.encode("utf-8", "surrogatepass"))))
def test_random_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(IntegrityError):
        AgentRecord.from_bytes(data)


_json = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=8), inner, max_size=3)),
    max_leaves=8,
)


@given(st.sampled_from(sorted(AgentRecord.model_fields)), _json)
def test_fields_of_other_types_are_refused_or_still_records(field: str, value: object) -> None:
    text = json.loads(ONE.model_dump_json()) | {field: value}
    try:
        found = AgentRecord.from_bytes(json.dumps(text).encode())
    except IntegrityError:
        return
    assert found.version == RECORD_VERSION


@pytest.mark.parametrize("version", [0, 2, -1, 10**30])
def test_other_versions_are_refused(version: int) -> None:
    text = json.loads(ONE.model_dump_json()) | {"version": version}
    with pytest.raises(IntegrityError) as found:
        AgentRecord.from_bytes(json.dumps(text).encode())
    assert found.value.hint


@pytest.mark.parametrize("data", [None, "text", 5, ["bytes"]])
def test_what_is_not_bytes_is_refused(data: object) -> None:
    with pytest.raises(IntegrityError, match="not bytes"):
        AgentRecord.from_bytes(data)  # type: ignore[arg-type]


def test_oversized_records_are_refused() -> None:
    with pytest.raises(IntegrityError, match="more than"):
        AgentRecord.from_bytes(ONE.to_bytes() + b" " * MAX_RECORD_NBYTES)
    assert AgentRecord.from_bytes(memoryview(ONE.to_bytes())) == ONE  # type: ignore[arg-type]


def test_a_record_with_too_many_regions_leaves_some_out() -> None:
    many = tuple(RegionRecord(id=i, generation=1, name="n" * 150, kind=MemoryKind.DRAM, nbytes=1) for i in range(2000))
    data = ONE.model_copy(update={"regions": many}).to_bytes()
    assert len(data) <= MAX_RECORD_NBYTES
    kept = AgentRecord.from_bytes(data).regions
    assert 0 < len(kept) < len(many)
    assert kept == many[: len(kept)]


@given(st.text(max_size=8))
def test_names_that_pass_can_be_published(name: str) -> None:
    try:
        check_name(name)
    except ConfigError:
        return
    assert AgentRecord.from_bytes(ONE.model_copy(update={"name": name}).to_bytes()).name == name


def test_labels_are_copied_and_checked() -> None:
    given_ = {"actor": "a1"}
    assert check_labels(given_) == given_
    assert check_labels(given_) is not given_
    assert check_labels(None) == {}
    for bad in ({"x": "\ud800"}, {"x": None}, ["x"], "x", {"y" * 201: ""}):
        with pytest.raises(ConfigError):
            check_labels(bad)  # type: ignore[arg-type]
