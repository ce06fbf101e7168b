"""A trainer that publishes again with chunks of another size is pulled from as it says now, however often."""

import pytest
import torch

from raynixl.weights import WeightSync, publish, subscribe

NAMES = ["r0", "r1", "r2", "r3"]
KIB = 1 << 10


@pytest.mark.parametrize("topology", ["relay", "direct"])
@pytest.mark.parametrize("sizes", [(256, 512, 256), (512, 128, 64, 512)])
def test_pushes_go_on_with_chunks_of_another_size(fleet, topology, sizes):
    trainer, source = fleet("t"), {"w": torch.zeros(1 << 20)}
    targets = {name: {"w": torch.zeros(1 << 20)} for name in NAMES}
    for name, target in targets.items():
        subscribe(fleet(name), "p", target)
    sync = WeightSync(trainer, "p", ["t"], NAMES, timeout=20.0, topology=topology, delta="off")
    version = 0
    for size in sizes:
        with publish(trainer, "p", source, delta="off", chunk_nbytes=size * KIB):
            for _ in range(3):
                version += 1
                source["w"].copy_(torch.arange(1 << 20) + version)
                report = sync.push(version)
                assert not report.excluded
                assert not report.liars
                assert all(torch.equal(target["w"], source["w"]) for target in targets.values())


def test_sources_that_want_chunks_of_different_sizes_agree_on_those_of_the_first(fleet):
    sources = {"a": 256, "b": 64}
    tensors = {name: {"w": torch.full((1 << 18,), 1.0)} for name in sources}
    agents = {name: fleet(name) for name in sources}
    publications = {
        name: publish(agents[name], "p", tensors[name], chunk_nbytes=sources[name] * KIB) for name in sources
    }
    target = {"w": torch.zeros(1 << 18)}
    subscribe(fleet("r"), "p", target)
    sync = WeightSync(agents["a"], "p", ["a", "b"], ["r"], timeout=20.0)
    for version in range(1, 7):
        again = "a" if version % 2 else "b"
        if version > 1:
            publications[again].close()
            publications[again] = publish(agents[again], "p", tensors[again], chunk_nbytes=sources[again] * KIB)
        for one in tensors.values():
            one["w"].fill_(float(version))
        sync.push(version).raise_for_excluded()
        assert target["w"].unique().tolist() == [float(version)]
