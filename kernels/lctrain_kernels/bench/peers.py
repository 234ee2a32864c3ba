"""The peers of the benchmark: lctrain's attention, and other libraries' packed attention.

A peer is a function that takes the inputs and returns the call that is timed. The call returns the
output [T, H, D]. Work that a training step does once per batch (a tile schedule, a block mask) is
done by the peer, before the call.
"""

import functools
import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import torch
import torch.nn.functional as F

from lctrain_kernels import flash_attn_varlen_func, make_schedule
from lctrain_kernels.bench.inputs import AttentionInputs

Call = Callable[[], torch.Tensor]


class UnsupportedWorkload(Exception):
    """Error of a peer that does not support a workload. The message names the reason."""


@dataclass(frozen=True)
class Peer:
    """An implementation of packed causal attention.

    Attributes:
        name: Name of the peer on the command line, in `--peers`.
        title: Name of the peer in tables.
        module: Module that must be importable.
        distribution: Package whose version is recorded.
        prepare: Function from the inputs to the call that is timed.
    """

    name: str
    title: str
    module: str
    distribution: str
    prepare: Callable[[AttentionInputs], Call]

    def missing(self) -> str | None:
        """Returns why the peer cannot be used on this machine, or None if it can."""
        try:
            importlib.import_module(self.module)
        except Exception as error:  # importing a peer may raise any error
            return f"{type(error).__name__}: {error}".splitlines()[0]
        return None


def installed_version(distribution: str) -> str | None:
    """Returns the version of an installed package, or None if it is unknown."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _refuse_dropout(inputs: AttentionInputs) -> None:
    if inputs.workload.dropout_p:
        raise UnsupportedWorkload("has no dropout")


def lctrain(inputs: AttentionInputs, backend: str = "auto", *, deterministic: bool = False) -> Call:
    """Returns the call of lctrain's attention that is timed; the tile schedule is built beforehand.

    Args:
        inputs: Tensors of the workload.
        backend: "auto", "hopper", "triton" or "pytorch".
        deterministic: Whether the backward must give the same bits in every run.
    """
    q, k, v = inputs.leaves
    cu, longest = inputs.cu_seqlens, inputs.max_seqlen
    schedule = make_schedule(inputs.workload.lengths).to(q.device)
    dropout_p = inputs.workload.dropout_p

    def call() -> torch.Tensor:
        out = flash_attn_varlen_func(
            *(q, k, v, cu, cu, longest, longest, dropout_p),
            causal=True,
            deterministic=deterministic,
            schedule=schedule,
            backend=backend,
        )
        assert isinstance(out, torch.Tensor)
        return out

    return call


def lctrain_deterministic(inputs: AttentionInputs) -> Call:
    """Returns a call of lctrain's attention with deterministic=True."""
    return lctrain(inputs, deterministic=True)


def lctrain_portable(inputs: AttentionInputs) -> Call:
    """Returns a call of lctrain's attention with backend="triton", the portable kernels."""
    return lctrain(inputs, backend="triton")


def fa2_varlen(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens: torch.Tensor, max_seqlen: int
) -> torch.Tensor:
    """Returns causal attention over a pack, by PyTorch's FlashAttention-2 (`varlen_attn`).

    Args:
        q: Queries [T, H, D].
        k: Keys [T, Hk, D].
        v: Values [T, Hk, D].
        cu_seqlens: Cumulative document lengths, [N + 1] int32.
        max_seqlen: Length of the longest document.
    """
    from torch.nn.attention.varlen import varlen_attn

    boundaries = (cu_seqlens, cu_seqlens, max_seqlen, max_seqlen)
    out = varlen_attn(q, k, v, *boundaries, **_causal_options())
    return out[0] if isinstance(out, tuple) else out


@functools.cache
def _causal_options() -> dict[str, Any]:
    """Returns keyword arguments that make PyTorch's `varlen_attn` causal, with grouped queries.

    The names depend on the installed version.
    """
    from torch.nn.attention.varlen import varlen_attn

    parameters = inspect.signature(varlen_attn).parameters
    options: dict[str, Any] = {"window_size": (-1, 0)}
    if "is_causal" in parameters:  # its older name
        options = {"is_causal": True}
    if "enable_gqa" in parameters:
        options["enable_gqa"] = True
    return options


def fa4_varlen(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens: torch.Tensor, max_seqlen: int
) -> torch.Tensor:
    """Returns causal attention over a pack, by FlashAttention-4. Arguments as in `fa2_varlen`."""
    from flash_attn.cute import flash_attn_varlen_func as flash_attention

    out = flash_attention(
        q,
        k,
        v,
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_k=cu_seqlens,
        max_seqlen_q=max_seqlen,
        max_seqlen_k=max_seqlen,
        causal=True,
    )
    return out[0] if isinstance(out, tuple) else out


