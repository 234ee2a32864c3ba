"""Tests `lctrain-train show=N`, which prints documents with the tokens to train on."""

import json
import sys
from types import SimpleNamespace

import pytest

from lctrain.batch import PackedBatch
from lctrain.show import describe, has_colours
from lctrain.train import main
from tests.data.chat.conftest import make_tokenizer

TOKENIZER = make_tokenizer("chatml")


def test_conversations_are_printed_and_nothing_is_trained(tmp_path, monkeypatch, capsys):
    records = [{"prompt": f"Is {i} even?", "completion": ["Yes.", "No."][i % 2]} for i in range(5)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, records)))
    TOKENIZER.save_pretrained(tmp_path / "tokenizer")
    overrides = [
        *("data=chat", "show=2", "model=tiny", "trainer.accelerator=cpu"),
        f"data.files=[{tmp_path}/a.jsonl]",
        f"data.tokenizer={tmp_path}/tokenizer",
        f"data.cache_dir={tmp_path}/cache",
        f"paths.root={tmp_path}",
    ]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lctrain-train", *overrides])
    main()
    printed = capsys.readouterr().out
    assert printed.count("--- ") == 2
    assert printed.count("<|im_start|>user\nIs ") == 2
    assert printed.count("<|im_start|>assistant\n⟦Yes.<|im_end|>⟧\n") + printed.count("⟦No.") == 2
    assert "⟦trained on⟧; training rows: 1 row of" in printed
    assert "tokens to train on" in printed
    assert not [*tmp_path.rglob("*.ckpt"), *tmp_path.rglob("run.json")]


def batch_of(text, labels=None):
    ids = TOKENIZER(text, add_special_tokens=False)["input_ids"]
    labels = None if labels is None else [labels(ids)]
    return PackedBatch.from_documents([ids], labels=labels)


@pytest.mark.parametrize("colour", [False, True])
def test_trained_tokens_stand_out(colour):
    batch = batch_of("abcd", lambda ids: [-100, -100, ids[2], -100])
    text = describe(batch, 0, 4, "a.jsonl:3", TOKENIZER, colour)
    heading, body = text.rstrip().split("\n")
    assert heading == "--- a.jsonl:3: 4 tokens, 1 trained on"
    dim, green, plain = "\x1b[2m", "\x1b[32m", "\x1b[0m"
    coloured = f"{dim}ab{plain}{green}c{plain}{dim}d{plain}"
    assert body == (coloured if colour else "ab⟦c⟧d")


def test_control_characters_of_a_document_do_not_reach_the_terminal():
    batch = batch_of("a\x1b[2Jb\tc\n")
    text = describe(batch, 0, batch.num_tokens, "x", TOKENIZER, False)
    assert "\x1b" not in text
    assert "a⟦\\x1b[2Jb\tc\n⟧" in text


@pytest.mark.parametrize(
    ("terminal", "variables", "colours"),
    [
        (True, {}, True),
        (True, {"TERM": "dumb"}, False),
        (True, {"NO_COLOR": "1"}, False),
        (False, {}, False),
    ],
)
def test_colours_are_for_terminals_that_show_them(monkeypatch, terminal, variables, colours):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("sys.stdout", SimpleNamespace(isatty=lambda: terminal))
    assert has_colours() is colours
