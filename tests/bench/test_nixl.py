"""The baseline NIXL: moves the same bytes as ours in processes of its own, and is never loaded in this one."""

import importlib.util
from pathlib import Path

import pytest

from raynixl.bench import nixl
from raynixl.bench.spec import TransferSpec
from raynixl.bench.transfer import run_transfer
from raynixl.errors import ConfigError, RaynixlError

needs_nixl = pytest.mark.skipif(
    all(importlib.util.find_spec(name) is None for name in nixl.PACKAGES), reason="NIXL is not installed"
)
pytestmark = pytest.mark.usefixtures("nothing_left")


@needs_nixl
@pytest.mark.parametrize(("op", "memory"), [("write", "arena"), ("read", "user")])
def test_it_moves_the_bytes_of_every_size_idle_and_busy(op, memory):
    spec = TransferSpec(
        (8, 4096), op=op, memory=memory, blocks=40, is_random=True, rounds=1, baselines=("nixl",), is_busy=True,
        ucx={"TLS": "cma,tcp"},
    )  # fmt: skip
    rows = list(run_transfer(spec))
    assert [(row["block_nbytes"], row["impl"], row["busy"]) for row in rows] == [
        (size, impl, busy) for size in (8, 4096) for impl in ("raynixl", "nixl") for busy in (False, True)
    ]
    assert all(row["verified"] is True for row in rows)
    assert "nixl_cu" not in Path("/proc/self/maps").read_text()


@needs_nixl
def test_bytes_that_do_not_arrive_are_noticed(monkeypatch):
    monkeypatch.setattr(nixl.NixlRunner, "sample", lambda _self, count: [1] * count)
    rows = list(run_transfer(TransferSpec((4096,), rounds=1, baselines=("nixl",), ucx={"TLS": "tcp"})))
    assert [row["verified"] for row in rows] == [True, False]


@needs_nixl
def test_options_that_leave_no_lane_are_an_error():
    with pytest.raises(RaynixlError, match="NIXL"):
        list(run_transfer(TransferSpec((8,), rounds=1, baselines=("nixl",), ucx={"TLS": "carrier_pigeon"})))


def test_without_nixl_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ConfigError, match="not installed") as caught:
        list(run_transfer(TransferSpec((8,), baselines=("nixl",))))
    assert "pip install" in caught.value.hint
