"""What is refused: models that cannot be carried or do not fit, bad arguments, nonsense from strangers."""

import pytest
import torch
from weights_tools import Cluster, Policy

from raynixl.agents import Agent
from raynixl.errors import ConfigError, IntegrityError
from raynixl.weights import WeightSync, publish, subscribe


def test_a_mismatch_is_refused_with_a_table_before_anything_moves(fleet):
    good, bad = Policy().eval(), Policy().eval()
    bad.layers[0] = torch.nn.Linear(64, 32)
    bad.layers[1].bfloat16()
    del bad.norm
    cluster = Cluster(fleet, Policy(value=1.0), [good, bad])
    with pytest.raises(ConfigError) as caught:
        cluster.sync.push(1)
    text = str(caught.value)
    for piece in (
        "rollout-1",
        "layers.0.weight",
        "[64, 64]",
        "[32, 64]",
        "layers.1.bias",
        "bfloat16",
        "norm.running_mean",
    ):
        assert piece in text
    assert good() == {0.0}
    assert cluster.rollouts[0].statistics().nbytes == 0
    sync = WeightSync(cluster.trainer, "policy", ["trainer"], ["rollout-0"])
    assert not sync.push(1).excluded
    assert good() == {1.0}


BAD_MODELS = {
    "nothing": {},
    "a list": [torch.zeros(2)],
    "no tensor": {"w": 3},
    "a sparse tensor": {"w": torch.eye(3).to_sparse()},
    "a tensor without values": {"w": torch.zeros(3, device="meta")},
}


def test_modules_without_shapes_and_wrapped_tensors_are_refused(fleet):
    from torch._subclasses.fake_tensor import FakeTensorMode

    agent = fleet("a")
    with FakeTensorMode():
        fake = torch.zeros(3)
    for model in (torch.nn.LazyLinear(3), {"w": fake}):
        for action in (publish, subscribe):
            with pytest.raises(ConfigError, match=r"shape yet|lie elsewhere"):
                action(agent, "w", model)


def test_a_dtensor_is_published_by_its_local_part_unless_it_is_an_unfinished_sum(fleet):
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor, Partial

    agent = fleet("a")
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = DeviceMesh("cpu", [0])
        sharded = torch.nn.Parameter(DTensor.from_local(torch.ones(4), mesh))
        with publish(agent, "w", {"w": sharded}) as publication:
            assert publication.layout.by_name["w"].shape == (4,)
        with pytest.raises(ConfigError, match="copy_out=True"):
            publish(agent, "w", {"w": sharded}, copy_out=False)
        with pytest.raises(ConfigError, match="a sum that is not done yet"):
            publish(agent, "w", {"w": DTensor.from_local(torch.ones(4), mesh, [Partial()])})
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("case", BAD_MODELS)
def test_what_cannot_be_carried_is_refused(fleet, case):
    agent = fleet("a")
    with pytest.raises(ConfigError):
        publish(agent, "w", BAD_MODELS[case])
    with pytest.raises(ConfigError):
        subscribe(agent, "w", BAD_MODELS[case])


def test_bad_arguments_are_refused(fleet):
    agent, model = fleet("a"), {"w": torch.zeros(4)}
    bad = [
        lambda: publish(agent, "", model),
        lambda: publish(agent, "x" * 151, model),
        lambda: publish(agent, "w", model, copy_threads=0),
        lambda: publish(agent, "w", model, chunk_nbytes=1),
        lambda: subscribe(agent, "w", model, install="magic"),
        lambda: subscribe(agent, "w", model, flip_timeout=0),
        lambda: subscribe(agent, "w", {"w": torch.zeros(4, 1).expand(4, 3)}, install="copy"),
        lambda: WeightSync(agent, "w", [], ["a"]),
        lambda: WeightSync(agent, "w", "a", ["a"]),
        lambda: WeightSync(agent, "w", ["a"], ["b", "b"]),
        lambda: WeightSync(agent, "w", ["a"], ["b"], timeout=0),
    ]
    for call in bad:
        with pytest.raises(ConfigError):
            call()


def test_a_name_is_published_and_subscribed_once_in_an_agent(fleet):
    agent = fleet("a")
    with publish(agent, "w", {"w": torch.zeros(4)}), pytest.raises(ConfigError):
        publish(agent, "w", {"w": torch.zeros(4)})
    with publish(agent, "e", {"e": torch.zeros(0)}), pytest.raises(ConfigError):
        publish(agent, "e", {"e": torch.zeros(0)})
    with subscribe(agent, "w", {"w": torch.zeros(4)}), pytest.raises(ConfigError):
        subscribe(agent, "w", {"w": torch.zeros(4)})
    with publish(agent, "w", {"w": torch.zeros(4)}), subscribe(agent, "w", {"w": torch.zeros(4)}):
        pass


def test_nonsense_from_a_stranger_changes_nothing(fleet):
    target = Policy().eval()
    cluster = Cluster(fleet, Policy(value=1.0), [target])
    stranger: Agent = fleet("stranger")
    whole = ("target", "incoming", "freeze", "release", "outgoing")
    for topic in (*whole, "pull", "flip", "hold", "let-go", "return"):
        peer = "trainer" if topic in ("freeze", "release", "outgoing") else "rollout-0"
        for payload in (b"", b"{}", b"[1]", b"\xff" * 99, b'{"push": "x", "version": -1}'):
            reply = stranger.ask(peer, f"weights/policy/{topic}", payload, timeout=5)
            if topic in whole:
                with pytest.raises(IntegrityError):
                    reply.wait()
            else:
                assert b"IntegrityError" in reply.wait()
    assert not cluster.sync.push(1).excluded
    assert target() == {1.0}
