"""Tests lctrain-train with task=mlm: the recipe in a tiny form, a resumed run, and bad settings."""

import pytest
import torch
import transformers

from lctrain.build import plan_memory
from lctrain.module import LongContextModule
from lctrain.train import train
from tests.configs.composed import composed
from tests.train.runs import assert_same_run, config

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
SMALL = (
    "task=mlm",
    "model=modernbert_3m",
    "model.config.hidden_size=32",
    "model.config.intermediate_size=48",
    "model.config.num_hidden_layers=2",
    "model.config.num_attention_heads=2",
    "+model.config.attention_dropout=0.1",
)


@pytest.fixture(scope="module")
def overrides(tiny):
    return [text for text in tiny if not text.startswith("model=")] + list(SMALL)


def test_a_run_stopped_and_resumed_is_the_whole_run(overrides, tmp_path, capsys):
    constant = [*overrides, "optim.schedule=constant"]
    whole = train(config(*constant, output_dir=tmp_path / "whole"))
    assert whole.held_out_last < whole.held_out_first
    assert [length for length, _ in whole.perplexities] == [16, 64]
    assert "lctrain-eval" not in str(whole)
    folder = whole.paths["model"]
    loaded = transformers.AutoModelForMaskedLM.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert tokenizer.mask_token_id == loaded.config.vocab_size - 1
    assert "pipeline_tag: fill-mask" in (folder / "README.md").read_text()
    checkpoint = tmp_path / "whole" / "checkpoints" / "last.ckpt"
    module = LongContextModule.load_from_checkpoint(checkpoint, weights_only=False)
    assert module.task == "mlm"
    part = tmp_path / "part"
    quiet = [*constant, "evaluation.enabled=false", "export=false"]
    train(config(*quiet, "trainer.max_steps=3", output_dir=part))
    train(config(*quiet, f"ckpt_path={part}/checkpoints/last.ckpt", output_dir=part))
    assert_same_run(part, tmp_path / "whole")


def test_adapters_train_under_a_memory_policy(overrides, tmp_path):
    """The frozen encoder offloads its layers' inputs; the adapters load again by peft."""
    peft = pytest.importorskip("peft")
    quiet = [*overrides, "trainer.max_steps=2", "evaluation.enabled=false"]
    base = train(config(*quiet, output_dir=tmp_path / "base")).paths["model"]
    kept = [text for text in quiet if not text.startswith(("model", "+model", "data.vocab_size"))]
    kept += ["model=hf", f"model.name_or_path={base}", "adapter=lora", "adapter.dropout=0.1"]
    weights = []
    for memory in (["memory=none"], ["memory=offload", "memory.keep_inputs=1"]):
        output = tmp_path / str(len(memory))
        folder = train(config(*kept, *memory, output_dir=output)).paths["model"]
        adapted = peft.AutoPeftModel.from_pretrained(folder)
        assert type(adapted.get_base_model()).__name__ == "ModernBertForMaskedLM"
        weights.append({n: p for n, p in adapted.named_parameters() if "lora_" in n})
        assert any(p.any() for n, p in weights[-1].items() if "lora_B" in n)  # zero at first
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[1][name], value) for name, value in weights[0].items())
    card = (folder / "README.md").read_text()
    assert "AutoPeftModel.from_pretrained" in card
    assert "pipeline_tag: fill-mask" in card
    planned = plan_memory(config(*kept, "memory=checkpoint", output_dir=tmp_path / "plan"))
    assert planned.policy == "checkpoint"
    assert len(planned.rows) == 2


def test_the_recipe_and_the_default_share():
    recipe = composed("experiment=modernbert_mlm")
    assert (recipe.task, recipe.data.mask_fraction) == ("mlm", 0.3)
    from lctrain.build import build_datamodule

    made = config("task=mlm", "model=modernbert_3m", output_dir="/nowhere/run")
    assert build_datamodule(made.data, made.model, made.task).options.mask_fraction == 0.15
    assert build_datamodule(made.data, made.model).options.mask_fraction is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["task=nsp"], "task must be one of causal, mlm, got 'nsp'"),
        (["task=causal", "data.mask_fraction=0.2"], "mask_fraction must be null with task=causal"),
        (["data.mask_fraction=1.5"], r"data.mask_fraction must be in \(0, 1\), got 1.5"),
        (["attention=dual_chunk"], "attention must be flash or none with task=mlm, got dual_"),
        (
            ["evaluation.methods=[plain]"],
            r"methods must be empty with task=mlm, got \['plain'\]. Leave it .* or set task=causal",
        ),
        (
            ["data.mask_fraction=null", "data.passkey_fraction=0.1"],
            "data.passkey_fraction must be 0 with task=mlm, got 0.1",
        ),
        (
            ["data.held_out_sets={a: {kind: chat, files: [a.jsonl]}}"],
            "data must not be conversations with task=mlm, got data=chat",
        ),
        (
            ["callbacks=[default,length_perplexity]"],
            "callbacks.length_perplexity must be null with task=mlm, got LengthPerplexity",
        ),
        (
            ["callbacks=[default,long_context_eval]"],
            "callbacks.long_context_eval must be null with task=mlm",
        ),
    ],
)
def test_bad_settings(overrides, changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        config(*overrides, *changes, output_dir=tmp_path / "run")


def test_conversations_of_a_mix_are_refused(overrides, tmp_path):
    settings = [text for text in overrides if not text.startswith(("data=", "data.files"))]
    sources = "data.sources=[{kind: stdlib}, {kind: chat, files: [a.jsonl]}]"
    with pytest.raises(ValueError, match="data must not be conversations with task=mlm"):
        config(*settings, "data=mix", sources, output_dir=tmp_path / "run")


def test_families_without_such_a_model(overrides, tmp_path):
    settings = [text for text in overrides if not text.startswith("model")]
    with pytest.raises(ValueError, match="can be trained with task=mlm, got llama"):
        train(config(*settings, "model=tiny", output_dir=tmp_path / "run"))
    with pytest.raises(ValueError, match="task must be one of causal, mlm, got 'nsp'"):
        LongContextModule(torch.nn.Linear(1, 1), task="nsp")
