"""A nursery: a process that has imported everything, and forks children that follow commands, in no time each."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import signal
import socket
import sys

import warm

SECONDS = 60.0


class Nursery:
    """Runs a script whose main loop is `serve`; `launch` says where. Close it, which ends its children too."""

    def __init__(self, script, *, launch=warm.popen, environment=os.environ):
        here, there = socket.socketpair()
        self._control = here
        self._process = launch(
            [sys.executable, "-W", "error", str(script), str(there.fileno())],
            pass_fds=[there.fileno()],
            env={**environment, "OMP_NUM_THREADS": "1"},
            torch=True,
        )
        there.close()
        self._control.settimeout(SECONDS)
        self._children = []

    def child(self, name):
        """Fork a child; it says something first."""
        here, there = socket.socketpair()
        socket.send_fds(self._control, [name.encode()], [there.fileno()])
        there.close()
        child = Forked(name, here, self._as_seen_here(int(self._control.recv(32))))
        self._children.append(child)
        return child

    def _as_seen_here(self, pid):
        """Return the process id that a child, which the nursery knows by this one, has here."""
        if os.readlink(f"/proc/{self._process.pid}/ns/pid") == os.readlink("/proc/self/ns/pid"):
            return pid
        children = f"/proc/{self._process.pid}/task/{self._process.pid}/children"
        for _ in range(100):  # the kernel may leave one out while another ends
            with open(children, encoding="ascii") as file:
                for one in file.read().split():
                    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                        if _innermost_pid(one) == pid:
                            return int(one)
        raise AssertionError(f"the nursery has no child {pid}")

    def close(self):
        for child in self._children:
            child.kill()
        self._control.close()
        self._process.wait(10)


class Brood:
    """Some children of a nursery that others use, too: closing it ends these alone."""

    def __init__(self, nursery):
        self._nursery, self._children = nursery, []

    def child(self, name):
        self._children.append(self._nursery.child(name))
        return self._children[-1]

    def close(self):
        for child in self._children:
            child.kill()


def _innermost_pid(pid):
    with open(f"/proc/{pid}/status", encoding="ascii") as status:
        return int(next(line for line in status if line.startswith("NSpid:")).split()[-1])


class Forked:
    """A child that follows commands over a socket."""

    def __init__(self, name, link, pid):
        self.name, self._link, self.pid = name, link, pid
        self._link.settimeout(SECONDS)
        self._lines = link.makefile("r")
        self.is_alive = True
        self.record = bytes.fromhex(self.hear())

    def send(self, do, **arguments):
        self._link.sendall((json.dumps({"do": do, **arguments}) + "\n").encode())

    def hear(self):
        line = self._lines.readline()
        assert line, f"child {self.name} ended"
        return json.loads(line)

    def ask(self, do, **arguments):
        self.send(do, **arguments)
        return self.hear()

    def signal(self, number):
        os.kill(self.pid, number)

    def kill(self):
        """End it, and return when it has ended."""
        if self.is_alive:
            self.signal(signal.SIGKILL)
            self.wait_ended()

    def wait_ended(self):
        """Return when it has ended, which it does by itself."""
        self.is_alive = False
        with contextlib.suppress(ConnectionResetError):
            while self._lines.readline():
                pass
        self._lines.close()
        self._link.close()


def serve(make):
    """Be a nursery: fork a child for each name that comes, which runs `make(name, say)`'s methods as they are asked."""
    control = socket.socket(fileno=int(sys.argv[1]))
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for children
    gc.collect()
    gc.freeze()  # collections in children leave out what was imported here: each would take a tenth of a second
    while True:
        name, fds, _, _ = socket.recv_fds(control, 256, 1)
        if not name:
            control.close()
            return
        pid = os.fork()
        if pid == 0:
            control.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            _follow(make, name.decode(), socket.socket(fileno=fds[0]))
        os.close(fds[0])
        control.send(str(pid).encode())


def _follow(make, name, link):
    try:
        child = make(name, lambda value: link.sendall((json.dumps(value) + "\n").encode()))
        child.say(child.agent.record().hex())
        for line in link.makefile("r"):
            arguments = json.loads(line)
            child.say(getattr(child, arguments.pop("do"))(**arguments))
    finally:
        os._exit(0)
