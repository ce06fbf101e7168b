"""Weight sync through actors: by handles and names, with ranks that die, restart, or hold another model."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable
from typing import Any

import pytest
import ray
from actor_tools import get, kill_process
from agent_tools import eventually

import raynixl as rx
from raynixl.actors import agent_names

pytestmark = pytest.mark.ray
Make = Callable[..., Any]


class _Model:
    def __init__(self, seed: int, *, width: int = 64) -> None:
        import os

        import torch

        torch.manual_seed(seed)
        torch.set_num_threads(1)
        self.flips: list[int] = []
        self.pid = os.getpid()
        self.model = torch.nn.Sequential(torch.nn.Linear(8, width), torch.nn.BatchNorm1d(width))

    def weights(self) -> bytes:
        """Every byte of the model."""
        return b"".join(tensor.contiguous().numpy().tobytes() for tensor in self.model.state_dict().values())

    def tell(self) -> tuple[int, list[int]]:
        """The process, and the versions that were flipped to."""
        return self.pid, self.flips


def _kinds() -> tuple[Any, Any]:
    @ray.remote(num_cpus=0)
    @rx.worker
    class Trainer(_Model):
        def __init__(self, seed: int) -> None:
            super().__init__(seed)
            rx.publish("model", self.model)

        def step(self) -> None:
            import torch

            with torch.no_grad():
                for parameter in self.model.parameters():
                    parameter.add_(torch.randn_like(parameter))

    @ray.remote(num_cpus=0)
    @rx.worker
    class Rollout(_Model):
        def __init__(self, seed: int, width: int = 64, keep: int = 1) -> None:
            super().__init__(seed, width=width)
            self.subscription = rx.subscribe("model", self.model, on_flip=self.flips.append, keep=keep)

    return Trainer, Rollout


def test_pushes_reach_all_rollouts_by_handle_and_name_and_await(make: Make) -> None:
    trainer_kind, rollout_kind = _kinds()
    trainer = make(trainer_kind, 0, options={"name": "trainer"})
    rollouts = [make(rollout_kind, number, options={"name": f"rollout-{number}"}) for number in (1, 2)]
    everybody = [trainer, *rollouts]
    sync = rx.WeightSync("model", sources=[trainer], targets=[rollouts[0], "rollout-2"])
    assert len({*get([one.weights.remote() for one in everybody])}) == 3
    report = sync.push(1)
    assert (report.version, sorted(report.ranks), dict(report.excluded)) == (1, ["rollout-1", "rollout-2"], {})
    assert len({*get([one.weights.remote() for one in everybody])}) == 1
    get(trainer.step.remote())
    assert asyncio.run(sync.push_async(2)).version == 2
    assert len({*get([one.weights.remote() for one in everybody])}) == 1
    assert [flips for _, flips in get([one.tell.remote() for one in rollouts])] == [[1, 2]] * 2
    assert "rollout-1" in str(report)


def test_a_dead_rollout_is_excluded_and_a_restarted_one_takes_part_again(make: Make) -> None:
    trainer_kind, rollout_kind = _kinds()
    trainer = make(trainer_kind, 0)
    lasting, dying = make(rollout_kind, 1), make(rollout_kind, 2)
    reborn = make(rollout_kind, 3, options={"max_restarts": -1, "max_task_retries": -1})
    sync = rx.WeightSync("model", sources=[trainer], targets=[lasting, dying, reborn], timeout=30.0)
    assert not sync.push(1).excluded
    ray.kill(dying)
    pid, _ = get(reborn.tell.remote())
    kill_process(pid, signal.SIGKILL)
    get(reborn.tell.remote())
    get(trainer.step.remote())
    report = sync.push(2, timeout=10.0)
    dead = f"Rollout-{dying._actor_id.hex()[:12]}"
    assert list(report.excluded) == [dead]
    assert isinstance(report.excluded[dead], rx.PeerLost | rx.PeerUnknown)
    assert len(report.ranks) == 2
    assert len({*get([one.weights.remote() for one in (trainer, lasting, reborn)])}) == 1
    assert get(reborn.tell.remote())[1] == [2]


def test_another_model_is_refused_with_the_differences_and_nothing_moves(make: Make) -> None:
    trainer_kind, rollout_kind = _kinds()
    trainer, rollout, other = make(trainer_kind, 0), make(rollout_kind, 1), make(rollout_kind, 2, 32)
    before = get([one.weights.remote() for one in (rollout, other)])
    sync = rx.WeightSync("model", sources=[trainer], targets=[rollout, other])
    with pytest.raises(rx.ConfigError) as caught:
        sync.push(1)
    assert "0.weight" in str(caught.value)
    assert "64" in str(caught.value)
    assert "32" in str(caught.value)
    assert get([one.weights.remote() for one in (rollout, other)]) == before


def test_replicas_of_handles_flip_together_and_rollouts_join_leave_and_roll_back(make: Make) -> None:
    trainer_kind, rollout_kind = _kinds()
    trainer, alone, late = make(trainer_kind, 0), make(rollout_kind, 1, keep=2), make(rollout_kind, 2, keep=2)
    pair = [make(rollout_kind, number, keep=2) for number in (3, 4)]
    sync = rx.WeightSync("model", sources=[trainer], targets=[alone, pair], timeout=30.0)
    sync.push(1).raise_for_excluded()
    first = get(trainer.weights.remote())
    get(trainer.step.remote())
    assert sync.join([late]) == {}
    assert get(late.weights.remote()) == first
    sync.push(2).raise_for_excluded()
    assert set(sync.lag().values()) == {0}
    assert len(sync.targets) == 4
    assert set(get([one.weights.remote() for one in (alone, late, *pair)])) == {get(trainer.weights.remote())}
    assert sync.roll_back(1) == {}
    assert set(get([one.weights.remote() for one in (alone, late, *pair)])) == {first}
    ray.kill(pair[1])
    report = sync.push(3, timeout=10.0)
    assert len(report.ranks) == 2  # a replica whose one rank is dead stays as it was
    assert get(pair[0].tell.remote())[1][-1] == 1
    sync.leave([pair])
    get(trainer.step.remote())
    sync.push(4).raise_for_excluded()
    with pytest.raises(rx.ConfigError, match="follow"):
        sync.leave([trainer])


@pytest.mark.parametrize("sources", ["trainer", object()])
def test_what_is_no_list_of_workers_is_refused(sources: Any) -> None:
    with pytest.raises(rx.ConfigError, match="give a list"):
        rx.WeightSync("model", sources=sources, targets=["rollout"])


def test_actors_that_ray_has_not_started_are_told_from_those_that_start(make: Make) -> None:
    @ray.remote(num_cpus=0)
    @rx.worker
    class Slow:
        def __init__(self) -> None:
            import time

            time.sleep(600)

    starting, unplaced = make(Slow, options={"name": "starting"}), make(Slow, options={"name": "x", "num_cpus": 999})
    eventually(lambda: rx.agent().publisher.find("starting") is not None, "its process is there")
    with pytest.raises(rx.TransferTimeout, match="num_cpus") as caught:
        agent_names([starting, unplaced], timeout=0.5)
    assert "Ray has not started x; the __init__ of starting has not ended" in caught.value.message
