"""Tests patched models on a GPU: the Triton kernels run, and no step waits for the device."""

import copy

import pytest
import torch

from lctrain.batch import PackedBatch
from lctrain.kernels import select_backend
from lctrain.models import patch_model
from tests.models.differential_families import DIFFERENTIAL, make_differential
from tests.models.families import (
    CAUSAL,
    ROTARY,
    gradients,
    make_documents,
    make_model,
    make_rotary_model,
    packed_outputs,
    padded,
    separate_outputs,
)
from tests.models.properties import assert_generates_as_the_whole, assert_never_waits
from tests.numerics import assert_error_at_most_twice, assert_errors_at_most_twice

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
            assert f"kernels: {select_backend('cuda')}" in repr(handle)
    assert_error_at_most_twice(packed, plain, reference, "outputs")


def packed_on_gpu(model, documents):
    batch = PackedBatch.from_documents(documents).to("cuda")
    return model(**batch.model_kwargs()).logits[0]


@pytest.mark.parametrize("family", ["bert", "modernbert"])
def test_encoders_without_padding_in_bfloat16(family):
    """A layer of BERT is then one function, with a product for query, key and value."""
    model = big_enough(family).bfloat16()
    exact = copy.deepcopy(model).double()
    rows, mask = padded(make_documents(LENGTHS), "right")

    def results(model, device):
        inputs = {"input_ids": rows.to(device), "attention_mask": mask.to(device)}
        real = inputs["attention_mask"].bool()
        hidden, found = gradients(model, lambda: model(**inputs).last_hidden_state[real])
        found = {name: one for name, one in found.items() if "key.bias" not in name}  # 0
        return found | {"hidden": hidden}

    reference = results(exact, "cpu")
    model.cuda()
    plain = results(model, "cuda")
    with patch_model(model, fused=True, unpad=True):
        found = results(model, "cuda")
    assert found.keys() == plain.keys() == reference.keys()
    assert_errors_at_most_twice(found, plain, reference)


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
        assert_never_waits(step)


DUAL_CHUNK = {"attention": "dual_chunk", "chunk_size": 95, "local_size": 12, "window": 96}


@pytest.mark.parametrize("family", ROTARY)
def test_dual_chunk_attention_in_bfloat16(family):
    """Compares the kernels with the PyTorch path; a chunk of 83 tokens is no multiple of a tile."""
    model = make_rotary_model(family, max_position_embeddings=512).bfloat16()
    exact = copy.deepcopy(model).double()
    documents = make_documents(LENGTHS)
    found = []
    with torch.no_grad():
        with patch_model(exact, **DUAL_CHUNK):
            reference = packed_outputs(exact, documents)
        model.cuda()
        for backend in ("auto", "pytorch"):
            with patch_model(model, **DUAL_CHUNK, backend=backend) as handle:
                found.append(packed_on_gpu(model, documents).cpu())
                assert ("kernels: pytorch" in repr(handle)) == (backend == "pytorch")
    assert_error_at_most_twice(*found, reference, "outputs")


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_training_step_with_dual_chunk_attention_never_waits_for_the_device(checkpointing):
    model = make_rotary_model("llama", max_position_embeddings=512).cuda().train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    batch = PackedBatch.from_documents(make_documents(LENGTHS)).to("cuda")

    def step():
        with torch.autocast("cuda", torch.bfloat16):
            logits = model(**batch.model_kwargs()).logits
            torch.nn.functional.cross_entropy(logits[0], batch.labels[0]).backward()

    with patch_model(model, **DUAL_CHUNK, scale="yarn", dropout=0.1):
        assert_never_waits(step)


def test_generate_with_dual_chunk_attention():
    model = make_rotary_model("llama", max_position_embeddings=512).cuda().bfloat16()
    prompt = make_documents([90])[0][None].cuda()
    assert_generates_as_the_whole(model, prompt, **DUAL_CHUNK)


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


@pytest.mark.parametrize("family", DIFFERENTIAL)
def test_differential_attention_in_bfloat16(family):
    """Compares the kernels with the unpatched model, document by document, gradients included."""
    model = make_differential(family, max_position_embeddings=512).bfloat16()
    exact, documents = copy.deepcopy(model).double(), make_documents(LENGTHS)
    reference, reference_grads = gradients(exact, lambda: separate_outputs(exact, documents))
    model.cuda()
    on_gpu = [tokens.cuda() for tokens in documents]
    plain, plain_grads = gradients(model, lambda: separate_outputs(model, on_gpu))
    with patch_model(model, attention="differential") as handle:
        found, grads = gradients(model, lambda: packed_on_gpu(model, documents))
        assert f"kernels: {select_backend('cuda')}" in repr(handle)
    assert_error_at_most_twice(found.cpu(), plain.cpu(), reference, "outputs")
    assert grads.keys() == reference_grads.keys()
    assert_error_at_most_twice(
        *(
            torch.cat([of[name].cpu().flatten() for name in sorted(reference_grads)])
            for of in (grads, plain_grads, reference_grads)
        ),
        "gradients",
    )


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", ["diffllama", "llama"])
def test_a_training_step_with_differential_attention_never_waits_for_the_device(
    family, checkpointing
):
    model = make_differential(family, max_position_embeddings=512).cuda().train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    batch = PackedBatch.from_documents(make_documents(LENGTHS)).to("cuda")

    def step():
        with torch.autocast("cuda", torch.bfloat16):
            logits = model(**batch.model_kwargs()).logits
            torch.nn.functional.cross_entropy(logits[0], batch.labels[0]).backward()

    with patch_model(model, attention="differential", dropout=0.1):
        assert_never_waits(step)


@pytest.mark.parametrize("family", ["diffllama", "llama"])
def test_generate_with_differential_attention(family):
    model = make_differential(family, max_position_embeddings=512).cuda().bfloat16()
    prompt = make_documents([90])[0][None].cuda()
    assert_generates_as_the_whole(model, prompt, attention="differential")
