"""Tests torch.compile(fullgraph=True) on models loaded with lctrain's attention by name.

test_training.py tests compilation of patched models.
"""

import pytest
import torch

from lctrain.models import patch_model
from tests.models.families import gradients, make_documents, make_model, outputs, packed_outputs

FAMILIES = {
    "llama": {},
    "qwen3": {},
    "mistral": {},
    "gemma2": {},
    "gpt_oss": {"experts_implementation": "batched_mm"},  # "eager" loops over the experts in use
}


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
