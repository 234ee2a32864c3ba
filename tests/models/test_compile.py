"""Tests torch.compile(fullgraph=True) and torch.export on models with lctrain's attention by name.

test_training.py tests compilation of patched models.
"""

import pytest
import torch
from transformers import DataCollatorWithFlattening

from lctrain.models import patch_model
from tests.models.families import gradients, make_documents, make_model, outputs, packed_outputs

FAMILIES = {
    "llama": {},
    "qwen3": {},
    "mistral": {},
    "gemma2": {},
    "gpt_oss": {"experts_implementation": "batched_mm"},  # "eager" loops over the experts in use
}


@pytest.fixture
def one_thread():
    """Several threads add the gradients of transformers' experts in any order."""
    count = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(count)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("family", FAMILIES)
def test_a_pack_is_one_graph(family):
    model, documents = make_model(family, **FAMILIES[family]), make_documents()
    model.set_attn_implementation("lctrain_flash")
    expected, expected_grads = gradients(model, lambda: packed_outputs(model, documents))
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    found, grads = gradients(model, lambda: packed_outputs(compiled, documents))
    assert torch.equal(found, expected)
    for name, grad in expected_grads.items():
        assert torch.equal(grads[name], grad), name


def test_rows_are_one_graph():
    model, rows = make_model("llama"), torch.stack(make_documents([9, 9]))
    model.set_attn_implementation("lctrain_flash")
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        found, expected = (outputs(m, input_ids=rows, use_cache=False) for m in (compiled, model))
    assert torch.equal(found, expected)


def test_loaded_by_name_is_ready_to_compile(tmp_path):
    """Loading prepares the model, since the first forward is already traced."""
    model, documents = make_model("llama"), make_documents()
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, attn_implementation="lctrain_flash").eval()
    torch._dynamo.reset()
    compiled = torch.compile(loaded, backend="eager", fullgraph=True)
    with torch.no_grad(), patch_model(model):
        assert torch.equal(packed_outputs(compiled, documents), packed_outputs(model, documents))


def flattened(documents):
    """Returns a batch of transformers' collator, whose boundaries come without a schedule."""
    collate = DataCollatorWithFlattening(return_flash_attn_kwargs=True)
    batch = collate([{"input_ids": tokens.tolist()} for tokens in documents])
    return {name: value for name, value in batch.items() if name != "labels"}


def test_a_batch_of_transformers_collator_is_one_graph():
    model = make_model("llama")
    model.set_attn_implementation("lctrain_flash")
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        for lengths in ((6, 1, 11, 7), (3, 9)):
            batch = flattened(make_documents(lengths))
            assert torch.equal(outputs(compiled, **batch), outputs(model, **batch))


@pytest.mark.parametrize("by_name", [False, True], ids=["patched", "by-name"])
@torch.no_grad()
def test_a_pack_is_exported(by_name):
    model, documents = make_model("llama"), make_documents()
    model.set_attn_implementation("lctrain_flash") if by_name else patch_model(model)
    batch = flattened(documents)
    program = torch.export.export(model, (), batch)
    assert torch.equal(program.module()(**batch).logits, model(**batch).logits)


@pytest.mark.parametrize("by_name", [False, True], ids=["patched", "by-name"])
@pytest.mark.parametrize("name", ["attention_mask", "position_ids", "seq_idx"])
def test_documents_by_value_are_refused_in_export(name, by_name):
    model, rows = make_model("llama"), torch.stack(make_documents([9, 9]))
    model.set_attn_implementation("lctrain_flash") if by_name else patch_model(model)
    values = torch.arange(9).expand(2, 9).contiguous()
    given = {name: torch.ones_like(rows) if name == "attention_mask" else values}
    message = rf"told documents by cu_seq_lens_q/k .* got {name}, whose values are not known"
    with pytest.raises(ValueError, match=message):
        torch.export.export(model, (), {"input_ids": rows, "use_cache": False, **given})
