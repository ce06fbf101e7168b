"""Kimi-K2 from 256 sources to 128 targets is planned in seconds, and every rank gets what it needs."""

import json
import subprocess
import sys

import numpy as np
import pytest

pytestmark = pytest.mark.pure

SCRIPT = """
import json, math, resource, sys, time
from raynixl.weights.catalogue import parameters
from raynixl.weights.meshes import source_shards, target_shards
from raynixl.weights.plan import Plan, plan

found = parameters("kimi-k2")
began = time.process_time()
sources, targets = source_shards(found, "fsdp=256"), target_shards(found, sys.argv[1])
declared = time.process_time() - began
made = plan(sources, targets)
planned = time.process_time() - began
incoming = made.incoming(5)
worked_out = time.process_time() - began - planned
cuts = incoming.cut(made.images[5].arenas, 32 << 20)
outgoing = made.outgoing(17)
print(json.dumps({
    "tensors": len(found), "sources": len(sources), "targets": len(targets), "images": len(made.images),
    "declared": declared, "planned": planned, "worked_out": worked_out, "nbytes": list(made.nbytes),
    "model": sum(2 * math.prod(one.info.shape) for one in found),
    "image": made.images[5].nbytes, "incoming": incoming.nbytes, "cut": int(cuts.nbytes.sum()), "chunks": len(cuts),
    "given": sum(ranges.nbytes for _, ranges in outgoing), "share": int(made.shares[:, made.part_of[17]].sum()),
    "travels": len(made.to_bytes()), "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10,
}))
"""


def planned(target):
    done = subprocess.run([sys.executable, "-c", SCRIPT, target], capture_output=True, timeout=100, check=True)
    return json.loads(done.stdout)


@pytest.mark.parametrize(("target", "images"), [("tp=8,ep=16,replicas=8", 16), ("tp=8,ep=128", 128)])
def test_kimi_k2_from_256_sources_to_128_targets_takes_seconds_and_little_memory(target, images):
    found = planned(target)
    assert (found["tensors"], found["sources"], found["targets"], found["images"]) == (69_975, 256, 128, images)
    assert found["planned"] <= 5.0  # of one core
    assert found["peak"] <= 2 << 30
    assert found["travels"] <= 32 << 20
    assert found["incoming"] == found["cut"] == found["nbytes"][5] <= found["image"]
    assert found["given"] == found["share"]
    assert np.sum(found["nbytes"]) >= found["model"]
