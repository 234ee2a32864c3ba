"""Attention on a shared pack, computed by one rank or by a group of ranks."""

from dataclasses import dataclass, field
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor

from lctrain.distributed import attention as shared_functions
from lctrain.distributed import context
from lctrain.distributed.context import ContextShard
from lctrain.distributed.shared_pack import ContextGroups, SharedPack
from lctrain_kernels.differential.api import diff_attn_pack_func
from lctrain_kernels.dual_chunk.api import dual_chunk_attn_pack_func
from lctrain_kernels.options import resolve_seed
from lctrain_kernels.varlen.api import flash_attn_pack_func

LONG, SHORT = (200, 1, 0, 60, 33), (3,)  # the second pack has tokens for one rank
FINE = 16  # the smallest BORDER that keeps the dropout mask, for short documents on many ranks
EIGHT = (8, 8)  # heads that eight ranks can exchange
SEED = 5


Lengths = tuple[int, ...]


@dataclass(frozen=True)
class Settings:
    """Heads of queries and keys, head dim, dtype, backend and device."""

    heads: tuple[int, int] = (8, 4)
    dim: int = 8
    dtype: torch.dtype = torch.float64
    backend: str = "auto"
    device: str = "cpu"


@dataclass
class Case:
    """One attention with its options.

    Attributes:
        function: "flash", "dual_chunk" or "diff".
        options: Options of the function, without tensors.
        has_tensors: Whether slopes per document and head, and sinks, are given.
        lam: Shape of lambda: "scalar", "heads" or "tokens", that is per token and head.
        version: Version of differential attention.
    """

    function: str = "flash"
    options: dict[str, Any] = field(default_factory=dict)
    has_tensors: bool = False
    lam: str = ""
    version: int = 1


ALL_OPTIONS = {"causal": True, "window_size": (50, 0), "softcap": 5.0, "dropout_p": 0.1}
DUAL_CHUNK = {"chunk_size": 40, "local_size": 8, "dropout_p": 0.1}
CASES = {
    "plain": Case(options={"causal": True}),
    "options": Case(options=ALL_OPTIONS, has_tensors=True),
    "dual_chunk": Case("dual_chunk", DUAL_CHUNK),
    "wide_chunks": Case("dual_chunk", {"chunk_size": 160, "local_size": 32, "dropout_p": 0.1}),
    "differential_1": Case("diff", {"dropout_p": 0.1, "window_size": (80, 0)}, lam="heads"),
    "differential_2": Case("diff", {"dropout_p": 0.1}, lam="tokens", version=2),
    "one_lambda": Case("diff", lam="scalar"),
}
FUNCTIONS = {
    "flash": flash_attn_pack_func,
    "dual_chunk": dual_chunk_attn_pack_func,
    "diff": diff_attn_pack_func,
}


@dataclass
class Inputs:
    """Tensors of the whole pack: per token, of all tokens, and the gradient of the output."""

    rows: list[Tensor]
    options: dict[str, Any]
    trained: dict[str, Tensor]
    dout: Tensor


def make_inputs(case: Case, lengths: Lengths, settings: Settings) -> Inputs:
    """Returns random inputs of the whole pack."""
    (heads_q, heads_k), dim, dtype = settings.heads, settings.dim, settings.dtype
    generator = torch.Generator().manual_seed(0)
    tokens = sum(lengths)

    def normal(*shape: int) -> Tensor:
        drawn = torch.randn(*shape, generator=generator, dtype=torch.float64)
        return drawn.to(settings.device, dtype)

    options, trained = dict(case.options), {}
    if options.get("dropout_p"):
        options["dropout_seed"] = SEED
    if case.function == "dual_chunk":
        frequencies = 10_000.0 ** -(torch.arange(0, dim, 2) / dim)
        scale = 1 + torch.rand(len(lengths), generator=generator)
        options |= {"inv_freq": frequencies.to(settings.device)}
        options |= {"logit_scale": scale.to(settings.device)}
    if case.function == "flash" and case.has_tensors:
        slopes = torch.rand(len(lengths), heads_q, generator=generator)
        options["alibi_slopes"] = slopes.to(settings.device)
        trained["learnable_sink"] = normal(heads_q)
    if case.function != "diff":
        rows = [normal(tokens, count, dim) for count in (heads_q, heads_k, heads_k)]
        return Inputs(rows, options, trained, normal(tokens, heads_q, dim))
    wide = dim if case.version == 2 else 2 * dim
    rows = [normal(tokens, heads_q, dim), normal(tokens, heads_q, dim)]
    rows += [normal(tokens, heads_k, dim) for _ in range(1 if case.version == 2 else 2)]
    rows.append(normal(tokens, heads_k, wide))
    state = torch.promote_types(dtype, torch.float32)
    if case.lam == "tokens":
        rows.append(normal(tokens, heads_q).to(state))
    else:
        trained["lam"] = normal(heads_q if case.lam == "heads" else 1).to(state)
        trained["lam"] = trained["lam"].squeeze() if case.lam == "scalar" else trained["lam"]
    return Inputs(rows, options, trained, normal(tokens, heads_q, wide))


