"""Tests that revision and trust_remote_code apply to a model's weights and to its config."""

import json
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig

from lctrain.build import build_model
from lctrain.config import AdapterConfig, PretrainedModelConfig
from lctrain.distributed.sharding import built_to_be_sharded
from lctrain.memory.tracker import Tracker
from lctrain.models.pretrained import load_architecture, load_pretrained, stored_task
from tests.numerics import assert_equal_sums, assert_far_apart

MINE = """
from transformers import LlamaConfig, LlamaForCausalLM

class MineConfig(LlamaConfig):
    model_type = "mine"

class MineForCausalLM(LlamaForCausalLM):
    config_class = MineConfig
"""


@pytest.mark.parametrize("load", [load_pretrained, load_architecture])
def test_revision_and_trust_reach_the_model(monkeypatch, load):
    seen = []

    def from_pretrained(name, **options):
        seen.append((name, options))
        raise OSError("not there")

    for owner in ("AutoConfig", "AutoModelForCausalLM"):
        monkeypatch.setattr(f"transformers.{owner}.from_pretrained", from_pretrained)
    config = PretrainedModelConfig(name_or_path="o/m", revision="v1", trust_remote_code=True)
    with pytest.raises(ValueError, match="not there"):
        load(config)
    ((name, options),) = seen
    assert name == "o/m"
    assert {"revision": "v1", "trust_remote_code": True}.items() <= options.items()


def test_code_of_a_model_runs_only_if_it_is_trusted(make_llama, tmp_path):
    folder = tmp_path / "model"
    model = make_llama()
    model.save_pretrained(folder)
    (folder / "mine.py").write_text(MINE)
    path = folder / "config.json"
    auto = {"AutoConfig": "mine.MineConfig", "AutoModelForCausalLM": "mine.MineForCausalLM"}
    settings = json.loads(path.read_text()) | {"model_type": "mine", "auto_map": auto}
    path.write_text(json.dumps(settings))
    name = str(folder)
    with pytest.raises(ValueError, match="trust_remote_code"):
        load_pretrained(PretrainedModelConfig(name_or_path=name))
    trusted = PretrainedModelConfig(name_or_path=name, trust_remote_code=True)
    loaded = load_pretrained(trusted)
    assert type(loaded).__name__ == "MineForCausalLM"
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)
    with torch.device("meta"):
        assert (
            load_architecture(trusted).config.hidden_size
            == LlamaConfig.from_pretrained(name).hidden_size
        )


def without_a_weight(folder):
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.0.self_attn.q_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def cut_short(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:500])


def of_other_shapes(folder):
    path = folder / "config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps(settings | {"vocab_size": settings["vocab_size"] + 1}))


def a_damaged_pickle(folder):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"no weights")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (without_a_weight, r"hold every weight, got .* without 1 of them, .*q_proj.weight among"),
        (cut_short, "hold intact weights .* cannot be loaded: .* Restore its files"),
        (of_other_shapes, "hold intact weights of the shapes in its config, got"),
        (a_damaged_pickle, "hold intact weights .* cannot be loaded: .* Restore its files"),
    ],
)
@pytest.mark.parametrize("context", [nullcontext, partial(built_to_be_sharded, True)])
def test_a_damaged_model_is_refused(make_llama, tmp_path, damage, message, context):
    make_llama().save_pretrained(tmp_path)
    damage(tmp_path)
    with pytest.raises(ValueError, match=message), context():
        load_pretrained(PretrainedModelConfig(name_or_path=str(tmp_path)))


def test_stored_adapters_are_read_on_their_base(make_llama, tmp_path):
    """An export of adapters has no config.json: its model is that of the base."""
    peft = pytest.importorskip("peft")
    base, folder = tmp_path / "base", tmp_path / "adapters"
    make_llama().save_pretrained(base)
    model = peft.get_peft_model(
        load_pretrained(PretrainedModelConfig(name_or_path=str(base))),
        peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False),
    )
    model.save_pretrained(folder)
    config = PretrainedModelConfig(name_or_path=str(folder))
    assert stored_task(config) == "causal"
    assert isinstance(load_architecture(config).config, LlamaConfig)
    ids = torch.arange(12).view(1, 12)
    with torch.no_grad():
        logits = load_pretrained(config)(input_ids=ids, use_cache=False).logits
        expected = model.eval()(input_ids=ids, use_cache=False).logits
        with model.disable_adapter():
            plain = model(input_ids=ids, use_cache=False).logits
    assert_equal_sums(logits, expected)
    assert_far_apart(logits, plain)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": None}))
    with pytest.raises(ValueError, match="must name the base model, got none"):
        stored_task(config)


class OffMeta(Tracker):
    """Counts the bytes of live tensors, except those on device meta."""

    def _add(self, tensor):
        if not tensor.is_meta:
            super()._add(tensor)


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32], ids=str)
def test_frozen_weights_are_loaded_once_in_bfloat16(make_llama, tmp_path, monkeypatch, stored):
    """Neither random weights nor float32 copies of all weights exist on the way."""
    pytest.importorskip("peft")
    monkeypatch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "1")  # a dispatch mode sees its own thread only
    make_llama().to(stored).save_pretrained(tmp_path)
    config = PretrainedModelConfig(name_or_path=str(tmp_path))
    tracker = OffMeta()
    # Like a GPU, this device is not the default, so transformers loads to it by a device map.
    with torch.device("cpu:0"), tracker:
        model = build_model(config, 64, AdapterConfig(rank=1))
    frozen = [p for p in model.parameters() if not p.requires_grad]
    assert {p.dtype for p in frozen} == {torch.bfloat16}
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    largest = 4 * max(p.numel() for p in frozen)  # one float32 weight on its way
    assert tracker.peak <= size + largest


def test_what_loads_weights_straight_to_a_gpu_is_installed_with_the_package():
    """Without accelerate, transformers refuses every device that is not the default."""
    project = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    needed = project.partition("dependencies = [")[2].partition("\n]")[0]
    assert '"accelerate' in needed
