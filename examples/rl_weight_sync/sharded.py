"""The same learning with everything cut: two trainers with half of each tensor, two rollouts of two ranks each.

The trainers shard the rows of every tensor, as FSDP does, in float32. The rollouts shard heads, as vLLM does, with
query, key and value in one parameter and gate and up in another, in bfloat16. Halfway one dies and is replaced.
"""

import sys
from pathlib import Path

import ray
import torch
import typer
from cluster import start_ray
from display import Progress
from grpo import Samples, clipped_loss, group_advantages
from parallel import Block, ParallelBlock, Team, rollout_shards, trainer_shards
from policy import LAYERS, Policy
from task import ALPHABET, ANSWER_LENGTH, LENGTH, draw_prompts, score, show
from torch.nn.utils import parameters_to_vector, vector_to_parameters

import raynixl as rx
from raynixl.weights.pieces import TensorInfo

TRAINERS, ROLLOUTS, RANKS = 2, 2, 2  # ranks of each rollout
PROMPTS, GROUP, LEARNING_RATE = 16, 16, 1e-3
CLEAR_RISE = 0.15  # what the mean reward must gain from the first tenth of the run to the last


def infos(dtype: str) -> list[TensorInfo]:
    """Return what the checkpoint holds: the names and shapes of full tensors."""
    with torch.device("meta"):
        policy = Policy(len(ALPHABET), LENGTH, Block)
    return [TensorInfo(name, dtype, tuple(tensor.shape)) for name, tensor in policy.state_dict().items()]


@ray.remote(num_cpus=0)
@rx.worker
class Trainer:
    """Holds and steps its shard; has all of the policy only to compute with."""

    def __init__(self, rank: int, team: list[str], steps: int) -> None:
        torch.set_num_threads(1)
        torch.manual_seed(0)
        self.rank, self.team = rank, Team(team)
        self.policy = Policy(len(ALPHABET), LENGTH, Block)
        self.shards = {name: self.mine(whole).clone() for name, whole in self.policy.state_dict().items()}
        self.optimizer = torch.optim.AdamW(self.shards.values(), lr=LEARNING_RATE, betas=(0.9, 0.95))
        self.schedule = torch.optim.lr_scheduler.LinearLR(self.optimizer, 1.0, 0.02, total_iters=steps)
        rx.publish("policy", self.shards, shards=trainer_shards(infos("float32"), TRAINERS, rank), cast="bfloat16")

    def mine(self, whole: torch.Tensor) -> torch.Tensor:
        return whole.chunk(TRAINERS)[self.rank]

    def whole(self) -> torch.Tensor:
        return parameters_to_vector(self.policy.parameters()).detach()

    def step(self, samples: Samples) -> float:
        advantages = group_advantages(samples.rewards, GROUP)
        self.policy.zero_grad()
        logprobs = self.policy.logprobs(samples.tokens, ANSWER_LENGTH)
        difference = (logprobs - samples.logprobs).abs().mean().item()
        assert difference < 0.02, f"the rollout computes something else: {difference:.3f} off"
        clipped_loss(logprobs, samples.logprobs, advantages).backward()
        named = dict(self.policy.named_parameters())
        mean = self.team.add_up(parameters_to_vector(one.grad for one in named.values())) / TRAINERS
        vector_to_parameters(mean, [one.grad for one in named.values()])
        torch.nn.utils.clip_grad_norm_(named.values(), 1.0)
        for name, shard in self.shards.items():
            shard.grad = self.mine(named[name].grad)
        self.optimizer.step()
        self.schedule.step()
        for name, shard in self.shards.items():
            self.mine(named[name].data.zero_()).copy_(shard)
        vector_to_parameters(self.team.add_up(self.whole()), named.values())
        return samples.rewards.mean().item()


@ray.remote(num_cpus=0)
@rx.worker
class Rollout:
    """One rank of a rollout."""

    def __init__(self, rank: int, team: list[str]) -> None:
        torch.set_num_threads(1)
        add_up = Team(team).add_up
        self.policy = Policy(len(ALPHABET), LENGTH, lambda: ParallelBlock(RANKS, add_up)).bfloat16()
        shards = rollout_shards(infos("bfloat16"), LAYERS, RANKS, rank)
        self.subscription = rx.subscribe("policy", self.policy, shards=shards)

    def sample(self, prompts: torch.Tensor, seed: int) -> Samples:
        torch.manual_seed(seed)  # the ranks draw alike
        with self.subscription.pinned() as version:
            tokens, logprobs = self.policy.generate(prompts.repeat_interleave(GROUP, dim=0), ANSWER_LENGTH)
        return Samples(version, tokens, logprobs, score(tokens))


def start_rollout(number: int) -> list[ray.actor.ActorHandle]:
    """Start the ranks of a rollout."""
    team = [f"rollout-{number}-{rank}" for rank in range(RANKS)]
    return [Rollout.options(name=name).remote(rank, team) for rank, name in enumerate(team)]


def replace(sync: rx.WeightSync, ranks: list[ray.actor.ActorHandle], number: int) -> list[ray.actor.ActorHandle]:
    """Start a rollout in the place of one that has lost a rank; it gets the present version from the others."""
    sync.leave([ranks])
    for rank in ranks:
        ray.kill(rank)
    new = start_rollout(number)
    failed = sync.join([new])
    if failed:
        sys.exit(f"FAILED: {failed}")
    return new


def main(steps: int = 120, out: Path = Path("sharded.png")) -> None:
    """Train for some steps, sync after each, lose a rollout halfway, and fail unless the policy has learned."""
    start_ray(cpus=2)
    names = [f"trainer-{rank}" for rank in range(TRAINERS)]
    trainers = [Trainer.options(name=name).remote(rank, names, steps) for rank, name in enumerate(names)]
    rollouts = [start_rollout(number) for number in range(ROLLOUTS)]
    sync = rx.WeightSync("policy", sources=trainers, targets=rollouts)
    sync.push(1).raise_for_excluded()
    progress, generator, deltas = Progress(steps), torch.Generator().manual_seed(0), 0
    for version in range(1, steps + 1):
        prompts = draw_prompts(ROLLOUTS * PROMPTS, generator).chunk(ROLLOUTS)
        asked = [
            [rank.sample.remote(part, version) for rank in ranks] for ranks, part in zip(rollouts, prompts, strict=True)
        ]
        samples = [ray.get(ranks)[0] for ranks in asked]  # all ranks of a rollout return the same
        assert all(part.version == version for part in samples), "a rollout sampled with stale weights"
        rewards = ray.get([trainer.step.remote(part) for trainer, part in zip(trainers, samples, strict=True)])
        if version == steps // 2:
            ray.kill(rollouts[-1][-1])
        report = sync.push(version + 1)
        progress.add(sum(rewards) / TRAINERS, 1e3 * report.seconds)
        deltas += report.deltas > 0
        if report.excluded:
            print(f"\n{report}")
            rollouts[-1] = replace(sync, rollouts[-1], ROLLOUTS)

    progress.save_picture(out)
    print(f"\n{report}\nthe last answer: {show(samples[-1].tokens[-1])}")
    first, last = progress.rewards_at_ends()
    if last < first + CLEAR_RISE:
        sys.exit(f"FAILED: the reward has not clearly risen: {first:.3f} at first, {last:.3f} at last")
    print(
        f"reward {first:.3f} -> {last:.3f}, mean sync {progress.mean_sync_ms():.1f} ms, {deltas} pushes brought deltas"
    )


if __name__ == "__main__":
    typer.run(main)
