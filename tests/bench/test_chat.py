"""Tests lctrain-bench chat: both ways read the same tokens, and its table."""

import json

from lctrain.bench import chat
from lctrain.bench.__main__ import main
from lctrain.bench.conversations import conversations, make_tokenizer, source_text
from lctrain_kernels.bench.newest import newest_record


def test_both_ways_read_the_same_tokens(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(chat, "_TEXT", 60_000)
    monkeypatch.setattr(chat, "_VOCABULARY", 400)
    output = tmp_path / "chat.json"
    options = ["--conversations", "5", "--part", "3", "--characters", "300"]
    assert main(["chat", *options, "--output", str(output)]) == 0
    parts = json.loads(output.read_text())["parts"]
    assert [part["conversations_read"] for part in parts] == [3, 2]
    for part in parts:
        # A document of text ends with the end token, a conversation with what the template writes.
        assert (
            part["text"]["tokens"] == part["conversations"]["tokens"] + part["conversations_read"]
        )
        assert 0 < part["trained_tokens"] < part["conversations"]["tokens"]
    assert "| ratio |" in capsys.readouterr().out


def test_masks_take_at_most_as_long_as_the_text_again():
    """The bar of the benchmark, on the record that the documents print."""
    parts = newest_record("chat")["parts"]
    for kind in ("seconds", "cpu_seconds"):
        text, chats = (sum(part[way][kind] for part in parts) for way in ("text", "conversations"))
        assert chats <= 2 * text


def test_conversations_have_the_length_that_is_asked_for():
    text = source_text(50_000)
    assert len(text) == 50_000
    source = conversations(text, characters=900)
    found = [next(source) for _ in range(400)]
    size = sum(len(turn["content"]) for one in found for turn in one["messages"]) / len(found)
    assert 700 < size < 1100
    assert found[0] == next(conversations(text, characters=900))


def test_the_template_is_chatml():
    tokenizer = make_tokenizer("a few words " * 20, 300)
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    text = tokenizer.apply_chat_template(turns, tokenize=False)
    assert text == "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n"
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") in tokenizer(text)["input_ids"]
