"""GRPO: learn from groups of answers to the same prompt by how each compares with its group."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

CLIP = 0.2


@dataclass(frozen=True, slots=True)
class Samples:
    """Answers of one rollout worker, with what the trainer needs to learn from them."""

    version: int  # of the weights that produced them
    tokens: Tensor  # (answers, time); the answers to one prompt are neighbours
    logprobs: Tensor  # (answers, answer tokens), under those weights
    rewards: Tensor  # (answers,)

    @staticmethod
    def join(parts: "Sequence[Samples]") -> "Samples":
        """Put the samples of several rollout workers together; they must come from one version."""
        (version,) = {part.version for part in parts}
        columns = zip(*((part.tokens, part.logprobs, part.rewards) for part in parts), strict=True)
        return Samples(version, *map(torch.cat, columns))


def group_advantages(rewards: Tensor, group: int) -> Tensor:
    """Normalise each reward by the mean and spread of its group."""
    grouped = rewards.view(-1, group)
    centred = grouped - grouped.mean(dim=1, keepdim=True)
    return (centred / (grouped.std(dim=1, keepdim=True) + 1e-4)).flatten()


def clipped_loss(logprobs: Tensor, behaviour_logprobs: Tensor, advantages: Tensor) -> Tensor:
    """Return the clipped policy-gradient loss of PPO and GRPO, averaged over tokens."""
    ratio = torch.exp(logprobs - behaviour_logprobs)
    advantages = advantages[:, None]
    return -torch.minimum(ratio * advantages, ratio.clamp(1 - CLIP, 1 + CLIP) * advantages).mean()
