"""Ranges outside a region, and what is no range, are refused before anything is posted."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from agent_scenes import HUGE, N, Scene, naming, refused
from agent_tools import PATIENCE

from raynixl import RangeError
from raynixl.blocks import Blocks

Select = Callable[[Any], Any]

OUTSIDE: dict[str, Select] = {
    "one byte too long": lambda r: r.span(0, N + 1),
    "one byte too far": lambda r: r.span(1, N),
    "the byte behind the last": lambda r: r.span(N, 1),
    "an offset behind the end": lambda r: r.span(N + 1),
    "a block of many": lambda r: r.blocks([0, N - 63, 64], [64, 64, 64]),
    "a page behind the last": lambda r: r.pages([0, 4], 1024),
    "a page larger than the region": lambda r: r.pages([0], N + 1),
    "raw, by one byte": lambda r: Blocks(r, np.array([[N - 1, 2, 0]], np.uint64)),
    "raw, sum wraps": lambda r: Blocks(r, np.array([[1, 2**64 - 1, 0]], np.uint64)),
    "raw, offset wraps": lambda r: Blocks(r, np.array([[2**64 - 1, 2, 0]], np.uint64)),
    "raw, 2^63 each": lambda r: Blocks(r, np.array([[2**63, 2**63, 0]], np.uint64)),
    "raw, second of two": lambda r: Blocks(r, np.array([[0, 1, 0], [N, 1, 0]], np.uint64)),
} | {
    f"{what} of {number}": select
    for number in HUGE
    for what, select in {
        "offset": lambda r, n=number: r.span(n),
        "length": lambda r, n=number: r.span(0, n),
        "length behind an offset": lambda r, n=number: r.span(8, n - 8),
        "block offset": lambda r, n=number: r.blocks([0, n], [8, 8]),
        "block length": lambda r, n=number: r.blocks([0, 8], [8, n]),
        "page id": lambda r, n=number: r.pages([n], 64),
        "page size": lambda r, n=number: r.pages([0], n),
    }.items()
}  # fmt: skip

NOT_NUMBERS: dict[str, Select] = {
    "negative offset": lambda r: r.span(-1),
    "negative length": lambda r: r.span(0, -1),
    "negative block offset": lambda r: r.blocks([-1], [8]),
    "negative block length": lambda r: r.blocks([0], [-8]),
    "negative page": lambda r: r.pages([-1], 64),
    "negative page size": lambda r: r.pages([0], -64),
    "page size 0": lambda r: r.pages([0], 0),
    "most negative": lambda r: r.span(-(2**63)),
    "negative array": lambda r: r.blocks(np.array([-8, 0]), 8),
    "float offset": lambda r: r.span(0.5),
    "float length": lambda r: r.span(0, 8.0),
    "float blocks": lambda r: r.blocks([0.0], [8]),
    "float lengths": lambda r: r.blocks([0], [8.5]),
    "floats as objects": lambda r: r.blocks(np.array([0.5], object), 8),
    "nan": lambda r: r.span(math.nan),
    "nan blocks": lambda r: r.blocks([math.nan], [8]),
    "infinity": lambda r: r.span(0, math.inf),
    "float page": lambda r: r.pages([0.0], 64),
    "float page size": lambda r: r.pages([0], 64.0),
    "text offset": lambda r: r.span("0"),
    "text length": lambda r: r.span(0, "8"),
    "text blocks": lambda r: r.blocks(["0"], ["8"]),
    "text page size": lambda r: r.pages([0], "64"),
    "nothing as offset": lambda r: r.span(None),
    "nothing as blocks": lambda r: r.blocks(None, None),
    "nothing as page size": lambda r: r.pages([0], None),
    "booleans": lambda r: r.blocks([True], [True]),
    "ragged": lambda r: r.blocks([[1, 2], [3]], [8]),
    "more offsets than lengths": lambda r: r.blocks([0, 8, 16], [8, 8]),
    "a step": lambda r: r[0:8:2],
    "an index": lambda r: r[5],
    "a text index": lambda r: r["5"],
    "a float slice": lambda r: r[0.5:8],
    "a text slice": lambda r: r["0":"8"],
    "a raw list": lambda r: Blocks(r, [[0, 8, 0]]),
    "raw signed": lambda r: Blocks(r, np.array([[0, 8, 0]], np.int64)),
    "raw floats": lambda r: Blocks(r, np.array([[0, 8, 0]], np.float64)),
    "raw of two columns": lambda r: Blocks(r, np.array([[0, 8]], np.uint64)),
    "raw flat": lambda r: Blocks(r, np.array([0, 8, 0], np.uint64)),
    "raw nothing": lambda r: Blocks(r, None),
}


def test_ranges_outside_a_region_are_refused(scene: Scene) -> None:
    for region in (scene.mine, scene.theirs):
        for name, select in OUTSIDE.items():
            error = refused(lambda: select(region), RangeError)  # noqa: B023 - called at once
            assert str(N) in error.message or "64-bit" in error.message, (name, str(error))
    scene.check_unharmed()


def test_the_message_names_region_range_and_remedy(scene: Scene) -> None:
    error = refused(lambda: scene.theirs.blocks([0, N - 7], [8, 8]), RangeError)
    assert "block 1 [4089, 4097)" in error.message
    assert "region 'theirs' of 'bob' of 4096 bytes" in error.message
    error = refused(lambda: scene.mine.span(N + 1), RangeError)
    assert "region 'mine' of 'alice' of 4096 bytes" in error.message
    assert "4097" in error.message


def test_what_is_not_a_number_of_bytes_is_refused(scene: Scene) -> None:
    for region in (scene.mine, scene.theirs):
        for name, select in NOT_NUMBERS.items():
            with naming(name):
                refused(lambda: select(region), RangeError)  # noqa: B023 - called at once
    scene.check_unharmed()


def test_blocks_cannot_be_changed_after_they_were_checked(scene: Scene) -> None:
    table = np.array([[0, 8, 0]], np.uint64)
    blocks = Blocks(scene.theirs, table)
    table[0, 0] = N  # would reach behind the region
    assert blocks.table[0, 0] == 0
    with pytest.raises(ValueError, match="read-only"):
        scene.theirs.span(0, 8).table[0, 0] = N
    scene.alice.write(scene.mine[:8], blocks).wait(PATIENCE)
    scene.before[N : N + 8] = scene.around[N : N + 8]
    scene.check_unharmed()
