"""The baseline `ucx_perftest`: UCX's own benchmark from the libucx wheel, its server where the target is.

One run of its client a round. With one block at most one operation is outstanding, so that its median is from post
to done as ours is; with many blocks it streams as many messages of that size with its ordinary window, since it knows
no list of scattered blocks: the average message, times the blocks. Its buffers are its own, in pages of the same
size as ours, and it checks no bytes.
"""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import math
import re
import select
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from raynixl.backends.ucx_options import PREFIX, merge
from raynixl.bench.pages import HUGE_NBYTES, is_huge
from raynixl.bench.process import Asked, signal_all, start, with_environment
from raynixl.bench.scene import Contender, Scene
from raynixl.bench.sizes import parse_size
from raynixl.bench.spec import TransferSpec
from raynixl.bench.timing import ROUND_SECONDS
from raynixl.config import variables
from raynixl.errors import BackendUnavailable, ConfigError, RaynixlError

RUN_SECONDS = 60.0
"""No run takes longer: it is ended and reported."""
_START_SECONDS = 10.0
_LEAVE_SECONDS = 5.0
_FEW = 3
_STREAM_SECONDS = 1.0
_UNUSED = "WARN_UNUSED_ENV_VARS"
_MANY = 100_000
_ATTEMPTS = 3
_PROTOCOL = re.compile(r"\|\s+(\w+)\.\.(\w+) \|\s*(.+?)\s*\|\s*(\S+)\s*\|\s*$")


def ucx_environment(options: Mapping[str, str], *, is_local: bool = True) -> dict[str, str]:
    """Return the variables that give another process's UCX the settings of our agents, but let it say what is wrong."""
    merged = merge(options, variables(PREFIX), device="", is_local=is_local)
    if "LOG_LEVEL" not in options:
        merged.pop("LOG_LEVEL", None)
    quiet = {} if PREFIX + _UNUSED in variables(PREFIX) else {_UNUSED: "n"}  # NIXL's UCX does not know all of ours
    return {PREFIX + name: value for name, value in (quiet | merged).items()}


def memory_environment(nbytes: int, *, is_in_huge_pages: bool) -> dict[str, str]:
    """Return the variables that give ucx_perftest buffers in pages of a kind, and have malloc fill them.

    It writes nothing into its source itself, which then is the kernel's one page of zeros again and again: always in
    the cache, up to twice as fast. malloc asks for huge pages from their size on; below it, UCX can: there the zeros
    are as many bytes as the message has, so nothing is gained by them.
    """
    tunables = "glibc.malloc.perturb=85"
    if is_in_huge_pages and nbytes < HUGE_NBYTES:
        return {"UCX_ALLOC_PRIO": "thp,heap"}  # it asks only after malloc, which must not have touched it by then
    if is_in_huge_pages:
        tunables += ":glibc.malloc.hugetlb=1"
    return {"UCX_ALLOC_PRIO": "heap", "GLIBC_TUNABLES": tunables}


def find_libucx() -> Path:
    """Return the directory of the libucx wheel.

    Raises:
        ConfigError: it is not installed.
    """
    found = importlib.util.find_spec("libucx")
    if found is None or not found.submodule_search_locations:
        raise ConfigError("ucx_perftest is not here", hint="pip install 'raynixl[ucx]': the libucx wheel brings it")
    return Path(found.submodule_search_locations[0])


class Perftest:
    """Runs ucx_perftest with the settings of the measured agents."""

    def __init__(self, spec: TransferSpec) -> None:
        root = find_libucx()
        options = ucx_environment(spec.ucx, is_local=not spec.launch)
        variables = {"LD_LIBRARY_PATH": str(root / "lib"), **options}
        self._launch = spec.launch
        self._command = [*with_environment(variables), str(root / "bin" / "ucx_perftest")]

    def contend(self, scene: Scene) -> list[Contender]:
        """Return the runner for messages of the block size; its bytes cannot be checked."""
        is_in_huge_pages = is_huge(scene.memory, scene.layout.nbytes)
        memory = memory_environment(scene.layout.block_nbytes, is_in_huge_pages=is_in_huge_pages)
        runner = PerftestRunner([*with_environment(memory), *self._command], scene, self._launch)
        return [Contender(runner, lambda: None, runner.lane)]

    def close(self) -> None:
        """Nothing is kept between runs."""


