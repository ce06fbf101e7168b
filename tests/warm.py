"""A Python that has imported what the tests' child processes need, and forks them in place of starting them.

`popen` is `subprocess.Popen` for `[sys.executable, script or "-c", ...]`: the child has the given environment, streams
and descriptors, runs the script as `__main__`, and ends as any process does. It saves the imports, half a second each.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import select
import signal
import socket
import subprocess
import sys
import types
from pathlib import Path
from typing import Any, NoReturn

_IMPORTS = ("raynixl.testing.far", "raynixl.backends.ucx_network", "agent_tools", "cuda_fake", "cuda_kernels")
_HIGH = 256
"""Where received descriptors are kept until they are where the child wants them."""
_MOST = 1 << 17


class WarmPython:
    """The near end. Close it, which ends its children too."""

    def __init__(self) -> None:
        here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with there:
            path = f"{Path(__file__).parent}:{os.environ.get('PYTHONPATH', '')}"
            self._process = subprocess.Popen(
                [sys.executable, __file__, str(there.fileno())], pass_fds=[there.fileno()],
                env={**os.environ, "PYTHONPATH": path},
            )  # fmt: skip
        self._control = here
        self.pid = self._process.pid

    def popen(
        self, argv: list[str], *, stdin: int | None = None, stdout: int | None = None, env: Any = None,
        pass_fds: Any = (), text: bool = False,
    ) -> WarmChild:  # fmt: skip
        """Fork a child that runs `argv`, whose first word is this interpreter."""
        assert argv[0] == sys.executable, f"{argv[0]} is another program"
        status, theirs = socket.socketpair()
        with contextlib.ExitStack() as stack:
            stack.enter_context(theirs)
            ours: list[int | None] = []
            given: list[int] = []
            for which, wanted in enumerate((stdin, stdout)):
                if wanted != subprocess.PIPE:
                    ours.append(None)
                    given.append(which if wanted is None else wanted)
                    continue
                reading, writing = os.pipe()
                ours.append(reading if which else writing)
                given.append(writing if which else reading)
                stack.callback(os.close, given[-1])
            targets = [0, 1, *pass_fds]
            told = {"argv": argv[1:], "env": dict(os.environ if env is None else env), "targets": targets}
            told["cwd"] = os.getcwd()
            socket.send_fds(self._control, [json.dumps(told).encode()], [theirs.fileno(), *given, *pass_fds])
        return WarmChild(argv, int(self._control.recv(32)), status, *ours, text=text)

    def close(self) -> None:
        """End it."""
        self._control.close()
        self._process.wait(20)


class WarmChild:
    """What `subprocess.Popen` is to a process."""

    def __init__(
        self, args: list[str], pid: int, status: socket.socket, stdin: int | None, stdout: int | None, *, text: bool
    ) -> None:
        self.args, self.pid, self.returncode = args, pid, None
        self._status: socket.socket = status
        self.stdin = None if stdin is None else os.fdopen(stdin, "w" if text else "wb")
        self.stdout = None if stdout is None else os.fdopen(stdout, "r" if text else "rb")

    def poll(self) -> int | None:
        """Say how it has ended, None if it has not."""
        return self._ended(0.0)

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end."""
        if self._ended(timeout) is None:
            assert timeout is not None
            raise subprocess.TimeoutExpired(self.args, timeout)
        assert self.returncode is not None
        return self.returncode

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


_warm: WarmPython | None = None


def ready() -> WarmPython:
    """Return this process's warm Python, which is started at the first call; `cool` ends it."""
    global _warm
    if _warm is None:
        _warm = WarmPython()
    return _warm


def cool() -> None:
    """End the warm Python."""
    global _warm
    if _warm is not None:
        _warm.close()
        _warm = None


def popen(argv: list[str], **options: Any) -> WarmChild:
    """Be `subprocess.Popen` for Python, in a warm one."""
    return ready().popen(argv, **options)


def _serve(control: socket.socket) -> None:
    """Fork what is asked for, and tell how it ended; once nobody asks any more, nothing is left."""
    running: dict[int, tuple[int, int]] = {}  # by pidfd: the process, and where to tell
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
            pid = os.fork()
            if pid == 0:
                _run(json.loads(said), fds)
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


def _run(told: dict[str, Any], fds: list[int]) -> NoReturn:
    """Be the child."""
    high = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, _HIGH) for fd in fds[1:]]
    os.closerange(3, _HIGH)
    for fd, target in zip(high, told["targets"], strict=True):
        os.dup2(fd, target)
        os.close(fd)
    os.environ.clear()
    os.environ.update(told["env"])
    os.chdir(told["cwd"])
    sys.exit(_run_as_main(*told["argv"]))


def _run_as_main(what: str, *arguments: str) -> Any:
    """Run code as `__main__`, with the import path that its interpreter would have."""
    main = types.ModuleType("__main__")
    main.__builtins__ = __builtins__  # type: ignore[attr-defined]
    code, first = (
        (arguments[0], "") if what == "-c" else (Path(what).read_text(encoding="utf-8"), str(Path(what).parent))
    )
    sys.argv = ["-c", *arguments[1:]] if what == "-c" else [what, *arguments]
    own = os.environ.get("PYTHONPATH", "")
    sys.path[:] = [first, *filter(None, own.split(":")), *_BASE]
    if what != "-c":
        main.__file__ = what
    sys.modules["__main__"] = main
    exec(compile(code, "<string>" if what == "-c" else what, "exec"), main.__dict__)


def _warm_up() -> None:
    import gc
    import importlib

    from raynixl.backends.ucx_runtime import load_ucxx
    from raynixl.errors import BackendUnavailable

    for name in _IMPORTS:
        importlib.import_module(name)
    with contextlib.suppress(BackendUnavailable):
        load_ucxx()
    gc.collect()
    gc.freeze()


if __name__ == "__main__":
    _BASE = [one for one in sys.path[1:] if one not in os.environ.get("PYTHONPATH", "").split(":")]
    _warm_up()
    _serve(socket.socket(fileno=int(sys.argv[1])))
