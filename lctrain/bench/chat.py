"""`lctrain-bench chat`: times tokenizing and masking conversations, beside tokenizing their text.

    lctrain-bench chat --output chat.json                      # 100,000 conversations
    lctrain-bench chat --tokenizer Qwen/Qwen3-0.6B --output chat.json
    lctrain-bench chat --conversations 200 --part 100 --output chat.json

"Conversations" is what `data=chat` does after reading: it renders each conversation with the chat
template, finds the tokens to train on, and writes tokens and masks into the cache. "Text" does the
same with the rendered conversations as plain documents, whose tokens have no masks. Both use all
cores. They take turns, part by part, so that other work of the machine slows both.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from lctrain.bench.conversations import conversations, make_tokenizer, source_text
from lctrain.data.chat.source import Rendering
from lctrain.data.chat.tokenizing import ChatTokenizing
from lctrain.data.documents import Documents, read_documents
from lctrain.data.tokenizer import load_tokenizer
from lctrain.data.tokenizing import tokenize
from lctrain_kernels.bench.__main__ import positive
from lctrain_kernels.bench.chat_report import chat_table
from lctrain_kernels.bench.peers import installed_version
from lctrain_kernels.bench.run import new_record
from lctrain_kernels.strict_json import write_json

_TEXT = 4_000_000  # characters from which messages are cut
_VOCABULARY = 32_000


def documents_of(texts: Sequence[str]) -> Documents:
    """Returns texts as documents."""
    from datasets import Dataset

    return read_documents(Dataset.from_dict({"text": list(texts)}), "conversations")


def measure(
    given: Sequence[dict[str, Any]], tokenizer: Any, rendering: Rendering, cache_dir: Path
) -> dict[str, Any]:
    """Times both ways on the same conversations; returns seconds, CPU seconds and tokens.

    Args:
        given: Conversations with messages.
        tokenizer: Tokenizer with a chat template.
        rendering: Settings of the chat template.
        cache_dir: Empty folder for the tokens.
    """
    chats = documents_of([json.dumps(one, ensure_ascii=False) for one in given])
    plain = documents_of(
        [tokenizer.apply_chat_template(one["messages"], tokenize=False) for one in given]
    )
    tokenizing = ChatTokenizing(tokenizer=tokenizer, rendering=rendering, keep_special=True)
    ways: dict[str, Callable[[], Any]] = {
        "text": lambda: tokenize(plain, tokenizer, cache_dir / "text", special_tokens="token"),
        "conversations": lambda: tokenizing.run(chats, cache_dir / "chat"),
    }
    found: dict[str, Any] = {"conversations_read": len(given)}
    for name, run in ways.items():
        started, cpu = time.perf_counter(), time.process_time()
        store = run()
        found[name] = {
            "seconds": round(time.perf_counter() - started, 3),
            "cpu_seconds": round(time.process_time() - cpu, 3),
            "tokens": int(store.lengths.sum()),
        }
    found["trained_tokens"] = int(store.trained_tokens.sum())
    return found


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        prog="lctrain-bench chat",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--conversations", type=positive, default=100_000)
    parser.add_argument("--part", type=positive, default=5_000, help="conversations in a turn")
    parser.add_argument("--characters", type=positive, default=2_800, help="mean of a conversation")
    parser.add_argument("--tokenizer", help="name or folder; by default one is trained")
    parser.add_argument("--output", type=Path, default=Path("chat.json"), help="JSON file")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark, and writes the record after every part."""
    options = parse_arguments(arguments)
    from datasets import disable_progress_bars

    disable_progress_bars()
    text = source_text(_TEXT)
    if options.tokenizer is None:
        tokenizer = make_tokenizer(text, _VOCABULARY)
    else:
        tokenizer = load_tokenizer(options.tokenizer)
    header = new_record([], torch.device("cpu"), 1, 0)
    packages = ("tokenizers", "transformers", "datasets")
    record: dict[str, Any] = {
        "device": f"{header.device} with {len(os.sched_getaffinity(0))} cores",
        "date": header.date,
        "versions": {
            "python": header.versions["python"],
            **{name: installed_version(name) for name in packages},
        },
        "tokenizer": options.tokenizer or f"byte-level BPE of {len(tokenizer):,} tokens",
        "parts": [],
    }
    rendering = Rendering("assistant", None, {})
    source = conversations(text, options.characters)
    for first in range(0, options.conversations, options.part):
        given = list(islice(source, min(options.part, options.conversations - first)))
        with tempfile.TemporaryDirectory() as folder:
            record["parts"].append(measure(given, tokenizer, rendering, Path(folder)))
        options.output.parent.mkdir(parents=True, exist_ok=True)
        write_json(options.output, record, indent=1)
    print(chat_table(record))
    print(f"Wrote {options.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
