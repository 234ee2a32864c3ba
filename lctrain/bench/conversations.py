"""Conversations and a tokenizer for benchmarks, made of the standard library's source files."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

from lctrain.data.sources import python_files, standard_library

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""The template ChatML, without generation markers."""
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_PIECE = 10_000  # characters of a text to train the tokenizer on


def source_text(characters: int) -> str:
    """Returns the first characters of the standard library's source files.

    Args:
        characters: Number of characters.
    """
    parts: list[str] = []
    size = 0
    root = standard_library()
    for name in python_files(root):
        parts.append((root / name).read_text(encoding="utf-8", errors="ignore"))
        size += len(parts[-1])
        if size >= characters:
            break
    return "".join(parts)[:characters]


def make_tokenizer(text: str, vocab_size: int) -> Any:
    """Returns a byte-level BPE tokenizer of transformers, with the template ChatML.

    Args:
        text: Text to train it on.
        vocab_size: Number of tokens, at most.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    pieces = (text[start : start + _PIECE] for start in range(0, len(text), _PIECE))
    tokenizer.train_from_iterator(pieces, trainer)
    found = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=SPECIAL[2],
        pad_token=SPECIAL[0],
        additional_special_tokens=list(SPECIAL[1:]),
    )
    found.chat_template = CHATML
    return found


def conversations(text: str, characters: int, seed: int = 0) -> Iterator[dict[str, Any]]:
    """Yields conversations of one to four questions and answers, without an end.

    The lengths of messages are log-normal; an answer is twice as long as a question on average.

    Args:
        text: Text of which the messages are pieces.
        characters: Mean number of characters of a conversation.
        seed: Seed of the conversations.
    """
    draw = random.Random(seed)
    sigma = 0.7
    unit = characters / 2.5 / 3 / 2.718281828 ** (sigma**2 / 2)  # 2.5 pairs of three units
    while True:
        messages = []
        for _ in range(draw.randint(1, 4)):
            for role, share in (("user", 1), ("assistant", 2)):
                length = max(
                    8, min(len(text) // 2, int(unit * share * draw.lognormvariate(0, sigma)))
                )
                first = draw.randrange(len(text) - length)
                content = text[first : first + length].strip() or "pass"
                messages.append({"role": role, "content": content})
        yield {"messages": messages}
