"""Decides whether the ranks of a context group can exchange the attention of a model."""

from collections.abc import Callable
from math import gcd
from typing import Any

import torch
from torch import Tensor, nn

from lctrain.attention.boundaries import Boundaries, is_packed
from lctrain.attention.spec import is_patched
from lctrain.batch import SHARE_ARGUMENT
from lctrain.distributed.context import choose_heads
from lctrain.models.adapters import inside_adapters
from lctrain.models.architectures import attention_layers
from lctrain.models.heads import refuse_share
from lctrain.models.positions import restarting_positions

_KEY_HEADS = ("num_key_value_heads", "num_global_key_value_heads")


def heads_group(model: nn.Module, ranks: int, exchange: str, on_machine: int | None = None) -> int:
    """Returns the size of a heads group, for a model whose packs are shared by several ranks.

    The ranks of a heads group exchange heads with each other, and gather keys from other groups.
    Size `ranks` means that only heads are exchanged, and size 1 that only keys are gathered.

    Args:
        model: A transformers model, which may have PEFT adapters.
        ranks: Number of ranks that share a pack.
        exchange: "heads", "keys" or "auto"; see `choose_heads`.
        on_machine: Number of ranks on a machine; None if all `ranks` are on one machine.

    Raises:
        ValueError: if the model pools documents; if its attention is not lctrain's; if keys would
            be gathered, but a layer attends to the future; or if exchange is "heads", and `ranks`
            does not divide the number of key/value heads.
    """
    inner = inside_adapters(model)
    refuse_share(inner, ranks)
    if not is_patched(inner):
        raise ValueError(
            f"the model must have lctrain's attention with trainer.context_parallel={ranks}, got "
            f"{type(inner).__name__} without: its own attention sees one rank's tokens only. "
            "Choose attention=flash, or call lctrain.patch_model."
        )
    count = key_heads(inner.config)
    if exchange == "heads" and count % ranks != 0:
        raise ValueError(
            "trainer.context_parallel must divide the key/value heads with "
            f"trainer.context_exchange=heads, got {ranks} ranks and {count} heads. Set "
            "trainer.context_exchange=auto."
        )
    heads = choose_heads(exchange, ranks, count, on_machine or ranks)
    layers = attention_layers(inner).values()
    if heads != ranks and not all(getattr(layer, "is_causal", True) for layer in layers):
        raise ValueError(
            f"trainer.context_parallel must exchange heads in {type(inner).__name__}, whose layers "
            f"attend to the future, got {ranks} ranks, {count} key/value heads and "
            f"trainer.context_exchange={exchange}. Use auto, and a number of ranks that divides "
            "the heads."
        )
    return heads


def read_share(
    model: nn.Module, inputs: dict[str, Any], tokens: Tensor, read: Callable[..., Boundaries]
) -> Boundaries | None:
    """Returns the boundaries of the whole pack if a model's inputs are one rank's share of it.

    Without a share in the inputs, it returns None.

    Args:
        model: The model.
        inputs: Keyword arguments of the model. The share is removed from them.
        tokens: [B, S, ...], tokens or embeddings of the call.
        read: `lctrain.models.read_boundaries.read_boundaries`.

    Raises:
        ValueError: if the inputs are not those of the share, there are no ranks to share with, or
            the model pools documents.
    """
    share = inputs.pop(SHARE_ARGUMENT, None)
    if share is None:
        return None
    rows = (tokens.shape[0], tokens.shape[1])
    share.check(rows, is_packed(inputs))
    refuse_share(model, share.size)
    whole = read(inputs, 1, len(share.plan.order), tokens.device)
    return whole._replace(queries=rows, keys=rows, share=share)


def give_positions(inputs: dict[str, Any], tokens: int) -> int:
    """Sets the position ids of packed inputs, counted from 0, if they are missing.

    Args:
        inputs: Keyword arguments of the model, a pack or one rank's share of it.
        tokens: Number of tokens in the row.

    Returns:
        The position in its document, counted from 0, of the row's first token.
    """
    share, boundaries = inputs.get(SHARE_ARGUMENT), inputs.get("cu_seq_lens_q")
    if inputs.get("position_ids") is None and boundaries is not None:
        whole = restarting_positions(boundaries, tokens if share is None else share.pack_tokens)
        inputs["position_ids"] = whole if share is None else whole[:, share.places]
    return 0 if share is None else int(share.first_position)


def covered_tokens(inputs: dict[str, Any]) -> int | None:
    """Returns the number of tokens of a pack, if it can be read without synchronising.

    Otherwise it returns None: for a share of a pack, and, without a tile schedule, while torch
    compiles or if the boundaries are on a GPU.

    Args:
        inputs: Keyword arguments of the model.
    """
    if SHARE_ARGUMENT in inputs:
        return None
    schedule, boundaries = inputs.get("schedule"), inputs.get("cu_seq_lens_q")
    if schedule is not None and schedule.total_q >= 0:
        return int(schedule.total_q)
    if torch.compiler.is_compiling() or boundaries is None or boundaries.device.type != "cpu":
        return None
    return int(boundaries[-1])


def key_heads(config: Any) -> int:
    """Returns a number that divides the key/value heads of every layer; 1 if they are unknown.

    A configuration may give one number per layer. With multi-query attention, all query heads of a
    layer share one key/value head. A head of differential attention of version 1 has the
    keys and values of two heads.

    Args:
        config: A transformers configuration.
    """
    if getattr(config, "multi_query", False):
        return 1
    counts = [getattr(config, name, None) for name in _KEY_HEADS]
    if all(count is None for count in counts):
        counts = [getattr(config, "num_attention_heads", None)]
    found: list[Any] = []
    for count in counts:
        found += count if isinstance(count, list | tuple) else [] if count is None else [count]
    if not all(isinstance(count, int) for count in found):
        return 1  # a layer without attention, or numbers that are unknown
    divisor = gcd(*found) or 1
    return divisor // 2 if getattr(config, "model_type", None) == "diffllama" else divisor
