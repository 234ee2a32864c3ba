"""Times attention and training steps on one document that all ranks share, with a prediction."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lctrain.bench.cost import Assumptions, ModelCost, exchange_seconds, step_cost
from lctrain.bench.scale_steps import ALONE, WARM_UP, free, now, time_steps
from lctrain.bench.shapes import ModelShape
from lctrain.config import MemoryConfig
from lctrain.distributed import Topology
from lctrain.distributed.attention import flash_attn_shared_func
from lctrain.distributed.context import ContextShard, choose_heads
from lctrain.distributed.shared_pack import ContextGroups, SharedPack
from lctrain.distributed.traffic import AttentionWidths
from lctrain.run.rank import ranks_on_machine

EXCHANGES = ("heads", "keys")
HEADS, KEY_HEADS, HEAD_DIM = 32, 8, 128  # shape of the shared attention
LINK, NETWORK, LATENCY = 350e9, 40e9, 20e-6  # bytes per second in a machine, between; seconds


def exchanges(size: int, key_heads: int) -> list[str]:
    """Returns the ways in which `size` ranks can exchange, for a number of key/value heads."""
    return [name for name in EXCHANGES if name == "keys" or key_heads % size == 0]


def time_attention(
    tokens: int,
    calls: int,
    device: torch.device,
    warm_up: int = WARM_UP,
    sizes: tuple[int, int, int] = (HEADS, KEY_HEADS, HEAD_DIM),
) -> list[dict[str, Any]]:
    """Times forward and backward of attention on one document that all ranks share.

    Args:
        tokens: Number of tokens of the document.
        calls: Number of timed calls.
        device: Device of this rank.
        warm_up: Number of calls before the timed ones.
        sizes: Number of query heads, of key/value heads, and the head dim.

    Returns:
        A row per exchange: "whole_seconds" of the whole document on one rank, "share_seconds" of
        the slowest rank's share, "predicted_seconds" of the cost model for it, and "efficiency".
    """
    ranks = Topology.of_process()
    count, key_heads, head_dim = sizes
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16

    def attention(shard: ContextShard, rank: int) -> Callable[..., Tensor]:
        groups = ContextGroups.of(shard.size, shard.heads) if shard.size > 1 else None
        shared = SharedPack.of(shard, rank, device, groups)
        return partial(flash_attn_shared_func, shared=shared, causal=True)

    def seconds(shard: ContextShard, rank: int) -> float:
        made = [
            torch.randn(shard.tokens[rank], heads, head_dim, device=device).to(dtype)
            for heads in (count, key_heads, key_heads)
        ]
        tensors = [tensor.requires_grad_() for tensor in made]
        found = _seconds(attention(shard, rank), tensors, calls, warm_up)
        del made, tensors
        free(device)
        return max(ranks.gather(found))

    whole = seconds(ContextShard.of([tokens], 1, 1), 0)
    rows = []
    for name in exchanges(ranks.size, key_heads):
        heads = choose_heads(name, ranks.size, key_heads, ranks.size)
        shard = ContextShard.of([tokens], ranks.size, heads)
        share = seconds(shard, ranks.rank)
        largest = max(shard.work) / sum(shard.work)
        assumed = _assumptions("attention", tokens, ranks.size)
        widths = AttentionWidths.plain(*sizes)
        rows.append(
            {
                "exchange": name,
                "whole_seconds": whole,
                "share_seconds": share,
                "predicted_seconds": whole * largest + exchange_seconds(widths, shard, assumed),
                "efficiency": whole / ranks.size / share,
            }
        )
    return rows


def _seconds(
    function: Callable[..., Tensor], tensors: Sequence[Tensor], calls: int, warm_up: int
) -> float:
    """Returns the median seconds of forward and backward."""
    times = []
    for _ in range(warm_up + calls):
        since = now(tensors[0].device)
        function(*tensors).sum().backward()
        times.append(now(tensors[0].device) - since)
    return statistics.median(times[warm_up:])


def time_context(
    shape: ModelShape,
    tokens: int,
    steps: int,
    accelerator: str,
    *,
    warm_up: int = WARM_UP,
    memory: MemoryConfig | None = None,
    speed: float | None = None,
) -> dict[str, Any]:
    """Times training steps on one document that all ranks share, with each way to exchange.

    Args:
        shape: Model to train, with random weights.
        tokens: Number of tokens of the document.
        steps: Number of timed steps.
        accelerator: Lightning's name of the accelerator.
        warm_up: Number of steps before the timed ones.
        memory: What the layers keep for the backward; None for everything.
        speed: FLOPs per second of one rank, by which the cost model predicts. None measures them:
            every rank then also trains on the whole document alone.

    Returns:
        "speed"; "whole_seconds", the step of one rank alone, or None; and "rows" with a row per
        exchange: the result of `time_steps`, "exchange", "predicted_seconds" of the cost model, and
        "efficiency", the whole seconds / ranks / seconds, or None.
    """
    ranks = Topology.of_process()
    cost = ModelCost.of(shape)
    timed = partial(time_steps, shape=shape, lengths=[tokens], steps=steps, accelerator=accelerator)
    whole = None
    if speed is None:
        whole = timed(ALONE, warm_up=warm_up, memory=memory)["seconds"]
        speed = cost.flops.step_flops([tokens]) / whole
    rows = []
    for name in exchanges(ranks.size, cost.key_heads):
        row = timed("fsdp2", warm_up=warm_up, memory=memory, context=ranks.size, exchange=name)
        assumed = _assumptions(shape.title, tokens, ranks.size)
        predicted = step_cost(cost, assumed, ranks.size, speed=speed, exchange=name)
        efficiency = None if whole is None else whole / ranks.size / row["seconds"]
        rows.append(
            {
                **row,
                "exchange": name,
                "predicted_seconds": predicted["step_seconds"],
                "efficiency": efficiency,
            }
        )
    return {"tokens": tokens, "speed": speed, "whole_seconds": whole, "rows": rows}


def _assumptions(title: str, tokens: int, size: int) -> Assumptions:
    """Returns the assumptions of the cost model for one document that all ranks share."""
    return Assumptions(
        model=title,
        gpu="measured",
        peak_share=1.0,
        on_machine=ranks_on_machine(),
        link=LINK,
        network=NETWORK,
        latency=LATENCY,
        tokens=tokens // size,
        document=tokens,
        context=size,
    )
