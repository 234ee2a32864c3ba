"""Tests which modules of a model FSDP2 shards as one group, on one process."""

import copy

import pytest
import torch
import transformers
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy

from lctrain.distributed.sharding import decoder_layers, shard_model, whole_value
from tests.models.tiny import tiny_model

TIED = {  # family -> class; they list embeddings with tied weights as modules not to split
    "bert": "BertLMHeadModel",
    "roberta": "RobertaForMaskedLM",
    "xlm-roberta": "XLMRobertaForMaskedLM",
    "modernbert": "ModernBertForMaskedLM",
}


@pytest.fixture
def mesh(tmp_path):
    """A mesh of one rank."""
    store = f"file://{tmp_path}/store"
    torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("family", TIED)
def test_tied_embeddings_belong_to_the_root(family, mesh):
    model = tiny_model(family, getattr(transformers, TIED[family]), tie_word_embeddings=True)
    original = copy.deepcopy(model)
    tied = model.get_input_embeddings().weight
    assert tied is model.get_output_embeddings().weight
    layers = decoder_layers(model)
    assert len(layers) == model.config.num_hidden_layers
    assert all(weight is not tied for layer in layers for weight in layer.parameters())
    tokens = torch.arange(3, 12)[None]
    with torch.no_grad():
        expected = original(tokens).logits
        root = shard_model(model, mesh, torch.device("cpu"), MixedPrecisionPolicy())
        assert torch.equal(root(lambda: model(tokens).logits), expected)
    root.reshard()
    for name, parameter in original.named_parameters():
        assert torch.equal(whole_value(model.get_parameter(name).data), parameter), name
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight


def test_layers_that_share_a_parameter_belong_to_the_root(mesh):
    class Layers(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(4))
            self.layers[1].weight = self.layers[0].weight

    model = Layers()
    assert decoder_layers(model) == [model.layers[2], model.layers[3]]
    shard_model(model, mesh, torch.device("cpu"), MixedPrecisionPolicy())
    assert model.layers[0].weight is model.layers[1].weight


def test_parameters_without_a_value_are_refused(mesh):
    model = tiny_model("llama", transformers.LlamaForCausalLM)
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.to("meta"))
    with pytest.raises(ValueError, match=r"must have values on rank 0, got lm_head.weight on dev"):
        shard_model(model, mesh, torch.device("cpu"), MixedPrecisionPolicy())
