"""Tests the plan of models with quantized weights, which takes their stored bytes."""

import pytest
import torch
from torch import nn

from lctrain import patch_model
from lctrain.build import build_model, plan_memory
from lctrain.config import AdapterConfig, PretrainedModelConfig
from lctrain.memory import plan
from lctrain.memory.quantized import stored_bytes, weight_bytes
from lctrain.memory.tracker import skeleton
from lctrain.models import low_rank
from tests.configs.composed import load
from tests.models.families import make_model

pytest.importorskip("peft")


class Halved(torch.Tensor):
    """A tensor subclass that stores a weight in one byte and a scale, as torchao does."""

    @staticmethod
    def __new__(cls, data, scale):
        return torch.Tensor._make_wrapper_subclass(cls, data.shape, dtype=torch.bfloat16)

    def __init__(self, data, scale):
        self.data_, self.scale = data, scale

    def __tensor_flatten__(self):
        return ["data_", "scale"], None

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:  # by nn.Parameter
            return cls(args[0].data_, args[0].scale)
        return NotImplemented


def test_a_quantized_weight_counts_what_it_stores_and_runs_dense():
    data, scale = torch.zeros(6, 4, dtype=torch.int8), torch.ones(6, 1)
    layer = nn.Linear(4, 6, bias=False)
    layer.weight = nn.Parameter(Halved(data, scale), requires_grad=False)
    model = nn.Sequential(layer, nn.Linear(6, 2))
    assert stored_bytes(layer.weight) == data.nbytes + scale.nbytes
    total, largest = weight_bytes(model)
    assert total == data.nbytes + scale.nbytes + 4 * (12 + 2)
    assert largest == 2 * 6 * 4  # a product takes a dense copy in bfloat16
    dense = skeleton(model)
    assert type(dense[0].weight) is nn.Parameter
    assert (dense[0].weight.shape, dense[0].weight.device.type) == ((6, 4), "meta")
    assert not dense[0].weight.requires_grad
    assert type(model[0].weight.data) is Halved


@pytest.mark.parametrize(("quantize", "bits"), [("nf4", 4.2), ("int8", 9.0)])
def test_a_run_with_a_quantized_base_is_planned_with_its_bits(
    tmp_path, monkeypatch, quantize, bits
):
    monkeypatch.setattr(low_rank, "require_packages", lambda config: None)
    model = make_model("llama", hidden_size=128, intermediate_size=256)
    model.save_pretrained(tmp_path)
    options = ("model=hf", f"model.name_or_path={tmp_path}", "adapter=lora", "memory=checkpoint")
    found, whole = (
        plan_memory(load(*options, f"adapter.quantize={name}")).parts for name in (quantize, "null")
    )
    linear = [module for module in model.model.layers.modules() if isinstance(module, nn.Linear)]
    saved = whole["weights"] - found["weights"]
    count = sum(module.weight.numel() for module in linear)
    tables = 1088 * len(linear)  # bytes of nf4's tables of values, large beside tiny weights
    assert saved <= count * 2
    assert count * (16 - bits) / 8 - tables <= saved
    assert found["gradients"] == whole["gradients"]


@pytest.mark.parametrize(("quantize", "package"), [("nf4", "bitsandbytes"), ("int8", "torchao")])
def test_the_plan_before_loading_is_that_of_the_loaded_model(tmp_path, quantize, package):
    pytest.importorskip(package)
    make_model("llama", hidden_size=128, intermediate_size=256).save_pretrained(tmp_path)
    config = PretrainedModelConfig(name_or_path=str(tmp_path))
    loaded = build_model(config, 61, AdapterConfig(rank=2, quantize=quantize))
    dense = build_model(config, 61, AdapterConfig(rank=2))
    assert weight_bytes(loaded) == weight_bytes(dense, quantize)
    patch_model(loaded.get_base_model(), fused=True)
    patch_model(dense.get_base_model(), fused=True)
    found, expected = (plan(model, 64, "checkpoint").rows for model in (loaded, dense))
    assert [row.inputs for row in found] == [row.inputs for row in expected]
    assert all(one.backward > two.backward for one, two in zip(found, expected, strict=True))
