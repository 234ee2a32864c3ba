"""Patched models on a GPU: the Triton kernels serve, no step waits for the device."""

import copy

import pytest
import torch

from lctrain.batch import PackedBatch
from lctrain.models import patch_model
from tests.models.families import (
    CAUSAL,
    gradients,
    make_documents,
    make_model,
    packed_outputs,
    separate_outputs,
)
from tests.numerics import assert_error_at_most_twice

pytestmark = pytest.mark.gpu
LENGTHS = (70, 1, 200, 129)


def big_enough(family):
    return make_model(family, max_position_embeddings=512)


@pytest.mark.parametrize("family", CAUSAL)
def test_packed_equals_separate_in_bfloat16(family):
    model = big_enough(family).bfloat16()
    exact = copy.deepcopy(model).double()
    documents = make_documents(LENGTHS)
    with torch.no_grad():
        reference = separate_outputs(exact, documents)
        model.cuda()
        on_gpu = [tokens.cuda() for tokens in documents]
        plain = separate_outputs(model, on_gpu)
        with patch_model(model) as handle:
            packed = packed_on_gpu(model, documents)
            assert "kernels: triton" in repr(handle)
    assert_error_at_most_twice(packed, plain, reference, "outputs")


def packed_on_gpu(model, documents):
    batch = PackedBatch.from_documents(documents).to("cuda")
    return model(**batch.model_kwargs()).logits[0]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_training_step_never_waits_for_the_device(checkpointing):
    model = big_enough("llama").cuda().train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    batch = PackedBatch.from_documents(make_documents(LENGTHS)).to("cuda")
    arguments = batch.model_kwargs()

    def step():
        with torch.autocast("cuda", torch.bfloat16):
            logits = model(**arguments).logits
            torch.nn.functional.cross_entropy(logits[0], batch.labels[0]).backward()

    with patch_model(model, dropout=0.1):
        step()  # compiles the kernels, which may wait
        torch.cuda.set_sync_debug_mode("error")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_compiled_with_inductor():
    model = big_enough("llama").cuda().bfloat16()
    packings = [make_documents(lengths, seed) for seed, lengths in enumerate(([70, 130], [9, 64]))]
    torch._dynamo.reset()
    with patch_model(model):
        compiled = torch.compile(model, fullgraph=True)
        for documents in packings:
            exact = copy.deepcopy(model).cpu().float().double()
            reference = packed_outputs(exact, documents)
            plain, _ = gradients(model, lambda d=documents: packed_on_gpu(model, d))
            found, grads = gradients(model, lambda d=documents: packed_on_gpu(compiled, d))
            assert_error_at_most_twice(found.cpu(), plain.cpu(), reference, "outputs")
            assert all(grad.isfinite().all() for grad in grads.values())
