"""Tests flash_attn_varlen_func with block_table and seqused_k, against float64."""

from dataclasses import dataclass

import pytest
import torch

from lctrain.kernels import flash_attn_varlen_func
from lctrain_kernels.reference.attention import dense_attention
from tests.kernels.oracle import cumulative
from tests.numerics import assert_error_at_most_twice

HALF = torch.float16


@dataclass(frozen=True)
class PackedCase:
    """One call: queries and keys of each document, layout, and options."""

    queries: tuple[int, ...] = (1, 0, 3, 1)
    used: tuple[int, ...] = (77, 5, 0, 140)
    page: int = 0
    spare: int = 9
    heads: int = 4
    heads_k: int = 2
    head_dim: int = 32
    causal: bool = True
    window: tuple[int, int] = (-1, -1)
    softcap: float = 0.0
    alibi: bool = False
    sink: bool = False

    @property
    def visible(self) -> tuple[int, int]:
        return (self.window[0], 0) if self.causal else self.window


CASES = {
    "used": PackedCase(),
    "used-not_causal": PackedCase(causal=False, queries=(2, 1, 1, 5)),
    "used-prefill": PackedCase(queries=(20, 0, 3, 40), window=(60, 0), heads=2, heads_k=1),
    "page16": PackedCase(page=16),
    "page32-speculative": PackedCase(page=32, queries=(5, 4, 0, 2), softcap=4.0),
    "page64-window": PackedCase(page=64, window=(70, 0), head_dim=20, heads=6),
    "page128-everything": PackedCase(page=128, queries=(3, 2, 1, 4), alibi=True, sink=True),
    "page256-mqa": PackedCase(page=256, heads_k=1, heads=20, queries=(1, 1, 1, 1)),
    "page16-prefill": PackedCase(page=16, queries=(30, 5, 0, 2), softcap=3.0, sink=True),
    "page32-prefill-cross": PackedCase(page=32, queries=(20, 1, 2, 0), causal=False, alibi=True),
    "no_documents": PackedCase(page=16, queries=(), used=()),
}


