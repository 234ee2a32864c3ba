"""Tests scalars of compiled calls: Inductor makes a float that varies a float64 argument."""

import pytest
import torch

import lctrain_kernels.cross_entropy.chunks as chunks
from lctrain.kernels import flash_attn_varlen_func, linear_cross_entropy, rms_norm
from tests.kernels.oracle import cumulative


def norm(x, number):
    return rms_norm(x, torch.ones(16, device=x.device, dtype=x.dtype), number)


def attention(x, number):
    q = x.view(len(x), 1, 16)
    cu = cumulative([len(x)], x.device)
    return flash_attn_varlen_func(q, q, q, cu, cu, len(x), len(x), softmax_scale=number)


def loss(x, number):
    labels = torch.zeros(len(x), dtype=torch.long, device=x.device)
    return linear_cross_entropy(x, x[:8], labels, logit_scale=number)[0]


@pytest.mark.parametrize("function", [norm, attention, loss])
@pytest.mark.parametrize(
    ("device", "backend"),
    [("cpu", "aot_eager"), pytest.param("cuda", "inductor", marks=pytest.mark.gpu)],
)
def test_a_float_that_varies_gives_what_the_eager_call_gives(function, device, backend):
    torch._dynamo.reset()
    compiled = torch.compile(function, dynamic=True, backend=backend)
    x = torch.randn(24, 16, device=device, dtype=torch.bfloat16)
    for number in (0.5, 0.25, 0.125):
        expected, found = function(x, number), compiled(x, number)
        assert found.dtype == expected.dtype
        assert torch.equal(found, expected)


def test_reading_the_free_memory_does_not_break_the_graph(monkeypatch):
    def read(device):
        torch._dynamo.graph_break()  # as torch.cuda.mem_get_info does
        return 2**20

    monkeypatch.setattr(chunks, "_read_chunk_bytes", read)
    torch._dynamo.reset()
    x = torch.randn(24, 16, dtype=torch.bfloat16)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, 0.5), loss(x, 0.5))


@pytest.mark.gpu
def test_the_loss_compiles_to_one_graph():
    torch._dynamo.reset()
    x = torch.randn(24, 16, device="cuda", dtype=torch.bfloat16)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, 0.5), loss(x, 0.5))


def test_implementations_are_not_traced():
    """After a graph break, torch.compile would compile what the dispatcher calls."""
    traced = []

    def backend(module, inputs):
        traced.append(module.print_readable(print_output=False))
        return module.forward

    @torch._dynamo.disable(recursive=False)
    def call(x):
        return torch.ops.lctrain.bias_gelu.default(x, None, "gelu", "pytorch")

    torch._dynamo.reset()
    x = torch.randn(24, 16)
    assert torch.equal(torch.compile(lambda x: call(x) + 1, backend=backend)(x), call(x) + 1)
    assert len(traced) == 1
