"""Pythons that have imported what the tests' child processes need, and fork them in place of starting them.

`popen` is `subprocess.Popen` for `[sys.executable, script or "-c", ...]`, with -W or -P before these: the child has the
given environment, streams and descriptors, runs the script as `__main__`, and ends as any process does. It saves the
imports, half a second for each child; two seconds where torch is imported, too, as it is with `torch=True`.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import types
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

_IMPORTS = ("raynixl.testing.far", "raynixl.backends.ucx_network", "agent_tools", "cuda_fake", "cuda_kernels")
_WITH_TORCH = (*_IMPORTS, "torch", "torch.distributed", "raynixl.weights.subscription", "raynixl.moe.parallel")
_HIGH = 256
"""Where received descriptors are kept until they are where the child wants them."""
_MOST = 1 << 17
_SECONDS = 60.0
_NAMESPACES = {"net": 0x40000000, "ipc": 0x08000000, "uts": 0x04000000, "mnt": 0x00020000}
_NEWPID = 0x20000000
_LIBC = ctypes.CDLL(None, use_errno=True)


class WarmPython:
    """The near end of one. Close it, which ends its children too."""

    def __init__(self, imports: Sequence[str]) -> None:
        here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with there:
            path = f"{Path(__file__).parent}:{os.environ.get('PYTHONPATH', '')}"
            self._process = subprocess.Popen(
                [sys.executable, __file__, str(there.fileno()), *imports],
                pass_fds=[there.fileno()],
                # UCX reads its level when it is loaded, and complains of one that comes later
                env={"UCX_LOG_LEVEL": "fatal", **os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
            )
        self._lock = threading.Lock()  # protects the order of answers
        self._control = here
        self._control.settimeout(_SECONDS)
        self.pid = self._process.pid
        self.fd = here.fileno()

    def fork(self, argv: Sequence[str], told: Mapping[str, Any], fds: Sequence[int]) -> int:
        """Fork a child that runs `argv`, whose first word is this interpreter; return its process id."""
        assert argv[0] == sys.executable, f"{argv[0]} is another program"
        said = {"argv": argv[1:], "cwd": os.getcwd(), **told}
        with self._lock:
            socket.send_fds(self._control, [json.dumps(said).encode()], fds)
            return int(self._control.recv(32))

    def close(self) -> None:
        """End it."""
        self._control.close()
        self._process.wait(_SECONDS)


class WarmChild:
    """What `subprocess.Popen` is to a process."""

    def __init__(
        self, args: Sequence[str], pid: int, status: socket.socket, pipes: Sequence[int | None], *, text: bool
    ) -> None:
        self.args, self.pid = args, pid
        self.returncode: int | None = None
        self._status = status
        stdin, stdout = pipes
        self.stdin: Any = None if stdin is None else os.fdopen(stdin, "w" if text else "wb")
        self.stdout: Any = None if stdout is None else os.fdopen(stdout, "r" if text else "rb")

    def poll(self) -> int | None:
        """Say how it has ended, None if it has not."""
        return self._ended(0.0)

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end."""
        ended = self._ended(timeout)
        if ended is None:
            assert timeout is not None
            raise subprocess.TimeoutExpired(self.args, timeout)
        return ended

    def send_signal(self, number: int) -> None:
        """Send it a signal, unless it has ended."""
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def kill(self) -> None:
        """End it at once."""
        self.send_signal(signal.SIGKILL)

    def _ended(self, timeout: float | None) -> int | None:
        if self.returncode is None:
            poll = select.poll()
            poll.register(self._status, select.POLLIN)
            if poll.poll(None if timeout is None else timeout * 1000):
                self.returncode = int(self._status.recv(32))
                self._status.close()
        return self.returncode


@dataclass(frozen=True)
class Home:
    """Where a child lives: the namespaces of a process, and an open descriptor of its process namespace."""

    pid: int
    space: int


_warm: dict[bool, WarmPython] = {}
_warming = threading.Lock()  # protects _warm


def ready(*, torch: bool = False) -> WarmPython:
    """Return this process's warm Python, which is started at the first call; `cool` ends it."""
    with _warming:
        if torch not in _warm:
            _warm[torch] = WarmPython(_WITH_TORCH if torch else _IMPORTS)
        return _warm[torch]


def all_ready() -> Iterable[WarmPython]:
    """Return those that run."""
    return _warm.values()


def cool() -> None:
    """End them."""
    while _warm:
        _warm.popitem()[1].close()


def popen(
    argv: Sequence[str], *, stdin: int | None = None, stdout: int | None = None, stderr: int | None = None,
    env: Mapping[str, str] | None = None, pass_fds: Sequence[int] = (), text: bool = False,
    start_new_session: bool = False, torch: bool = False, home: Home | None = None,
) -> WarmChild:  # fmt: skip
    """Be `subprocess.Popen` for Python, in a warm one; the child lives in `home` if one is given.

    Of `stderr` there is no pipe: it may be a descriptor.
    """
    said = [] if stderr is None else [stderr]
    told = {
        "env": dict(os.environ if env is None else env), "targets": [0, 1, *([2] * len(said)), *pass_fds],
        "is_leader": start_new_session, "home": None if home is None else home.pid,
    }  # fmt: skip
    status, theirs = socket.socketpair()
    with contextlib.ExitStack() as given:
        given.enter_context(theirs)
        ours, theirs_of = zip(
            *(_stream(number, wanted, given) for number, wanted in enumerate((stdin, stdout))), strict=True
        )
        fds = [theirs.fileno(), *([] if home is None else [home.space]), *theirs_of, *said, *pass_fds]
        pid = ready(torch=torch).fork(argv, told, fds)
    return WarmChild(argv, pid, status, ours, text=text)


