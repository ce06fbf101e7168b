"""A process with one agent that trains or rolls out, as it is told; see `weights_nursery`."""

from __future__ import annotations

import sys
import threading
import warnings
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from weights_nursery import serve

from raynixl.agents import Agent
from raynixl.errors import RaynixlError
from raynixl.weights import WeightSync, publish, subscribe
from raynixl.weights.declare import declare
from raynixl.weights.flipper import Flipper
from raynixl.weights.pieces import TensorInfo
from raynixl.weights.placement import Mesh, Shard
from raynixl.weights.receiver import Receiver
from raynixl.weights.versionlock import VersionLock


class Child:
    """The commands."""

    def __init__(self, name, send):
        self.agent = Agent(name)
        self.send = send
        self.weights = {}
        self.lock = threading.Lock()

    def say(self, value):
        with self.lock:
            self.send(value)

    def meet(self, record):
        self.agent.peer(bytes.fromhex(record))
        return True

    def make(self, tensors, elements):
        self.weights = {f"w{number}": torch.zeros(elements) for number in range(tensors)}
        return True

    def fill(self, value):
        for tensor in self.weights.values():
            tensor.fill_(value)
        return True

    def publish(self, chunk_nbytes):
        self.publication = publish(self.agent, "w", self.weights, chunk_nbytes=chunk_nbytes)
        return True

    def publish_shard(self, rank, ranks):
        """Publish the weights as what this rank has of larger ones, split along their first dimension."""
        infos = [TensorInfo(name, "float32", (ranks * len(own),)) for name, own in self.weights.items()]
        shards = declare(infos, Mesh((("fsdp", ranks),)), (Shard(0),), (rank,))
        self.publication = publish(self.agent, "w", self.weights, shards=shards)
        return True

    def publish_fsdp(self, rank, ranks, store):
        """Publish a module that torch shards over processes, and keep what trains it."""
        warnings.simplefilter("ignore")  # of torch's
        from torch.distributed.fsdp import fully_shard

        torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
        torch.manual_seed(0)
        self.model = fully_shard(torch.nn.Sequential(torch.nn.Linear(33, 51), torch.nn.Linear(51, 17)))
        self.optimiser = torch.optim.SGD(self.model.parameters(), lr=0.5)
        self.publication = publish(self.agent, "w", self.model)
        return True

    def train(self):
        """Take a step, the same on every rank."""
        with self.publication.updating():
            self.model(torch.ones(2, 33)).sum().backward()
            self.optimiser.step()
            self.optimiser.zero_grad()
        return True

    def unpublish(self):
        self.publication.close()
        return True

    def subscribe(self, install="auto"):
        self.subscription = subscribe(self.agent, "w", self.weights, install=install)
        return True

    def stall(self):
        """From now on say so at the second chunk of a pull, and go no further for a minute."""
        begin = Receiver._begin
        calls = []

        def slow(receiver, chunk):
            calls.append(chunk)
            if len(calls) == 2:
                self.say("stalled")
            if len(calls) >= 2:
                threading.Event().wait(60)
            return begin(receiver, chunk)

        Receiver._begin = slow
        return True

    def stall_flip(self):
        """At the next flip say so, and go on when told; from now on note which versions are served."""
        hold, install = VersionLock.hold, Flipper._install
        self.told, self.served = threading.Event(), []

        def stall(lock, timeout):
            VersionLock.hold = hold
            self.say("stalled")
            self.told.wait(60)
            return hold(lock, timeout)

        def note(flipper, slot, version, ready):
            self.served.append(version)
            return install(flipper, slot, version, ready)

        VersionLock.hold, Flipper._install = stall, note
        return True

    def go_on(self):
        self.told.set()
        return True

    def flips(self):
        return self.served

    def push(self, version, targets, timeout):
        sync = WeightSync(self.agent, "w", [self.agent.name], targets, timeout=timeout)
        try:
            report = sync.push(version)
        except RaynixlError as error:
            return type(error).__name__
        return sorted(report.ranks)

    def values(self):
        """Return the version served and the distinct values of all tensors."""
        with self.subscription.pinned() as version:
            return [version, sorted({value for tensor in self.weights.values() for value in tensor.unique().tolist()})]

    def wait_version(self, version):
        return self.subscription.wait_version(version, 20.0)


serve(Child)
