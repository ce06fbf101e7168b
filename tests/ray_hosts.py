"""Real Ray nodes on the hosts of a bed: a head on the first, a node on each other, drivers on the first."""

from __future__ import annotations

import contextlib
import secrets
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from hosts_tools import Bed, Host, environment

PATIENCE = 100.0  # each worker imports torch, on a machine that others share
DRIVERS = Path(__file__).parent / "hosts" / "drivers"
_PORT = 6379
_TEMP = "/dev/shm/ray"  # each host has its own /dev/shm, which ends with it; short, as paths of sockets must be


class RayHosts:
    """A cluster whose nodes are the hosts of a bed of its own: other clusters of this machine see nothing of it.

    `settings` are variables of the nodes' environment, which the workers inherit, and of the drivers'. All ends at once
    with the hosts, workers and drivers too.
    """

    def __init__(self, hosts: int = 2, *, cpus: int = 2, **settings: str) -> None:
        self._opened = contextlib.ExitStack()
        with self._opened:
            self.bed = self._opened.enter_context(Bed(hosts))
            self.head = self.bed.hosts[0]
            self.environment = environment(
                RAY_ADDRESS=f"{self.head.address}:{_PORT}", RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32),
                **settings,
            )  # fmt: skip
            self._log = self._opened.enter_context(tempfile.TemporaryFile("w+"))  # noqa: SIM115 - entered here
            for host in self.bed:
                self._start_node(host, cpus)
            self._wait_ready()
            self._opened = self._opened.pop_all()

    def __enter__(self) -> RayHosts:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the hosts, and with them all that runs there. Idempotent."""
        self._opened.close()

    def start(self, argv: list[str], *, cwd: str | Path = ".") -> subprocess.Popen[str]:
        """Start a program on the first host, with pipes as its streams; RAY_ADDRESS names the cluster."""
        return self.head.run(
            argv, cwd=cwd, env=self.environment, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip

    def run(
        self, argv: list[str], *, cwd: str | Path = ".", timeout: float = PATIENCE
    ) -> subprocess.CompletedProcess[str]:
        """Run a program on the first host to its end."""
        process = self.start(argv, cwd=cwd)
        try:
            out, err = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired as exc:
            process.kill()
            exc.add_note("it has said: {}{}".format(*process.communicate()))
            raise
        return subprocess.CompletedProcess(argv, process.returncode, out, err)

    def drive(self, name: str, *arguments: str, timeout: float = PATIENCE) -> str:
        """Run one of tests/hosts/drivers to its end, which must be good; return what it printed."""
        ended = self.run([sys.executable, str(DRIVERS / f"{name}.py"), *arguments], timeout=timeout)
        assert ended.returncode == 0, f"the driver {name!r} ended with {ended.returncode}: {ended.stdout}{ended.stderr}"
        return ended.stdout

    def _start_node(self, host: Host, cpus: int) -> subprocess.Popen[Any]:
        is_head = host is self.head
        role = ["--head", f"--port={_PORT}", "--include-dashboard=false", "--no-monitor"] if is_head else []
        role += [] if is_head else [f"--address={self.head.address}:{_PORT}"]
        return host.run(
            [sys.executable, "-m", "ray.scripts.scripts", "start", *role, f"--node-ip-address={host.address}",
             f"--num-cpus={cpus}", f"--object-store-memory={80 << 20}", f"--temp-dir={_TEMP}", "--disable-usage-stats",
             "--include-log-monitor=false", "--block"],
            env={name: value for name, value in self.environment.items() if name != "RAY_ADDRESS"},
            stdin=subprocess.DEVNULL, stdout=self._log, stderr=self._log,
        )  # fmt: skip

    def _wait_ready(self) -> None:
        try:
            self.drive("ready", str(len(self.bed.hosts)))
        except BaseException as exc:
            self._log.seek(0)
            exc.add_note(f"the nodes have said: {self._log.read()}")
            raise
