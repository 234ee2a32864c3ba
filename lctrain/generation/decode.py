"""DecodeStep: one token of each running request, over static buffers that a CUDA graph replays."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lctrain.attention.by_query import attend_by_query, attends_by_query
from lctrain.generation.forward import CachedForward
from lctrain.generation.noise import KEYS
from lctrain.generation.pages import PAGE, PagePool
from lctrain.generation.request import Request
from lctrain.generation.shared_pages import PrefixBounds, PrefixBuffers
from lctrain.generation.slot_tokens import SlotTokens
from lctrain.generation.token_choice import TokenChoice

if TYPE_CHECKING:
    from lctrain_kernels import SharedPrefixes

Capture = Callable[[Callable[[], Tensor]], tuple[Callable[[], None], Tensor]]
"""Records a function; returns a function that runs it again, and the tensor with its result."""

WARM_UP = 2
"""Steps of a size before one is captured. A capture takes about as long as a step without graph."""

BUFFERS = 2
"""Sets of inputs on the host. A set is written again when the tokens of its step were read."""


def batch_sizes(most: int) -> list[int]:
    """Returns the sizes to which batches are padded: powers of 4 below `most`, and `most`."""
    sizes = [1]
    while sizes[-1] * 4 < most:
        sizes.append(sizes[-1] * 4)
    return sizes if most == 1 else [*sizes, most]


class DecodeStep:
    """Decodes and chooses one token of up to `size` requests. Rows beyond them have no keys.

    All inputs lie in buffers of a fixed place and size, so that a captured step can be replayed.
    The step reads and writes the tokens of slots on the device.

    Args:
        forward: The model.
        pool: Pages.
        choice: Chooses the tokens.
        tokens: Tokens of the slots.
        size: Number of rows B.
        width: Most pages of a request.
        capture: Captures the step after WARM_UP steps; None runs it as it is.
        bounds: Sizes of the prefixes that requests share in every step; None for none.
    """

    def __init__(
        self,
        forward: CachedForward,
        pool: PagePool,
        choice: TokenChoice,
        tokens: SlotTokens,
        size: int,
        width: int,
        capture: Capture | None = None,
        bounds: PrefixBounds | None = None,
    ) -> None:
        self._forward_pass = forward
        self._pool = pool
        self._choice = choice
        self._tokens = tokens
        self._width = width
        self.capture = capture
        device = forward.device
        rows = size * (2 + KEYS + width)
        groups = 0 if bounds is None else PrefixBuffers.numbers(size, bounds)
        numbers = torch.zeros(rows + groups, dtype=torch.int32)
        self._inputs = _Inputs(torch.empty_like(numbers, device=device), size, width)
        pinned = device.type == "cuda"
        self._host = [
            _Inputs(numbers.pin_memory() if pinned else numbers.clone(), size, width)
            for _ in range(BUFFERS)
        ]
        self._prefixes: list[PrefixBuffers] = []
        if bounds is not None:
            self._prefixes = [
                PrefixBuffers(host.rest, self._inputs.rest, size, bounds) for host in self._host
            ]
        self._chosen = torch.zeros(size, dtype=torch.int64, device=device)
        self._plan: Any = None
        self._plan_of_windows: Any = None
        self._steps = 0
        self._replay: Callable[[], None] | None = None
        self._result: Tensor | None = None

    def __call__(
        self, requests: Sequence[Request], tables: Tensor, shared: SharedPrefixes | None = None
    ) -> Tensor:
        """Returns ids and log-probabilities of the next token of each request, [2, n] float64.

        The next call overwrites them. At most BUFFERS - 1 earlier steps may be unfinished.

        Args:
            requests: Running requests, n of them.
            tables: Pages of each request, [n, width] int32, on the CPU.
            shared: Prefixes that requests share, on the CPU; given if the step has bounds for them.
        """
        count, turn = len(requests), self._steps % BUFFERS
        host = self._host[turn]
        stored = [request.stored for request in requests]
        seeds = [request.seed for request in requests]
        host.slots.fill_(self._tokens.spare)
        host.slots[:count] = torch.tensor([request.slot for request in requests])
        host.lengths.fill_(-1)  # one new token: a row of -1 has no key
        host.lengths[:count] = torch.tensor(stored)
        host.keys[:count] = self._choice.keys(seeds, [length + 1 for length in stored])
        host.table[:count] = tables
        if self._prefixes:
            assert shared is not None
            self._prefixes[turn].fill(shared)
        self._inputs.buffer.copy_(host.buffer, non_blocking=True)
        if self.is_capturing:
            assert self.capture is not None
            self._replay, self._result = self.capture(self._run)
        self._steps += 1
        if self._replay is None:
            result = self._run()
        else:
            self._replay()
            assert self._result is not None
            result = self._result
        # Not a part of the graph: run twice, a step gives the same result.
        self._tokens.last.index_copy_(0, self._inputs.slots.long(), self._chosen)
        return result[:, :count]

    @property
    def is_capturing(self) -> bool:
        """Whether the next step is captured before it is replayed."""
        return self._replay is None and self.capture is not None and self._steps >= WARM_UP

    def attend(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        causal: bool,
        options: dict[str, Any],
    ) -> Tensor:
        """Returns the output of a layer, [1, B, H, D]; see CacheStep."""
        from lctrain_kernels import flash_attn_with_kvcache

        exact = self._forward_pass.head is not None
        keys, values = self._pool.layer(int(module.layer_idx))  # type: ignore[arg-type]
        q, k, v = (x[0].transpose(0, 1)[:, None].to(keys.dtype) for x in (query, key, value))
        out = flash_attn_with_kvcache(
            q,
            keys,
            values,
            k,
            v,
            cache_seqlens=self._inputs.lengths,
            block_table=self._inputs.table,
            causal=causal,
            plan=None if exact else self._plan_for(options["window_size"]),
            split="exact" if exact else "fixed",
            **options,
        )
        assert isinstance(out, Tensor)
        if exact and attends_by_query(q, options["backend"]):
            out = self._attend_by_query(q, keys, values, options)
        return out.transpose(0, 1)

    def _attend_by_query(
        self, q: Tensor, keys: Tensor, values: Tensor, options: dict[str, Any]
    ) -> Tensor:
        """Returns the attention [B, 1, H, D] of queries in PyTorch, one after another.

        Args:
            q: Queries [B, 1, H, D].
            keys: Pages of keys, the new ones among them.
            values: Pages of values.
            options: See CacheStep.
        """
        chosen = {name: options[name] for name in ("softmax_scale", "window_size")}
        chosen["learnable_sink"] = options["learnable_sink"]
        out = torch.zeros_like(q)
        for row, stored in enumerate(self._inputs.lengths.tolist()):
            if stored < 0:
                continue
            index = torch.arange(stored + 1, device=q.device)
            place = (self._inputs.table[row, index // PAGE].long(), index % PAGE)
            k, v = keys[place], values[place]
            out[row] = attend_by_query(q[row], k, v, [1], [stored + 1], chosen)
        return out

    def _run(self) -> Tensor:
        shared = self._prefixes[0].prefixes if self._prefixes else None
        if self._forward_pass.head is None:
            self._plan = self._make_plan(shared)
            self._plan_of_windows = self._plan if shared is None else None
        slots = self._inputs.slots.long()
        positions = self._inputs.lengths.clamp(min=0).long()
        tokens = self._tokens.last[slots]
        history = self._tokens.history
        if history is not None:
            history[slots, positions] = tokens
            history = history[slots]
        logits = self._forward_pass(tokens[None], positions[None], self)
        chosen, log_probs = self._choice(history, logits, self._inputs.keys)
        self._chosen.copy_(chosen)
        return torch.stack((chosen.double(), log_probs.double()))

    def _plan_for(self, window: tuple[int, int]) -> Any:
        """Returns the plan of layers with a window (left, right).

        Layers with a bounded window would read a prefix that none of them sees.
        """
        if window[0] < 0:
            return self._plan
        if self._plan_of_windows is None:
            self._plan_of_windows = self._make_plan(None)
        return self._plan_of_windows

    def _make_plan(self, shared: SharedPrefixes | None) -> Any:
        from lctrain_kernels.decode.plan import make_decode_plan

        shape = self._pool.shape
        return make_decode_plan(
            self._inputs.lengths,
            self._width * PAGE,
            shape.head_dim,
            shape.dtype,
            shared_prefixes=shared,
        )


class _Inputs:
    """Inputs of a step, views of one buffer, so that one copy takes them to the device.

    Args:
        buffer: int32, contiguous.
        size: Number of rows B.
        width: Most pages of a request.

    Attributes:
        buffer: All inputs.
        slots: [B] int32, slot of each request.
        lengths: [B] int32, tokens of each request in the cache; -1 for padding.
        keys: [B, KEYS] int32, keys of each request's draw.
        table: [B, width] int32, pages of each request.
        rest: What follows in the buffer.
    """

    def __init__(self, buffer: Tensor, size: int, width: int) -> None:
        self.buffer = buffer
        rows = [size, size, size * KEYS, size * width]
        self.slots, self.lengths, keys, table, self.rest = buffer.split(
            [*rows, len(buffer) - sum(rows)]
        )
        self.keys = keys.view(size, KEYS)
        self.table = table.view(size, width)
