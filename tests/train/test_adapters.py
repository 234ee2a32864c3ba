"""Tests lctrain-train with adapters: checkpoints, resuming to the bit, and both exports."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from lctrain.train import train
from tests.evaluate.conftest import llama_config, save_model
from tests.train.runs import config, weights

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A pretrained model of two layers over bytes."""
    settings = llama_config(num_hidden_layers=2, max_position_embeddings=256)
    return save_model(tmp_path_factory.mktemp("base"), settings)


@pytest.fixture(scope="module")
def run(tiny, base, tmp_path_factory):
    """Returns run(*overrides), which trains adapters; it returns the report and the folder."""
    kept = [text for text in tiny if not text.startswith(("model=", "data.vocab_size"))]
    kept += ["model=hf", f"model.name_or_path={base}", "adapter=lora", "adapter.dropout=0.1"]
    kept += ["trainer.max_steps=4", "callbacks.checkpoint.every_n_steps=2"]
    folder = tmp_path_factory.mktemp("runs")

    def call(name, *overrides):
        settings = config(*kept, *overrides, output_dir=folder / name)
        return train(settings), folder / name

    return call


WITHOUT_EVALUATION = "evaluation.enabled=false"


def test_a_resumed_run_has_the_adapters_of_an_uninterrupted_one(run, base):
    schedule = ("optim.schedule=constant", "optim.warmup_steps=0", WITHOUT_EVALUATION)
    report, whole = run("uninterrupted", *schedule)
    _, first = run("interrupted", *schedule, "trainer.max_steps=2")
    early = weights(first)
    _, resumed = run("interrupted", *schedule, "ckpt_path=last")
    states = weights(whole), weights(resumed)
    assert all(".lora_" in name and "base_layer" not in name for name in states[0])
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[1][name], value) for name, value in states[0].items())
    assert not all(torch.equal(early[name], value) for name, value in states[0].items())

    exported = report.paths["model"]
    assert (exported / "adapter_config.json").exists()
    adapted = AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32)
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    tokens = torch.arange(3, 12)[None]
    with torch.no_grad():
        assert not torch.equal(adapted(tokens).logits, plain(tokens).logits)


def test_a_merged_export_is_a_whole_model_and_is_what_is_evaluated(run, base):
    report, folder = run("merged", "adapter=dora", "adapter.merge=true", "model.dtype=float32")
    merged = AutoModelForCausalLM.from_pretrained(report.paths["model"], dtype=torch.float32)
    assert not (report.paths["model"] / "adapter_config.json").exists()
    assert any("magnitude" in name for name in weights(folder))
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    changed = [
        name
        for name, value in merged.state_dict().items()
        if not torch.equal(value, plain.state_dict()[name])
    ]
    assert changed
    assert all("_proj.weight" in name for name in changed)
    assert [length for length, _ in report.perplexities] == [16, 64]
