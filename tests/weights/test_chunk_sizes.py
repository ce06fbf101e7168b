"""A trainer that publishes again with chunks of another size is pulled from as it says now."""

import pytest
import torch

from raynixl.weights import WeightSync, publish, subscribe

NAMES = ["r0", "r1", "r2", "r3"]
KIB = 1 << 10


@pytest.mark.parametrize("topology", ["relay", "direct"])
@pytest.mark.parametrize(("before", "after"), [(256 * KIB, 512 * KIB), (512 * KIB, 128 * KIB)])
def test_pushes_go_on_with_chunks_of_another_size(fleet, topology, before, after):
    trainer, source = fleet("t"), {"w": torch.zeros(1 << 20)}
    targets = {name: {"w": torch.zeros(1 << 20)} for name in NAMES}
    for name, target in targets.items():
        subscribe(fleet(name), "p", target)
    publication = publish(trainer, "p", source, delta="off", chunk_nbytes=before)
    sync = WeightSync(trainer, "p", ["t"], NAMES, timeout=20.0, topology=topology, delta="off")
    for version in range(1, 9):
        if version == 5:
            publication.close()
            publication = publish(trainer, "p", source, delta="off", chunk_nbytes=after)
        source["w"].copy_(torch.arange(1 << 20) + version)
        report = sync.push(version)
        assert not report.excluded
        assert not report.liars
        assert all(torch.equal(target["w"], source["w"]) for target in targets.values())