def flash_attention_2(inputs: AttentionInputs) -> Call:
    """Returns a call of the FlashAttention-2 that PyTorch contains.

    The call is `varlen_attn`, or the operator below it for workloads with dropout.
    """
    q, k, v = inputs.leaves
    cu, longest = inputs.cu_seqlens, inputs.max_seqlen
    dropout_p = inputs.workload.dropout_p
    if dropout_p:
        forward = torch.ops.aten._flash_attention_forward
        return lambda: forward(q, k, v, cu, cu, longest, longest, dropout_p, True, False)[0]
    return lambda: fa2_varlen(q, k, v, cu, longest)


def flash_attention_4(inputs: AttentionInputs) -> Call:
    """Returns a call of FlashAttention-4 (CuTe DSL)."""
    _refuse_dropout(inputs)
    q, k, v = inputs.leaves
    return lambda: fa4_varlen(q, k, v, inputs.cu_seqlens, inputs.max_seqlen)


def flex_attention(inputs: AttentionInputs) -> Call:
    """Returns a call of PyTorch's FlexAttention with a causal document mask, built beforehand."""
    _refuse_dropout(inputs)
    import torch._functorch.config
    from torch.nn.attention import flex_attention as flex

    torch._functorch.config.donated_buffer = False  # one graph is run backward many times
    torch.compiler.reset()  # else the workloads add up to the limit of recompilations
    lengths = torch.tensor(inputs.workload.lengths, device=inputs.q.device)
    document = torch.repeat_interleave(torch.arange(len(lengths), device=lengths.device), lengths)

    def same_document_and_causal(
        batch: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor
    ) -> torch.Tensor:
        return (document[query] == document[key]) & (query >= key)

    tokens = inputs.workload.tokens
    block_mask = torch.compile(flex.create_block_mask)(
        same_document_and_causal, None, None, tokens, tokens, device=inputs.q.device
    )
    attention = torch.compile(flex.flex_attention, dynamic=False, fullgraph=True)

    def call() -> torch.Tensor:
        q, k, v = (x.transpose(0, 1)[None] for x in inputs.leaves)
        return attention(q, k, v, block_mask=block_mask, enable_gqa=True)[0].transpose(0, 1)

    return call


def flash_linear_attention(inputs: AttentionInputs) -> Call:
    """Returns a call of flash-linear-attention's `parallel_attn` (Triton)."""
    _refuse_dropout(inputs)
    if inputs.workload.tokens > 65_536:
        raise UnsupportedWorkload("left out above 65,536 tokens")
    from fla.ops.attn import parallel_attn

    q, k, v = inputs.leaves
    cu = inputs.cu_seqlens.long()
    return lambda: parallel_attn(q[None], k[None], v[None], cu_seqlens=cu)[0]


def cudnn(inputs: AttentionInputs) -> Call:
    """Returns a call of cuDNN's attention through scaled_dot_product_attention.

    All documents must have the same length.
    """
    _refuse_dropout(inputs)
    if len(set(inputs.workload.lengths)) > 1:
        raise UnsupportedWorkload("takes documents of one length only")
    from torch.nn.attention import SDPBackend, sdpa_kernel

    rows = len(inputs.workload.lengths)

    def call() -> torch.Tensor:
        q, k, v = (x.unflatten(0, (rows, -1)).transpose(1, 2) for x in inputs.leaves)
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return out.transpose(1, 2).flatten(0, 1)

    return call


OURS = "lctrain"
_ALL = (
    Peer(OURS, "lctrain", "lctrain.kernels", "lctrain", lctrain),
    Peer("portable", "lctrain, portable", "lctrain.kernels", "lctrain", lctrain_portable),
    Peer(
        "deterministic",
        "lctrain, deterministic",
        "lctrain.kernels",
        "lctrain",
        lctrain_deterministic,
    ),
    Peer(
        "fa2", "FlashAttention-2 in torch", "torch.nn.attention.varlen", "torch", flash_attention_2
    ),
    Peer("fa4", "FlashAttention-4", "flash_attn.cute", "flash-attn-4", flash_attention_4),
    Peer("cudnn", "cuDNN SDPA", "torch", "torch", cudnn),
    Peer("flex", "FlexAttention", "torch.nn.attention.flex_attention", "torch", flex_attention),
    Peer(
        "fla",
        "flash-linear-attention",
        "fla.ops.attn",
        "flash-linear-attention",
        flash_linear_attention,
    ),
)
PEERS = {peer.name: peer for peer in _ALL}
