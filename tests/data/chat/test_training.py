"""Tests a run on conversations from the command to the evaluation that it proposes."""

import json
import shlex
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lctrain import evaluate, train
from lctrain.data import ChatSource, PackedDataModule
from tests.data.chat.conftest import template_text
from tests.evaluate.conftest import llama_config
from tests.train.runs import config

ANSWERS = ("Yes.", "No.")


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
def test_a_run_on_conversations(tokenizer_of, tmp_path, monkeypatch, capsys):
    """The model is saved with the template that it was trained with."""
    lines = [json.dumps({"prompt": f"{i}?", "completion": ANSWERS[i % 2]}) for i in range(40)]
    (tmp_path / "a.jsonl").write_text("\n".join([*lines, "{not json"]))
    tokenizer_of("chatml").save_pretrained(tmp_path / "tokenizer")
    template = tmp_path / "my.jinja"
    template.write_text(template_text("chatml_generation"))
    overrides = [
        *("data=chat", "model=tiny", "trainer.accelerator=cpu", "trainer.max_steps=2"),
        *("data.max_tokens=128", "data.held_out_fraction=0.3", "evaluation.lengths=[8,16]"),
        *("trainer.enable_progress_bar=false", "+data.template_arguments.thinking=false"),
        f"data.files=[{tmp_path}/a.jsonl]",
        f"data.tokenizer={tmp_path}/tokenizer",
        f"data.chat_template={template}",
        f"data.cache_dir={tmp_path}/cache",
        f"paths.root={tmp_path}",
        f"paths.output_dir={tmp_path}/run",
    ]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lctrain-train", *overrides])
    train.main()
    printed = capsys.readouterr().out
    saved = AutoTokenizer.from_pretrained(tmp_path / "run" / "model")
    assert saved.chat_template == template.read_text()
    program, *arguments = shlex.split(printed.splitlines()[-1].partition("lctrain-eval")[2])
    arguments = [program, *arguments, f"data.cache_dir={tmp_path}/cache", "device=cpu"]
    assert "+data.template_arguments={thinking:false}" in arguments
    monkeypatch.setattr(sys, "argv", ["lctrain-eval", *arguments])
    evaluate.main()
    assert "Perplexity by context length" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
def test_adapters_on_conversations(tokenizer_of, tmp_path):
    """The base model stays as it was; the adapters are saved with the template of training."""
    lines = [json.dumps({"prompt": f"{i}?", "completion": ANSWERS[i % 2]}) for i in range(40)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    tokenizer = tokenizer_of("chatml")
    tokenizer.save_pretrained(tmp_path / "base")
    torch.manual_seed(0)
    settings = llama_config(vocab_size=len(tokenizer), max_position_embeddings=128)
    AutoModelForCausalLM.from_config(settings).save_pretrained(tmp_path / "base")
    overrides = [
        *("data=chat", "model=hf", "adapter=lora", "adapter.rank=4", "trainer.max_steps=8"),
        *("trainer.accelerator=cpu", "trainer.enable_progress_bar=false", "model.dtype=float32"),
        *("data.max_tokens=128", "data.held_out_fraction=0.3", "evaluation.enabled=false"),
        *("optim.learning_rate=0.1", "optim.schedule=constant", "optim.warmup_steps=0"),
        f"data.files=[{tmp_path}/a.jsonl]",
        f"data.cache_dir={tmp_path}/cache",
        f"model.name_or_path={tmp_path}/base",
    ]
    report = train.train(config(*overrides, output_dir=tmp_path / "run"))
    assert report.held_out_last < report.held_out_first
    exported = tmp_path / "run" / "model"
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    adapted = AutoModelForCausalLM.from_pretrained(exported)
    frozen = {name.replace(".base_layer", ""): w for name, w in adapted.state_dict().items()}
    assert all(torch.equal(frozen[name], weight) for name, weight in base.state_dict().items())
    saved = AutoTokenizer.from_pretrained(exported)
    assert saved.chat_template == tokenizer.chat_template
    question = [{"role": "user", "content": "1?"}]
    prompt = saved.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt")
    with torch.no_grad():
        assert not torch.equal(adapted(**prompt).logits, base(**prompt).logits)


def test_a_tokenizer_that_the_user_passed_keeps_its_template(tokenizer_of, tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"prompt": "a", "completion": "b"}))
    (tmp_path / "my.jinja").write_text(template_text("chatml_generation"))
    source = ChatSource(files=tmp_path / "a.jsonl", chat_template=tmp_path / "my.jinja")
    given = tokenizer_of("chatml")
    module = PackedDataModule(source, given, max_tokens=64, cache_dir=tmp_path / "cache")
    module.setup()
    assert module.tokenizer.chat_template == template_text("chatml_generation")
    assert given.chat_template == template_text("chatml")