def make_call(case: PackedCase, device, dtype=HALF):
    """Returns (positional arguments, keyword arguments, keys and values of each document).

    What no document uses of keys and values is NaN.
    """
    generator = torch.Generator().manual_seed(7)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    heads = (case.heads_k, case.head_dim)
    documents = [(draw(n, *heads), draw(n, *heads)) for n in case.used]
    used = torch.tensor(case.used, dtype=torch.int32, device=device)
    options: dict = {"causal": case.causal, "window_size": case.window, "softcap": case.softcap}
    options |= {"seqused_k": used, "return_lse": True}
    if case.page:
        width = -(-max(case.used, default=1) // case.page) + 1
        count = len(case.used) * width
        order = torch.randperm(count + 2, generator=generator)[:count].view(-1, width)
        pools = torch.full((2, count + 2, case.page, *heads), float("nan"), dtype=dtype)
        pools = pools.to(device)
        table = order.to(device, torch.int32)
        for row, document in enumerate(documents):
            index = torch.arange(case.used[row])
            page = order[row, index // case.page]
            for pool, tokens in zip(pools, document, strict=True):
                pool[page.to(device), (index % case.page).to(device)] = tokens
        options["block_table"] = table
        k, v = pools
        cu_k = None
    else:
        gap = torch.full((case.spare, *heads), float("nan"), dtype=dtype, device=device)
        k, v = (
            torch.cat([x for one in side for x in (one, gap)])
            for side in zip(*documents, strict=True)
        )
        cu_k = cumulative([n + case.spare for n in case.used], device)
    if case.alibi:
        options["alibi_slopes"] = draw(len(case.queries), case.heads).float().abs()
    if case.sink:
        options["learnable_sink"] = draw(case.heads)
    q = draw(sum(case.queries), case.heads, case.head_dim)
    longest = max(case.queries, default=0), max(case.used, default=0)
    return (q, k, v, cumulative(case.queries, device), cu_k, *longest), options, documents


def plain(case: PackedCase, arguments, options, documents, dtype):
    """Returns (out, lse) of plain PyTorch in `dtype`, document by document."""
    q, outs, lses = arguments[0].to(dtype), [], []
    slopes = options.get("alibi_slopes")
    for i, (rows, (k, v)) in enumerate(zip(q.split(case.queries), documents, strict=True)):
        out, lse, _ = dense_attention(
            rows,
            k.to(dtype),
            v.to(dtype),
            window=case.visible,
            softcap=case.softcap,
            alibi_slopes=None if slopes is None else slopes[i],
            learnable_sink=options.get("learnable_sink"),
        )
        outs.append(out)
        lses.append(lse)
    return torch.cat(outs), torch.cat(lses, 1)


@pytest.mark.parametrize("backend", ["triton", "pytorch"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_matches_float64(case, backend, device, nan_filled_memory):
    arguments, options, documents = make_call(case, device)
    out, lse = flash_attn_varlen_func(*arguments, backend=backend, **options)
    assert out.shape == arguments[0].shape
    assert lse.shape == (case.heads, len(arguments[0]))
    if not documents:
        return
    exact = plain(case, arguments, options, documents, torch.float64)
    same = plain(case, arguments, options, documents, HALF)
    assert_error_at_most_twice(out, same[0], exact[0], "out")
    seen = exact[1] > float("-inf")
    assert torch.equal(lse > float("-inf"), seen)
    assert_error_at_most_twice(lse[seen], same[1][seen], exact[1][seen], "lse")


def test_pages_change_no_bit_of_a_prefill(device):
    """More than 16 queries: the tile and order of the training kernel, with pages or without."""
    softcap = 3.0 if device.type == "cpu" else 0.0  # on a GPU only equal up to rounding
    case = PackedCase(queries=(40, 20, 3), used=(77, 20, 60), page=16, heads=2, softcap=softcap)
    arguments, options, documents = make_call(case, device)
    found = flash_attn_varlen_func(*arguments, backend="triton", **options)
    del options["block_table"], options["seqused_k"]
    k, v = (torch.cat(side) for side in zip(*documents, strict=True))
    q, _, _, cu_q, _, *longest = arguments
    trained = flash_attn_varlen_func(
        q, k, v, cu_q, cumulative(case.used, device), *longest, backend="triton", **options
    )
    assert all(map(torch.equal, found, trained))


@pytest.mark.parametrize("by_used", [True, False], ids=["seqused_k", "cu_seqlens_k"])
def test_lengths_come_from_either_argument(by_used, device):
    case = PackedCase(page=16)
    arguments, options, _ = make_call(case, device)
    expected = flash_attn_varlen_func(*arguments, backend="triton", **options)
    cu_k = cumulative([n + 3 if by_used else n for n in case.used], device)
    if not by_used:
        del options["seqused_k"]
    found = flash_attn_varlen_func(
        *arguments[:4], cu_k, *arguments[5:], backend="triton", **options
    )
    assert all(map(torch.equal, found, expected))


def test_torch_compile_keeps_its_graph_whole(device):
    arguments, options, _ = make_call(PackedCase(page=16), device)

    def attend(q):
        return flash_attn_varlen_func(q, *arguments[1:], backend="pytorch", **options)

    found = torch.compile(attend, backend="eager", fullgraph=True)(arguments[0])
    assert all(map(torch.equal, found, attend(arguments[0])))


PAGED, USED = PackedCase(page=16), PackedCase()
BAD = {
    "gradient": (PAGED, {"q": torch.zeros(5, 4, 32).requires_grad_()}, ValueError,
                 "with block_table or seqused_k has no backward, and q requires a gradient. Call "
                 "it under torch.no_grad.., or gather the keys into contiguous k and v"),
    "dropout": (PAGED, {"dropout_p": 0.1}, ValueError, "dropout_p must be off with block_table"),
    "weights": (USED, {"return_attn_probs": True}, ValueError, "return_attn_probs must be off"),
    "hopper": (PAGED, {"backend": "hopper"}, ValueError, "backend='hopper', which has no decode"),
    "window": (PAGED, {"window_size": torch.zeros(2, dtype=torch.int32)}, TypeError,
               "two ints for the decode kernels, got a tensor"),
    "rank": (PAGED, {"k": torch.zeros(9, 2, 32)}, ValueError, "k must be .pages, page, heads"),
    "stride": (PAGED, {"v": torch.zeros(14, 16, 32, 2).mT}, ValueError, "v must have a last"),
    "page": (PAGED, {"k": torch.zeros(14, 24, 2, 32)}, ValueError, "k must have pages of 16, 32"),
    "no-lengths": (USED, {"cu_seqlens_k": None}, ValueError, "cu_seqlens_k must be given unless"),
    "documents": (USED, {"cu_seqlens_k": torch.tensor([0, 258], dtype=torch.int32)}, ValueError,
                  "must describe the same documents, got 4 and 1"),
    "table-shape": (PAGED, {"block_table": torch.zeros(3, 9, dtype=torch.int32)}, ValueError,
                    "block_table must have shape .4, pages per document., got .3, 9."),
    "table-dtype": (PAGED, {"block_table": torch.zeros(4, 9)}, TypeError, "table must be an int32"),
    "table-range": (PAGED, {"block_table": torch.full((4, 9), 99, dtype=torch.int32)}, ValueError,
                    r"block_table\[0\] must name pages from 0 to 41, got 99"),
    "used-shape": (PAGED, {"seqused_k": torch.zeros(3, dtype=torch.int32)}, ValueError,
                   "seqused_k must have shape .4., got .3."),
    "used-long": (USED, {"seqused_k": torch.tensor([87, 0, 0, 0], dtype=torch.int32)}, ValueError,
                  r"seqused_k\[0\] must be from 0 to 86, the keys that the document has, got 87"),
    "used-beyond": (PAGED, {"seqused_k": torch.tensor([0, 161, 0, 0], dtype=torch.int32)},
                    ValueError, r"seqused_k\[1\] must be from 0 to 160"),
    "short-q": (PAGED, {"max_seqlen_q": 2}, ValueError, "max_seqlen_q must be at least 3"),
    "short-k": (PAGED, {"max_seqlen_k": 139}, ValueError, "max_seqlen_k must be at least 140"),
}  # fmt: skip


def test_the_longest_number_of_queries_is_checked_without_reading_a_device(monkeypatch):
    monkeypatch.setattr("lctrain_kernels.decode.packed_checks.reads_values", lambda _: False)
    arguments, options, _ = make_call(PAGED, "cpu", torch.float32)
    arguments = (*arguments[:5], 1, arguments[6])
    message = "max_seqlen_q must be at least 2 for 5 queries of 4 documents, got 1"
    with pytest.raises(ValueError, match=message):
        flash_attn_varlen_func(*arguments, **options)


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments(name):
    case, changes, error, message = BAD[name]
    arguments, options, _ = make_call(case, "cpu", torch.float32)
    names = ("q", "k", "v", "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")
    given = dict(zip(names, arguments, strict=True)) | options | changes
    with pytest.raises(error, match=message):
        flash_attn_varlen_func(**given)


def test_contiguous_keys_need_their_lengths():
    q = torch.zeros(3, 1, 8)
    cu = torch.tensor([0, 3], dtype=torch.int32)
    with pytest.raises(TypeError, match=r"cu_seqlens_k must be a torch\.Tensor, got None"):
        flash_attn_varlen_func(q, q, q, cu, None, 3, 3)
