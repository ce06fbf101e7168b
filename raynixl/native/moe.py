"""The interface of the part of the core that expert parallelism needs: routes, rows, lines, and sums of rows.

Addresses are plain integers: whoever gives them answers for the memory behind them. Arrays are C-contiguous and of the
types named, or it is a TypeError. What takes long releases the GIL.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final, Protocol, TypeAlias

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from raynixl.native import Gate

__all__ = ["BF16", "BELL_NBYTES", "F16", "F32", "F64", "SENT", "MoeCore", "Way"]

F32: Final = 0
BF16: Final = 1
F16: Final = 2
F64: Final = 3

BELL_NBYTES: Final = 8
"""A bell, zero at first and aligned to as much: how often it has rung, and when to wake who sleeps."""


SENT: Final = 0
NO_ROWS: Final = 1
NO_LINE: Final = 2
"""What became of one peer's rows and line: rows that cannot be put have no line behind them."""


class Way(Protocol):
    """How rows and the line behind them reach one peer: made once for each slot of its, and used again and again."""

    @property
    def capacity(self) -> int:
        """How many rows the slot holds; 0 where there is none."""


class WayMaker(Protocol):
    """The class `Way` of an implementation."""

    def __call__(
        self,
        cells: tuple[int, int],
        bell: int,
        board: Sequence[Gate],
        slot: int,
        base: int,
        capacity: int,
        starts: Sequence[int],
        memory: Sequence[Gate],
    ) -> Way:
        """Know where lines of even and odd numbers go, and rows: field by field from `base + starts` on.

        What is stored for a line is inside the gates of the board, what is stored for rows inside those of the memory.

        Raises:
            ValueError: an address that is not a multiple of 8.
        """


_Send: TypeAlias = tuple[Way, int, int, int, int]  # inside MoeCore, `Way` would name its own member


