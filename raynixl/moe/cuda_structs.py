"""Structs that the kernels of kernels/*.cu share with the host: what stays, what is pinned, and arguments of launches.

Addresses are plain numbers; 0 is none, and `NOWHERE` as an offset in a row means that the field is not there.
kernels/structs.cu declares the same structs and asserts their sizes.
"""

from __future__ import annotations

import ctypes
import enum
from ctypes import c_uint32, c_uint64
from typing import Final

RANKS: Final = 64
"""Ranks of a layer on GPUs at most: sets of them are 64 bits."""

COLUMNS: Final = 8
"""Columns at most that travel with a row beside ids, weights and token: x, its scales, and what is extra."""

LOCAL_EXPERTS: Final = 2048
"""Experts of one rank at most."""

TOPK: Final = 64
"""Experts of one token at most."""

STATUSES: Final = 8
"""More than there are of `Refusal`: `refusals` of a page are an operation's number times this, and why."""

LINE_NBYTES: Final = 64
NOWHERE: Final = 0xFFFFFFFF


class Kind(enum.IntEnum):
    """Which lines an operation waits for."""

    DISPATCH = 0
    COMBINE = 1


class Refusal(enum.IntEnum):
    """Why rows of a rank are not used: `RANGE`, `CONFIG` and `GROWS` its line says, the others its reader finds."""

    FINE = 0
    RANGE = 1
    CONFIG = 2
    DIFFERS = 3
    """Its call is signed otherwise than ours."""
    DAMAGED = 4
    """Its line names more rows than there can be, or others than went there."""
    GROWS = 5
    """It needs larger windows: not a mistake where all do."""


class Giving(enum.IntEnum):
    """What goes back for each row that came."""

    ROWS = 0
    """Its row of y."""
    SUMS = 1
    """The sum of its pairs, whose rows of y a table names, weighted, rounded once."""
    PAIRS = 2
    """Its pairs, each to a place of its own."""


class Summing(enum.IntEnum):
    """What a token gets."""

    ROWS = 0
    """The sum of what its holders sent, by ascending rank."""
    PAIRS = 1
    """The weighted sum of its pairs, in order of k."""
    APART = 2
    """Its pairs, each in a row of its own, zeros for those that did not come."""


class Column(ctypes.Structure):
    """Rows of a tensor, one for each token or row; `at` is where they lie within rows that travel."""

    _fields_ = (("address", c_uint64), ("stride", c_uint64), ("nbytes", c_uint32), ("at", c_uint32))


class Line(ctypes.Structure):
    """What a rank writes behind the rows of one operation: the number last."""

    _fields_ = (
        ("number", c_uint64), ("mask", c_uint64), ("signature", c_uint64), ("count", c_uint32), ("status", c_uint32),
        ("rest", c_uint64 * 4),
    )  # fmt: skip


class Layer(ctypes.Structure):
    """What stays between launches, in memory of the GPU. The host writes it while no kernel of the layer runs.

    Up to `ranks` it is what the host has settled; `operation` and what follows are the kernels' own: the host sets
    `operation` and `base` to a number above all former ones of these windows, `mask` to who takes no part, others to 0.
    """

    _fields_ = (
        ("windows", c_uint64 * RANKS),  # by rank, as this GPU reaches it
        ("lines_at", c_uint64 * 2), ("notices_at", c_uint64), ("waits_at", c_uint64), ("loads_at", c_uint64),
        ("in_at", c_uint64), ("back_at", c_uint64), ("in_nbytes", c_uint64), ("back_nbytes", c_uint64),  # of a side
        ("page", c_uint64),
        ("me", c_uint32), ("capacity", c_uint32), ("loads_width", c_uint32), ("ranks", c_uint32),
        ("operation", c_uint64), ("turns", c_uint64 * 2), ("mask", c_uint64), ("masked", c_uint64), ("base", c_uint64),
        ("began", c_uint64), ("since", c_uint64), ("found", c_uint64), ("told", c_uint64), ("came", c_uint64),
        ("verdicts", c_uint64 * RANKS), ("waits", c_uint64 * RANKS), ("counters", c_uint32 * RANKS),
        ("ended", c_uint32), ("spare", c_uint32),
    )  # fmt: skip


class Page(ctypes.Structure):
    """What kernels tell the host, and it them, in pinned memory of the host. Zeros at first."""

    _fields_ = (
        ("ticket", c_uint64),  # of the last `arrive`, written behind all that it tells
        ("operation", c_uint64),  # the last one that has ended
        ("turns", c_uint64 * 2),  # dispatches and combines that have ended
        ("lost", c_uint64),  # ranks that were masked here so far
        ("masked", c_uint64),  # 1 + the rank that has masked us
        ("excused", c_uint64),  # the host's: ranks that need not be waited for
        ("refused", c_uint64),  # grows behind what is written to `refusals`
        ("status", c_uint32 * RANKS),  # `arrive`: what is wrong with each rank's line
        ("counts", c_uint32 * RANKS),  # `arrive` of a dispatch: rows by source
        ("experts", c_uint32 * LOCAL_EXPERTS),  # likewise: pairs by local expert
        (
            "refusals",
            c_uint64 * RANKS,
        ),  # by rank: the last operation in which its line was refused, and why; `STATUSES`
    )


