"""Contenders of `lctrain-bench generation`: each completes prompts greedily and times itself."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from itertools import pairwise
from statistics import median
from typing import Any

import torch

from lctrain.generation.continuous import ContinuousBatch
from lctrain.generation.graph import GraphCapture
from lctrain.generation.options import Completion, SamplingOptions
from lctrain.generation.paged_cache import PagedCache
from lctrain.generation.road import find_cache
from lctrain.generation.task import GenerationTask

BEAMS = 4
"""Beams of each prompt in a beam search."""
FEW = 8
"""Tokens of the short run before a contender of lctrain is timed, which compiles its kernels."""


GREEDY = SamplingOptions(temperature=0)
SAMPLED = SamplingOptions(temperature=0.7, top_p=0.95)


class TimedBatch(ContinuousBatch):
    """A ContinuousBatch that adds up the seconds of its prefills and of its decode steps.

    A step ends when the host has read its tokens. The next one runs already then, and it counts
    from there on, so the seconds of all steps add up to those of the run.

    Attributes:
        prefill_seconds: Seconds of all prefills.
        decode_seconds: Seconds of each decode step.
    """

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.prefill_seconds = 0.0
        self.decode_seconds: list[float] = []
        self._launched_prefills: deque[bool] = deque()  # of the steps that are not read
        self._last = time.perf_counter()

    def _prefill(self, groups: Any) -> None:
        super()._prefill(groups)
        self._launched_prefills.append(True)

    def _decode(self) -> None:
        before = self.steps
        super()._decode()
        if self.steps > before:
            self._launched_prefills.append(False)

    def _read(self) -> None:
        super()._read()
        now = time.perf_counter()
        seconds, self._last = now - self._last, now
        if self._launched_prefills.popleft():
            self.prefill_seconds += seconds
        else:
            self.decode_seconds.append(seconds)


def run_continuous(
    model: Any,
    prompts: Sequence[list[int]],
    new_tokens: int,
    graphs: bool,
    shared_prefixes: str = "auto",
    options: SamplingOptions = GREEDY,
    waits: bool = False,
) -> tuple[dict[str, Any], list[Completion]]:
    """Times lctrain's continuous batching; returns the figures and the completions.

    Args:
        model: A patched model in eval mode.
        prompts: Token ids of each prompt; all are completed together.
        new_tokens: Tokens of each completion.
        graphs: Whether decode steps are captured; not on a CPU.
        shared_prefixes: "auto", "always" or "never"; see lctrain.generate.
        options: How tokens are chosen.
        waits: Whether the host reads the tokens of a step before it launches the next one.
    """
    task = GenerationTask(
        prompts, range(len(prompts)), options, new_tokens, batch_size=len(prompts)
    )
    device = next(model.parameters()).device
    capture = GraphCapture(device) if graphs and device.type == "cuda" else None
    with torch.no_grad():
        shape = find_cache(model)
        if isinstance(shape, str):
            raise ValueError(f"the model must have a paged cache, got: {shape}.")
        start = time.perf_counter()
        batch = TimedBatch(model, task, shape, None, capture, shared_prefixes)
        batch.most_unread = 0 if waits else batch.most_unread
        found = batch.run()
        seconds = time.perf_counter() - start
    figures = _figures(seconds, batch.prefill_seconds, batch.decode_seconds, new_tokens)
    figures["preempted"] = batch.schedule.preempted
    return figures | {"shared_steps": batch.shared_steps}, found


def run_padded(
    model: Any, prompts: Sequence[list[int]], new_tokens: int, num_beams: int = 1, cache: Any = None
) -> dict[str, Any]:
    """Times transformers' generate on one left-padded batch.

    Args:
        model: A model of transformers in eval mode.
        prompts: Token ids of each prompt.
        new_tokens: Tokens of each completion.
        num_beams: Beams of each prompt.
        cache: Key/value cache; None for a DynamicCache.

    Returns:
        The figures, and on a GPU the most memory that torch had allocated, in bytes.
    """
    from transformers import StoppingCriteriaList

    device = next(model.parameters()).device
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in prompts], device=device)
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in prompts])
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    times = [time.perf_counter()]

    def note(input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        ended = torch.zeros(len(input_ids), dtype=torch.bool, device=device)
        input_ids[:1, -1:].tolist()  # waits for the step
        times.append(time.perf_counter())
        return ended

    model.generate(
        input_ids=ids,
        attention_mask=mask.to(device),
        max_new_tokens=new_tokens,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=None,
        use_cache=True,
        num_beams=num_beams,
        past_key_values=cache,
        stopping_criteria=StoppingCriteriaList([note]),  # type: ignore[list-item]
    )
    steps = [later - earlier for earlier, later in pairwise(times[1:])]
    figures = _figures(times[-1] - times[0], times[1] - times[0], steps, new_tokens)
    if device.type == "cuda":
        figures["peak_bytes"] = torch.cuda.max_memory_allocated(device)
    return figures


def run_beams(
    model: Any, prompts: Sequence[list[int]], new_tokens: int, paged: bool
) -> dict[str, Any]:
    """Times beam search of transformers on a patched model, after a short run that compiles.

    Args:
        model: A patched model in eval mode.
        prompts: Token ids of each prompt.
        new_tokens: Tokens of each completion.
        paged: Whether the cache is a PagedCache; otherwise a DynamicCache.
    """
    with torch.no_grad():
        for count in (FEW, new_tokens):
            cache = PagedCache(model) if paged else None
            figures = run_padded(model, prompts, count, BEAMS, cache)
    return figures


def run_generate_batch(
    model: Any, prompts: Sequence[list[int]], new_tokens: int, **options: Any
) -> dict[str, Any]:
    """Times transformers' continuous batching as it comes.

    It decodes some requests while it prefills others. So a step counts from the moment at which
    every request has its first token. The time ends with the last token: that in which the cache
    is freed does not count.

    Args:
        model: A model of transformers in eval mode.
        prompts: Token ids of each prompt.
        new_tokens: Tokens of each completion.
        options: Further arguments of `generate_batch`.

    Raises:
        RuntimeError: if a request failed.
    """
    from transformers import GenerationConfig

    config = GenerationConfig(max_new_tokens=new_tokens, do_sample=False, eos_token_id=-1)
    config.pad_token_id = 0
    start = time.perf_counter()
    found = model.generate_batch(
        list(prompts), generation_config=config, record_timestamps=True, **options
    )
    lengths = [len(one.generated_tokens) for one in found.values()]
    if lengths != [new_tokens] * len(prompts):
        errors = {str(one.error) for one in found.values()}
        raise RuntimeError(
            f"{len(lengths)} requests with up to {max(lengths, default=0)} "
            f"tokens, {sorted(errors)[:1]}"
        )
    times = [one.timestamps for one in found.values()]
    last = max(times, key=lambda one: one[0])
    steps = [later - earlier for earlier, later in pairwise(last)]
    return _figures(max(one[-1] for one in times) - start, last[0] - start, steps, new_tokens)


def _figures(
    seconds: float, prefill: float, steps: Sequence[float], new_tokens: int
) -> dict[str, Any]:
    """Returns the figures of a run, rounded.

    Args:
        seconds: Seconds of the run.
        prefill: Seconds until the first token of each completion.
        steps: Seconds of each decode step.
        new_tokens: Tokens of each completion.
    """
    return {
        "new_tokens": new_tokens,
        "seconds": round(seconds, 4),
        "prefill_seconds": round(prefill, 4),
        "step_ms": round(1e3 * median(steps), 4) if steps else 0.0,
        "beyond_median_seconds": round(sum(steps) - len(steps) * median(steps or [0.0]), 4),
    }
