"""Fixtures: a small tokenizer with the special tokens of a template, and conversations."""

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

HERE = Path(__file__).parent
CONVERSATIONS = json.loads((HERE / "conversations.json").read_text())
SPECIAL = {
    "llama3": ("<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"),
    "mistral": (
        "<s>",
        "</s>",
        *("[INST]", "[/INST]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]"),
        *("[TOOL_RESULTS]", "[/TOOL_RESULTS]"),
    ),
    "gemma": ("<bos>", "<end_of_turn>", "<start_of_turn>"),
    "phi": ("<s>", "<|endoftext|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"),
}
CHATML = (None, "<|im_end|>", "<|im_start|>")


def template_text(name):
    return (HERE / "templates" / f"{name}.jinja").read_text()


def make_tokenizer(name, merges=0):
    """A byte-level BPE with few merges, the special tokens of a template, and the template."""
    model = Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    begin, end, *others = SPECIAL.get(name, CHATML)
    trainer = trainers.BpeTrainer(
        vocab_size=256 + merges,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [m.get("content", "") for c in CONVERSATIONS.values() for m in c["messages"]]
    model.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=model,
        bos_token=begin,
        eos_token=end,
        additional_special_tokens=others,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = template_text(name)
    return tokenizer


@pytest.fixture(scope="session")
def tokenizer_of():
    """Returns the tokenizer of a template; each is made once."""
    made = {}

    def get(name, merges=0):
        if (name, merges) not in made:
            made[name, merges] = make_tokenizer(name, merges)
        return made[name, merges]

    return get
