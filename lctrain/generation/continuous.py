"""ContinuousBatch: completes prompts over a paged cache, refilled as requests end."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lctrain.generation import prefill
from lctrain.generation.decode import Capture, DecodeStep, batch_sizes
from lctrain.generation.forward import CachedForward
from lctrain.generation.graph import GraphCapture, capture_refusal
from lctrain.generation.options import Completion
from lctrain.generation.pages import CacheShape, PagePool
from lctrain.generation.pool_size import longest_pages, pool_pages
from lctrain.generation.request import Request
from lctrain.generation.schedule import Schedule
from lctrain.generation.shared_pages import PrefixBounds, SharedPages, bounds_of
from lctrain.generation.stops import StopStrings
from lctrain.generation.task import GenerationTask
from lctrain.generation.token_choice import TokenChoice, require_distributions
from lctrain.warn import warn_caller

if TYPE_CHECKING:
    from lctrain_kernels import SharedPrefixes


class ContinuousBatch:
    """Completes the prompts of a task.

    Requests that are admitted are prefilled in packs. All running requests then decode one token
    per step, in a batch that is padded to one of a few sizes.

    Args:
        model: A patched causal LM in eval mode, or a model of PEFT around one.
        task: Prompts and options, at least one prompt.
        shape: Shape of the model's keys and values.
        cache_gib: Most memory of the cache in GiB; None for a share of the free memory.
        capture: Captures decode steps; None runs them as they are.
        shared_prefixes: Whether decode steps read the pages that requests share once for all of
            them: "auto", "always" or "never".

    Attributes:
        schedule: The requests and their pages.
        steps: Number of decode steps.
        shared_steps: Number of decode steps that read shared pages once.
    """

    def __init__(
        self,
        model: Any,
        task: GenerationTask,
        shape: CacheShape,
        cache_gib: float | None = None,
        capture: Capture | None = None,
        shared_prefixes: str = "auto",
    ) -> None:
        self._task = task
        self._forward = CachedForward(model)
        device = self._forward.device
        self._pool = PagePool(shape, pool_pages(task, shape, device, cache_gib), device)
        self._width = max(longest_pages(task))
        self._choice = TokenChoice(task.options)
        self._stops = StopStrings(task.tokenizer, task.stop) if task.stop else None
        self._end = frozenset(task.end)
        slots = min(task.batch_size, task.count)
        self.schedule = Schedule(self._requests(), self._pool, slots, self._width)
        self._sizes = batch_sizes(slots)
        self._capture = capture
        self._shared_pages = SharedPages(shared_prefixes, self._pool, device)
        self._decoders: dict[tuple[int, PrefixBounds | None], DecodeStep] = {}
        self._history: Tensor | None = None
        if self._choice.reads_history:
            longest = max(map(len, task.prompts)) + task.max_new_tokens
            self._history = torch.zeros(slots, longest, dtype=torch.int64, device=device)
        self._completions: list[Completion | None] = [None] * task.count
        self.steps = self.shared_steps = 0

    def run(self) -> list[Completion]:
        """Returns the completions of each prompt, in the order of the prompts."""
        while self.schedule.waiting or self.schedule.running:
            if groups := self.schedule.admit():
                self._prefill(groups)
            else:
                self._decode()
        return [found for found in self._completions if found is not None]

    def _requests(self) -> list[Request]:
        """Returns the requests, those of equal prompts one after another."""
        device = self._forward.device
        first: dict[tuple[int, ...], int] = {}
        found = []
        for index, seed in enumerate(self._task.seeds):
            prompt = self._task.prompts[index // self._task.samples]
            group = first.setdefault(tuple(prompt), index)
            longest = len(prompt) + self._task.max_new_tokens - 1
            generator = self._choice.generator(seed, device)
            found.append(Request(index, prompt, group, longest, generator))
        return sorted(found, key=lambda request: request.group)

    def _prefill(self, groups: Sequence[list[Request]]) -> None:
        leaders = [(group[0].tokens, group[0].pages, group[0].known) for group in groups]
        logits = prefill.prefill(self._forward, self._pool, leaders)
        rows = [row for row, group in enumerate(groups) for _ in group]
        requests = [request for group in groups for request in group]
        if self._history is not None:
            for request in requests:
                ids = torch.tensor(request.tokens)
                self._history[request.slot] = ids[0]
                self._history[request.slot, : len(ids)] = ids.to(self._history.device)
        self._accept(requests, logits if len(rows) == len(logits) else logits[rows])

    def _decode(self) -> None:
        self.schedule.make_room()
        requests = list(self.schedule.running)
        tokens = [request.token_ids[-1] for request in requests]
        stored = [request.stored for request in requests]
        tables = self.schedule.tables()
        shared = self._shared_pages.find(self.schedule.version, requests, tables)
        decoder = self._decoder(len(requests), shared)
        try:
            logits = decoder(tokens, stored, tables, shared)
        except RuntimeError as error:
            if not decoder.is_capturing:
                raise
            self._give_capture_up(str(error).partition("\n")[0])
            logits = decoder(tokens, stored, tables, shared)
        self.steps += 1
        self.shared_steps += shared is not None
        for request in requests:
            request.stored += 1
        self._accept(requests, logits)

    def _decoder(self, requests: int, shared: SharedPrefixes | None) -> DecodeStep:
        """Returns the decoder of the smallest size that holds a number of requests.

        Steps with shared prefixes have decoders of their own, one per size and bounds.
        """
        size = next(size for size in self._sizes if size >= requests)
        bounds = None if shared is None else bounds_of(shared, size)
        if (size, bounds) not in self._decoders:
            self._decoders[size, bounds] = DecodeStep(
                self._forward, self._pool, size, self._width, self._capture, bounds
            )
        return self._decoders[size, bounds]

    def _give_capture_up(self, reason: str) -> None:
        warn_caller(
            f"CUDA graphs need a decode step that can be captured, got the error {reason!r}. Steps "
            "run without graphs; pass cuda_graphs=False to generate to avoid the attempt."
        )
        self._capture = None
        for decoder in self._decoders.values():
            decoder.capture = None

    def _accept(self, requests: Sequence[Request], logits: Tensor) -> None:
        """Chooses the next token of each request, and retires those that have ended.

        Args:
            requests: Running requests.
            logits: Logits of each request's next token, [n, V].
        """
        slots = [request.slot for request in requests]
        history = None if self._history is None else self._history[slots]
        chosen = self._choice(history, logits.float(), [request.generator for request in requests])
        if self._history is not None:
            places = torch.tensor([len(request.tokens) for request in requests])
            self._history[slots, places.to(chosen[0].device)] = chosen[0]
        # One copy to the host: ids are exact in float64.
        ids, log_probs = torch.stack([part.double() for part in chosen]).tolist()
        for request, token, log_prob in zip(requests, ids, log_probs, strict=True):
            request.token_ids.append(int(token))
            request.log_probs.append(log_prob)
            if math.isnan(log_prob):
                require_distributions(request.log_probs, request.index // self._task.samples)
        ended = [request.token_ids[-1] in self._end for request in requests]
        if self._stops is not None:
            found = self._stops([request.token_ids for request in requests])
            ended = [one or other for one, other in zip(ended, found, strict=True)]
        for request, stopped in zip(requests, ended, strict=True):
            if stopped or len(request.token_ids) == self._task.max_new_tokens:
                self._completions[request.index] = self._task.completion(
                    request.index, request.token_ids, request.log_probs, stopped
                )
                self.schedule.retire(request)


def complete_continuously(
    model: Any,
    task: GenerationTask,
    shape: CacheShape,
    cache_gib: float | None = None,
    cuda_graphs: bool = True,
    shared_prefixes: str = "auto",
) -> list[Completion]:
    """Returns the completions of each prompt, in the order of the prompts.

    Args:
        model: A patched causal LM in eval mode, or a model of PEFT around one.
        task: Prompts and options, at least one prompt.
        shape: Shape of the model's keys and values.
        cache_gib: Most memory of the cache in GiB; None for a share of the free memory.
        cuda_graphs: Whether decode steps on a GPU are captured.
        shared_prefixes: See ContinuousBatch.
    """
    capture: Capture | None = None
    device = next(model.parameters()).device
    if cuda_graphs and device.type == "cuda":
        refusal = capture_refusal(model)
        if refusal is None:
            capture = GraphCapture(device)
        else:
            warn_caller(
                f"CUDA graphs need a forward pass that only launches kernels, got {refusal}. Steps "
                "run without graphs; pass cuda_graphs=False to generate to avoid this warning."
            )
    return ContinuousBatch(model, task, shape, cache_gib, capture, shared_prefixes).run()
