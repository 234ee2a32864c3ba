import pytest
import torch

from lctrain_kernels.rotary import apply_rotary_emb, qk_norm_rotary, rotary_table, rotate_qk
from tests.kernels.fused_cases import all_backends, assert_error_at_most_twice_plain
from tests.numerics import assert_error_at_most_twice

BATCH, LENGTH, HEADS, KEY_HEADS = 2, 7, 3, 2
SIZES = pytest.mark.parametrize(
    ("head_dim", "rotary"), [(16, 16), (24, 24), (16, 8)], ids=["16", "24", "partial"]
)


def tables(rotary: int, dtype: torch.dtype, device: str, *, rows: int = 1):
    """Returns cos and sin [rows, LENGTH, R] in float64, rounded to values that `dtype` can hold."""
    cos, sin = torch.randn(2, rows, LENGTH, rotary).to(dtype).double().to(device).unbind()
    return cos, sin


def turn_half(x):
    low, high = x.chunk(2, -1)
    return torch.cat((-high, low), -1)


def plain_rotation(x, cos, sin):
    """Rotates x [B, S, H, D] by tables [B or 1, S, R], as transformers does."""
    rotary = cos.shape[-1]
    cos, sin = (table.to(x.dtype)[:, :, None] for table in (cos, sin))
    turned, rest = x[..., :rotary], x[..., rotary:]
    return torch.cat((turned * cos + turn_half(turned) * sin, rest), -1)


def plain_norm(x, weight, offset=0.0):
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)
    return (weight + offset) * wide.to(x.dtype)


def queries_and_keys(head_dim: int, device: str):
    shape = (BATCH, LENGTH)
    q = torch.randn(*shape, HEADS, head_dim, device=device)
    return q, torch.randn(*shape, KEY_HEADS, head_dim, device=device)


@pytest.mark.parametrize("rows", [1, BATCH])
@SIZES
@all_backends
def test_rotate_qk(device, dtype, backend, head_dim, rotary, rows) -> None:
    cos, sin = tables(rotary, dtype, device, rows=rows)
    assert_error_at_most_twice_plain(
        lambda q, k: rotate_qk(q, k, cos.to(q.dtype), sin.to(q.dtype), backend=backend),
        lambda q, k: (plain_rotation(q, cos, sin), plain_rotation(k, cos, sin)),
        queries_and_keys(head_dim, device),
        dtype,
    )


@pytest.mark.parametrize("offset", [0.0, 1.0])
@SIZES
@all_backends
def test_qk_norm_rotary(device, dtype, backend, head_dim, rotary, offset) -> None:
    cos, sin = tables(rotary, dtype, device)
    weights = torch.randn(2, head_dim, device=device).unbind()
    assert_error_at_most_twice_plain(
        lambda q, k, a, b: qk_norm_rotary(
            q, k, a, b, cos.to(q.dtype), sin.to(q.dtype), weight_offset=offset, backend=backend
        ),
        lambda q, k, a, b: (
            plain_rotation(plain_norm(q, a, offset), cos, sin),
            plain_rotation(plain_norm(k, b, offset), cos, sin),
        ),
        (*queries_and_keys(head_dim, device), *weights),
        dtype,
    )


