"""A process that exchanges lines with others over a memfd, round after round, and checks what they say.

Run as `moe_lines_process.py FD CORES RANK ROUNDS SPIN`; CORES names the core of each rank. Prints seconds a round.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
import time

import numpy as np

from raynixl.native import load

LINE_NBYTES = 256
PAYLOAD_NBYTES = 200
PATIENCE = 30.0


def board_nbytes(world: int) -> int:
    """Bytes of one rank's bell and cells: two for each source."""
    return LINE_NBYTES * (1 + 2 * world)


def cell(base: int, world: int, owner: int, source: int, side: int) -> int:
    """The address of the line that `source` writes into the board of `owner`."""
    return base + owner * board_nbytes(world) + LINE_NBYTES * (1 + 2 * source + side)


def payload(source: int, number: int) -> bytes:
    """What a rank says in a round."""
    return bytes([(source * 31 + number * 7) % 256]) * (PAYLOAD_NBYTES - 1) + bytes([number % 251])


def exchange(base: int, cores: list[str], rank: int, rounds: int, spin: float) -> float:
    """Post to all others and wait for all others, in each round; return seconds a round after a warm-up."""
    core, world = load(cores[rank] == "native"), len(cores)
    others = [peer for peer in range(world) if peer != rank]
    bells = [base + peer * board_nbytes(world) for peer in range(world)]
    cells = [np.array([cell(base, world, rank, peer, side) for peer in others], np.uint64) for side in (0, 1)]
    numbers = np.zeros(len(others), np.uint64)
    began = time.perf_counter()
    for number in range(1, rounds + 1):
        if number == rounds // 10 + 1:
            began = time.perf_counter()
        for peer in others:
            core.post_line(cell(base, world, peer, rank, number & 1), payload(rank, number), number, bells[peer])
        numbers[:] = number
        arrived = core.wait_lines(cells[number & 1], numbers, bells[rank], PATIENCE, spin)
        assert arrived == len(others), f"rank {rank} has {arrived} lines in round {number}"
        check(cells[number & 1], others, number)
    return (time.perf_counter() - began) / (rounds - rounds // 10)


def check(cells: np.ndarray, others: list[int], number: int) -> None:
    """Compare what the lines say."""
    for address, peer in zip(cells.tolist(), others, strict=True):
        said = bytes((ctypes.c_uint8 * PAYLOAD_NBYTES).from_address(address + 8))
        assert said == payload(peer, number), f"rank {peer} said something else in round {number}"


def main() -> None:
    """Take part as one rank."""
    fd, cores, rank, rounds, spin = sys.argv[1:]
    with mmap.mmap(int(fd), 0) as mapped:
        memory = np.frombuffer(mapped, np.uint8)
        seconds = exchange(memory.ctypes.data, cores.split(","), int(rank), int(rounds), float(spin))
        del memory
    print(f"{seconds * 1e6:.2f}")


if __name__ == "__main__":
    main()
