"""Types of the compiled core, native/module.cpp."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from raynixl.native.ucx import MakeRma, RailMaker

NAME: str
REDUCE_VARIANTS: int

class Gate:
    def __init__(self) -> None: ...
    def close(self, code: int, *, abort: bool = ...) -> None: ...
    def drain(self, timeout: float) -> bool: ...
    def enter(self) -> int: ...
    def leave(self) -> None: ...
    @property
    def aborted(self) -> int: ...
    @property
    def code(self) -> int: ...
    @property
    def inflight(self) -> int: ...

class Job:
    @property
    def code(self) -> int: ...
    @property
    def nbytes_done(self) -> int: ...
    @property
    def settled(self) -> bool: ...
    def wait(self, timeout: float) -> bool: ...
    def wait_settled(self, timeout: float) -> bool: ...
    def cancel(self, code: int) -> bool: ...
    def arm(self, fd: int) -> bool: ...
    @property
    def digest(self) -> tuple[int, int] | None: ...

class Program:
    @property
    def nbytes(self) -> int: ...
    @property
    def count(self) -> int: ...
    def run(self, timeout: float, out_of_line: bool = False) -> int | Job: ...
    def run_digesting(self, timeout: float, shift: int, seed: int) -> int | Job: ...

class Engine:
    def __init__(self, threads: int, inline_nbytes: int = ...) -> None: ...
    @property
    def threads(self) -> int: ...
    def program(self, mode: int, pid: int, segments: npt.NDArray[np.uint64], gates: Sequence[Any]) -> Program: ...
    def close(self, timeout: float) -> bool: ...

class Launcher:
    def __init__(
        self,
        functions: tuple[int, int, int, int, int],
        context: int,
        function: int,
        shape: tuple[int, int],
        values: npt.NDArray[np.uint64],
        copies: npt.NDArray[np.uint64],
    ) -> None: ...
    def run(self, stream: int, flag: int, number: int, counter: int, may_wait: bool) -> int: ...

Rail: RailMaker
rma: MakeRma

def copy(dst_addr: int, src_addr: int, nbytes: int) -> None: ...
def cuda_copy_loop(copy: int, stream: int, rows: npt.NDArray[np.uint64]) -> int: ...
def delta_apply(
    gaps: npt.NDArray[np.uint8],
    values: npt.NDArray[np.uint8],
    itemsize: int,
    arenas: npt.NDArray[np.uint64],
    *,
    write: bool,
) -> bool: ...
def delta_encode(rows: npt.NDArray[np.uint64], itemsize: int, limit: int) -> tuple[bytes, bytes] | None: ...
def digest_copy(rows: npt.NDArray[np.uint64], out: npt.NDArray[np.uint64], seed: int) -> None: ...
def digest_rows(rows: npt.NDArray[np.uint64], out: npt.NDArray[np.uint64], seed: int) -> None: ...
def enter_cuda(context: int, get_current: int, set_current: int) -> None: ...
def look_for(address: int, value: int, timeout: float) -> bool: ...
def mapped(address: int, nbytes: int) -> bool: ...
def post_line(
    address: int,
    payload: bytes | npt.NDArray[np.uint8],
    number: int,
    bell: int,
    gates: Sequence[Any] = ...,
) -> int: ...

class Way:
    def __init__(
        self,
        cells: tuple[int, int],
        bell: int,
        board: Sequence[Any],
        slot: int,
        base: int,
        capacity: int,
        starts: Sequence[int],
        memory: Sequence[Any],
    ) -> None: ...
    @property
    def capacity(self) -> int: ...

def send_rows(
    sends: Sequence[tuple[Any, int, int, int, int]],
    total: int,
    fields: npt.NDArray[np.uint64],
    line: npt.NDArray[np.uint8],
    told_at: int,
) -> list[int]: ...
def put_fields(
    fields: npt.NDArray[np.uint64],
    first: int,
    starts: npt.NDArray[np.uint64],
    base: int,
    offset: int,
    gates: Sequence[Any],
    count: int,
) -> int: ...
def put_rows(
    src: int,
    src_stride: int,
    row_nbytes: int,
    index: npt.NDArray[np.int32] | None,
    dst: int,
    gates: Sequence[Any],
    count: int,
) -> int: ...
def reduce_rows(
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
    gates: Sequence[Any],
    scale: npt.NDArray[np.float32] | None = ...,
    variant: int = ...,
) -> int: ...
def ring(bell: int) -> None: ...
def route(
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
) -> int: ...
def take_ids(
    source: int,
    copy: npt.NDArray[np.int32],
    wide: npt.NDArray[np.int64] | None,
    counts: npt.NDArray[np.int64],
) -> None: ...
def wait_lines(
    addresses: npt.NDArray[np.uint64],
    numbers: npt.NDArray[np.uint64],
    bell: int,
    timeout: float,
    spin: float,
) -> int: ...
