"""Tests the search of the longest context that fits."""

import json
from functools import partial

import pytest
import torch

from lctrain.bench import longest
from lctrain.bench.__main__ import main
from lctrain.bench.shapes import SHAPES, build_shape, tiny
from lctrain.config import AdapterConfig, MemoryConfig
from lctrain.memory.plan import GIB, plan_of
from lctrain.memory.profile import profile
from lctrain.memory.reserved import CONTEXT
from lctrain.models import patch_model
from lctrain.models.low_rank import add_adapter


@pytest.fixture(autouse=True)
def expandable(monkeypatch):
    """The allocator's segments are expandable, as the command assumes."""
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "expandable_segments:True")


@pytest.fixture(scope="module")
def model():
    made = build_shape(tiny(SHAPES["llama-1b"]), "sdpa", torch.device("meta"), torch.float32)
    patch_model(made, fused=True)
    pytest.importorskip("peft")
    return add_adapter(made, AdapterConfig(rank=2)).train()


def test_the_longest_context_fits_and_a_longer_one_does_not(model):
    profile_of = partial(profile, model, mlp_tokens=longest.MLP_TOKENS)
    device, host = (CONTEXT + 2**26) / GIB, 2**24 / GIB
    tokens = longest.longest(profile_of, device, host)
    assert tokens > 0
    limits = int(device * GIB), int(host * GIB)
    config = MemoryConfig(name="auto", mlp_tokens=longest.MLP_TOKENS, host_gib=host)
    for length, fits in ((tokens, True), (tokens + longest.STEP, False)):
        assert plan_of(profile_of(length), config, *limits).fits == fits
    assert longest.longest(profile_of, CONTEXT / GIB, host) == 0


@pytest.mark.parametrize("profiled", [2 * longest.MLP_TOKENS, 2**20], ids=["short", "long"])
def test_the_length_of_the_first_profile_changes_the_result_by_rounding(
    profiled, model, monkeypatch
):
    """A tile of an MLP has the same size in every pack, so scaled bytes alone would be wrong."""
    profile_of = partial(profile, model, mlp_tokens=longest.MLP_TOKENS)
    memory = (CONTEXT + 2**26) / GIB, 2**24 / GIB
    expected = longest.longest(profile_of, *memory)
    monkeypatch.setattr(longest, "PROFILED", profiled)
    monkeypatch.setattr(longest, "NEAR", 0)
    once = longest.longest(profile_of, *memory)
    monkeypatch.undo()
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    monkeypatch.setattr(longest, "PROFILED", profiled)
    found = longest.longest(profile_of, *memory)
    assert abs(found - expected) <= expected // 50 < abs(once - expected)


def test_scaled_bytes_are_those_of_the_other_length(model):
    """Without tiles every activation grows with the tokens."""
    short, long = (profile(model, tokens) for tokens in (2048, 8192))
    found = longest.scaled(short, 8192)
    assert found.tokens == 8192
    for name in ("inputs", "attention", "saved", "forward", "backward"):
        for one, other in zip(found.layers, long.layers, strict=True):
            assert 100 * abs(getattr(one, name) - getattr(other, name)) <= getattr(other, name)
    assert found.attention_operations == long.attention_operations
    assert found.weights == long.weights


def test_the_record_has_every_model_and_machine(tmp_path, monkeypatch, model):
    monkeypatch.setattr(longest, "MACHINES", ((8, 8), (16, 16)))
    monkeypatch.setattr(longest, "longest", lambda profile_of, device, host: 1024 * device)
    monkeypatch.setattr(longest, "profiles", lambda setting: None)
    monkeypatch.delenv("PYTORCH_ALLOC_CONF")
    monkeypatch.setattr(longest, "expand_segments", lambda platform: seen.append(platform))
    seen = []
    path = tmp_path / "longest.json"
    assert main(["longest", "--tiny", "--output", str(path)]) == 0
    assert seen == ["linux"]
    plans = json.loads(path.read_text())["plans"]
    assert len(plans) == 2 * len(longest.SETTINGS)
    assert plans[1] | {"model": ""} == {
        "model": "",
        "device_gib": 16,
        "host_gib": 16,
        "tokens": 16_384,
    }