def _stream(number: int, wanted: int | None, given: contextlib.ExitStack) -> tuple[int | None, int]:
    """Return our end of a stream if there is one, and the child's."""
    if wanted != subprocess.PIPE:
        return None, number if wanted is None else wanted
    reading, writing = os.pipe()
    ours, theirs = (writing, reading) if number == 0 else (reading, writing)
    given.callback(os.close, theirs)
    return ours, theirs


def _serve(control: socket.socket) -> None:
    """Fork what is asked for, and tell how it ended; once nobody asks any more, nothing is left."""
    running: dict[int, tuple[int, int]] = {}  # by pidfd: the process, and where to tell
    own = os.open("/proc/self/ns/pid", os.O_RDONLY | os.O_CLOEXEC)
    poll = select.poll()
    poll.register(control, select.POLLIN)
    while True:
        for fd, _ in poll.poll():
            if fd != control.fileno():
                poll.unregister(fd)
                _bury(fd, *running.pop(fd))
                continue
            said, fds, _, _ = socket.recv_fds(control, _MOST, 64)
            if not said:
                for pid, _ in running.values():
                    os.kill(pid, signal.SIGKILL)
                return
            pid = _forked(json.loads(said), fds, own)
            running[handle := os.pidfd_open(pid)] = pid, fds[0]
            poll.register(handle, select.POLLIN)
            for one in fds[1:]:
                os.close(one)
            control.send(str(pid).encode())


def _bury(handle: int, pid: int, status: int) -> None:
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    with contextlib.suppress(BrokenPipeError):
        os.write(status, str(code).encode())
    os.close(status)
    os.close(handle)


def _forked(told: dict[str, Any], fds: list[int], own: int) -> int:
    """Fork a child; return when it is as it was asked for."""
    reading, writing = os.pipe()
    with _children_in(None if told["home"] is None else fds[1], own):
        pid = os.fork()
        if pid == 0:
            _run(told, fds[1:] if told["home"] is None else fds[2:], writing)
    os.close(writing)
    os.read(reading, 1)
    os.close(reading)
    return pid


@contextlib.contextmanager
def _children_in(space: int | None, own: int) -> Iterator[None]:
    """Have children be born in a process namespace."""
    if space is None:
        yield
        return
    _enter(space, _NEWPID)
    yield
    _enter(own, _NEWPID)  # not of the child, which leaves by an exception, and could not


def _enter(namespace: int, kind: int) -> None:
    if _LIBC.setns(namespace, kind) != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def _run(told: dict[str, Any], fds: list[int], is_set_up: int) -> NoReturn:
    """Be the child."""
    if told["home"] is not None:
        spaces = [(os.open(f"/proc/{told['home']}/ns/{name}", os.O_RDONLY), kind) for name, kind in _NAMESPACES.items()]
        for space, kind in spaces:
            _enter(space, kind)
    if told["is_leader"]:
        os.setsid()
    os.environ.clear()
    os.environ.update(told["env"])
    os.chdir(told["cwd"])
    os.write(is_set_up, b"!")
    high = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, _HIGH) for fd in fds]
    os.closerange(3, _HIGH)
    for fd, target in zip(high, told["targets"], strict=True):
        os.dup2(fd, target)
        os.close(fd)
    _run_as_main(*told["argv"])
    sys.exit()


def _run_as_main(*words: str) -> None:
    """Run code as `__main__`, with the import path that its interpreter would have."""
    is_safe_path = False
    while words[0] in ("-W", "-P"):
        if words[0] == "-W":
            warnings.simplefilter(words[1])  # type: ignore[arg-type]
            words = words[2:]
        else:
            is_safe_path, words = True, words[1:]
    main = types.ModuleType("__main__")
    main.__builtins__ = __builtins__  # type: ignore[attr-defined]
    if words[0] == "-c":
        code, name, first, sys.argv = words[1], "<string>", "", ["-c", *words[2:]]
    else:
        name, sys.argv = words[0], list(words)
        code, first, main.__file__ = Path(name).read_text(encoding="utf-8"), str(Path(name).parent), name
    own = filter(None, os.environ.get("PYTHONPATH", "").split(":"))
    sys.path[:] = [*([] if is_safe_path else [first]), *own, *_BASE]
    sys.modules["__main__"] = main
    exec(compile(code, name, "exec"), main.__dict__)


def _warm_up(imports: Sequence[str]) -> None:
    import gc
    import importlib

    from raynixl.backends.ucx_runtime import load_ucxx
    from raynixl.errors import BackendUnavailable

    for name in imports:
        importlib.import_module(name)
    with contextlib.suppress(BackendUnavailable):
        load_ucxx()
    gc.collect()
    gc.freeze()


if __name__ == "__main__":
    _BASE = [one for one in sys.path[1:] if one not in os.environ.get("PYTHONPATH", "").split(":")]
    _warm_up(sys.argv[2:])
    _serve(socket.socket(fileno=int(sys.argv[1])))
