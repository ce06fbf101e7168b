"""The kernels under sanitizers of the host: no races between CTAs or ranks, nothing undefined or out of bounds."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from moe_kernels_host import WATCHERS

pytestmark = [pytest.mark.pure, pytest.mark.slow, pytest.mark.timeout(1200)]

TESTS = Path(__file__).parent
FALSE_ALARMS = "race:dl_deallocate_tls\nrace:rtld-malloc\nrace:host::\n"
"""What threads leave behind that have ended, in memory that the next ones get; and what takes turns on one of them."""
CHOICES = {
    "thread": ("libtsan.so", ["test_cuda_kernels.py", "-k", "at_the_same_time"]),
    "address": (
        "libasan.so",
        ["test_cuda_kernels.py", "test_cuda_kernel_sums.py", "-k", "any_number or any_bits or width or apart"],
    ),
}


@pytest.mark.parametrize("watcher", WATCHERS)
def test_a_sanitizer_finds_nothing_wrong(watcher: str, tmp_path: Path) -> None:
    library, (file, *others) = CHOICES[watcher]
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs g++")
    found = subprocess.run([compiler, f"-print-file-name={library}"], capture_output=True, text=True, check=True)
    preloaded = Path(found.stdout.strip())
    if not preloaded.is_absolute():
        pytest.skip(f"needs {library}")
    (tmp_path / "false").write_text(FALSE_ALARMS, encoding="utf-8")
    environment = {
        **os.environ, "KERNELS_WATCHED_FOR": watcher, "LD_PRELOAD": str(preloaded.resolve()),
        "TSAN_OPTIONS": f"suppressions={tmp_path / 'false'} log_path={tmp_path / 'log'} report_signal_unsafe=0",
        "ASAN_OPTIONS": f"detect_leaks=0 detect_stack_use_after_return=0 log_path={tmp_path / 'log'}",
        "UBSAN_OPTIONS": f"print_stacktrace=1 log_path={tmp_path / 'log'}",
    }  # fmt: skip
    fixed = [setarch, "-R"] if (setarch := shutil.which("setarch")) else []  # the shadow has fixed places
    tests = [str(TESTS / one) if one.endswith(".py") else one for one in (file, *others)]
    plugins = ["-p", "no:faulthandler", "-p", "no:cacheprovider", "-p", "no:xdist"]
    command = [*fixed, sys.executable, "-m", "pytest", "-q", "-x", *plugins, "-o", "timeout=600", *tests]
    ended = subprocess.run(
        command, env=environment, cwd=TESTS.parents[1], capture_output=True, text=True, timeout=1100, check=False
    )
    said = "".join(one.read_text(encoding="utf-8", errors="replace") for one in tmp_path.glob("log.*"))
    assert said == "", said[:4000]
    assert ended.returncode == 0, ended.stdout[-4000:] + ended.stderr[-2000:]