class Send(ctypes.Structure):
    """Arguments of raynixl_moe_send."""

    _fields_ = (
        ("layer", c_uint64), ("columns", Column * COLUMNS), ("ids", c_uint64), ("weights", c_uint64),
        ("holders", c_uint64), ("local", c_uint64), ("row_of", c_uint64), ("holder_of", c_uint64), ("sent", c_uint64),
        ("signature", c_uint64),
        ("columns_count", c_uint32), ("row_nbytes", c_uint32), ("ids_at", c_uint32), ("weights_at", c_uint32),
        ("token_at", c_uint32), ("ids_nbytes", c_uint32), ("tokens", c_uint32), ("topk", c_uint32),
        ("experts", c_uint32), ("loads_count", c_uint32), ("ranks", c_uint32), ("status", c_uint32),
    )  # fmt: skip


class Arrive(ctypes.Structure):
    """Arguments of raynixl_moe_arrive."""

    _fields_ = (
        ("layer", c_uint64), ("signature", c_uint64), ("deadline", c_uint64), ("ticket", c_uint64), ("sent", c_uint64),
        ("kind", c_uint32), ("ranks", c_uint32), ("loads_count", c_uint32), ("spare", c_uint32),
    )  # fmt: skip


class Order(ctypes.Structure):
    """Arguments of raynixl_moe_order."""

    _fields_ = (
        ("layer", c_uint64), ("columns", Column * COLUMNS), ("row_ids", c_uint64), ("expected", c_uint64),
        ("positions", c_uint64), ("offsets", c_uint64), ("place_weights", c_uint64),
        ("columns_count", c_uint32), ("row_nbytes", c_uint32), ("ids_at", c_uint32), ("topk", c_uint32),
        ("ranks", c_uint32), ("local_experts", c_uint32), ("alignment", c_uint32), ("spare", c_uint32),
    )  # fmt: skip


class Take(ctypes.Structure):
    """Arguments of raynixl_moe_take."""

    _fields_ = (
        ("layer", c_uint64), ("columns", Column * COLUMNS), ("ids", c_uint64), ("row_ids", c_uint64),
        ("weights", c_uint64), ("row_weights", c_uint64), ("tokens", c_uint64), ("counts", c_uint64),
        ("experts", c_uint64), ("expected", c_uint64), ("positions", c_uint64), ("place_weights", c_uint64),
        ("waited", c_uint64),  # float64 by rank: the seconds are added that it was waited for
        ("signature", c_uint64), ("deadline", c_uint64),
        ("columns_count", c_uint32), ("row_nbytes", c_uint32), ("ids_at", c_uint32), ("weights_at", c_uint32),
        ("token_at", c_uint32), ("ids_nbytes", c_uint32), ("topk", c_uint32), ("ranks", c_uint32),
        ("loads_count", c_uint32), ("is_packed", c_uint32), ("waits", c_uint32), ("waited_count", c_uint32),
    )  # fmt: skip


class Give(ctypes.Structure):
    """Arguments of raynixl_moe_give."""

    _fields_ = (
        ("layer", c_uint64), ("y", c_uint64), ("y_stride", c_uint64), ("beside", c_uint64), ("pairs", c_uint64),
        ("weights", c_uint64), ("row_ids", c_uint64), ("counts", c_uint64), ("signature", c_uint64),
        ("hidden", c_uint32), ("dtype", c_uint32), ("item_nbytes", c_uint32), ("beside_at", c_uint32),
        ("topk", c_uint32), ("ranks", c_uint32), ("mode", c_uint32), ("is_packed", c_uint32), ("status", c_uint32),
        ("y_rows", c_uint32),
    )  # fmt: skip


class Sum(ctypes.Structure):
    """Arguments of raynixl_moe_sum."""

    _fields_ = (
        ("layer", c_uint64), ("row_of", c_uint64), ("holder_of", c_uint64), ("sent", c_uint64), ("weights", c_uint64),
        ("out", c_uint64), ("out_stride", c_uint64), ("biases", c_uint64 * 2), ("bias_strides", c_uint64 * 2),
        ("out_weights", c_uint64), ("waited", c_uint64), ("signature", c_uint64), ("deadline", c_uint64),
        ("tokens", c_uint32), ("topk", c_uint32), ("ranks", c_uint32), ("hidden", c_uint32), ("dtype", c_uint32),
        ("out_dtype", c_uint32), ("bias_dtype", c_uint32), ("bias_count", c_uint32), ("item_nbytes", c_uint32),
        ("beside_at", c_uint32), ("mode", c_uint32), ("renormalises", c_uint32), ("waits", c_uint32),
        ("waited_count", c_uint32),
    )  # fmt: skip


class Mask(ctypes.Structure):
    """Arguments of raynixl_moe_mask. Ranks in `told` hear that they are masked: their memory must be there still."""

    _fields_ = (("layer", c_uint64), ("mask", c_uint64), ("told", c_uint64))
