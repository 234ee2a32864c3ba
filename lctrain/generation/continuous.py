"""ContinuousBatch: completes prompts over a paged cache, refilled as requests end."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lctrain.generation import prefill
from lctrain.generation.decode import BUFFERS, Capture, DecodeStep, batch_sizes
from lctrain.generation.forward import CachedForward
from lctrain.generation.graph import GraphCapture, capture_refusal
from lctrain.generation.invariant_head import find_invariant_head
from lctrain.generation.joined_projections import JoinedProjections
from lctrain.generation.options import Completion
from lctrain.generation.pages import CacheShape, PagePool
from lctrain.generation.pool_size import give_back, longest_pages, pack_tokens, pool_pages
from lctrain.generation.request import Request
from lctrain.generation.schedule import Schedule
from lctrain.generation.shared_pages import PrefixBounds, SharedPages, bounds_of
from lctrain.generation.slot_tokens import SlotTokens
from lctrain.generation.stops import StopStrings
from lctrain.generation.task import GenerationTask
from lctrain.generation.token_choice import TokenChoice, require_distributions
from lctrain.transfer import HostCopy, upload
from lctrain.warn import warn_caller

if TYPE_CHECKING:
    from lctrain_kernels import SharedPrefixes

UNREAD = BUFFERS - 1
"""Steps whose tokens the host may leave unread: their inputs are not overwritten yet."""


class ContinuousBatch:
    """Completes the prompts of a task.

    Requests that are admitted are prefilled in packs. All running requests then decode one token
    per step, in a batch that is padded to one of a few sizes. Chosen tokens stay on the device for
    the next step. The host reads them while the next step runs: so a request that ends with an end
    token or a stop string takes part in one step more, whose token is dropped.

    Args:
        model: A patched causal LM in eval mode, or a model of PEFT around one.
        task: Prompts and options, at least one prompt.
        shape: Shape of the model's keys and values.
        cache_gib: Most memory of the cache in GiB; None for a share of the free memory.
        capture: Captures decode steps; None runs them as they are.
        shared_prefixes: Whether decode steps read the pages that requests share once for all of
            them: "auto", "always" or "never".

    Attributes:
        device: Device of the model and the cache.
        schedule: The requests and their pages.
        steps: Number of decode steps.
        shared_steps: Number of decode steps that read shared pages once.
        most_unread: Steps whose tokens the host has not read when it launches the next one, at most
            UNREAD.
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
        head = find_invariant_head(model, float(task.options.temperature or 1))
        self._forward = CachedForward(model, head)
        self.device = device = self._forward.device
        self._projections = JoinedProjections(model)
        self._pool = PagePool(shape, pool_pages(task, shape, device, cache_gib), device)
        self._pack_tokens = pack_tokens(model, device)
        self._width = max(longest_pages(task))
        self._choice = TokenChoice(task.options, head)
        self._stops = StopStrings(task.tokenizer, task.stop) if task.stop else None
        self._end = frozenset(task.end)
        slots = min(task.batch_size, task.count)
        self.schedule = Schedule(self._requests(), self._pool, slots, self._width)
        longest = max(map(len, task.prompts)) + task.max_new_tokens
        self._tokens = SlotTokens(slots, longest if self._choice.reads_history else None, device)
        self._sizes = batch_sizes(slots)
        self._capture = capture
        sharing = shared_prefixes if head is None else "never"
        self._shared_pages = SharedPages(sharing, self._pool, device)
        self._decoders: dict[tuple[int, PrefixBounds | None], DecodeStep] = {}
        self._unread: deque[tuple[list[Request], HostCopy]] = deque()
        self._completions: list[Completion | None] = [None] * task.count
        self.steps = self.shared_steps = 0
        self.most_unread = UNREAD

    @property
    def cache_bytes(self) -> int:
        """Bytes of the cache."""
        return self._pool.pages * self._pool.shape.page_bytes

    def run(self) -> list[Completion]:
        """Returns the completions of each prompt, in the order of the prompts."""
        with self._projections.in_use():
            while self.schedule.waiting or self.schedule.running:
                if groups := self.schedule.admit():
                    self._prefill(groups)
                else:
                    self._decode()
                while len(self._unread) > self.most_unread:
                    self._read()
            self._settle()
        return [found for found in self._completions if found is not None]

    def _requests(self) -> list[Request]:
        """Returns the requests, those of equal prompts one after another."""
        prompts, samples = self._task.prompts, self._task.samples
        first: dict[tuple[int, ...], int] = {}
        groups = [first.setdefault(tuple(prompt), row) for row, prompt in enumerate(prompts)]
        found = []
        for index, seed in enumerate(self._task.seeds):
            row = index // samples
            longest = len(prompts[row]) + self._task.max_new_tokens - 1
            found.append(Request(index, prompts[row], groups[row], longest, seed))
        return sorted(found, key=lambda request: request.group)

    def _prefill(self, groups: Sequence[list[Request]]) -> None:
        """Launches the prefill of groups of equal tokens, and the choice of their next tokens."""
        leaders = [(group[0].tokens, group[0].pages, group[0].known) for group in groups]
        logits = prefill.prefill(self._forward, self._pool, leaders, self._pack_tokens)
        rows = [row for row, group in enumerate(groups) for _ in group]
        requests = [request for group in groups for request in group]
        if len(rows) != len(logits):
            logits = logits[upload(torch.tensor(rows), logits.device)]
        seeds = [request.seed for request in requests]
        keys = self._choice.keys(seeds, [request.stored for request in requests])
        chosen, log_probs = self._choice(
            self._tokens.begin(requests), logits, upload(keys, logits.device)
        )
        self._tokens.write_last(requests, chosen)
        self._launched(requests, torch.stack((chosen.double(), log_probs.double())))

    def _decode(self) -> None:
        """Launches a step of all running requests."""
        self.schedule.make_room(self._settle)
        requests = list(self.schedule.running)
        if not requests:  # all have ended meanwhile
            return
        tables = self.schedule.tables()
        stored = [request.stored for request in requests]
        shared = self._shared_pages.find(self.schedule.version, stored, tables)
        decoder = self._decoder(len(requests), shared)
        is_last = all(one.launched + 1 == self._task.max_new_tokens for one in requests)
        try:
            values = decoder(requests, tables, shared, is_last)
        except RuntimeError as error:
            if not decoder.is_capturing:
                raise
            self._give_capture_up(str(error).partition("\n")[0])
            values = decoder(requests, tables, shared)
        self.steps += 1
        self.shared_steps += shared is not None
        for request in requests:
            request.stored += 1
        self._launched(requests, values)

    def _decoder(self, requests: int, shared: SharedPrefixes | None) -> DecodeStep:
        """Returns the decoder of the smallest size that holds a number of requests.

        Steps with shared prefixes have decoders of their own, one per size and bounds.
        """
        size = next(size for size in self._sizes if size >= requests)
        bounds = None if shared is None else bounds_of(shared, size)
        if (size, bounds) not in self._decoders:
            self._decoders[size, bounds] = DecodeStep(
                self._forward,
                self._pool,
                self._choice,
                self._tokens,
                size,
                self._width,
                self._capture,
                bounds,
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

    def _launched(self, requests: Sequence[Request], values: Tensor) -> None:
        """Notes the next token of each request, and retires requests of which it is the last one.

        What later kernels do with the pages of such a request comes after this step.

        Args:
            requests: Running requests.
            values: Ids and log-probabilities of the tokens, [2, n] float64, in which ids are exact.
        """
        self._unread.append((list(requests), HostCopy(values)))
        for request in requests:
            request.launched += 1
            if request.launched == self._task.max_new_tokens:
                self.schedule.retire(request)

    def _settle(self) -> bool:
        """Reads the tokens of all steps that have been launched; returns whether there were any."""
        unread = bool(self._unread)
        while self._unread:
            self._read()
        return unread

    def _read(self) -> None:
        """Reads the tokens of the oldest step, and retires the requests that have ended."""
        launched, values = self._unread.popleft()
        requests, ended = [], []
        end, most = self._end, self._task.max_new_tokens
        for request, token, log_prob in zip(launched, *values.wait().tolist(), strict=True):
            if request.ended:
                continue
            requests.append(request)
            ids = request.token_ids
            ids.append(int(token))
            request.log_probs.append(log_prob)
            if math.isnan(log_prob):
                require_distributions(request.log_probs, request.index // self._task.samples)
            if token in end or len(ids) == most:
                ended.append(request)
        stopped: set[int] = set()
        if self._stops is not None and requests:
            found = self._stops([request.token_ids for request in requests])
            stopped = {request.index for request, stop in zip(requests, found, strict=True) if stop}
            ended = [one for one in requests if one in ended or one.index in stopped]
        for request in ended:
            self._end_request(request, request.token_ids[-1] in end or request.index in stopped)

    def _end_request(self, request: Request, stopped: bool) -> None:
        request.ended = True
        self._completions[request.index] = self._task.completion(
            request.index, request.token_ids, request.log_probs, stopped
        )
        if request.slot >= 0:
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
    capture: GraphCapture | None = None
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
    batch = ContinuousBatch(model, task, shape, cache_gib, capture, shared_prefixes)
    device, size = batch.device, batch.cache_bytes
    found = batch.run()
    del batch  # frees the cache and the graphs
    give_back(device, size, has_graphs=capture is not None and capture.used)
    return found
