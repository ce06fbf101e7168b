"""Making: the topology that is asked for, or the one that is predicted to be faster."""

import pytest
import torch

from raynixl.errors import ConfigError
from raynixl.moe.cost import Fabric, Topology
from raynixl.moe.making import expert_parallel, predict_for
from raynixl.moe.parallel import ExpertParallel
from raynixl.moe.two_level import TwoLevel

OPTIONS = {"experts": 8, "hidden": 16, "topk": 2, "max_tokens": 4}
SLOW_MESSAGES = Fabric(call_seconds=0.0, message_seconds=1.0)


@pytest.mark.parametrize(
    ("more", "kind"),
    [
        ({"topology": "flat"}, ExpertParallel),
        ({"topology": "two-level"}, TwoLevel),
        ({"topology": "auto"}, ExpertParallel),  # four ranks of one host
        ({"fabric": SLOW_MESSAGES}, TwoLevel),
        ({"fabric": SLOW_MESSAGES, "placement": (0, 1, 2, 3, 4, 5, 7, -1)}, TwoLevel),
    ],
)
def test_a_topology_is_chosen(crew, more, kind):
    def work(rank, ep):
        assert type(ep) is kind
        r = ep.dispatch(torch.ones(2, 16), torch.tensor([[0, 3], [1, 2]]))
        return ep.combine(r.x, r.handle)

    with crew.experts(8, kind=expert_parallel, **OPTIONS, **more) as layer:
        for out in layer.run(work):
            assert out.shape == (2, 16)
            assert out.min() >= 1


def test_all_members_learn_the_same(crew):
    with crew.experts(5, **OPTIONS) as layer:
        shape = {"experts": 8, "hidden": 16, "topk": 2, "tokens": 4}
        choices = crew.run([lambda group=group: predict_for(group, **shape) for group in layer.groups])
    assert len(set(choices)) == 1
    assert choices[0].topology is Topology.FLAT


@pytest.mark.parametrize("more", [{"topology": "ring"}, {"topology": 2}, {"hidden": 0}, {"dtype": "bfloat16"}])
def test_what_makes_no_sense_is_refused(crew, more):
    with pytest.raises(ConfigError):
        crew.experts(2, kind=expert_parallel, **{**OPTIONS, **more}).__enter__()


def test_sizes_must_be_given(crew):
    with pytest.raises(ConfigError, match="hidden"):
        crew.experts(2, kind=expert_parallel, experts=8, topk=2, max_tokens=4).__enter__()


@pytest.mark.parametrize("more", [{"topology": "two-level"}, {"topology": "flat"}], ids=str)
def test_who_comes_back_takes_the_topology_of_those_that_run(crew, more):
    with crew.experts(4, kind=expert_parallel, **OPTIONS, **more) as layer:
        layer.eps[3].close()

        def come_back(rank, ep):
            if rank < 3:
                while True:
                    r = ep.dispatch(torch.ones(2, 16), torch.tensor([[0, 7], [1, 6]]))
                    out = ep.combine(r.x, r.handle)
                    if ep.active == (0, 1, 2, 3):
                        return out
            name = layer.groups[3].name
            layer.eps[3] = expert_parallel(layer.groups[3], name=name, deadline=20.0, **OPTIONS)
            r = layer.eps[3].dispatch(torch.ones(2, 16), torch.tensor([[0, 7], [1, 6]]))
            return layer.eps[3].combine(r.x, r.handle)

        for out in layer.run(come_back):
            assert (out == 2).all()
        assert type(layer.eps[3]) is type(layer.eps[0])
