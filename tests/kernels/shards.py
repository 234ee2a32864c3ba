"""Computes attention with dropout as ranks of context or tensor parallelism do.

A rank of context parallelism holds a run of every document's queries, and the keys up to the end of
the run. A rank of tensor parallelism holds a slice of the heads. `run` computes a call;
`queries_of_a_rank` and `heads_of_a_rank` select a rank's inputs.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lctrain_kernels.differential.api import diff_attn_pack_func
from lctrain_kernels.dual_chunk.api import dual_chunk_attn_pack_func
from lctrain_kernels.pack import Pack, checked_pack
from lctrain_kernels.varlen.api import flash_attn_pack_func
from tests.kernels.oracle import DROPOUT_SEED, cumulative

ATTENTIONS = ("varlen", "dual_chunk", "differential")
DROPOUT_P = 0.1


@dataclass(frozen=True)
class ShardInputs:
    """Inputs of one rank's attention call; also those of the call on all queries and heads.

    Attributes:
        queries: q, or q1 and q2, each [T, H, D].
        keys: k and v, or k1, k2 and v, each [Tk, Hk, D].
        dout: Gradient of out, [T, H, D].
        dlse: Gradient of every lse, [H, T].
        runs: (first query, end) of each document; its keys are those up to the end.
        first_head: Index of the first query head among the heads of all ranks.
    """

    queries: tuple[Tensor, ...]
    keys: tuple[Tensor, ...]
    dout: Tensor
    dlse: Tensor
    runs: tuple[tuple[int, int], ...]
    first_head: int = 0


@dataclass(frozen=True)
class ShardResult:
    """Results of one rank's attention call.

    Attributes:
        out: Output [T, H, D].
        lse: Log-sum-exp [H, T]; two of them for differential attention.
        dqueries: Gradients of ShardInputs.queries.
        dkeys: Gradients of ShardInputs.keys.
    """

    out: Tensor
    lse: tuple[Tensor, ...]
    dqueries: tuple[Tensor, ...]
    dkeys: tuple[Tensor, ...]


def make_inputs(
    attention: str,
    lengths: Sequence[int],
    heads: int,
    heads_k: int,
    head_dim: int,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
) -> ShardInputs:
    """Draws the inputs of the call on all queries and heads, the same on every device."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    total, branches = sum(lengths), 2 if attention == "differential" else 1
    state = torch.promote_types(dtype, torch.float32)
    return ShardInputs(
        tuple(normal(total, heads, head_dim).to(device, dtype) for _ in range(branches)),
        tuple(normal(total, heads_k, head_dim).to(device, dtype) for _ in range(branches + 1)),
        normal(total, heads, head_dim).to(device, dtype),
        normal(heads, total).to(device, state),
        tuple((0, length) for length in lengths),
    )


def rows_of(
    runs: Sequence[tuple[int, int]], whole: Sequence[tuple[int, int]]
) -> tuple[Tensor, Tensor]:
    """Returns the indices, in the pack of all queries, of a rank's queries and of its keys, int64.

    Args:
        runs: (first query, end) of the rank's run of each document.
        whole: (0, length) of each document.
    """
    queries, keys, begin = [], [], 0
    for (start, stop), (_, length) in zip(runs, whole, strict=True):
        queries.append(torch.arange(begin + start, begin + stop))
        keys.append(torch.arange(begin, begin + stop))
        begin += length
    return torch.cat(queries), torch.cat(keys)


def queries_of_a_rank(whole: ShardInputs, runs: Sequence[tuple[int, int]]) -> ShardInputs:
    """Returns the inputs of the rank that holds the run `runs[i]` of the queries of document i."""
    queries, keys = (x.to(whole.dout.device) for x in rows_of(runs, whole.runs))
    return dataclasses.replace(
        whole,
        queries=tuple(x[queries] for x in whole.queries),
        keys=tuple(x[keys] for x in whole.keys),
        dout=whole.dout[queries],
        dlse=whole.dlse[:, queries].contiguous(),
        runs=tuple(runs),
    )


