"""The test bed itself: hosts are apart, cables carry, are capped, cut and healed, and nothing is ever left."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from agent_tools import eventually
from hosts_tools import PATIENCE, Bed, Host, environment, processes_of, why_no_hosts

from raynixl.host import process_state

pytestmark = pytest.mark.pure

RECEIVE = """
    import hashlib, socket, sys, time
    with socket.create_server((sys.argv[1], 5001)) as server:
        print("listening", flush=True)
        while True:
            connection, _ = server.accept()
            with connection:
                digest, began = hashlib.sha256(), time.perf_counter()
                while part := connection.recv(1 << 20):
                    digest.update(part)
                print(digest.hexdigest(), time.perf_counter() - began, flush=True)
"""
SEND = """
    import hashlib, os, socket, sys
    nbytes, timeout = int(sys.argv[2]), float(sys.argv[3])
    sent = os.urandom(nbytes)
    with socket.create_connection((sys.argv[1], 5001), timeout=timeout) as connection:
        connection.sendall(sent)
    print(hashlib.sha256(sent).hexdigest())
"""
TAKE = """
    import socket, sys, time
    with socket.create_server((sys.argv[1], 5001)) as server:
        print("listening", flush=True)
        connection, _ = server.accept()
        with connection:
            buffer = bytearray(1 << 20)
            taken, began = connection.recv_into(buffer), time.perf_counter()
            while part := connection.recv_into(buffer):
                taken += part
            print(taken, 8 * taken / (time.perf_counter() - began) / 1e9)
"""
GIVE = """
    import socket, sys
    with socket.create_connection((sys.argv[1], 5001)) as connection:
        for _ in range(int(sys.argv[2]) >> 20):
            connection.sendall(bytes(1 << 20))
