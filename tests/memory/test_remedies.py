"""Tests that an error of memory names a setting that is left, and that the run takes."""

import re

import pytest
import torch
from torch import nn

import lctrain
from lctrain.failure import explain
from lctrain.memory.policy import apply_config
from lctrain.memory.remedies import find_remedy, with_remedies
from tests.configs.composed import load
from tests.memory.test_experts import make_mixtral
from tests.models.families import make_model

HF = ("model=hf", "model.name_or_path=gpt2")
AUTO, TILES = "Set memory=auto", "Set memory.mlp_tokens=4096"
ADAPTERS, LIMIT = "Train adapters (adapter=lora)", "Set memory.device_gib below"


def remedy(model, *overrides):
    config = load("data.max_tokens=8192", *overrides)
    return find_remedy(config, model)


@pytest.mark.parametrize(
    ("family", "overrides", "expected"),
    [
        ("llama", (), AUTO),
        ("llama", ("memory=checkpoint",), AUTO),
        ("llama", ("memory=auto",), TILES),
        ("llama", ("memory=offload",), TILES),
        ("llama", ("memory=auto", "data.max_tokens=4096"), LIMIT),
        ("llama", ("memory=auto", "trainer.precision=bf16-true"), LIMIT),
        ("llama", ("memory=auto", "memory.mlp_tokens=4096"), LIMIT),
        ("llama", ("memory=auto", "memory.mlp_tokens=4096", *HF), ADAPTERS),
        ("llama", ("memory=auto", "memory.mlp_tokens=4096", *HF, "adapter=lora"), LIMIT),
        ("llama", ("memory=offload", "memory.mlp_tokens=4096"), None),
        ("mixtral", ("memory=auto",), LIMIT),
        ("mixtral", ("memory=auto", *HF), ADAPTERS),
        ("bfloat16", ("memory=auto",), LIMIT),
        ("own", (), None),
        ("own", HF, ADAPTERS),
    ],
)
def test_the_remedy_applies_to_the_model(family, overrides, expected):
    makers = {
        "llama": lambda: make_model("llama"),
        "mixtral": make_mixtral,
        "bfloat16": lambda: make_model("llama").bfloat16(),
        "own": lambda: nn.Linear(2, 2),
    }
    model = makers[family]()
    found = remedy(model, *overrides)
    assert found == expected if expected != LIMIT else found.startswith(LIMIT)
    if found == TILES:  # lctrain takes it
        changed = load("data.max_tokens=8192", *overrides, "memory.mlp_tokens=4096").memory
        lctrain.patch_model(model)  # as the plan of memory=auto requires
        apply_config(model, changed, tokens=8192).remove()
    assert not any("forward" in vars(module) for module in model.modules())


def test_an_error_of_a_training_step_carries_the_remedy():
    class Module:
        model = make_model("llama")

    def fail():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 8 GiB.\nMore words.")

    with pytest.raises(torch.OutOfMemoryError) as caught, with_remedies(load(), Module()):
        fail()
    message = explain(caught.value)
    assert re.search(
        r"8 GiB. Set memory=auto, or lower data\.max_tokens; memory.plan=true", message
    )
    assert "More words" not in message
    Module.model = nn.Linear(2, 2)
    with pytest.raises(torch.OutOfMemoryError) as caught, with_remedies(load(), Module()):
        fail()
    assert "8 GiB. Lower data.max_tokens; memory.plan=true" in explain(caught.value)
    del Module.model  # an error of the search does not replace the one of memory
    with pytest.raises(torch.OutOfMemoryError) as caught, with_remedies(load(), Module()):
        fail()
    assert "8 GiB. Lower data.max_tokens; memory.plan=true" in explain(caught.value)
    with pytest.raises(torch.OutOfMemoryError) as caught:
        fail()
    message = explain(caught.value)  # such as that of an evaluation, which has no option `memory`
    assert message.endswith(
        "8 GiB. Use fewer tokens at a time, a smaller model, or a GPU with more memory."
    )
