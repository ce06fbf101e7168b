"""Control groups: what a container, or a slice of the host, may still take of the host's memory."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path

UNLIMITED = 1 << 62


@dataclass(frozen=True, slots=True)
class _Files:
    """How a version of the kernel's interface names what is asked for here."""

    limit: str
    usage: str
    reclaimable: str


_V1 = _Files("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
_V2 = _Files("memory.max", "memory.current", "inactive_file")


def left_nbytes(root: Path = Path("/sys/fs/cgroup"), lines: Path = Path("/proc/self/cgroup")) -> int:
    """Return how much memory this process's control groups leave it; `UNLIMITED` where none limits it.

    Each group from its own up to the root may have a limit. File pages that nobody used of late count as free, since
    the kernel drops them first. A container sees its own group as the root, whatever path the kernel names.
    """
    left = UNLIMITED
    with contextlib.suppress(OSError):
        for line in lines.read_text().splitlines():
            number, controllers, path = line.split(":", 2)
            if number == "0":
                left = min(left, _left_upwards(root, path, _V2))
            elif "memory" in controllers.split(","):
                left = min(left, _left_upwards(root / "memory", path, _V1))
    return left


def _left_upwards(root: Path, path: str, files: _Files) -> int:
    group, left = root / path.lstrip("/"), UNLIMITED
    while True:
        left = min(left, _left_of(group, files))
        if group in (root, group.parent):
            return left
        group = group.parent


def _left_of(group: Path, files: _Files) -> int:
    try:
        limit = (group / files.limit).read_text().strip()
        if limit == "max" or int(limit) >= UNLIMITED:
            return UNLIMITED
        usage = int((group / files.usage).read_text())
        counts = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):  # no such group here, or one that does not count memory
        return UNLIMITED
    return max(0, int(limit) - usage + int(counts.get(files.reclaimable, 0)))
