"""Tests that the plan measures layers and tiles that are alike once, with the same bytes."""

import pytest

import lctrain
from lctrain.config import AdapterConfig
from lctrain.memory import profile as profiles
from lctrain.memory import tiled_function, tiles
from lctrain.memory.alike import structure
from lctrain.memory.layers import checkpointed_layers
from lctrain.models.low_rank import add_adapter
from tests.models.families import make_model

FAMILIES = ("phi3", "gemma2", "modernbert")  # the last two have layers of two kinds
TOKENS = 100


def in_full(monkeypatch, *arguments):
    """Returns the profile in which every layer and every tile runs."""
    with monkeypatch.context() as patch:
        patch.setattr(profiles, "structure", lambda value: object())
        patch.setattr(tiled_function, "_computed", lambda x, count: range(count))
        return profiles.profile(*arguments)


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_that_are_alike_are_measured_once(family, monkeypatch):
    model = make_model(family, num_hidden_layers=5).train()
    with lctrain.patch_model(model, fused=True):
        found = profiles.profile(model, TOKENS)
        assert found == in_full(monkeypatch, model, TOKENS)
    assert len(found.layers) == 5


@pytest.mark.parametrize(
    ("precision", "trained", "tile"),
    [("bf16-mixed", "adapters", 9), ("bf16-mixed", "weights", 10), ("true", "weights", 40)],
    ids=["short-last", "whole", "few"],
)
def test_tiles_that_are_alike_are_measured_once(precision, trained, tile, monkeypatch):
    model = make_model("llama", num_hidden_layers=4, intermediate_size=256).train()
    lctrain.patch_model(model, fused=True)
    if trained == "adapters":
        pytest.importorskip("peft")
        model = add_adapter(model, AdapterConfig(rank=2)).train()
    arguments = model, TOKENS, precision, tile
    assert profiles.profile(*arguments) == in_full(monkeypatch, *arguments)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_the_recomputation_runs_an_mlp_only_where_its_output_is_read(family):
    """Gemma 2 has a norm after the MLP, which reads the MLP's output in the backward."""
    model = make_model(family).train()
    lctrain.patch_model(model, fused=True)
    found = profiles.profile(model, TOKENS, mlp_tokens=16)
    assert (found.tile_operations > 0) == (family == "gemma2")
    assert profiles.profile(model, TOKENS).tile_operations == 0


def test_the_work_does_not_grow_with_layers_and_tiles(monkeypatch):
    calls = []
    real = tiles._uncached
    monkeypatch.setattr(tiles, "_uncached", lambda *given: calls.append(given) or real(*given))
    counts = []
    for layers, tokens in ((2, 64), (9, 1024)):
        model = make_model("llama", num_hidden_layers=layers).train()
        lctrain.patch_model(model, fused=True)
        profiles.profile(model, tokens, mlp_tokens=8)
        counts.append(len(calls))
        calls.clear()
    assert counts[0] == counts[1] > 0


def test_layers_that_differ_have_other_structures():
    first, second, *_ = checkpointed_layers(make_model("gemma2"))  # one has a sliding window
    assert structure(first) != structure(second)
    first, second = checkpointed_layers(make_model("llama"))
    assert structure(first) == structure(second)
    second.mlp.up_proj.weight.requires_grad_(False)
    assert structure(first) != structure(second)
    second.mlp.up_proj.weight.requires_grad_(True)
    second.self_attn.setting = {"unknown": [object()]}
    first.self_attn.setting = {"unknown": [object()]}
    assert structure(first) != structure(second)
    values = bytearray(1), bytearray(1)  # objects without a hash are equal only to themselves
    assert structure(values[0]) != structure(values[1])
    assert structure(values[0]) == structure(values[0])
