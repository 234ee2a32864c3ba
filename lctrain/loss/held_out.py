"""HeldOutLoss: sums of the loss over held-out sets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from lctrain.distributed import Topology


class HeldOutLoss:
    """Adds up the losses and the numbers of tokens of each held-out set, over this rank's batches.

    Every rank must add at least one batch of each set.
    """

    def __init__(self) -> None:
        self._sums: list[Tensor] = []
        self._tokens: list[int] = []

    def add(self, number: int, loss_sum: Tensor, tokens: int) -> None:
        """Adds the loss of one batch.

        Args:
            number: Number of the set, from 0. Batches of set 0 are added first, then those of 1.
            loss_sum: 0-dim tensor, sum of the token losses.
            tokens: Number of tokens with a target.
        """
        while len(self._sums) <= number:
            self._sums.append(torch.zeros((), dtype=torch.float64, device=loss_sum.device))
            self._tokens.append(0)
        self._sums[number] = self._sums[number] + loss_sum.detach()
        self._tokens[number] += tokens

    def means(self, ranks: Topology, names: Sequence[str]) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns the losses per token over the batches of all ranks, 0-dim float64 each.

        Args:
            ranks: Ranks of the run, all of which call this method.
            names: Names of the sets. Sets without one have their numbers as names.

        Returns:
            The loss over all sets together, and the loss of each set by its name. With one set, the
            second is {}. The loss of no token is NaN.
        """
        if not self._sums:
            return torch.zeros((), dtype=torch.float64), {}
        sums = torch.stack(self._sums)
        tokens = torch.tensor(self._tokens, dtype=torch.float64).to(sums.device)
        sums, tokens = ranks.sum(torch.stack([sums, tokens])).unbind()
        whole = sums.sum() / tokens.sum()
        if len(sums) == 1:
            return whole, {}
        named = [*names, *map(str, range(len(names), len(sums)))]
        return whole, dict(zip(named, sums / tokens, strict=False))

    def log(self, module: pl.LightningModule, stage: str) -> dict[str, float]:
        """Logs loss and perplexity over the tokens of all ranks: of all sets together, and of each.

        Args:
            module: Module whose trainer has the ranks and the loaders. The `name` of a loader is
                that of its set.
            stage: Prefix of the metrics, "val" or "test".

        Returns:
            The loss per token over all sets, under the name "", and of every set by its name.
        """
        loaders = getattr(module.trainer, f"{stage}_dataloaders")
        loaders = loaders if isinstance(loaders, list) else [loaders]
        names = [getattr(loader, "name", None) or str(i) for i, loader in enumerate(loaders)]
        loss, sets = self.means(Topology.of(module.trainer), names)
        # Every rank has the same value, and the maximum over ranks keeps its bits. Lightning warns
        # about metrics that are logged without a reduction.
        same: dict[str, Any] = {"batch_size": 1, "sync_dist": True, "reduce_fx": "max"}
        for name, mean in {"": loss, **sets}.items():
            prefix = f"{stage}/{name}".rstrip("/")
            module.log(f"{prefix}/loss", mean.float(), prog_bar=not name, **same)
            module.log(f"{prefix}/perplexity", mean.exp().float(), **same)
        return {"": loss.item()} | {name: mean.item() for name, mean in sets.items()}
