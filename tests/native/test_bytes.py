"""Which bytes a program moves: every size, every alignment, within a process and between two."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from native_tools import INLINE, KIB, MIB, address_of, finish, random_bytes, table

from raynixl.native import COPY, DONE, VM_READ, VM_WRITE, Engine, Native

pytestmark = pytest.mark.pure

SPACE = 6 * MIB
EDGES = [1, 7, 8, 15, 31, 63, 64, 127, 4095, 4096, 16 * KIB, 32 * KIB, INLINE, MIB, 4 * MIB]

# (gap before it, length) of each segment, in order in the target; the sources lie in any order.
lengths = st.one_of(
    st.integers(1, 300),
    st.builds(lambda edge, off: max(1, edge + off), st.sampled_from(EDGES), st.integers(-2, 2)),
)
layouts = st.lists(st.tuples(st.integers(0, 130), lengths), min_size=1, max_size=40)


def placed(layout: list[tuple[int, int]], seed: int) -> list[tuple[int, int, int]]:
    """Offsets of source and target, for as many segments as fit into the space."""
    rng = np.random.default_rng(seed)
    rows, at = [], 0
    for gap, nbytes in layout:
        if at + gap + nbytes > SPACE:
            break
        rows.append((int(rng.integers(0, SPACE - nbytes + 1)), at + gap, nbytes))
        at += gap + nbytes
    return rows


def expected(source: np.ndarray, rows: list[tuple[int, int, int]]) -> np.ndarray:
    """What the target holds afterwards: written by numpy."""
    target = np.zeros(SPACE, dtype=np.uint8)
    for start, to, nbytes in rows:
        target[to : to + nbytes] = source[start : start + nbytes]
    return target


@pytest.fixture(scope="module")
def source() -> np.ndarray:
    """Bytes to copy."""
    return random_bytes(SPACE)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(layout=layouts, seed=st.integers(0, 2**32 - 1), mode=st.sampled_from([COPY, VM_READ, VM_WRITE]))
def test_segments_land_where_numpy_puts_them(
    engine: Engine, source: np.ndarray, layout: list, seed: int, mode: int
) -> None:
    rows = placed(layout, seed)
    if not rows:
        return
    target = np.zeros(SPACE, dtype=np.uint8)
    addresses = table(*[(address_of(source) + a, address_of(target) + b, n) for a, b, n in rows])
    program = engine.program(mode, os.getpid(), addresses, [])
    assert finish(program.run(30.0)) == DONE
    assert np.array_equal(target, expected(source, rows))


@pytest.fixture(scope="module")
def large() -> np.ndarray:
    """Bytes to copy that are streamed past the cache, in many pieces, on any machine."""
    return random_bytes(40 * MIB + 141)


@pytest.mark.parametrize("mode", [COPY, VM_READ, VM_WRITE])
@pytest.mark.parametrize("shift", [0, 1, 33])
def test_a_block_beyond_every_threshold(engine: Engine, large: np.ndarray, mode: int, shift: int) -> None:
    nbytes = large.size - 64
    source, target = large, np.zeros(nbytes + 128, dtype=np.uint8)
    row = (address_of(source) + 5, address_of(target) + shift, nbytes)
    assert finish(engine.program(mode, os.getpid(), table(row), []).run(30.0)) == DONE
    assert np.array_equal(target[shift : shift + nbytes], source[5 : 5 + nbytes])
    assert not target[:shift].any()
    assert not target[shift + nbytes :].any()


@pytest.mark.parametrize("mode", [COPY, VM_READ, VM_WRITE])
@pytest.mark.parametrize("block", [1, 100, 4 * KIB])
def test_ten_thousand_random_blocks(engine: Engine, mode: int, block: int) -> None:
    count = 10_000
    source, target = random_bytes(count * block), np.zeros(count * block, dtype=np.uint8)
    order = np.random.default_rng(1).permutation(count).astype(np.uint64)
    rows = np.empty((count, 3), dtype=np.uint64)
    rows[:, 0] = np.uint64(address_of(source)) + order * np.uint64(block)
    rows[:, 1] = np.uint64(address_of(target)) + np.arange(count, dtype=np.uint64) * np.uint64(block)
    rows[:, 2] = block
    assert finish(engine.program(mode, os.getpid(), rows, []).run(30.0)) == DONE
    assert np.array_equal(target.reshape(count, block), source.reshape(count, block)[order])


@pytest.mark.parametrize("nbytes", [1, 4 * KIB, 30 * MIB])
def test_copy_moves_one_range(core: Native, nbytes: int) -> None:
    source, target = random_bytes(nbytes), np.zeros(nbytes, dtype=np.uint8)
    core.copy(address_of(target), address_of(source), nbytes)
    assert np.array_equal(source, target)


def test_mapped_sees_holes(core: Native) -> None:
    page = mmap.PAGESIZE
    area = mmap.mmap(-1, 4 * page)
    start = ctypes.addressof(ctypes.c_char.from_buffer(area))
    assert core.mapped(start, 4 * page)
    assert core.mapped(start + 1, 1)
    assert core.mapped(start, 0)
    libc = ctypes.CDLL(None)
    libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
    hole = libc.mmap
    hole.restype = ctypes.c_void_p
    hole.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long)
    lone = hole(None, 3 * page, 3, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
    assert core.mapped(lone, 3 * page)
    libc.munmap(lone + page, page)
    assert not core.mapped(lone, 3 * page)
    assert core.mapped(lone, page)
    assert not core.mapped(lone, page + 1)
    libc.munmap(lone, page)
    libc.munmap(lone + 2 * page, page)
    assert not core.mapped(16, 1)
    assert not core.mapped(2**64 - 8, 16)


# Another process

CHILD = """
import ctypes, sys
nbytes = int(sys.argv[1])
memory = (ctypes.c_char * nbytes)()
print(ctypes.addressof(memory), flush=True)
for line in sys.stdin:
    if line.startswith("fill"):
        ctypes.memset(memory, int(line.split()[1]), nbytes)
        print("filled", flush=True)
    else:
        import zlib
        print(zlib.crc32(memory), flush=True)
