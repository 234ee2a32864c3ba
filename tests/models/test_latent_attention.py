"""Tests latent attention (MLA) on packs, and fused operations, with every type of RoPE."""

import copy

import pytest
import torch
import transformers
from packaging.version import Version

from lctrain.models import patch_model
from tests.models.families import make_documents, packed_outputs
from tests.models.test_frequencies import alone
from tests.models.tiny import tiny_model
from tests.numerics import assert_error_at_most_twice

WINDOW = 16
LENGTHS = (9, 40, 1, 17)
ROPES = {
    "default": {"rope_type": "default"},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "longrope": {"rope_type": "longrope", "original_max_position_embeddings": WINDOW},
}
FAMILIES = {  # class, rotated pairs of a head
    "deepseek_v2": ("DeepseekV2ForCausalLM", 2),
    "deepseek_v3": ("DeepseekV3ForCausalLM", 2),
    "longcat_flash": ("LongcatFlashForCausalLM", 2),
    "minicpm3": ("MiniCPM3ForCausalLM", 2),
    "llama": ("LlamaForCausalLM", 4),
    "qwen3": ("Qwen3ForCausalLM", 4),
}


def make(family, rope, **options):
    name, pairs = FAMILIES[family]
    parameters = ROPES[rope] | {"rope_theta": 1e4}
    if rope == "longrope":
        parameters |= {"short_factor": [1.0] * pairs, "long_factor": [8.0, 3.0, 2.0, 5.0][:pairs]}
        if Version(transformers.__version__) < Version("5.23"):
            parameters["factor"] = 1.0  # the default, which these models read themselves
    options |= {"rope_parameters": parameters, "max_position_embeddings": WINDOW}
    return tiny_model(family, getattr(transformers, name), **options)


@torch.no_grad()
@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_documents_of_a_pack_are_those_alone(family, rope):
    plain, documents = make(family, rope), make_documents(LENGTHS)
    expected, reference = (alone(m, documents) for m in (plain, copy.deepcopy(plain).double()))
    for fused in (False, True):
        with patch_model(copy.deepcopy(plain), fused=fused) as handle:
            found = packed_outputs(handle.model, documents)
            assert_error_at_most_twice(found, expected, reference, f"fused={fused}")
    named = make(family, rope, attn_implementation="lctrain_flash")
    assert_error_at_most_twice(packed_outputs(named, documents), expected, reference, "by name")


@torch.no_grad()
@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_neighbour_s_length_changes_no_bit(family, fused):
    model = make(family, "dynamic")
    patch_model(model, fused=fused)
    (document,) = make_documents([12])
    rows = [
        packed_outputs(model, [document, *make_documents([n, 80 - n], 5)])[:12] for n in (3, 40)
    ]
    assert torch.equal(*rows)
