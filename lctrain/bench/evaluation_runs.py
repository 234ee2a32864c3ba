"""The runs of `lctrain-bench evaluation`: perplexity, answers, and a suite."""

from __future__ import annotations

import statistics
import sysconfig
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lctrain.batch import PackedBatch
from lctrain.bench.scale_steps import now
from lctrain.bench.shapes import ModelShape, build_shape
from lctrain.config import (
    AttentionConfig,
    PasskeyConfig,
    PathsConfig,
    PretrainedModelConfig,
    RulerConfig,
)
from lctrain.data import TokenizedDocument
from lctrain.eval import Run, Subject, Task, computed
from lctrain.eval.reading import GivenReading
from lctrain.eval.shipped import SHIPPED, passkey_tokenizer
from lctrain.eval.table import PerplexityTable
from lctrain.eval.tasks.passkey import PasskeyRetrieval
from lctrain.eval.tasks.perplexity import Perplexity
from lctrain.eval.tasks.ruler import Ruler
from lctrain.evaluate import EvalConfig, evaluate
from lctrain.loss import causal_lm_loss
from lctrain.schemas import TextData

BY_GENERATION = "passkey by generation"
_DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True)
class Sizes:
    """Sizes of the runs.

    Attributes:
        lengths: Context lengths of the part `perplexity`, rising. The last one is also the number
            of tokens in a forward pass.
        documents: Most documents of a length, each of one window.
        most_tokens: Most tokens of all documents of a length.
        rounds: Number of timed rounds of plain forward passes.
        answered: Context length of the part `answers`.
        keys: Number of passkeys at each depth.
        items: Number of prompts of each of RULER's tasks in the part `answers`.
        generated: Context lengths of the passkeys that the small model answers by generation.
        generated_keys: Number of these passkeys at each length and each of six depths.
        document: Tokens of the part `document`.
        haystack: Characters of the text in which the part `answers` hides keys and needles.
        suite_lengths: Context lengths of the suite, for the 1B model and then for SmolLM2's shape.
        suite_items: Number of prompts of each of RULER's tasks in the suite.
        suite_documents: Number of documents of the suite's perplexity.
        characters: Characters of a document of the suite.
        ruler_tasks: Names of RULER's tasks; None for all but qa.
        vocab_size: Vocabulary of a tiny model, which holds that of the tokenizer.
    """

    lengths: tuple[int, ...] = (4096, 8192, 16_384, 32_768, 65_536, 131_072)
    documents: int = 64
    most_tokens: int = 8_388_608
    rounds: int = 2
    answered: int = 32_768
    keys: int = 4
    items: int = 4
    generated: tuple[int, ...] = (2048, 4096, 8192, 16_384, 32_768)
    generated_keys: int = 20
    document: int = 2**20
    haystack: int = 400_000
    suite_lengths: tuple[tuple[int, ...], ...] = (
        (4096, 8192, 16_384, 32_768),
        (4096, 8192),
    )
    suite_items: int = 10
    suite_documents: int = 32
    characters: int = 120_000
    ruler_tasks: tuple[str, ...] | None = None
    vocab_size: int = 8192

    def documents_of(self, length: int) -> int:
        """Returns the number of documents of a context length."""
        return max(1, min(self.documents, self.most_tokens // length))

    @classmethod
    def tiny(cls) -> Sizes:
        """Returns sizes for a trial on a CPU."""
        return cls(
            lengths=(256, 512),
            documents=3,
            most_tokens=1024,
            rounds=1,
            answered=512,
            keys=1,
            items=1,
            generated=(256, 512),
            generated_keys=1,
            document=2048,
            haystack=20_000,
            suite_lengths=((512,),),
            suite_items=1,
            suite_documents=2,
            characters=20_000,
            ruler_tasks=("niah_single_1",),
        )


def time_perplexity(model: Any, length: int, sizes: Sizes) -> dict[str, Any]:
    """Times the task perplexity at one length, and plain forward passes over the same documents.

    Args:
        model: A patched causal LM in eval mode.
        length: Context length in tokens; each document has one token more.
        sizes: Sizes of the runs.

    Returns:
        Documents, tokens that the model reads, seconds of the task, seconds of the plain passes,
        and the speed of the task over theirs.
    """
    device = next(model.parameters()).device
    count = sizes.documents_of(length)
    draw = np.random.default_rng(length)
    tokens = [draw.integers(model.config.vocab_size, size=length + 1) for _ in range(count)]
    documents = [TokenizedDocument(f"document {i}", ids, i) for i, ids in enumerate(tokens)]
    most = max(sizes.lengths)

    def task() -> None:
        _compute(Perplexity(), Subject(model, documents=documents), length, most)

    rows = max(1, most // length)
    packs = [
        PackedBatch.from_documents(tokens[start : start + rows]).to(device)
        for start in range(0, count, rows)
    ]

    def forward() -> None:
        for pack in packs:
            causal_lm_loss(model, pack)

    _warm_up(model, task, tokens, min(count, rows), device)
    with torch.no_grad():
        plain = statistics.median(_seconds(forward, device) for _ in range(sizes.rounds))
    seconds = _seconds(task, device)
    return {
        "documents": count,
        "tokens": count * length,
        "seconds": seconds,
        "forward_seconds": plain,
        "speed_ratio": plain / seconds,
    }


def time_document(model: Any, sizes: Sizes) -> dict[str, Any]:
    """Times the task perplexity on one long document, which is one window, and notes its memory.

    Args:
        model: A patched causal LM in eval mode.
        sizes: Sizes of the runs.

    Returns:
        Tokens, seconds, loss in nats per token, and on a GPU bytes: of the weights, of the most
        that torch had allocated, and of the logits of all tokens, in float32, which are never made.
    """
    device = next(model.parameters()).device
    vocabulary, length = model.config.vocab_size, sizes.document
    ids = np.random.default_rng(0).integers(vocabulary, size=length + 1)
    document = [TokenizedDocument("document", ids, 0)]
    if device.type == "cuda":
        first = [TokenizedDocument("first", ids[:4097], 0)]
        _compute(Perplexity(), Subject(model, documents=first), 4096, 4096)  # compiles
        torch.cuda.reset_peak_memory_stats(device)
        weights = torch.cuda.memory_allocated(device)
    start = now(device)
    task = Perplexity()
    run = Run.prepared(
        task, Subject(model, documents=document), [GivenReading()], (length,), max_tokens=length
    )
    table = task.table(computed(run))
    assert isinstance(table, PerplexityTable)  # of one method
    found: dict[str, Any] = {
        "length": length,
        "tokens": length,
        "seconds": now(device) - start,
        "loss": table.rows[0].loss,
    }
    if device.type == "cuda":
        found["weights_bytes"] = weights
        found["peak_bytes"] = torch.cuda.max_memory_allocated(device)
        found["logits_bytes"] = 4 * length * vocabulary
    return found


def time_answers(model: Any, task: str, lengths: tuple[int, ...], sizes: Sizes) -> dict[str, Any]:
    """Times a task that asks for answers, and forward passes over as many documents without logits.

    The documents fill the lengths. As many of them are in a pass as the longest length has tokens.
    The task runs twice, with prompts made anew. Its first run compiles the kernels, since batches
    of other sizes need other variants. Triton keeps them on disk for later processes.

    Args:
        model: A patched causal LM in eval mode.
        task: "passkey", BY_GENERATION or "ruler".
        lengths: Context lengths in tokens, rising.
        sizes: Sizes of the runs.

    Returns:
        Context lengths, prompts, seconds of the task's first and second run and of the passes, and
        the ratio of the second run to the passes. A prompt has fewer tokens than a document, since
        the length holds its answer too.
    """
    device = next(model.parameters()).device
    longest = lengths[-1]
    tokenizer = passkey_tokenizer(SHIPPED)
    ids = tokenizer(_text(sizes.haystack), verbose=False)["input_ids"]
    documents = [TokenizedDocument("text", np.array(ids), 0)]

    def task_seconds() -> float:
        made, subject = _answers_task(task, sizes), Subject(model, tokenizer, documents)
        run = Run.prepared(made, subject, [GivenReading()], lengths, max_tokens=longest)
        return _seconds(lambda: computed(run), device)

    size = _answers_task(task, sizes).size
    draw = np.random.default_rng(0)
    packs = [
        PackedBatch.from_documents([draw.integers(256, size=length) for _ in range(rows)])
        .to(device)
        .model_kwargs()
        for length in lengths
        for rows in _shares(size(length), longest // length)
    ]

    def prefill() -> None:
        for pack in packs:
            model.model(**pack)

    with torch.no_grad():
        for pack in (packs[0], packs[-1]):
            model.model(**pack)  # compiles
        passes = _seconds(prefill, device)
    first, seconds = task_seconds(), task_seconds()
    return {
        "shortest": lengths[0],
        "length": longest,
        "prompts": sum(map(size, lengths)),
        "first_seconds": first,
        "seconds": seconds,
        "prefill_seconds": passes,
        "time_ratio": seconds / passes,
    }


def _shares(count: int, most: int) -> list[int]:
    """Returns sizes of at most `most` that sum to a count."""
    return [min(most, count - begin) for begin in range(0, count, most)]


def time_suite(
    shape: ModelShape,
    task: str,
    lengths: Sequence[int],
    sizes: Sizes,
    folder: Path,
    device: torch.device,
    dtype: torch.dtype,
) -> dict[str, Any]:
    """Times one task of a suite of `lctrain-eval`, with a stored model.

    Args:
        shape: Shape of the model.
        task: Name of the task.
        lengths: Context lengths in tokens.
        sizes: Sizes of the runs.
        folder: Folder in which models, texts and results are stored.
        device: Device of the model.
        dtype: Dtype of the weights.
    """
    stored, texts = folder / shape.name, folder / "texts"
    if not stored.exists():
        build_shape(shape, "sdpa", device, dtype).save_pretrained(stored)
        passkey_tokenizer(SHIPPED).save_pretrained(stored)
    if not texts.exists():
        texts.mkdir()
        text = _text(sizes.suite_documents * sizes.characters)
        for number in range(sizes.suite_documents):
            start = number * sizes.characters
            (texts / f"{number}.txt").write_text(text[start : start + sizes.characters])
    config = EvalConfig(
        model=PretrainedModelConfig(name_or_path=str(stored)),
        data=TextData(files=(str(texts / "*.txt"),), cache_dir=str(folder / "cache")),
        attention=AttentionConfig(),
        paths=PathsConfig(output_dir=str(folder / f"{shape.name}_{task}")),
        split="all",
        tasks=[task],
        lengths=list(lengths),
        documents=sizes.suite_documents,
        passkey=PasskeyConfig(depths=list(_DEPTHS), keys_per_cell=sizes.keys),
        ruler=RulerConfig(
            tasks=None if sizes.ruler_tasks is None else list(sizes.ruler_tasks),
            items=sizes.suite_items,
        ),
        dtype=str(dtype).removeprefix("torch."),
        device=device.type,
    )
    return {
        "documents": sizes.suite_documents,
        "items": sizes.suite_items,
        "seconds": _seconds(lambda: evaluate(config), device),
    }


def _compute(task: Task, subject: Subject, length: int, most: int) -> None:
    computed(Run.prepared(task, subject, [GivenReading()], (length,), max_tokens=most))


def _warm_up(
    model: Any, task: Callable[[], None], tokens: list[np.ndarray], rows: int, device: torch.device
) -> None:
    """Compiles what task and forward need, on one pack."""
    with torch.no_grad():
        causal_lm_loss(model, PackedBatch.from_documents(tokens[:rows]).to(device))
    if device.type == "cuda":
        documents = [TokenizedDocument("first", tokens[0], 0)]
        length = len(tokens[0]) - 1
        _compute(Perplexity(), Subject(model, documents=documents), length, length)


def _answers_task(task: str, sizes: Sizes) -> Task:
    if task == "passkey":
        return PasskeyRetrieval(depths=_DEPTHS, keys_per_cell=sizes.keys)
    if task == BY_GENERATION:
        return PasskeyRetrieval(keys_per_cell=sizes.generated_keys, by="generation")
    return Ruler(tasks=sizes.ruler_tasks, items=sizes.items)


def _seconds(run: Callable[[], Any], device: torch.device) -> float:
    start = now(device)
    run()
    return now(device) - start


@cache
def _text(characters: int) -> str:
    """Returns the beginning of the standard library's source files."""
    root = Path(sysconfig.get_paths()["stdlib"])
    text = ""
    for path in sorted(root.glob("[a-z]*/*.py")):
        text += path.read_text(errors="replace")
        if len(text) >= characters:
            break
    return text[:characters]
