"""Tests autocast, torch.compile and DDP with a patched model, gradients included."""

import copy
import os

import pytest
import torch
import torch.distributed as dist

from lctrain.batch import PackedBatch
from lctrain.models import patch_model
from tests.distributed.ranks import join, run_ranks
from tests.float64 import built_in_float64, float64_throughout
from tests.models.families import (
    FAMILIES,
    exact_gradients,
    gradients,
    make_documents,
    make_model,
    packed_outputs,
    separate_outputs,
)
from tests.numerics import (
    assert_equal_in_float64,
    assert_error_at_most_twice,
    assert_errors_at_most_twice,
)


@pytest.mark.parametrize("family", FAMILIES)
def test_autocast(family):
    model, documents = make_model(family), make_documents()
    exact = make_model(family).double()
    with torch.no_grad():
        reference = separate_outputs(exact, documents)
        with torch.autocast("cpu", torch.bfloat16):
            plain = separate_outputs(model, documents)
    with patch_model(model), torch.autocast("cpu", torch.bfloat16):
        packed, grads = gradients(model, lambda: packed_outputs(model, documents))
    assert packed.dtype == plain.dtype
    assert_error_at_most_twice(packed, plain, reference, "outputs")
    assert all(grad.isfinite().all() and grad.dtype == torch.float32 for grad in grads.values())


def test_autocast_casts_to_the_dtype_of_the_values(monkeypatch):
    from lctrain_kernels.varlen import api

    seen = []
    attend = api.flash_attn_pack_func

    def record(q, k, v, *args, **kwargs):
        seen.append({q.dtype, k.dtype, v.dtype})
        return attend(q, k, v, *args, **kwargs)

    monkeypatch.setattr(api, "flash_attn_pack_func", record)
    with patch_model(make_model("llama")) as handle, torch.autocast("cpu", torch.bfloat16):
        packed_outputs(handle.model, make_documents())
    assert seen == [{torch.bfloat16}] * 2


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_compile_without_breaks_and_without_recompiling(family):
    model = make_model(family).train()
    shapes = ((6, 1, 11), (9, 5), (4, 8, 3, 2), (12, 7))
    packings = [make_documents(lengths, seed) for seed, lengths in enumerate(shapes)]
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    with patch_model(model):
        expected = [gradients(model, lambda d=d: packed_outputs(model, d)) for d in packings]
        exact = exact_gradients(model, packings)
        compiled = torch.compile(model, backend=count, fullgraph=True)
        compiled_graphs = []
        for documents, plain, reference in zip(packings, expected, exact, strict=True):
            found = gradients(model, lambda d=documents: packed_outputs(compiled, d))
            assert_error_at_most_twice(found[0], plain[0], reference[0], "outputs")
            assert_errors_at_most_twice(found[1], plain[1], reference[1])
            compiled_graphs.append(len(graphs))
    assert compiled_graphs[1:] == compiled_graphs[1:2] * 3  # the second shape made sizes dynamic


def test_compiled_with_padding():
    model = make_model("llama")
    rows = torch.stack(make_documents([9, 9]))
    mask = torch.ones_like(rows)
    mask[1, 6:] = 0
    torch._dynamo.reset()
    with patch_model(model), torch.no_grad():
        expected = model(rows, attention_mask=mask).logits[mask.bool()]
        with float64_throughout():
            exact = copy.deepcopy(model).double()(rows, attention_mask=mask).logits[mask.bool()]
        compiled = torch.compile(model, backend="aot_eager")(rows, attention_mask=mask).logits
        packed = packed_outputs(torch.compile(model, backend="eager"), [rows[0], rows[1, :6]])
    assert_error_at_most_twice(compiled[mask.bool()], expected, exact)
    assert_error_at_most_twice(packed, expected, exact)


@built_in_float64()
def main():
    """Computes the gradients as one of two ranks; rank 0 writes them."""
    rank, _, folder, _ = join()
    model = make_model("llama").train()
    patch_model(model)
    parallel = torch.nn.parallel.DistributedDataParallel(model)
    documents = make_documents()
    arguments = PackedBatch.from_documents(documents[2 * rank : 2 * rank + 2]).model_kwargs()
    parallel(**arguments).logits.square().sum().backward()
    if rank == 0:
        torch.save({n: p.grad for n, p in model.named_parameters()}, folder / "grads")
    dist.barrier()
    # Without destructors: freeing DDP's reducer while gloo's thread waits for the interpreter lock
    # deadlocks (torch 2.13).
    os._exit(0)


@pytest.mark.usefixtures("in_float64")
def test_ddp_gives_the_mean_of_the_gradients(tmp_path):
    run_ranks("tests.models.test_training", 2, tmp_path)
    found = torch.load(tmp_path / "grads")
    model = make_model("llama").train()
    with patch_model(model):
        (packed_outputs(model, make_documents()).square().sum() / 2).backward()
    for name, parameter in model.named_parameters():
        assert_equal_in_float64(found[name], parameter.grad)