def call(case: Case, function: Any, rows: list[Tensor], trained: dict[str, Tensor]) -> Any:
    """Calls an attention with its positional tensors in order."""
    if case.function != "diff":
        return function(*rows, **trained)
    rows = list(rows)
    lam = rows.pop() if case.lam == "tokens" else trained["lam"]
    if case.version == 2:
        rows.insert(3, rows[2])
    return function(*rows, lam)


@dataclass
class Result:
    """Output, gradients per token, and gradients of trained tensors."""

    rows: list[Tensor]
    trained: list[Tensor]


def run(case: Case, function: Any, inputs: Inputs, tokens: Tensor | None = None) -> Result:
    """Runs forward and backward of an attention on some tokens of the pack, or on all."""
    chosen = inputs.rows if tokens is None else [x[tokens] for x in inputs.rows]
    dout = inputs.dout if tokens is None else inputs.dout[tokens]
    rows = [x.clone().requires_grad_() for x in chosen]
    trained = {name: x.clone().requires_grad_() for name, x in inputs.trained.items()}
    out = call(case, partial(function, **inputs.options), rows, trained)
    out = out[0] if isinstance(out, tuple) else out
    out.backward(dout)
    found = [out.detach(), *(x.grad for x in rows)]
    return Result(found, [x.grad for x in trained.values()])


def whole(name: str, lengths: Lengths, settings: Settings) -> Result:
    """Returns the result of one rank."""
    case = CASES[name]
    inputs = make_inputs(case, lengths, settings)
    pack = SharedPack.of(ContextShard.of(lengths, 1), 0, settings.device).pack
    function = partial(FUNCTIONS[case.function], pack=pack, backend=settings.backend)
    return run(case, function, inputs)


def share(
    name: str,
    shard: ContextShard,
    rank: int,
    groups: ContextGroups,
    settings: Settings,
) -> Result:
    """Returns the result of one rank of several."""
    case = CASES[name]
    inputs = make_inputs(case, shard.lengths, settings)
    shared = SharedPack.of(shard, rank, settings.device, groups)
    function = getattr(shared_functions, f"{case.function}_attn_shared_func")
    function = partial(function, shared=shared, backend=settings.backend)
    return run(case, function, inputs, torch.from_numpy(shard.indices(rank)))


def fine_shard(lengths: Lengths, size: int, heads: int, border: int = FINE) -> ContextShard:
    """Returns the division of a pack into chunks that begin at multiples of a small number."""
    with patch.object(context, "BORDER", border):
        return ContextShard.of(lengths, size, heads)


def put_together(shard: ContextShard, results: list[Result]) -> Result:
    """Returns the result of one rank from those of all ranks."""
    order = torch.from_numpy(shard.order)
    rows = [torch.cat(parts) for parts in zip(*(result.rows for result in results), strict=True)]
    rows = [torch.empty_like(x).index_copy_(0, order, x) for x in rows]
    trained = [sum(parts) for parts in zip(*(result.trained for result in results), strict=True)]
    return Result(rows, trained)


def check_seed(shared: SharedPack) -> None:
    """Checks that all ranks get the seed that the first one draws."""
    cpu = torch.device("cpu")
    with torch.random.fork_rng():
        torch.manual_seed(shared.rank)
        seed = shared_functions.shared_seed({"dropout_p": 0.5}, shared, cpu)
        torch.manual_seed(0)
        assert torch.equal(seed, resolve_seed(0.5, None, cpu))


def all_shared(heads: int) -> dict[tuple[str, Lengths], tuple[ContextShard, list[Result]]]:
    """Returns the results of all ranks of the default group, by case and pack.

    Args:
        heads: Number of ranks of a heads group.
    """
    size, rank = dist.get_world_size(), dist.get_rank()
    groups = ContextGroups.of(size, heads)
    settings = Settings(EIGHT if size == 8 else Settings.heads)
    found = {}
    for lengths in (LONG, SHORT):
        shard = fine_shard(lengths, size, heads)
        check_seed(SharedPack.of(shard, rank, "cpu", groups))
        for name in CASES:
            results: list[Any] = [None] * size
            dist.all_gather_object(results, share(name, shard, rank, groups, settings))
            found[name, lengths] = (shard, results)
    return found