def plain_pairs(x, cos, sin, interleaved):
    """Rotates x [..., H, D] by the tables [..., R / 2] of its tokens."""
    rotary = 2 * cos.shape[-1]
    cos, sin = (table.to(x.dtype).unsqueeze(-2) for table in (cos, sin))
    places = (slice(0, rotary, 2), slice(1, rotary, 2))
    if not interleaved:
        places = (slice(0, rotary // 2), slice(rotary // 2, rotary))
    a, b = (x[..., place] for place in places)
    out = x.clone()
    out[..., places[0]], out[..., places[1]] = a * cos - b * sin, b * cos + a * sin
    return out


@pytest.mark.parametrize("positions", [None, "row", "tokens"])
@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])
@SIZES
@all_backends
def test_apply_rotary_emb(device, dtype, backend, head_dim, rotary, interleaved, positions) -> None:
    cos, sin = (table[0, :, : rotary // 2] for table in tables(rotary, dtype, device))
    rows = {None: None, "row": (1, LENGTH), "tokens": (BATCH, LENGTH)}[positions]
    ids = None if rows is None else torch.randint(LENGTH, rows, device=device)
    places = torch.arange(LENGTH, device=device)[None] if ids is None else ids
    assert_error_at_most_twice_plain(
        lambda x: apply_rotary_emb(
            x, cos.to(x.dtype), sin.to(x.dtype), interleaved, position_ids=ids, backend=backend
        ),
        lambda x: plain_pairs(x, cos[places], sin[places], interleaved),
        queries_and_keys(head_dim, device)[:1],
        dtype,
    )


@pytest.mark.parametrize("backend", ["pytorch", "triton"])
def test_transposed_heads_and_expanded_gradients(backend) -> None:
    q, k = queries_and_keys(16, "cpu")
    q, k = (x.transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for x in (q, k))
    cos, sin = (table.float() for table in tables(16, torch.float32, "cpu"))
    outputs = rotate_qk(q, k, cos, sin, backend=backend)
    grads = torch.autograd.grad(sum(out.sum() for out in outputs), (q, k))
    plain, exact = (
        torch.autograd.grad(
            sum(plain_rotation(x.to(dtype), cos.to(dtype), sin.to(dtype)).sum() for x in (q, k)),
            (q, k),
        )
        for dtype in (torch.float32, torch.float64)
    )
    for found, other, true in zip(grads, plain, exact, strict=True):
        assert_error_at_most_twice(found, other, true.double())


def test_table_is_exact_at_position_one_million() -> None:
    positions = torch.arange(1_000_000, 1_000_064)
    inv_freq = 1.0 / 500_000 ** (torch.arange(0, 64, 2) / 64)
    angles = positions.double()[:, None] * inv_freq.double()
    for table, exact in zip(
        rotary_table(inv_freq, positions), (angles.cos(), angles.sin()), strict=True
    ):
        assert table.dtype == torch.float32
        rounding = torch.finfo(torch.float32).eps / 2
        assert (table.double() - exact).abs().max() <= rounding
    float32 = (positions.float()[:, None] * inv_freq).cos()
    assert (float32.double() - angles.cos()).abs().max() > 1e-3  # what it is for


@pytest.mark.parametrize("name", ["rotary", "qk_norm_rotary"])
def test_operators_satisfy_the_rules_of_torch_library(name) -> None:
    q, k = torch.randn(5, 3, 8, requires_grad=True), torch.randn(5, 2, 8, requires_grad=True)
    cos, sin = torch.randn(2, 5, 8).unbind()
    weights = (torch.randn(8), torch.randn(8)) if name == "qk_norm_rotary" else ()
    inverse = () if weights else (False,)
    operator = getattr(torch.ops.lctrain, name).default
    options = (False, True, 1e-6, 0.0, "pytorch")
    torch.library.opcheck(operator, (q, k, *weights, cos, sin, None, *inverse, *options))


def test_compiled_graph_has_no_break() -> None:
    q, k = torch.randn(1, 5, 3, 8), torch.randn(1, 5, 2, 8)
    weight, (cos, sin) = torch.randn(8), torch.randn(2, 1, 5, 8).unbind()

    def function(q, k, weight):
        q, k = qk_norm_rotary(q, k, weight, weight, cos, sin)
        q, k = rotate_qk(q, k, cos, sin)
        return q.square().sum() + apply_rotary_emb(k, cos[0, :, :4], sin[0, :, :4]).sum()

    leaves = [tensor.requires_grad_() for tensor in (q, k, weight)]
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    gradients = torch.autograd.grad(compiled(*leaves), leaves)
    assert all(map(torch.equal, gradients, torch.autograd.grad(function(*leaves), leaves)))


def test_nothing_is_written_into_inputs_or_gradients() -> None:
    """Liger's rotary embedding rotates its inputs and gradients in place."""
    q, k = torch.randn(1, 5, 3, 8), torch.randn(1, 5, 2, 8)
    weight, (cos, sin) = torch.randn(8), torch.randn(2, 1, 5, 8).unbind()
    leaves = [tensor.requires_grad_() for tensor in (q, k, weight)]
    for function in (
        lambda q, k, weight: rotate_qk(q, k * weight, cos, sin),
        lambda q, k, weight: qk_norm_rotary(q, k, weight, weight, cos, sin),
    ):
        before = [leaf.detach().clone() for leaf in leaves]
        outputs = function(*leaves)
        grads = [torch.randn_like(out) for out in outputs]
        given = [grad.clone() for grad in grads]
        first = torch.autograd.grad(outputs, leaves, grads, retain_graph=True)
        assert all(map(torch.equal, first, torch.autograd.grad(outputs, leaves, grads)))
        assert all(map(torch.equal, [*before, *given], [*leaves, *grads]))


@pytest.mark.gpu
def test_more_elements_than_int32_counts() -> None:
    rows = 2**31 // (64 * 128) + 8
    x = torch.randn(rows, 64, 128, device="cuda", dtype=torch.bfloat16)
    cos, sin = torch.randn(2, rows, 64, device="cuda").unbind()
    tail = apply_rotary_emb(x, cos, sin)[-8:]
    assert torch.equal(tail, apply_rotary_emb(x[-8:].clone(), cos[-8:], sin[-8:]))


X, TABLE = torch.ones(4, 2, 8), torch.ones(4, 4)
Q, FULL = torch.ones(1, 4, 2, 8), torch.ones(1, 4, 8)
BAD_CALLS = {
    "heads": (lambda: apply_rotary_emb(torch.ones(4, 8), TABLE, TABLE), "x must be"),
    "short": (lambda: apply_rotary_emb(X, TABLE[:2], TABLE[:2]), "must have a row for each"),
    "wide": (lambda: apply_rotary_emb(X, FULL[0], FULL[0]), "cos and sin must be"),
    "positions": (
        lambda: apply_rotary_emb(X, TABLE, TABLE, position_ids=torch.ones(3).long()),
        "position_ids must be integers",
    ),
    "dtypes": (lambda: rotate_qk(Q, Q.half(), FULL, FULL), "q and k must be"),
    "rows": (lambda: rotate_qk(Q, Q, FULL[:, :3], FULL[:, :3]), "cos must be"),
    "weight": (
        lambda: qk_norm_rotary(Q, Q, torch.ones(7), torch.ones(8), FULL, FULL),
        "q_weight must have shape",
    ),
}


@pytest.mark.parametrize(("call", "message"), BAD_CALLS.values(), ids=BAD_CALLS)
def test_bad_input_is_an_error_that_names_it(call, message) -> None:
    with pytest.raises(ValueError, match=message):
        call()