"""
MIB = 1 << 20


@pytest.fixture(autouse=True)
def _leaves_nothing(_hosts_allowed: None, nothing_left: Callable[[], list[str]]) -> None:
    """Every test of this file is held to it."""


def gbit_between(sender: Host, taker: Host, nbytes: int = 128 * MIB) -> float:
    """How many Gbit/s one TCP connection carries."""
    taking = taker.python(TAKE, taker.address, stdout=subprocess.PIPE)
    assert taking.stdout is not None
    assert taking.stdout.readline() == "listening\n"
    sender.ask(GIVE, taker.address, str(nbytes))
    taken, gbit = taking.communicate(timeout=PATIENCE)[0].split()
    assert int(taken) == nbytes
    return float(gbit)


class Receiver:
    """A process in a host that takes bytes and says their digest."""

    def __init__(self, host: Host, rail: int) -> None:
        self.address = host.address_on(rail)
        self._process = host.python(RECEIVE, self.address, stdout=subprocess.PIPE)
        assert self._process.stdout is not None
        self._told = self._process.stdout
        assert self._told.readline() == "listening\n"

    def seconds_for(self, nbytes: int, sender: Host) -> float:
        """How long it takes to receive bytes from a host; they must be the right ones."""
        sent = sender.ask(SEND, self.address, str(nbytes), str(PATIENCE)).strip()
        digest, seconds = self._told.readline().split()
        assert digest == sent
        return float(seconds)

    def hears(self, sender: Host) -> bool:
        """Whether a host can connect, and send a byte, within a moment."""
        process = sender.python(SEND, self.address, "1", "0.3", stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        process.communicate(timeout=PATIENCE)
        if process.returncode == 0:
            self._told.readline()
        return process.returncode == 0

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait(PATIENCE)
        self._told.close()


@contextlib.contextmanager
def receiver(host: Host, rail: int = 0) -> Iterator[Receiver]:
    """A receiver that is gone afterwards."""
    made = Receiver(host, rail)
    try:
        yield made
    finally:
        made.close()


def links_here() -> list[str]:
    """The network interfaces of this machine itself, and its named namespaces."""
    named = Path("/run/netns")
    return sorted([*os.listdir("/sys/class/net"), *(os.listdir(named) if named.exists() else [])])


def test_hosts_reach_each_other_and_are_apart_in_all_else() -> None:
    before = links_here()
    look = """
        import os, socket
        open("/dev/shm/mine", "w").close()
        print(socket.gethostname(), len(os.listdir("/dev/shm")), sorted(os.listdir("/sys/class/net")))
        print([os.stat(f"/proc/self/ns/{kind}").st_ino for kind in ("net", "pid", "mnt", "uts", "ipc")])
        print(sorted(int(name) for name in os.listdir("/proc") if name.isdigit())[0], os.getcwd())
    """
    with Bed(3) as bed:
        seen = [host.ask(look).splitlines() for host in bed]
        assert [lines[0] for lines in seen] == [f"{host.name} 1 ['eth0', 'lo']" for host in bed]
        spaces = [space for lines in seen for space in lines[1].strip("[]").split(", ")]
        assert len(set(spaces)) == 3 * 5
        assert [lines[2] for lines in seen] == [f"1 {os.getcwd()}"] * 3
        first, second, third = bed
        with receiver(third) as takes:
            takes.seconds_for(MIB, first)
            takes.seconds_for(MIB, second)
        assert links_here() == before
    assert links_here() == before


def test_a_machine_that_allows_no_hosts_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert "ip, tc, nsenter, unshare (packages iproute2" in why_no_hosts.__wrapped__()
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert "need root" in why_no_hosts.__wrapped__()


def test_two_beds_at_a_time_have_the_same_addresses_and_nothing_else_in_common(bed: Bed) -> None:
    with Bed() as other:
        assert [host.address for host in bed] == [host.address for host in other]
        with receiver(bed.hosts[1]) as takes, receiver(other.hosts[1]) as takes_too:
            bed.cut(bed.hosts[0])
            assert not takes.hears(bed.hosts[0])
            takes_too.seconds_for(MIB, other.hosts[0])


def test_a_process_is_waited_for_and_signalled_from_here(bed: Bed) -> None:
    first, _ = bed
    process = first.run(["sleep", "60"])
    assert int(Path(f"/proc/{process.pid}/stat").read_text().split()[0]) == process.pid
    process.send_signal(signal.SIGTERM)
    assert process.wait(PATIENCE) == -signal.SIGTERM
    assert first.run(["sh", "-c", "exit 3"]).wait(PATIENCE) == 3


def test_a_cap_holds_in_both_directions_until_it_is_taken_away(bed: Bed) -> None:
    first, second = bed
    nbytes = 5 * MIB
    floor = 8 * (nbytes - MIB) / 0.1e9  # what the bucket and the buffers take at once is far below 1 MiB
    bed.cap(second, 0.1)
    with receiver(second) as takes, receiver(first) as takes_back:
        assert takes.seconds_for(nbytes, first) > floor
        assert takes_back.seconds_for(nbytes, second) > floor
        bed.free(second)
        assert min(takes.seconds_for(nbytes, first) for _ in range(5)) < floor


def test_a_cap_of_ten_gigabits_is_used_to_the_full(bed: Bed) -> None:
    first, second = bed
    seen = []
    for _ in range(5):
        uncapped = gbit_between(first, second)
        bed.cap(second, 10)
        capped = gbit_between(first, second)
        bed.free(second)
        assert capped < 10.5
        if capped > min(9, 0.7 * uncapped):  # TCP can use 9.5 of it; a machine that is busy carries less in any case
            return
        seen.append((capped, uncapped))
    pytest.fail(f"the cap takes more than it should: Gbit/s with and without {seen}")


def test_a_cut_cable_carries_nothing_until_it_is_healed(bed: Bed) -> None:
    first, second = bed
    with receiver(second) as takes:
        assert takes.hears(first)
        bed.cut(second)
        assert not takes.hears(first)
        assert "ok" in second.ask(f"import socket; socket.create_connection(('{second.address}', 5001)); print('ok')")
        takes._told.readline()
        bed.heal(second)
        eventually(lambda: takes.hears(first), "the cable carries again")
        takes.seconds_for(MIB, first)


def test_a_connection_outlives_a_short_cut(bed: Bed) -> None:
    first, second = bed
    echo = """
        import socket, sys
        with socket.create_server((sys.argv[1], 5001)) as server:
            print("listening", flush=True)
            connection, _ = server.accept()
            with connection:
                while part := connection.recv(1):
                    connection.sendall(part)
    """
    talk = """
        import socket, sys
        with socket.create_connection((sys.argv[1], 5001), timeout=20) as connection:
            for line in sys.stdin:
                connection.sendall(line[:1].encode())
                print(connection.recv(1).decode(), flush=True)
    """
    echoing = second.python(echo, second.address, stdout=subprocess.PIPE)
    assert echoing.stdout is not None
    assert echoing.stdout.readline() == "listening\n"
    talking = first.python(talk, second.address, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert talking.stdin is not None
    assert talking.stdout is not None
    with echoing.stdout, talking.stdin, talking.stdout:
        for letter in "abc":
            if letter == "b":
                bed.cut(first)
            talking.stdin.write(f"{letter}\n")
            talking.stdin.flush()
            if letter == "b":
                bed.heal(first)
            assert talking.stdout.readline() == f"{letter}\n"


def test_rails_are_cut_one_by_one(bed: Bed) -> None:
    first, second = bed
    bed.second_rail()
    bed.second_rail()
    assert bed.rails == 2
    with receiver(second, rail=0) as takes, receiver(second, rail=1) as takes_too:
        assert takes.address != takes_too.address
        bed.cut(second, rail=0)
        assert not takes.hears(first)
        takes_too.seconds_for(MIB, first)
        bed.heal(second, rail=0)
        bed.cut(second, rail=1)
        eventually(lambda: takes.hears(first), "the first rail carries again")
        assert not takes_too.hears(first)


def test_delay_and_loss_where_the_kernel_has_them(bed: Bed) -> None:
    first, second = bed
    if not bed.has_netem:
        with pytest.raises(AssertionError, match="no netem"):
            bed.delay(second, 20)
        return
    bed.delay(second, 20, loss=0.01)
    with receiver(second) as takes:
        assert takes.seconds_for(MIB, first) > 0.02


def test_a_host_ends_with_all_its_processes_and_the_others_go_on() -> None:
    with Bed(3) as bed:
        first, second, third = bed
        process = first.run(["sh", "-c", "setsid sleep 60 & echo $! && exec sleep 60"], stdout=subprocess.PIPE)
        assert process.stdout is not None
        with process.stdout as told:
            told.readline()
            inside = [pid for pid in processes_of(first) if pid != first.pid]
            assert len(inside) == 2
            first.close()
            assert process.wait(PATIENCE) == -signal.SIGKILL
        assert not [pid for pid in inside if Path(f"/proc/{pid}").exists()]
        with receiver(third) as takes:
            takes.seconds_for(MIB, second)


def test_nothing_outlives_a_killed_owner() -> None:
    before = links_here()
    code = """
        import os, sys, time
        from hosts_tools import Bed
        bed = Bed()
        process = bed.hosts[0].run(["sh", "-c", "setsid sleep 60 & exec sleep 60"])
        print(*(host.pid for host in (*bed, bed.switch)), process.pid, flush=True)
        time.sleep(60)
    """
    owner = subprocess.Popen(
        [sys.executable, "-c", "import textwrap, sys; exec(textwrap.dedent(sys.argv[1]))", code],
        stdout=subprocess.PIPE, text=True, env=environment(),
    )  # fmt: skip
    assert owner.stdout is not None
    with owner.stdout as told:
        pids = [int(pid) for pid in told.readline().split()]
        assert len(pids) == 4
        assert "" not in [process_state(pid) for pid in pids]
        owner.kill()
        owner.wait(PATIENCE)
    eventually(lambda: {process_state(pid) for pid in pids} <= {"", "Z"}, "all its processes are dead")
    assert links_here() == before
