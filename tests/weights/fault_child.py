"""A process with one agent for the tests of faults: trains or serves weights, watches them, stalls and lies."""

from __future__ import annotations

import hashlib
import os
import signal
import sys
import threading
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from weights_nursery import serve

from raynixl.agents import Agent
from raynixl.errors import RaynixlError
from raynixl.weights import WeightSync, publish, settling, subscribe
from raynixl.weights.declare import declare
from raynixl.weights.pieces import TensorInfo
from raynixl.weights.placement import Mesh, Shard
from raynixl.weights.receiver import Receiver
from raynixl.weights.targets import Targets

VERIFY = Receiver._verify


class Child:
    """The commands."""

    def __init__(self, name, send):
        self.agent = Agent(name)
        self.send = send
        self.weights = {}
        self.module = None
        self.publication = self.subscription = None
        self.saying = threading.Lock()
        self.told, self.stop = threading.Event(), threading.Event()
        self.reads, self.torn, self.seen = 0, [], []

    def say(self, value):
        with self.saying:
            self.send(value)

    def meet(self, record):
        self.agent.peer(bytes.fromhex(record))
        return True

    def make(self, tensors, elements, value=0.0):
        self.weights = {f"w{number}": torch.full((elements,), float(value)) for number in range(tensors)}
        return True

    def fill(self, value):
        with self.publication.updating():
            for tensor in self.weights.values():
                tensor.fill_(value)
        return True

    def randomise(self, seed):
        """Give the weights values that tell every element from its neighbours."""
        draw = torch.Generator().manual_seed(seed)
        with self.publication.updating():
            for tensor in self.weights.values():
                tensor.copy_(torch.rand(tensor.shape, generator=draw))
        return True

    def sha256(self):
        """Return what tells the weights' bytes from any others."""
        digest = hashlib.sha256()
        for tensor in (self.module if self.module is not None else self.weights).values():
            digest.update(tensor.detach().numpy().tobytes())
        return digest.hexdigest()

    def publish(self, **options):
        self.publication = publish(self.agent, "w", self.weights, **options)
        return True

    def withdraw(self):
        """Publish and follow no more."""
        for one in (self.publication, self.subscription):
            if one is not None:
                one.close()
        return True

    def publish_share(self, rank, ranks, **options):
        """Publish the weights as what this rank has of larger ones, split along their only dimension."""
        return self.publish(shards=self._shards(rank, ranks), **options)

    def subscribe_share(self, rank, ranks, **options):
        return self.subscribe(shards=self._shards(rank, ranks), **options)

    def _shards(self, rank, ranks):
        infos = [TensorInfo(name, "float32", (ranks * len(own),)) for name, own in self.weights.items()]
        return declare(infos, Mesh((("tp", ranks),)), (Shard(0),), (rank,))

    def is_free(self):
        """Whether no push has the weights."""
        return self.publication._copies.wait_free(0.0)

    def subscribe(self, **options):
        self.module = torch.nn.ParameterDict(self.weights)
        self.subscription = subscribe(self.agent, "w", self.module, **options)
        return True

    def unsubscribe(self):
        self.subscription.close()
        return True

    def values(self):
        """Return the version served and the distinct values of all tensors."""
        with self.subscription.pinned() as version:
            return [version, sorted({value for tensor in self.module.values() for value in tensor.unique().tolist()})]

    def wait_version(self, version):
        return self.subscription.wait_version(version, 30.0)

    def watch(self):
        """Read the weights in a tight loop from now on; every version has its number in all its elements."""

        def read():
            while not self.stop.is_set():
                with self.subscription.pinned() as version:
                    ends = {t.data[at].item() for t in self.module.values() for at in (0, len(t) // 2, -1)}
                self.reads += 1
                if not self.seen or self.seen[-1] != version:
                    self.seen.append(version)
                if ends != {float(version)}:
                    self.torn.append([version, sorted(ends)])

        self.reader = threading.Thread(target=read, daemon=True)
        self.reader.start()
        return True

    def watched(self):
        """Stop reading; return how often it read, what was torn, and the versions that it saw."""
        self.stop.set()
        self.reader.join(10)
        found = [self.reads, self.torn[:3], self.seen]
        self.stop.clear()
        self.reads, self.torn, self.seen = 0, [], []
        return found

    def reset(self):
        """Do no more harm."""
        Receiver._verify = VERIFY
        self.told.set()
        return True

    def dawdle(self, seconds):
        """Take so long for every chunk that lands."""

        def slow(receiver, *arguments, **options):
            time.sleep(seconds)
            return VERIFY(receiver, *arguments, **options)

        Receiver._verify = slow
        return True

    def stall_at(self, chunk):
        """At the n-th chunk that lands say so, and go no further until told."""
        verify, landed = VERIFY, []
        self.told.clear()

        def slow(receiver, *arguments, **options):
            landed.append(1)
            if len(landed) == chunk:
                self.say("stalled")
            if len(landed) >= chunk:
                self.told.wait(60)
            return verify(receiver, *arguments, **options)

        Receiver._verify = slow
        return True

    def lie(self, told_at=0):
        """From now on damage every chunk once it is verified, before anybody gets it; say so at the n-th."""
        verify, damaged = VERIFY, []

        def damage(receiver, chunk, *arguments, **options):
            verify(receiver, chunk, *arguments, **options)
            arena, offset, _ = receiver.cargo.chunks[chunk].tolist()
            receiver.slot.bank.arrays[arena][offset] ^= 1
            damaged.append(chunk)
            if len(damaged) == told_at:
                self.say("lied")

        Receiver._verify = damage
        return True

    def go_on(self):
        self.told.set()
        return True

    def push(self, version, sources, targets, **options):
        sync = WeightSync(self.agent, "w", sources, targets, **options)
        try:
            report = sync.push(version)
        except RaynixlError as error:
            return type(error).__name__
        return sorted(report.ranks)

    def push_until(self, flips, pause, **arguments):
        """Push, but when so many ranks of a replica have flipped say so and wait, or die if there is no pause."""
        ask = Targets.ask

        def ask_some(targets, phase, payloads, deadline, **options):
            if phase != "flip":
                return ask(targets, phase, payloads, deadline, **options)
            some = dict(list(payloads.items())[:flips])
            answers = ask(targets, phase, some, deadline)
            if not pause:
                os.kill(os.getpid(), signal.SIGKILL)
            self.say("flipped")
            time.sleep(pause)
            rest = {name: payload for name, payload in payloads.items() if name not in some}
            return answers | ask(targets, phase, rest, deadline)

        Targets.ask = ask_some
        return self.push(**arguments)

    def settle_for(self, seconds):
        """Ask other ranks no longer than this how a flip has ended."""
        settling._SETTLE_SECONDS = seconds
        return True


serve(Child)
