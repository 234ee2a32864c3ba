"""time_spread: how unequal the compute of the ranks is on packs of documents of unequal lengths."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict
from typing import Any

import numpy as np
import torch

from lctrain.batch import PackedBatch
from lctrain.bench.balance import Mix
from lctrain.bench.scale_steps import build_on, free, now
from lctrain.bench.shapes import ModelShape
from lctrain.data.order import BALANCE_WINDOW, epoch_order
from lctrain.distributed import Topology
from lctrain.flops import FlopCounter
from lctrain.loss import causal_lm_loss
from lctrain.models import patch_model


def time_spread(
    shape: ModelShape, mix: Mix, steps: int, device: torch.device, seed: int = 0
) -> dict[str, Any]:
    """Times forward and backward of every rank's packs, with a plain shuffle and with lctrain's.

    Ranks do not wait for each other, so the times are those of their own packs. The largest time of
    a step over the mean of all ranks is what a step of training costs over perfect balance.

    Args:
        shape: Model with random weights; every rank has a copy.
        mix: Distribution of document lengths, and the rows that hold the documents.
        steps: Number of timed packs of each rank, the first ones of an epoch.
        device: Device of this rank.
        seed: Seed of the lengths and of the order.

    Returns:
        "mix" and, as "orders", a row for "shuffled" and "balanced": the mean over steps of the
        largest over the mean time ("seconds_spread") and of the same with model FLOPs
        ("flops_spread"), and the seconds of all steps if ranks wait for the slowest ("seconds").
    """
    ranks = Topology.of_process()
    plan = mix.plan(seed)
    balanced = epoch_order(plan.costs(), ranks.size, seed, epoch=0, window=BALANCE_WINDOW)
    drawn = np.random.default_rng(seed).permutation(len(plan))[: balanced.size]
    model: Any = build_on(shape, device)
    patch_model(model, fused=True)
    counter = FlopCounter.of(model)
    orders = {"shuffled": drawn.reshape(balanced.shape), "balanced": balanced}
    rows = []
    for name, order in orders.items():
        packs = [plan.lengths[plan.row(row)].tolist() for row in order[:steps, ranks.rank]]
        times = np.array(ranks.gather(_times(model, [packs[0], *packs], shape, device)[1:]))
        flops = np.array(ranks.gather([counter.step_flops(lengths) for lengths in packs]))
        rows.append(
            {
                "order": name,
                "seconds_spread": float((times.max(0) / times.mean(0)).mean()),
                "flops_spread": float((flops.max(0) / flops.mean(0)).mean()),
                "seconds": float(times.max(0).sum()),
            }
        )
    del model
    free(device)
    return {"mix": asdict(mix), "orders": rows}


def _times(
    model: Any, packs: Sequence[Sequence[int]], shape: ModelShape, device: torch.device
) -> list[float]:
    """Returns the seconds of forward and backward on each pack, given by its lengths."""
    generator = torch.Generator().manual_seed(0)
    autocast = torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else nullcontext()
    times = []
    for lengths in packs:
        tokens = torch.randint(shape.vocab_size, (sum(lengths),), generator=generator)
        batch = PackedBatch.from_documents(tokens.split(list(lengths))).to(device)
        since = now(device)
        with autocast:
            loss, _ = causal_lm_loss(model, batch)
        loss.backward()
        model.zero_grad(set_to_none=True)
        times.append(now(device) - since)
    return times
