"""verl's own manager and workers bring weights over raynixl: `make test-verl`."""

import pytest

pytest.importorskip("verl", reason="verl is installed by `make test-verl`, in an environment of its own")
pytest.importorskip("ray")
import ray
import torch
from actor_tools import INIT, driver_environment
from verl.checkpoint_engine import CheckpointEngineManager
from verl.single_controller.ray import RayClassWithInitArgs, RayResourcePool, RayWorkerGroup
from verl.workers.config import RolloutConfig
from verl_tools import CONFIG, Replica, Rollout, Trainer, make_model

import raynixl as rx

pytestmark = [
    pytest.mark.heavy,
    pytest.mark.ray,
    pytest.mark.timeout(300),
    pytest.mark.filterwarnings("ignore"),  # those of verl and what it imports
]


@pytest.fixture(scope="module")
def groups():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", driver_environment()["PYTHONPATH"])
        ray.init(address="local", **{**INIT, "num_cpus": 8})
        yield group(Trainer, 2), group(Rollout, 3, rollout_config=RolloutConfig(name="vllm", checkpoint_engine=CONFIG))
        ray.shutdown()


def group(kind, size, **arguments):
    pool = RayResourcePool([size], use_gpu=False, max_colocate_count=1)
    made = RayClassWithInitArgs(cls=ray.remote(kind), **arguments)
    return RayWorkerGroup(resource_pool=pool, ray_cls_with_init=made, device_name="cpu")


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_every_update_reaches_every_rollout_worker_bit_by_bit(groups):
    trainers, rollouts = groups
    replicas = [Replica(rollouts.workers[:2]), Replica(rollouts.workers[2:])]
    manager = CheckpointEngineManager(CONFIG, trainers, replicas)
    for step in (1, 2, 5):
        trainers.train(step)
        metrics = manager.update_weights(global_steps=step)
        assert metrics["raynixl/seconds"] > 0
        for state, steps in rollouts.look():
            assert same(state, make_model(step).state_dict())
            assert steps[-1] == step
    assert replicas[0].calls[0] == "abort_all_requests"
    assert replicas[0].calls[-1] == "resume_generation"


def test_a_replica_that_is_gone_is_left_out_and_one_that_comes_catches_up(groups):
    trainers, rollouts = groups
    first, second = Replica(rollouts.workers[:1]), Replica(rollouts.workers[1:])
    manager = CheckpointEngineManager(CONFIG, trainers, [first])
    trainers.train(11)
    manager.update_weights(global_steps=11)
    manager.add_replicas([second])
    manager.remove_replicas([first])
    trainers.train(12)
    manager.update_weights(global_steps=12)
    states = [state for state, _ in rollouts.look()]
    assert same(states[0], make_model(11).state_dict())
    assert all(same(state, make_model(12).state_dict()) for state in states[1:])


def test_a_rollout_worker_that_died_fails_the_update_with_its_name(groups):
    trainers, rollouts = groups
    names = [one["agent"] for one in ray.get(rollouts.execute_checkpoint_engine(["prepare"] * 3), timeout=30)]
    trainers.train(21)
    prepared = ray.get(trainers.execute_checkpoint_engine(["prepare"] * 2), timeout=30)
    topology = {"source": [prepared[0]["agent"]] * 2, "targets": [(names[0], "nobody")] * 2}
    ray.get(trainers.execute_checkpoint_engine(method=["init_process_group"] * 2, rank=[0, 1], **topology), timeout=30)
    with pytest.raises(rx.PeerUnknown, match="nobody"):
        ray.get(trainers.update_weights(global_steps=21), timeout=60)
