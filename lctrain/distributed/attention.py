"""Context parallelism: lctrain's attention functions on a pack that several ranks share.

A context group is a set of ranks that compute one pack together; each rank holds t of the pack's T
tokens. Each function here takes the tensors of one rank's tokens. The outputs of all ranks together
are those of one call on the whole pack, with the same dropout mask. All ranks of the context group
must call the functions in the same order.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lctrain.distributed.exchange import exchange
from lctrain.distributed.shared_pack import SharedPack


def flash_attn_shared_func(
    q: Tensor, k: Tensor, v: Tensor, shared: SharedPack, **options: Any
) -> Tensor:
    """Computes flash_attn_varlen_func on a shared pack, for this rank's tokens.

    Args:
        q: Queries of this rank's t tokens, [t, H, D].
        k: Keys of this rank's tokens, [t, Hk, D].
        v: Values of this rank's tokens, [t, Hk, D].
        shared: The shared pack, as this rank sees it.
        **options: Keyword arguments of flash_attn_varlen_func that follow max_seqlen_k, except
            `schedule`, `document_ids`, `block_table`, `return_lse` and `return_attn_probs`. ALiBi
            slopes and sinks cover all heads and all documents of the pack. Without `dropout_seed`,
            the first rank of the context group draws the seed.

    Returns:
        The output of this rank's tokens, [t, H, D].

    Raises:
        ValueError: if attention is not causal and keys are gathered, or an argument does not fit.
    """
    from lctrain_kernels.options import check_head_tensors
    from lctrain_kernels.varlen.api import flash_attn_pack_func

    if shared.selection is not None and not options.get("causal", False):
        raise ValueError(
            "causal must be True to gather keys, got False. Exchange heads among all ranks."
        )
    slopes, sink = options.get("alibi_slopes"), options.get("learnable_sink")
    _refuse_first_head(options)
    check_head_tensors(len(shared.shard.lengths), q.shape[1], q.device, slopes, sink)
    if slopes is not None and slopes.dim() == 2:
        slopes = shared.of_documents(slopes)
    options |= {
        "alibi_slopes": shared.of_heads(slopes),
        "learnable_sink": shared.of_heads(sink),
        "dropout_seed": shared_seed(options, shared, q.device),
        "first_head": shared.first_head(q.shape[1]),
    }

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return flash_attn_pack_func(q, k, v, shared.pack, **options)[0]

    return exchange(attention, [q], [k, v], shared)


def dual_chunk_attn_shared_func(
    q: Tensor, k: Tensor, v: Tensor, shared: SharedPack, **options: Any
) -> Tensor:
    """Computes dual_chunk_attn_varlen_func on a shared pack, for this rank's tokens.

    Args:
        q: Queries of this rank's t tokens, [t, H, D], rotated as for dual_chunk_attn_varlen_func.
        k: Keys of this rank's tokens, [t, Hk, D], rotated in the same way.
        v: Values of this rank's tokens, [t, Hk, D].
        shared: The shared pack, as this rank sees it.
        **options: Keyword arguments of dual_chunk_attn_varlen_func: inv_freq, chunk_size and
            local_size; optionally logit_scale (of all documents of the pack), dropout_p,
            softmax_scale, dropout_seed and backend. Without `dropout_seed`, the first rank of the
            context group draws the seed.

    Returns:
        The output of this rank's tokens, [t, H, D].

    Raises:
        ValueError: if an argument does not fit.
    """
    from lctrain_kernels.dual_chunk.api import dual_chunk_attn_pack_func

    _refuse_first_head(options)
    scale, documents = options.get("logit_scale"), len(shared.shard.lengths)
    if scale is not None and tuple(scale.shape) != (documents,):
        raise ValueError(
            f"logit_scale must have shape [{documents}], one per document of the whole pack, got "
            f"{tuple(scale.shape)}. Compute it from the lengths of all documents."
        )
    options |= {
        "logit_scale": shared.of_documents(scale),
        "dropout_seed": shared_seed(options, shared, q.device),
        "first_head": shared.first_head(q.shape[1]),
    }

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return dual_chunk_attn_pack_func(q, k, v, shared.pack, **options)[0]

    return exchange(attention, [q], [k, v], shared)


def diff_attn_shared_func(
    q1: Tensor,
    q2: Tensor,
    k1: Tensor,
    k2: Tensor,
    v: Tensor,
    lam: Tensor,
    shared: SharedPack,
    **options: Any,
) -> Tensor:
    """Computes diff_attn_varlen_func on a shared pack, for this rank's tokens.

    Args:
        q1: Queries of branch 1 for this rank's t tokens, [t, H, D].
        q2: Queries of branch 2, [t, H, D].
        k1: Keys of branch 1, [t, Hk, D].
        k2: Keys of branch 2, [t, Hk, D]. In version 2 of differential attention both branches have
            the same keys: pass k1 itself, which is then exchanged once.
        v: Values of this rank's tokens, [t, Hk, Dv].
        lam: Lambda: a scalar or [H], the same on every rank, or [t, H] of this rank's tokens.
        shared: The shared pack, as this rank sees it.
        **options: Options of diff_attn_varlen_func, except `schedule`, `document_ids` and
            `return_lse`. Without `dropout_seed`, the first rank of the context group draws the
            seed.

    Returns:
        The output of this rank's tokens, [t, H, Dv].

    Raises:
        ValueError: if attention is not causal and keys are gathered, or an argument does not fit.
    """
    from lctrain_kernels.differential.api import diff_attn_pack_func
    from lctrain_kernels.differential.checks import check_lam

    _refuse_first_head(options)
    check_lam(lam, q1.shape[0], q1.shape[1], q1.device)
    if shared.selection is not None and not options.get("causal", True):
        raise ValueError(
            "causal must be True to gather keys, got False. Exchange heads among all ranks."
        )
    options |= {
        "dropout_seed": shared_seed(options, shared, q1.device),
        "first_head": shared.first_head(q1.shape[1]),
    }
    queries = [q1, q2]
    if lam.dim() == 2:
        queries.append(lam[..., None])
    factors = lam
    if lam.dim() == 1:
        factors = lam.chunk(shared.shard.heads)[shared.place]

    def attention(*tensors: Tensor) -> Tensor:
        q1, q2, *rest, k1, k2, v = tensors
        factor = rest[0][..., 0] if rest else factors
        return diff_attn_pack_func(q1, q2, k1, k2, v, factor, shared.pack, **options)[0]

    return exchange(attention, queries, [k1, k2, v], shared)


def _refuse_first_head(options: dict[str, Any]) -> None:
    if "first_head" in options:
        raise ValueError(
            "first_head must be left out where ranks share a pack, got "
            f"{options['first_head']}. The rank's place in its heads group determines it."
        )


def shared_seed(options: dict[str, Any], shared: SharedPack, device: torch.device) -> Any:
    """Returns the dropout seed of a call, the same on all ranks of the context group.

    Args:
        options: Options of the attention. If dropout is on and `dropout_seed` is missing, every
            rank draws a seed from torch's generator, and all use the first rank's seed.
        shared: The shared pack.
        device: Device of the queries.
    """
    from lctrain_kernels.options import resolve_seed

    given = options.get("dropout_seed")
    if options.get("dropout_p", 0.0) == 0 or given is not None or shared.shard.size == 1:
        return given
    seed = resolve_seed(options["dropout_p"], None, device)
    assert seed is not None
    dist.broadcast(seed, group=shared.groups.whole, group_src=0)
    return seed
