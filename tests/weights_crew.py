"""A crew: a trainer and rollouts in processes of their own, for tests of what happens between and to them."""

from __future__ import annotations

import time
from pathlib import Path

from weights_nursery import Nursery

from raynixl.weights import WeightSync

SCRIPT = Path(__file__).parent / "weights" / "fault_child.py"
TENSORS, ELEMENTS = 4, 100_000
NBYTES = TENSORS * ELEMENTS * 4
CHUNK = 1 << 16
CHUNKS = -(-NBYTES // CHUNK)


class Crew:
    """A trainer and rollouts in processes of their own, that know each other and the pusher; the dead are replaced."""

    def __init__(self, pusher):
        self.pusher = pusher
        self.nursery = Nursery(SCRIPT)
        self.version = 0
        self.by_name = {}

    def start(self, *names):
        """Start processes, and introduce them to all that live."""
        fresh = [self.nursery.child(name) for name in names]
        self.by_name.update((child.name, child) for child in fresh)
        for child in fresh:
            child.ask("meet", record=self.pusher.record().hex())
            self.pusher.peer(child.record)
            for other in self.alive():
                if other is not child:
                    child.ask("meet", record=other.record.hex())
                    other.ask("meet", record=child.record.hex())
        return fresh

    def alive(self):
        return [child for child in self.by_name.values() if child.is_alive]

    def missing(self, *names):
        alive = {child.name for child in self.alive()}
        return self.start(*(name for name in names if name not in alive))

    def ready(self, *names, **options):
        """Return a sync to these rollouts, the trainer and them; all serve one version and do no harm."""
        for child in self.missing("trainer", *names):
            child.ask("make", tensors=TENSORS, elements=ELEMENTS)
            if child.name == "trainer":
                child.ask("publish", chunk_nbytes=CHUNK)
            else:
                child.ask("subscribe")
        rollouts = [self.by_name[name] for name in names]
        for child in rollouts:
            child.ask("reset")
        sync = WeightSync(self.pusher, "w", ["trainer"], list(names), timeout=40, **{"topology": "relay", **options})
        assert not self.push(sync).excluded
        return sync, self.by_name["trainer"], rollouts

    def next(self):
        """Give the trainer's weights the next version's number, and return it."""
        self.version += 1
        self.by_name["trainer"].ask("fill", value=float(self.version))
        return self.version

    def wait_released(self):
        """Wait until the trainer is needed no more by a push that goes on."""
        end = time.monotonic() + 20
        while not self.by_name["trainer"].ask("is_free"):
            assert time.monotonic() < end

    def push(self, sync, **options):
        return sync.push(self.next(), **options)

    def close(self):
        self.nursery.close()
