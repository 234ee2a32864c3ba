"""Attention of suffixes to a prefix that they share, merged with their attention to themselves."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from lctrain.attention.mask import UNPATCH
from lctrain.groups import PatchedOnly, PrefixGroups

if TYPE_CHECKING:
    from lctrain_kernels.pack import Pack

GROUPS_ARGUMENT = "prefix_groups"


class SharedPrefixes(NamedTuple):
    """The suffixes and prefixes of a batch, as every layer passes them to the kernels.

    Attributes:
        pack: Pack for the kernels with one document per group: its suffixes are the queries, and
            their prefix is the keys.
        prefix_tokens: [P] int64, indices of the prefixes' tokens in the batch.
        suffix_tokens: [S] int64, indices of the suffixes' tokens in the batch.
        longest: Length of the longest prefix with one of its suffixes.
    """

    pack: Pack
    prefix_tokens: Tensor
    suffix_tokens: Tensor
    longest: int


def admit_groups(inputs: dict[str, Any], packed: bool) -> None:
    """Prepares the inputs of a patched model that may have shared prefixes, in place.

    Args:
        inputs: Keyword arguments of the model.
        packed: Whether they hold the boundaries of documents.

    Raises:
        ValueError: if there are groups without the boundaries of their documents.
    """
    if isinstance(inputs.get("use_cache"), PatchedOnly):
        inputs["use_cache"] = False
    if inputs.get(GROUPS_ARGUMENT) is not None and not packed:
        raise ValueError(
            f"{GROUPS_ARGUMENT} must come with the boundaries of its documents, got no "
            "cu_seq_lens_q. Pass all of PackedBatch.model_kwargs()."
        )


def read_groups(groups: PrefixGroups | None, device: torch.device) -> SharedPrefixes | None:
    """Returns the shared prefixes of a batch; None without any.

    Args:
        groups: Groups of a PackedBatch.
        device: Device of the batch.

    Raises:
        ValueError: if the groups are on another device.
    """
    from lctrain_kernels.pack import checked_pack

    if groups is None or len(groups.cu_prefix) == 1:
        return None
    pack = checked_pack(
        groups.cu_suffix,
        groups.cu_prefix,
        groups.suffix_tokens.shape[0],
        groups.prefix_tokens.shape[0],
        device,
        max_seqlen_q=groups.max_suffix,
        max_seqlen_k=groups.max_prefix,
        document_ids=groups.document_ids,
        schedule=groups.schedule,
    )
    return SharedPrefixes(pack, groups.prefix_tokens, groups.suffix_tokens, groups.longest)


def add_prefixes(
    shared: SharedPrefixes,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    **options: Any,
) -> Tensor:
    """Merges the attention of every document to itself with that of suffixes to their prefixes.

    The result and its gradients are exact, since merge_attn_states is differentiable in the
    log-sum-exps. With dropout, a suffix draws a mask of its own for the keys of the prefix.

    Args:
        shared: Suffixes and prefixes.
        q: [T, H, D].
        k: [T, Hk, D].
        v: [T, Hk, D].
        out: [T, H, D], attention of every document to itself.
        lse: [H, T], log-sum-exp of the logits of that attention, a sink included.
        **options: Keyword arguments of flash_attn_pack_func, except those of the mask and the sink.
    """
    from lctrain_kernels.merge import merge_attn_states
    from lctrain_kernels.varlen.api import flash_attn_pack_func

    suffix, prefix = shared.suffix_tokens, shared.prefix_tokens
    prefix_out, prefix_lse = flash_attn_pack_func(
        q.index_select(0, suffix),
        k.index_select(0, prefix),
        v.index_select(0, prefix),
        shared.pack,
        **options,
    )
    merged, _ = merge_attn_states(
        out.index_select(0, suffix), lse.index_select(1, suffix), prefix_out, prefix_lse
    )
    return out.index_copy(0, suffix, merged)


def require_whole_groups(shared: SharedPrefixes, causal: bool, window: int | None) -> None:
    """Raises a ValueError if an attention layer cannot serve shared prefixes.

    Args:
        shared: Suffixes and prefixes.
        causal: Whether the layer is causal.
        window: Number of keys that a query sees to its left, its own included; None for all.
    """
    if not causal:
        raise ValueError(
            "the attention of shared prefixes must be causal, got a bidirectional layer. Pass "
            "prompts and completions as separate documents: PackedBatch.from_documents."
        )
    if window is not None and window < shared.longest:
        raise ValueError(
            f"sliding_window must be at least {shared.longest}, the longest prompt with its "
            f"completion, for shared prefixes, got {window}. Pass them as separate documents: "
            "PackedBatch.from_documents."
        )


def refuse_groups(shared: SharedPrefixes | None, attention: str) -> None:
    """Raises a ValueError if an attention other than flash attention gets shared prefixes.

    Args:
        shared: Suffixes and prefixes; None without any.
        attention: Name of the attention.
    """
    if shared is not None:
        raise _other_attention(attention)


def refuse_model(model: nn.Module, attention: str, has_lengths: bool, pools_rows: bool) -> None:
    """Raises a ValueError if a model cannot serve documents that share a prefix.

    Args:
        model: The model.
        attention: Name of its attention in transformers.
        has_lengths: Whether rotary frequencies depend on the document's length.
        pools_rows: Whether the head gives one output per document.
    """
    if attention != "lctrain_flash":
        raise _other_attention(attention.removeprefix("lctrain_"))
    reasons = {
        "rotary frequencies that depend on the document's length": has_lengths,
        "a head with one output per document": pools_rows,
    }
    for reason in (reason for reason, holds in reasons.items() if holds):
        raise ValueError(
            f"the model must compute a prefix without its suffixes, got {type(model).__name__} "
            f"with {reason}. Pass prompts and completions as separate documents: "
            "PackedBatch.from_documents."
        )


def longest_document(shared: SharedPrefixes | None, pack: Pack) -> int:
    """Returns the length of the longest document, its prefix included.

    Args:
        shared: Suffixes and prefixes; None without any.
        pack: Documents of the batch.
    """
    return pack.max_seqlen_k if shared is None else shared.longest


def _other_attention(attention: str) -> ValueError:
    return ValueError(
        f"the attention of shared prefixes must be flash, got {attention}. Patch the model with "
        "attention='flash', or pass prompts and completions as separate documents: "
        f"PackedBatch.from_documents. {UNPATCH}"
    )
