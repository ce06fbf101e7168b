"""Hypothesis strategies of records."""

from __future__ import annotations

from hypothesis import strategies as st

from raynixl import MemoryKind
from raynixl.record import RegionRecord

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
fields = st.dictionaries(texts, st.one_of(texts, st.integers(-(2**70), 2**70)), max_size=4)
regions = st.builds(
    RegionRecord, id=st.integers(0, 2**63 - 1), generation=st.integers(0, 2**63 - 1), name=texts,
    kind=st.sampled_from(MemoryKind), device=st.integers(0, 1023), nbytes=st.integers(1, 2**63 - 1),
    writable=st.booleans(), keys=st.dictionaries(texts, fields, max_size=3),
)  # fmt: skip
