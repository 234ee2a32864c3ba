"""Tests that torch.export keeps each operation as one node, and that AOTInductor packages call it.

Python loads the packages, after importing lctrain.kernels, because the operators are in Python.
"""

import pytest
import torch
from torch import nn

from lctrain.kernels import (
    diff_attn_varlen_func,
    dual_chunk_attn_varlen_func,
    flash_attn_varlen_func,
    linear_cross_entropy,
)

TOKENS = 24
CU_SEQLENS = torch.tensor([0, 10, TOKENS], dtype=torch.int32)


class Flash(nn.Module):
    def forward(self, q, k, v, cu_seqlens):
        return flash_attn_varlen_func(q, k, v, cu_seqlens, cu_seqlens, 64, 64, causal=True)


class DualChunk(nn.Module):
    def forward(self, q, k, v, cu_seqlens, inv_freq):
        return dual_chunk_attn_varlen_func(
            q, k, v, cu_seqlens, 64, inv_freq=inv_freq, chunk_size=8, local_size=2
        )


class Differential(nn.Module):
    def forward(self, q, k, v, cu_seqlens, lam):
        return diff_attn_varlen_func(q, 2 * q, k, 2 * k, v, lam, cu_seqlens, 64)


class Loss(nn.Module):
    def forward(self, hidden, weight, labels):
        return linear_cross_entropy(hidden, weight, labels)


def attention_inputs(tokens=TOKENS, cu_seqlens=CU_SEQLENS):
    q, k, v = (torch.randn(tokens, heads, 16) for heads in (4, 2, 2))
    return q, k, v, cu_seqlens


def example(module):
    if isinstance(module, Loss):
        return torch.randn(TOKENS, 16), torch.randn(50, 16), torch.randint(0, 50, (TOKENS,))
    extra = {DualChunk: (torch.rand(8),), Differential: (torch.tensor(0.3),)}
    return *attention_inputs(), *extra.get(type(module), ())


def operations(program):
    return [str(n.target) for n in program.graph.nodes if "lctrain" in str(n.target)]


@pytest.mark.parametrize("module", [Flash(), DualChunk(), Differential(), Loss()], ids=repr)
def test_exported(module):
    inputs = example(module)
    program = torch.export.export(module, inputs)
    assert len(operations(program)) == 1
    found, expected = program.module()(*inputs), module(*inputs)
    for one, other in zip(
        *(torch.utils._pytree.tree_leaves(out) for out in (found, expected)), strict=True
    ):
        assert torch.equal(one, other)


def test_exported_for_packs_of_any_size():
    tokens, documents = torch.export.Dim("tokens", min=2), torch.export.Dim("edges", min=2)
    shapes = ({0: tokens}, {0: tokens}, {0: tokens}, {0: documents})
    program = torch.export.export(Flash(), attention_inputs(), dynamic_shapes=shapes)
    longer = attention_inputs(40, torch.tensor([0, 1, 33, 40], dtype=torch.int32))
    assert torch.equal(program.module()(*longer), Flash()(*longer))


@pytest.mark.slow
def test_packaged_by_aot_inductor(tmp_path):
    inputs = example(Flash())
    program = torch.export.export(Flash(), inputs)
    path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "a.pt2"))
    package = torch._inductor.aoti_load_package(path)
    assert torch.equal(package(*inputs), Flash()(*inputs))
