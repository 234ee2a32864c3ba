"""HeldOutLoss: sums of the loss over held-out sets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from lctrain.distributed import Topology


class HeldOutLoss:
    """Sums of the losses and the tokens of S held-out sets, over the batches of one rank.

    Every rank adds at least one batch of each set.
    """

    def __init__(self) -> None:
        self._sums: list[Tensor] = []
        self._tokens: list[int] = []

    def add(self, number: int, loss_sum: Tensor, tokens: int) -> None:
        """Adds the loss of one batch.

        Args:
            number: Number of the set. Sets come in rising order.
            loss_sum: 0-dim tensor, sum of the token losses.
            tokens: Number of tokens with a target.
        """
        while len(self._sums) <= number:
            self._sums.append(torch.zeros((), dtype=torch.float64, device=loss_sum.device))
            self._tokens.append(0)
        self._sums[number] = self._sums[number] + loss_sum.detach()
        self._tokens[number] += tokens

    def means(self, ranks: Topology, names: Sequence[str]) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns the loss per token over all ranks, 0-dim float64 each.

        Args:
            ranks: Ranks that have added batches.
            names: Names of the sets.

        Returns:
            The loss over all sets, and the loss of each set by name; {} for a single set.
        """
        if not self._sums:
            return torch.zeros((), dtype=torch.float64), {}
        sums = torch.stack(self._sums)
        tokens = torch.tensor(self._tokens, dtype=torch.float64).to(sums.device)
        sums, tokens = ranks.sum(torch.stack([sums, tokens])).unbind()
        whole = sums.sum() / tokens.sum().clamp(min=1.0)
        if len(sums) == 1:
            return whole, {}
        named = [*names, *map(str, range(len(names), len(sums)))]
        return whole, dict(zip(named, sums / tokens.clamp(min=1.0), strict=False))

    def log(self, module: pl.LightningModule, stage: str) -> dict[str, float]:
        """Logs loss and perplexity over the tokens of all ranks, and those of every set.

        Args:
            module: Module whose trainer has the ranks and the data module with `held_out_names`.
            stage: Prefix of the metrics, "val" or "test".

        Returns:
            The loss per token over all sets, under the name "", and of every set by its name.
        """
        names = getattr(getattr(module.trainer, "datamodule", None), "held_out_names", ())
        loss, sets = self.means(Topology.of(module.trainer), names)
        # Every rank has the same value, and the maximum over ranks keeps its bits. Lightning warns
        # about metrics that are logged without a reduction.
        same: dict[str, Any] = {"batch_size": 1, "sync_dist": True, "reduce_fx": "max"}
        for name, mean in {"": loss, **sets}.items():
            prefix = f"{stage}/{name}".rstrip("/")
            module.log(f"{prefix}/loss", mean.float(), prog_bar=not name, **same)
            module.log(f"{prefix}/perplexity", mean.exp().float(), **same)
        return {"": loss.item()} | {name: mean.item() for name, mean in sets.items()}