def without_gradients_elsewhere(whole: ShardInputs, runs: Sequence[tuple[int, int]]) -> ShardInputs:
    """Returns the inputs of the whole call, with zero gradients outside a rank's queries.

    The gradients dout and dlse are set to 0 for the other queries. So the whole call has the
    gradients that the rank computes.
    """
    kept = torch.zeros(len(whole.dout), dtype=torch.bool, device=whole.dout.device)
    kept[rows_of(runs, whole.runs)[0].to(kept.device)] = True
    return dataclasses.replace(whole, dout=whole.dout * kept[:, None, None], dlse=whole.dlse * kept)


def heads_of_a_rank(whole: ShardInputs, heads: slice, heads_k: slice) -> ShardInputs:
    """Returns the inputs of the rank that holds slices of the query and the key/value heads."""
    return dataclasses.replace(
        whole,
        queries=tuple(x[:, heads] for x in whole.queries),
        keys=tuple(x[:, heads_k] for x in whole.keys),
        dout=whole.dout[:, heads].contiguous(),
        dlse=whole.dlse[heads],
        first_head=heads.start,
    )


def pack_of(inputs: ShardInputs, query_offsets: Sequence[int] | None = None) -> Pack:
    """Returns the Pack of a rank's call.

    Args:
        inputs: Inputs of the rank.
        query_offsets: Query offsets of the pack; by default the first queries of the runs.
    """
    device = inputs.dout.device
    starts, stops = zip(*inputs.runs, strict=True)
    lengths = [stop - start for start, stop in inputs.runs]
    offsets = torch.tensor(starts if query_offsets is None else query_offsets, dtype=torch.int32)
    return checked_pack(
        cumulative(lengths, device),
        cumulative(stops, device),
        sum(lengths),
        sum(stops),
        device,
        max_seqlen_q=max(lengths),
        max_seqlen_k=max(stops),
        query_offsets=offsets.to(device) if offsets.any() else None,
    )


def run(
    attention: str,
    inputs: ShardInputs,
    backend: str,
    *,
    has_backward: bool = True,
    query_offsets: Sequence[int] | None = None,
) -> ShardResult:
    """Runs a rank's forward, and by default its backward. `query_offsets` are those of pack_of.

    The chunks of dual chunk attention have 64 tokens. Its dk and dv depend in their last bits on
    the first query of a tile, which is at a multiple of 64 then, however queries are split.
    """
    leaves = [x.detach().requires_grad_(has_backward) for x in (*inputs.queries, *inputs.keys)]
    pack = pack_of(inputs, query_offsets)
    options: dict[str, Any] = {
        "dropout_p": DROPOUT_P,
        "dropout_seed": DROPOUT_SEED,
        "first_head": inputs.first_head,
        "backend": backend,
    }
    if attention == "varlen":
        options |= {"causal": True, "deterministic": True}
        out, *lse = flash_attn_pack_func(*leaves, pack, **options)
    elif attention == "dual_chunk":
        head_dim = inputs.dout.shape[2]
        columns = torch.arange(0, head_dim, 2, device=inputs.dout.device) / head_dim
        options |= {"inv_freq": 10_000**-columns, "chunk_size": 128, "local_size": 64}
        out, *lse = dual_chunk_attn_pack_func(*leaves, pack, **options)
    else:
        lam = torch.tensor(0.3, device=inputs.dout.device, dtype=inputs.dlse.dtype)
        out, *lse = diff_attn_pack_func(*leaves, lam, pack, **options)
    grads: Sequence[Tensor] = ()
    if has_backward:
        grads = torch.autograd.grad([out, *lse], leaves, [inputs.dout, *[inputs.dlse] * len(lse)])
    split = len(inputs.queries)
    states = tuple(x.detach() for x in lse)
    return ShardResult(out.detach(), states, tuple(grads[:split]), tuple(grads[split:]))
