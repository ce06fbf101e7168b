"""What a container's limits leave of the host's memory."""

from __future__ import annotations

from pathlib import Path

import pytest

from raynixl.cgroup import UNLIMITED, left_nbytes

pytestmark = pytest.mark.pure
MIB = 1 << 20


def group(path: Path, files: dict[str, str]) -> None:
    path.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (path / name).write_text(f"{text}\n")


def v2(limit: int | str, used: int, inactive: int = 0) -> dict[str, str]:
    return {"memory.max": str(limit), "memory.current": str(used), "memory.stat": f"anon 5\ninactive_file {inactive}"}


def v1(limit: int, used: int, inactive: int = 0) -> dict[str, str]:
    return {
        "memory.limit_in_bytes": str(limit), "memory.usage_in_bytes": str(used),
        "memory.stat": f"inactive_file 1\ntotal_inactive_file {inactive}",
    }  # fmt: skip


@pytest.fixture
def lines(tmp_path: Path) -> Path:
    return tmp_path / "cgroup"


def test_the_tightest_group_on_the_way_up_counts(tmp_path: Path, lines: Path) -> None:
    lines.write_text("0::/slice/pod\n")
    group(tmp_path / "slice", v2(100 * MIB, 95 * MIB))
    group(tmp_path / "slice/pod", v2(64 * MIB, 4 * MIB))
    assert left_nbytes(tmp_path, lines) == 5 * MIB
    group(tmp_path / "slice", v2("max", 95 * MIB))
    assert left_nbytes(tmp_path, lines) == 60 * MIB


def test_file_pages_that_nobody_uses_count_as_free(tmp_path: Path, lines: Path) -> None:
    lines.write_text("0::/\n")
    group(tmp_path, v2(64 * MIB, 64 * MIB, inactive=10 * MIB))
    assert left_nbytes(tmp_path, lines) == 10 * MIB


def test_the_first_version_of_the_interface_is_read_too(tmp_path: Path, lines: Path) -> None:
    lines.write_text("9:name=systemd:/\n4:memory:/job\n0::/\n")
    group(tmp_path / "memory/job", v1(64 * MIB, 60 * MIB, inactive=2 * MIB))
    assert left_nbytes(tmp_path, lines) == 6 * MIB


def test_a_container_whose_path_is_the_hosts_is_limited_by_the_root_it_sees(tmp_path: Path, lines: Path) -> None:
    lines.write_text("4:memory:/docker/0123456789ab\n")
    group(tmp_path / "memory", v1(64 * MIB, 63 * MIB))
    assert left_nbytes(tmp_path, lines) == MIB


@pytest.mark.parametrize("text", ["", "0::/nowhere\n", "4:cpu:/\n"])
def test_without_a_limit_nothing_is_limited(tmp_path: Path, lines: Path, text: str) -> None:
    lines.write_text(text)
    assert left_nbytes(tmp_path, lines) == UNLIMITED
    assert left_nbytes(tmp_path, tmp_path / "missing") == UNLIMITED


def test_more_used_than_allowed_leaves_nothing(tmp_path: Path, lines: Path) -> None:
    lines.write_text("0::/\n")
    group(tmp_path, v2(MIB, 2 * MIB))
    assert left_nbytes(tmp_path, lines) == 0


def test_nonsense_in_a_group_is_no_limit(tmp_path: Path, lines: Path) -> None:
    lines.write_text("0::/\n")
    group(tmp_path, {**v2(MIB, 0), "memory.current": "?"})
    assert left_nbytes(tmp_path, lines) == UNLIMITED