class MoeCore(Protocol):
    """What both cores offer to expert parallelism."""

    @property
    def Way(self) -> WayMaker:  # noqa: N802 - a class
        """Make a way to a peer."""

    @property
    def REDUCE_VARIANTS(self) -> int:  # noqa: N802 - a module's constant
        """How many sets of instructions `reduce_rows` can use on this machine."""

    def route(  # noqa: PLR0913, PLR0917 - one table, column by column
        self,
        ids: npt.NDArray[np.int64],
        weights: npt.NDArray[np.float32] | None,
        holder: npt.NDArray[np.int32],
        local: npt.NDArray[np.int32],
        order: npt.NDArray[np.int32],
        counts: npt.NDArray[np.int64],
        starts: npt.NDArray[np.int64],
        positions: npt.NDArray[np.int32],
        row_ids: npt.NDArray[np.int32],
        row_weights: npt.NDArray[np.float32] | None,
    ) -> int:
        """Make one row for each token and rank that holds an expert of it, by rank, then token; return their number.

        In goes: ids (tokens, topk), -1 for none, and their weights; for each expert its rank, -1 for nobody (the pair
        is dropped), and its local id there. Out comes: the token of each row, in `order`; how many rows each rank gets
        (there are as many ranks as counts); the rows of token t, `positions[starts[t]:starts[t + 1]]`, ascending; and
        for each row the local ids and weights of its token at that rank, -1 and 0 elsewhere.

        Raises:
            ValueError: an id, or a holder, that does not exist; too little room; arrays that do not fit together. What
                comes out is undefined then.
        """

    def put_rows(
        self,
        src: int,
        src_stride: int,
        row_nbytes: int,
        index: npt.NDArray[np.int32] | None,
        dst: int,
        gates: Sequence[Gate],
        count: int,
    ) -> int:
        """Copy rows `index[i]` of a source (or i) to `dst + i * row_nbytes`, inside the gates; -1 writes zeros.

        Returns DONE, or the code of a gate that refused (then nothing was copied) or stopped it (then some was).

        Raises:
            ValueError: the index is shorter than `count`.
        """

    def put_fields(
        self,
        fields: npt.NDArray[np.uint64],
        first: int,
        starts: npt.NDArray[np.uint64],
        base: int,
        offset: int,
        gates: Sequence[Gate],
        count: int,
    ) -> int:
        """Copy `count` rows from `first` on of several fields, inside the gates.

        fields: for each (source, stride, bytes of a row, address of an index of int32 or 0): row i is index[i] of the
        source (-1: zeros), or i. Those of field f go to `base + starts[f] + offset * bytes` on, end to end.
        Returns as `put_rows` does.

        Raises:
            ValueError: not as many starts as fields.
        """

    def send_rows(
        self,
        sends: Sequence[_Send],
        total: int,
        fields: npt.NDArray[np.uint64],
        line: npt.NDArray[np.uint8],
        told_at: int,
    ) -> list[int]:
        """Put each peer's rows as `put_fields` does, and post the line behind them, one peer after another.

        sends: for each (way, first row, how many, the row at which they begin there, `back`). The line begins with its
        number; from `told_at` on five uint32 are stored for each peer: slot and offset of its rows (all bits set, and
        0, without rows), how many, `back` and `total`. Returns for each SENT, NO_ROWS (they have no room, or a gate
        refused or stopped them: no line was posted) or NO_LINE (a gate refused).

        Raises:
            ValueError: fields of another form than those of `put_fields`, or a line without room for what it tells.
        """

    def take_ids(
        self,
        source: int,
        copy: npt.NDArray[np.int32],
        wide: npt.NDArray[np.int64] | None,
        counts: npt.NDArray[np.int64],
    ) -> None:
        """Copy int32 ids (rows, topk) from an address, also to 64 bits, and count how often each occurs, -1 aside.

        Raises:
            ValueError: an id below -1, or for which there is no count. What comes out is undefined then.
        """

    def post_line(
        self,
        address: int,
        payload: bytes | npt.NDArray[np.uint8],
        number: int,
        bell: int,
        gates: Sequence[Gate] = ...,
    ) -> int:
        """Write the payload to `address + 8`, then the number to `address`, then ring the bell, if it is not 0.

        Whoever sees the number sees the payload. Every line that somebody waits for rings exactly once: who sleeps on
        the bell is woken when as many rings have come as lines were missing. Returns DONE, or the code of a gate that
        refused: then nothing was written.

        Raises:
            ValueError: an address that is not a multiple of 8.
        """

    def ring(self, bell: int) -> None:
        """Ring without a line: everybody who sleeps on it wakes, and looks again."""

    def wait_lines(
        self,
        addresses: npt.NDArray[np.uint64],
        numbers: npt.NDArray[np.uint64],
        bell: int,
        timeout: float,
        spin: float,
    ) -> int:
        """Wait until the word at each address is its number or more; return how many are, all unless at the timeout.

        Looks for `spin` seconds, giving way to others at each look, then sleeps on the bell (which takes some 20 us to
        wake from). `numbers` is read anew at each look: another thread may
        excuse a word by setting its number to 0, and ring.
        """

    def reduce_rows(  # noqa: PLR0913, PLR0917 - a source, a target, and what may be added
        self,
        dst: int,
        dst_stride: int,
        out_code: int,
        starts: npt.NDArray[np.int64],
        rows: npt.NDArray[np.uint64],
        in_code: int,
        weights: npt.NDArray[np.float32] | None,
        hidden: int,
        biases: npt.NDArray[np.uint64],
        bias_stride: int,
        bias_code: int,
        gates: Sequence[Gate],
        scale: npt.NDArray[np.float32] | None = None,
        variant: int = ...,
    ) -> int:
        """Add up the rows at addresses `rows[starts[t]:starts[t + 1]]` of each token t, inside the gates.

        Terms are added in order in float32 (float64 for F64), each multiplied by its weight before, the sum of a
        token's rows by its scale; then row t of each bias is added. The result is rounded once, to nearest even. The
        sum starts with its first term, so that -0 stays -0; without any it is 0. One row to which nothing is done is
        copied byte for byte; any other NaN comes out as the canonical quiet one. The bits are the same in all variants,
        and in the compiled core whatever rounding and denormals the thread has been set to.

        Returns DONE, or the code of a gate that refused or stopped it.

        Raises:
            ValueError: starts that do not ascend or exceed the rows, unknown codes, F64 together with others (biases of
                any may be added to F64), weights or scales of another length.
        """
