"""Trains with every loss on completions, in float64 on two gloo ranks; test_two_ranks.py starts it.

Usage: python -m tests.loss.train_two_ranks FOLDER

The ranks have unequal numbers of tokens, pairs and completions. The gradients and losses of rank 0
are FOLDER/found.pt.
"""

import sys
from functools import partial
from pathlib import Path

import lightning.pytorch as pl
import torch

import lctrain
from lctrain.batch import PackedBatch
from lctrain.callbacks import TokenExactLoss
from lctrain.loss import policy_loss, preference_loss, token_log_probs
from tests.distributed.ranks import fork_ranks
from tests.float64 import built_in_float64
from tests.train_two_ranks import make_model
from tests.training import loader, make_trainer

RANKS = 2
LONG, SHORT = list(range(20, 45)), [7, 8, 9]
GROUPS = [  # by rank and micro-batch; LONG is the prompt of completions on both ranks
    [[(LONG, [[50, 51, 52], [53]])], [(SHORT, [[60], [61, 62]]), ([5, 6], [[63], [64, 65]])]],
    [[(LONG, [[54, 55, 56, 57, 58, 59], [70, 71]])], [([4], [[72], [73, 74, 75]])]],
]
PAIRS = ("dpo", "smoothed dpo", "ipo", "simpo", "orpo")
POLICIES = ("token, token", "token, completion", "sequence, token", "sequence, completion")
KINDS = (*PAIRS, *POLICIES)


def packs(rank: int) -> list[PackedBatch]:
    """Returns the packs of one rank; the last one of rank 1 has no token to train on."""
    found = [PackedBatch.from_groups(groups) for groups in GROUPS[rank]]
    last = PackedBatch.from_groups(GROUPS[0][0])
    return [*found, last.without_targets() if rank == 1 else last]


def whole_pack() -> PackedBatch:
    """Returns the groups of both ranks in one pack."""
    parts = [*GROUPS[0], GROUPS[0][0], *GROUPS[1]]
    return PackedBatch.from_groups([group for part in parts for group in part])


def made_up(tokens: torch.Tensor, factor: float) -> torch.Tensor:
    """Returns a number in (0, 1) for each token id, the same in every pack."""
    return (factor * tokens.double()).frac()


class Completions(pl.LightningModule):
    """A module that trains with one of KINDS, and keeps the gradients of its step.

    Args:
        kind: Loss.
        packs_of: Called with the rank; returns its packs.
    """

    def __init__(self, kind, packs_of):
        super().__init__()
        self.kind, self.packs_of = kind, packs_of
        self.model = make_model()
        lctrain.patch_model(self.model)
        self.gradients = {}

    def training_step(self, batch, batch_idx):
        found = token_log_probs(self.model, batch)
        tokens = batch.labels[batch.labels != -100]
        reference = -4 - made_up(tokens, 0.37)
        if self.kind in POLICIES:
            ratio, average = self.kind.split(", ")  # of the policy loss
            policy = policy_loss(
                found,
                found.log_probs.detach() + 0.5 * (made_up(tokens, 0.71) - 0.5),
                made_up(tokens, 0.29) - 0.5,
                reference=reference,
                kl=0.2,
                token_weights=1 + made_up(tokens, 0.53),
                average=average,
                ratio=ratio,
            )
            return {"loss": policy.loss, "num_tokens": policy.divisor}
        smoothing = 0.1 if self.kind == "smoothed dpo" else 0.0
        kind = self.kind.removeprefix("smoothed ")
        sums = found.sums(reference) if kind in ("dpo", "ipo") else None
        pairs = preference_loss(found, sums, kind=kind, beta=0.3, label_smoothing=smoothing)
        return {"loss": pairs.loss, "num_tokens": pairs.pairs}

    def on_before_optimizer_step(self, optimizer):
        self.gradients = {n: p.grad.clone() for n, p in self.model.named_parameters()}

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)

    def train_dataloader(self):
        return loader(self.packs_of(self.global_rank))


def trained(kind: str, folder: Path, packs_of, **settings) -> dict[str, torch.Tensor]:
    """Trains for one optimizer step, and returns its gradients and its loss."""
    exact, module = TokenExactLoss(log=None), Completions(kind, packs_of)
    trainer = make_trainer(folder, [exact], max_steps=1, **settings)
    trainer.fit(module)
    assert trainer.global_step == 1
    return {**module.gradients, "loss": exact.last_loss}


def main(rank: int, size: int, folder: Path) -> None:
    """Trains with every loss, and writes the results of rank 0."""
    ranks = partial(trained, packs_of=packs, strategy="ddp", devices=RANKS)
    with built_in_float64():
        found = {kind: ranks(kind, folder, accumulate_grad_batches=3) for kind in KINDS}
    if rank == 0:
        torch.save(found, folder / "found.pt")


if __name__ == "__main__":
    fork_ranks(main, RANKS, Path(sys.argv[1]))
