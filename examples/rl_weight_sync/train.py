"""Teach a small transformer to sort digits by reinforcement learning, on Ray, with raynixl.

Two rollout workers sample answers, a trainer learns from them, and `sync.push` carries the new weights
into both rollouts after every step. No GPU, no downloads, about two minutes on two cores.
"""

import sys
from pathlib import Path

import ray
import torch
import typer
from cluster import start_ray
from display import Progress
from grpo import Samples, clipped_loss, group_advantages
from policy import Policy
from task import ALPHABET, ANSWER_LENGTH, LENGTH, draw_prompts, score, show

import raynixl as rx

ROLLOUTS, PROMPTS, GROUP = 2, 16, 16  # each rollout answers 16 prompts 16 times a step
UPDATES, LEARNING_RATE = 2, 1e-3  # gradient steps per batch of samples, and their size at first
CLEAR_RISE = 0.25  # what the mean reward must gain from the first tenth of the run to the last


class Worker:
    """What trainer and rollouts share: a policy with random weights of its own."""

    def __init__(self, seed: int) -> None:
        torch.set_num_threads(1)
        torch.manual_seed(seed)
        self.policy = Policy(len(ALPHABET), LENGTH)

    def digest(self) -> str:
        return self.policy.digest()


@ray.remote(num_cpus=1, scheduling_strategy="SPREAD")
@rx.worker
class Rollout(Worker):
    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.subscription = rx.subscribe("policy", self.policy)

    def sample(self, prompts: torch.Tensor) -> Samples:
        with self.subscription.pinned() as version:  # one version from the first token to the last
            tokens, logprobs = self.policy.generate(prompts.repeat_interleave(GROUP, dim=0), ANSWER_LENGTH)
        return Samples(version, tokens, logprobs, score(tokens))


@ray.remote(num_cpus=1, scheduling_strategy="SPREAD")
@rx.worker
class Trainer(Worker):
    def __init__(self, seed: int, steps: int) -> None:
        super().__init__(seed)
        self.optimizer = torch.optim.AdamW(self.policy.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95))
        self.schedule = torch.optim.lr_scheduler.LinearLR(self.optimizer, 1.0, 0.05, total_iters=steps)
        rx.publish("policy", self.policy)

    def step(self, parts: list[Samples]) -> float:
        samples = Samples.join(parts)
        advantages = group_advantages(samples.rewards, GROUP)
        for rows in torch.randperm(len(advantages)).chunk(UPDATES):
            logprobs = self.policy.logprobs(samples.tokens[rows], ANSWER_LENGTH)
            self.optimizer.zero_grad()
            clipped_loss(logprobs, samples.logprobs[rows], advantages[rows]).backward()
            torch.nn.utils.clip_grad_norm_(self.policy.parameters(), 1.0)
            self.optimizer.step()
        self.schedule.step()
        return samples.rewards.mean().item()


def main(steps: int = 280, seed: int = 0, out: Path = Path("reward.png")) -> None:
    """Train for some steps, sync after each, draw a picture, and fail unless the policy has learned."""
    start_ray(cpus=1 + ROLLOUTS)
    trainer = Trainer.remote(seed, steps)
    rollouts = [Rollout.remote(seed + rank) for rank in range(1, 1 + ROLLOUTS)]
    sync = rx.WeightSync("policy", sources=[trainer], targets=rollouts, exclude_failed=False)  # or go on without them
    sync.push(1)
    progress, generator = Progress(steps), torch.Generator().manual_seed(seed)
    for version in range(1, steps + 1):
        prompts = draw_prompts(ROLLOUTS * PROMPTS, generator).chunk(ROLLOUTS)
        samples = ray.get([r.sample.remote(part) for r, part in zip(rollouts, prompts, strict=True)])
        assert all(part.version == version for part in samples), "a rollout sampled with stale weights"
        reward = ray.get(trainer.step.remote(samples))
        report = sync.push(version + 1)
        progress.add(reward, 1e3 * report.seconds)

    progress.save_picture(out)
    print(f"\n{report}\nthe last answer: {show(samples[-1].tokens[-1])}")
    if len(set(ray.get([worker.digest.remote() for worker in (trainer, *rollouts)]))) > 1:
        sys.exit("FAILED: a rollout's weights differ from the trainer's")
    first, last = progress.rewards_at_ends()
    if last < first + CLEAR_RISE:
        sys.exit(f"FAILED: the reward has not clearly risen: {first:.3f} at first, {last:.3f} at last")
    print(f"reward {first:.3f} -> {last:.3f}, mean sync {progress.mean_sync_ms():.1f} ms, all weights equal, see {out}")


if __name__ == "__main__":
    typer.run(main)