class PerftestRunner:
    """One size and direction; every sample is a run as long as a round. `lane` is what UCX says it takes."""

    impl = "ucx_perftest"
    prepare_seconds = 0.0

    def __init__(self, command: list[str], scene: Scene, launch: Sequence[str]) -> None:
        self._command, self._blocks = [*command], scene.layout.blocks
        self._launch, self._target, self._address = launch, scene.target, scene.address
        self._nbytes = scene.layout.block_nbytes
        self._test = "ucp_put_bw" if scene.is_write else "ucp_get"
        self._nanoseconds = 0.0
        self._command.insert(1, "UCX_PROTO_INFO=y")
        try:
            self.lane = parse_lane(self._measure(_FEW), self._nbytes)
        finally:
            del self._command[1]

    def sample(self, count: int) -> list[int]:
        """Run it once; return the nanoseconds of one transfer."""
        wanted = ROUND_SECONDS * 1e9 / self._nanoseconds
        if self._blocks > 1:  # its average counts the start of a stream, too: let that be short beside the rest
            wanted = max(wanted, min(self._blocks, _STREAM_SECONDS * 1e9 / self._nanoseconds))
        self._measure(int(min(_MANY, max(_FEW, wanted))))
        return [math.ceil(self._nanoseconds * self._blocks)]

    def _measure(self, times: int) -> str:
        """Note what one message takes; return all that the client prints."""
        output = self._run(times)
        median, average = parse_result(output)
        self._nanoseconds = median if self._blocks == 1 else average
        return output

    def _run(self, times: int) -> str:
        warm = max(1, min(times // 10, 1000))
        arguments = ["-t", self._test, "-s", str(self._nbytes), "-n", str(times), "-w", str(warm), "-e", "-f", "-v"]
        if self._blocks == 1:
            arguments += ["-O", "1"]
        for _ in range(_ATTEMPTS - 1):
            with contextlib.suppress(BackendUnavailable):  # somebody else took the port
                return self._run_pair(arguments)
        return self._run_pair(arguments)

    def _run_pair(self, arguments: list[str]) -> str:
        port = self._target.ask("free_port")["port"]
        command = [*self._command, "-p", str(port), *arguments]
        with start(
            [*self._launch, "timeout", f"{RUN_SECONDS:g}", *command],  # it waits for ever, should we be killed now
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        ) as server:  # fmt: skip
            try:
                _wait_listening(server, self._target, port)
                return _run_client([*command, self._address])
            finally:
                _end(server)


def _run_client(command: list[str]) -> str:
    """Return its output; it is killed when it takes too long or this process is interrupted."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=RUN_SECONDS, check=False)
    except subprocess.TimeoutExpired as exc:
        raise RaynixlError(f"ucx_perftest did not end within {RUN_SECONDS:g} s", hint="see `raynixl doctor`") from exc
    if done.returncode != 0:
        reason = _reason(done.stdout + done.stderr)
        raise RaynixlError(f"ucx_perftest failed: {reason}", hint="see the options given by --ucx, and UCX_*")
    return done.stdout


def _reason(text: str) -> str:
    """Return the first error that UCX logs, without where in its source it was; or the last line."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line.partition("ERROR")[2].strip() for line in lines if " ERROR " in line]
    return next(iter(errors), lines[-1] if lines else "it does not say why")


def _wait_listening(server: subprocess.Popen[str], target: Asked, port: int) -> None:
    """Wait until the server listens; it says so only in a buffer, and takes any connection for its client.

    Raises:
        BackendUnavailable: it ended.
        RaynixlError: it does not begin.
    """
    deadline = time.monotonic() + _START_SECONDS
    assert server.stderr is not None
    while not target.ask("listens", port=port)["listens"]:
        if server.poll() is not None:
            raise BackendUnavailable(f"ucx_perftest failed: {_reason(server.stderr.read())}", hint="see its options")
        if time.monotonic() > deadline:
            raise RaynixlError(f"ucx_perftest does not listen after {_START_SECONDS:g} s", hint="see `raynixl doctor`")
        select.select([], [], [], 0.002)


def _end(server: subprocess.Popen[str]) -> None:
    """End the server if it has not ended by itself, which it does after its client."""
    try:
        server.wait(_LEAVE_SECONDS if server.poll() is None else 0.0)
    except subprocess.TimeoutExpired:
        signal_all(server, signal.SIGTERM)  # which `timeout` passes on
        server.wait(_LEAVE_SECONDS)


def parse_result(output: str) -> tuple[float, float]:
    """Return the median and the average nanoseconds of a message from what ucx_perftest -v -f prints.

    Raises:
        RaynixlError: that is not there.
    """
    rows = [line.split(",") for line in output.splitlines() if line.count(",") >= 7]
    for names, values in itertools.pairwise(rows):
        if "overall_lat" in names:
            named = dict(zip(names, values, strict=True))
            median = next(value for name, value in named.items() if name.endswith("percentile_lat"))
            return float(median) * 1e3, float(named["overall_lat"]) * 1e3
    raise RaynixlError("ucx_perftest printed no result", hint="libucx 1.19 to 1.21 are known to")


def parse_lane(output: str, nbytes: int) -> str:
    """Return protocol and transport of a message of `nbytes` from the last table of UCX_PROTO_INFO; '' if none."""
    lane = ""
    for line in output.splitlines():
        found = _PROTOCOL.search(line)
        if found and int(_bound(found[1])) <= nbytes <= _bound(found[2]):
            lane = f"{found[3]} {found[4]}"
    return lane


def _bound(text: str) -> float:
    return math.inf if text == "inf" else 0 if text == "0" else parse_size(text)
