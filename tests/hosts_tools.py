"""A test bed of several hosts on one machine: namespaces joined by virtual cables, which can be capped and cut."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import warm

TESTS = Path(__file__).parent
PATIENCE = 20.0
NETWORK, NETWORK6 = "10.77", "fd77"  # exist inside the hosts only
_NEWPID = 0x20000000
_LIBC = ctypes.CDLL(None, use_errno=True)


@functools.cache
def why_no_hosts() -> str:
    """Why this machine cannot make a bed, or ''."""
    if os.geteuid() != 0:
        return "hosts are network namespaces: they need root"
    if missing := [tool for tool in ("ip", "tc", "nsenter", "unshare") if shutil.which(tool) is None]:
        return f"hosts need the commands {', '.join(missing)} (packages iproute2 and util-linux)"
    link = "ip link add rx0 type veth peer name rx1 && ip link add rx2 type bridge"
    tried = subprocess.run(
        ["unshare", "--net", "--mount", "--uts", "--ipc", "--pid", "--fork", "--mount-proc", "sh", "-c",
         f"mount -t sysfs sysfs /sys && {link} && tc qdisc add dev rx0 root tbf rate 1gbit burst 1mb latency 9ms"],
        capture_output=True, text=True, timeout=PATIENCE, check=False,
    )  # fmt: skip
    return f"this machine allows no namespaces, links or caps: {tried.stderr.strip()}" if tried.returncode else ""


class Host:
    """One host: namespaces for network, processes, mounts, IPC and its name.

    Files are shared by all hosts, except in /proc, /sys and /dev/shm. A process id is the one of this process's own
    namespace, so it can be signalled from here; inside the host the process has another one.
    """

    def __init__(self, name: str, number: int) -> None:
        self.name, self.number = name, number
        self._own = os.open("/proc/self/ns/pid", os.O_RDONLY | os.O_CLOEXEC)
        with _born_in(None, self._own):
            self._init = subprocess.Popen(
                [sys.executable, "-ISB", str(TESTS / "host_init.py"), name],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            )  # fmt: skip
        assert self._init.stdout is not None
        with self._init.stdout as told:
            assert told.read() == b"ready\n", f"host {name} did not start"
        self.pid = self._init.pid
        self._space = os.open(f"/proc/{self.pid}/ns/pid", os.O_RDONLY | os.O_CLOEXEC)
        self._processes: list[subprocess.Popen[Any] | warm.WarmChild] = []
        self._is_closed = False

    def __repr__(self) -> str:
        return f"Host({self.name!r}, {self.address})"

    @property
    def address(self) -> str:
        """The address on the first rail."""
        return self.address_on(0)

    def address_on(self, rail: int) -> str:
        """The address on a rail, whose interface is called eth0, eth1, ..."""
        return f"{NETWORK}.{rail}.{self.number}"

    def address6_on(self, rail: int) -> str:
        """The IPv6 address on a rail."""
        return f"{NETWORK6}:{rail + 1}::{self.number}"

    def run(self, argv: Sequence[str], *, cwd: str | Path = ".", **options: Any) -> subprocess.Popen[Any]:
        """Start a process in the host: `subprocess.Popen` with its options. It is killed when the host goes."""
        enter = ["nsenter", "-t", str(self.pid), "-n", "-m", "-u", "-i", "--", "env", "-C", os.path.abspath(cwd)]
        with _born_in(self._space, self._own):
            process = subprocess.Popen([*enter, *argv], **options)
        self._note(process)
        return process

    def run_warm(self, argv: Sequence[str], **options: Any) -> warm.WarmChild:
        """Start Python in the host as `run` does, in no time: see `warm.popen`."""
        process = warm.popen(argv, home=warm.Home(self.pid, self._space), **options)
        self._note(process)
        return process

    def python(self, code: str, *arguments: str, **options: Any) -> subprocess.Popen[Any]:
        """Start Python code in the host, with the tests' helpers importable and text in its streams."""
        options.setdefault("env", environment())
        options.setdefault("text", True)
        return self.run([sys.executable, "-c", textwrap.dedent(code), *arguments], **options)

    def ask(self, code: str, *arguments: str, timeout: float = PATIENCE) -> str:
        """Run Python code in the host to its end, which must be good; return what it printed."""
        process = self.python(code, *arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        try:
            out, err = process.communicate(timeout=timeout)
        finally:
            process.kill()
            process.communicate()
        assert process.returncode == 0, f"in {self}: {err}"
        return str(out)

    def _note(self, process: subprocess.Popen[Any] | warm.WarmChild) -> None:
        self._processes = [one for one in self._processes if one.poll() is None]
        self._processes.append(process)

    def configure(self, tool: str, *lines: str) -> None:
        """Run lines of `ip` or `tc` in the host's network."""
        done = subprocess.run(
            ["nsenter", "-t", str(self.pid), "-n", tool, "-batch", "-"],
            input="\n".join(lines) + "\n", capture_output=True, text=True, timeout=PATIENCE, check=False,
        )  # fmt: skip
        assert done.returncode == 0, f"{tool} in {self.name}: {done.stderr} {lines}"

    def close(self) -> None:
        """End the host as if its power was cut: all its processes are killed, its links and mounts go. Idempotent."""
        if self._is_closed:
            return
        self._is_closed = True
        self._init.kill()
        for process in self._processes:  # the first process of a namespace ends when all others are reaped
            process.wait(PATIENCE)
        self._init.wait(PATIENCE)
        assert self._init.stdin is not None
        self._init.stdin.close()
        os.close(self._space)
        os.close(self._own)


class Bed:
    """Hosts h1, h2, ... joined by a switch; `bed.hosts` or `first, second = bed`. Close it, or use it by `with`."""

    def __init__(self, hosts: int = 2) -> None:
        self.rails = 0
        self.hosts: list[Host] = []
        self._opened = contextlib.ExitStack()
        with self._opened:
            self.switch = self._open("switch", 0)
            self.hosts += [self._open(f"h{number}", number) for number in range(1, hosts + 1)]
            self._lay_rail()
            self.has_netem = self._try_netem()
            self._opened = self._opened.pop_all()

    def __enter__(self) -> Bed:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __iter__(self) -> Iterator[Host]:
        return iter(self.hosts)

    def close(self) -> None:
        """End all hosts. Idempotent."""
        self._opened.close()

    def second_rail(self) -> None:
        """Give every host a second network (eth1), unless there is one already."""
        if self.rails == 1:
            self._lay_rail()

    def cap(self, host: Host, gbit: float, *, rail: int = 0) -> None:
        """Limit what a host can send, and what it can receive, in Gbit/s (1e9 bits)."""
        burst = max(256 << 10, int(gbit * 1e9 / 8 * 0.001))  # 1 ms, and several of the kernel's largest segments
        self._shape(host, rail, f"tbf rate {int(gbit * 1e6)}kbit burst {burst} latency 20ms")

    def delay(self, host: Host, ms: float, *, loss: float = 0.0, rail: int = 0) -> None:
        """Delay what a host sends and receives, and lose a part of it (0 to 1); takes the place of a cap."""
        assert self.has_netem, "this kernel has no netem: ask bed.has_netem first"
        self._shape(host, rail, f"netem delay {ms}ms loss {100 * loss}% limit 100000")

    def free(self, host: Host, *, rail: int = 0) -> None:
        """Take a cap or a delay away."""
        host.configure("tc", f"qdisc del dev eth{rail} root")
        self.switch.configure("tc", f"qdisc del dev {_port(host, rail)} root")

    def cut(self, host: Host, *, rail: int | None = None) -> None:
        """Pull a host's cable, or those of all rails: it keeps its addresses, and nobody is told anything."""
        for number in self._rails(rail):
            self.switch.configure("ip", f"link set {_port(host, number)} down")

    def heal(self, host: Host, *, rail: int | None = None) -> None:
        """Plug it in again."""
        for number in self._rails(rail):
            self.switch.configure("ip", f"link set {_port(host, number)} up")

    def _open(self, name: str, number: int) -> Host:
        host = Host(name, number)
        self._opened.callback(host.close)
        if number:
            host.configure("ip", "link set lo up")
        return host

    def _lay_rail(self) -> None:
        rail = self.rails
        bridge = f"rail{rail}"
        cables = [f"link add {_port(host, rail)} type veth peer name eth{rail} netns {host.pid}" for host in self.hosts]
        plugs = [f"link set {_port(host, rail)} master {bridge} up" for host in self.hosts]
        self.switch.configure("ip", f"link add {bridge} type bridge", f"link set {bridge} up", *cables, *plugs)
        for host in self.hosts:
            host.configure(
                "ip",
                f"link set eth{rail} addrgenmode none",  # a link-local address would be tentative for a second
                f"addr add {host.address_on(rail)}/24 dev eth{rail}",
                f"addr add {host.address6_on(rail)}/64 dev eth{rail} nodad",
                f"link set eth{rail} up",
            )
        self.rails += 1

    def _rails(self, rail: int | None) -> Sequence[int]:
        return range(self.rails) if rail is None else (rail,)

    def _shape(self, host: Host, rail: int, discipline: str) -> None:
        host.configure("tc", f"qdisc replace dev eth{rail} root {discipline}")
        self.switch.configure("tc", f"qdisc replace dev {_port(host, rail)} root {discipline}")

    def _try_netem(self) -> bool:
        tried = subprocess.run(
            ["nsenter", "-t", str(self.switch.pid), "-n", "tc", "qdisc", "add", "dev", "rail0", "root", "netem",
             "delay", "1ms"], capture_output=True, timeout=PATIENCE, check=False,
        )  # fmt: skip
        if tried.returncode == 0:
            self.switch.configure("tc", "qdisc del dev rail0 root")
        return tried.returncode == 0


def environment(**more: str) -> dict[str, str]:
    """This process's environment for one in a host: the tests' helpers are importable, no cluster is named."""
    others = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return {**others, "PYTHONPATH": f"{TESTS}:{TESTS.parent}", **more}


def processes_of(host: Host) -> list[int]:
    """The processes of a host, by their ids here."""
    space, found = os.readlink(f"/proc/{host.pid}/ns/pid"), []
    for name in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(FileNotFoundError, PermissionError):
            if os.readlink(f"/proc/{name}/ns/pid") == space:
                found.append(int(name))
    return found


def _port(host: Host, rail: int) -> str:
    """The switch's end of a cable."""
    return f"{host.name}r{rail}"


@contextlib.contextmanager
def _born_in(space: int | None, own: int) -> Iterator[None]:
    """Have this thread's children be born in a process namespace, None for a new one. It must start no thread."""
    _checked(_LIBC.unshare(_NEWPID) if space is None else _LIBC.setns(space, _NEWPID))
    try:
        yield
    finally:
        _checked(_LIBC.setns(own, _NEWPID))


def _checked(result: int) -> None:
    if result != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