"""


class Child:
    """A plain process with some memory."""

    def __init__(self, nbytes: int) -> None:
        arguments = [sys.executable, "-c", CHILD, str(nbytes)]
        self._process = subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._process.stdin
        assert self._process.stdout
        self._in, self._out = self._process.stdin, self._process.stdout
        self.pid = self._process.pid
        self.address = int(self._out.readline())

    def ask(self, question: str) -> str:
        """Send a line and return the answer."""
        self._in.write(question + "\n")
        self._in.flush()
        return self._out.readline().strip()

    def kill(self) -> None:
        """End it and reap it."""
        self._process.send_signal(signal.SIGKILL)
        self._process.wait()
        self._in.close()
        self._out.close()


@pytest.fixture
def child() -> Iterator[Child]:
    """A process of 6 MiB."""
    child = Child(SPACE)
    yield child
    child.kill()


@pytest.mark.parametrize("block", [3 * KIB + 1, SPACE])
def test_another_process_is_written_and_read(engine: Engine, source: np.ndarray, child: Child, block: int) -> None:
    import zlib

    back = np.zeros(SPACE, dtype=np.uint8)
    here, there, home = address_of(source), child.address, address_of(back)
    parts = [(at, min(block, SPACE - at)) for at in range(0, SPACE, block)]
    write = engine.program(VM_WRITE, child.pid, table(*[(here + a, there + a, n) for a, n in parts]), [])
    read = engine.program(VM_READ, child.pid, table(*[(there + a, home + a, n) for a, n in parts]), [])
    assert finish(write.run(30.0)) == DONE
    assert int(child.ask("sum")) == zlib.crc32(source)
    assert finish(read.run(30.0)) == DONE
    assert np.array_equal(back, source)
    assert child.ask("fill 7") == "filled"
    assert finish(read.run(30.0)) == DONE
    assert (back == 7).all()


@pytest.mark.parametrize("nbytes", [64, MIB])
def test_unmapped_memory_of_a_peer_is_an_error(engine: Engine, source: np.ndarray, child: Child, nbytes: int) -> None:
    for mode, row in [
        (VM_WRITE, (address_of(source), 4096, nbytes)),
        (VM_READ, (4096, address_of(source), nbytes)),
    ]:
        assert finish(engine.program(mode, child.pid, table(row), []).run(10.0)) == -errno.EFAULT


def test_the_part_before_unmapped_memory_is_moved(engine: Engine, source: np.ndarray, child: Child) -> None:
    back = np.zeros(128, dtype=np.uint8)
    rows = [(child.address, address_of(back), 128), (4096, address_of(back), 64)]
    assert child.ask("fill 9") == "filled"
    assert finish(engine.program(VM_READ, child.pid, table(*rows), []).run(10.0)) == -errno.EFAULT
    assert (back == 9).all()


def test_a_dead_process_is_an_error(engine: Engine, source: np.ndarray, child: Child) -> None:
    programs = [
        engine.program(VM_WRITE, child.pid, table((address_of(source), child.address, nbytes)), [])
        for nbytes in (64, MIB)
    ]
    child.kill()
    assert [finish(program.run(10.0)) for program in programs] == [-errno.ESRCH] * 2


def test_a_forked_child_is_refused_and_ends(make_engine: Callable[..., Engine], core: Native) -> None:
    script = f"""
import os, sys
import numpy as np
from raynixl.native import CLOSED, COPY, load
core = load({core.NAME == "native"})
engine, gate = core.Engine(2), core.Gate()
source, target = np.ones(64 << 20, dtype=np.uint8), np.zeros(64 << 20, dtype=np.uint8)
rows = np.array([[source.ctypes.data, target.ctypes.data, source.nbytes]] * 50, dtype=np.uint64)
program = engine.program(COPY, 0, rows, [gate])
job = program.run(60.0)
pid = os.fork()
if pid == 0:
    ok = program.run(1.0) == CLOSED and program.run(1.0, out_of_line=True) == CLOSED
    ok = ok and job.wait(1.0) and job.code == CLOSED and job.settled and not job.cancel(3)
    sys.exit(0 if ok and engine.close(1.0) else 1)
status = os.waitpid(pid, 0)[1]
assert job.cancel(3) and job.wait_settled(10.0)
sys.exit(status != 0)
"""
    environment = {**os.environ, "PYTHONWARNINGS": "ignore"}  # Python 3.12 warns of every fork with threads
    assert subprocess.run([sys.executable, "-c", script], env=environment, timeout=60, check=False).returncode == 0


@pytest.mark.parametrize("drop", ["", "del engine, program, job", "del engine, program"])
def test_the_interpreter_exits_while_jobs_run(core: Native, drop: str) -> None:
    script = f"""
import numpy as np
from raynixl.native import COPY, load
engine = load({core.NAME == "native"}).Engine(2)
source, target = np.ones(64 << 20, dtype=np.uint8), np.zeros(64 << 20, dtype=np.uint8)
rows = np.array([[source.ctypes.data, target.ctypes.data, source.nbytes]] * 500, dtype=np.uint64)
program = engine.program(COPY, 0, rows, [])
job = program.run(60.0)
{drop}
"""
    assert subprocess.run([sys.executable, "-c", script], timeout=60, check=False).returncode == 0
