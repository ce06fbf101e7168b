"""A tool of the tests of sources: asks them as whoever pushes does, pulls images by plan, and checks their digests."""

from __future__ import annotations

import secrets
import time

import numpy as np

from raynixl.weights.bank import HostBank
from raynixl.weights.digest import digest_chunks
from raynixl.weights.plan import plan
from raynixl.weights.protocol import topic
from raynixl.weights.shards import Shards
from raynixl.weights.sourcing import Described, Freeze, Frozen, ImageRows, Outgoing, Release
from raynixl.weights.table import Table

SECONDS = 20.0


class Puller:
    """Plans from sources, by name, to targets' shards, and brings versions into arrays of its own."""

    def __init__(self, agent, name, sources, targets, *, chunk_nbytes=4096):
        self.agent, self.name, self.sources, self.chunk_nbytes = agent, name, sources, chunk_nbytes
        described = [Described.from_bytes(self.ask(source, "describe")) for source in sources]
        tables = {
            one.table: Table.from_bytes(self.ask(source, "layout", one.table.encode()))
            for source, one in zip(sources, described, strict=True)
        }
        self.plan = plan([Shards.at(tables[one.table], one.rank) for one in described], targets)
        self.images = list(self.plan.images)
        for number in range(len(sources)):
            self.send_rows(number)

    def ask(self, source, phase, payload=b"", timeout=SECONDS):
        return self.agent.ask(source, topic(self.name, phase), payload, timeout=timeout).wait()

    def send_rows(self, number):
        """Tell a source what it serves."""
        part = self.plan.part_of[number]
        rows = tuple(
            ImageRows(image, self.plan.incoming(image).parts.index(part), self.images[image].arenas, ranges.to_bytes())
            for image, ranges in self.plan.outgoing(number)
        )
        self.ask(self.sources[number], "outgoing", Outgoing(self.plan.digest, self.chunk_nbytes, rows).to_bytes())

    def freeze(self, version, *, base=0, seconds=SECONDS, push=None):
        """Freeze all sources; return the push and what they answered."""
        push = secrets.token_hex(16) if push is None else push
        request = Freeze(push=push, version=version, seconds=seconds, plan=self.plan.digest, base=base).to_bytes()
        return push, [Frozen.from_bytes(self.ask(source, "freeze", request)) for source in self.sources]

    def release(self, push, *, committed=True):
        for source in self.sources:
            self.ask(source, "release", Release(push=push, committed=committed).to_bytes())

    def warm(self, *publications):
        """Push versions 1 and 2, so that the sources have room for a base version from now on."""
        self.push(1)
        self.push(2, base=1)
        deadline = time.monotonic() + SECONDS
        while any(len(publication._copies._copies) < 2 for publication in publications):
            assert time.monotonic() < deadline
            time.sleep(0.01)

    def pull(self, version, frozen):
        """Return the tensors of each image; every chunk's digest is the sum of what the sources said."""
        arrays = [[np.zeros(size, np.uint8) for size in layout.arenas] for layout in self.images]
        for image in range(len(self.images)):
            for row in self.plan.incoming(image).expand().tolist():
                self._read(frozen[self.plan.parts[row[0]][0]], arrays[image], row)
            self._check(version, frozen, (image, arrays[image]))
        return [
            {entry.name: HostBank(arrays[image]).tensor(entry).clone() for entry in layout.entries}
            for image, layout in enumerate(self.images)
        ]

    def push(self, version, **options):
        """Freeze, pull and release a version; return the tensors of each image."""
        push, frozen = self.freeze(version, **options)
        pulled = self.pull(version, frozen)
        self.release(push)
        return pulled

    def _read(self, frozen, arrays, row):
        _, source_arena, source_offset, arena, offset, nbytes = row
        remote = frozen.holder.remotes()[source_arena]
        local = self.agent.register(arrays[arena])
        self.agent.read(remote.span(source_offset, nbytes), local.span(offset, nbytes), timeout=SECONDS).wait()
        self.agent.deregister(local)

    def _check(self, version, frozen, pulled):
        image, arrays = pulled
        chunks = self.images[image].chunks(self.chunk_nbytes)
        sums = np.zeros((len(chunks), 2), np.uint64)
        for members in self.plan.parts:
            partials = [frozen[member].partials.get(image) for member in members]
            for partial in partials[1:]:
                assert np.array_equal(partial.digests, partials[0].digests)
            if partials[0] is not None:
                sums[partials[0].chunks] += partials[0].digests
        assert np.array_equal(sums, digest_chunks(arrays, chunks, threads=1, seed=version))
