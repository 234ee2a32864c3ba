"""DecodeStep: one token of each running request, over static buffers that a CUDA graph replays."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lctrain.attention.cache_step import StepAttention
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

WARM_UP = 1
"""Steps of a size that are launched kernel by kernel. The last of them is captured afterwards: a
capture takes about as long, and meanwhile the device works on what has been launched."""

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
        capture: Captures the step behind WARM_UP steps; None runs it as it is.
        bounds: Sizes of the prefixes that requests share in every step; None for none.

    Attributes:
        is_capturing: Whether a step is captured now; after an error, whether that failed.
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
        self._plans: dict[bool, Any] = {}
        self._steps = 0
        self.is_capturing = False
        self._replay: Callable[[], None] | None = None
        self._result: Tensor | None = None

    def __call__(
        self,
        requests: Sequence[Request],
        tables: Tensor,
        shared: SharedPrefixes | None = None,
        is_last: bool = False,
    ) -> Tensor:
        """Returns ids and log-probabilities of the next token of each request, [2, n] float64.

        The next call overwrites them. At most BUFFERS - 1 earlier steps may be unfinished.

        Args:
            requests: Running requests, n of them.
            tables: Pages of each request, [n, width] int32, on the CPU.
            shared: Prefixes that requests share, on the CPU; given if the step has bounds for them.
            is_last: Whether no request needs another step, so that a capture would be in vain.
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
        self.is_capturing = False
        if self._replay is None:
            result = self._run()
            if self.capture is not None and self._steps + 1 >= WARM_UP and not is_last:
                self.is_capturing = True
                self._replay, self._result = self.capture(self._run)
                self.is_capturing = False
        else:
            self._replay()
            assert self._result is not None
            result = self._result
        self._steps += 1
        # Not a part of the graph: run twice, a step gives the same result.
        self._tokens.last.index_copy_(0, self._inputs.slots.long(), self._chosen)
        return result[:, :count]

    @property
    def lengths(self) -> Tensor:
        """Tokens of each request with the new one, [B] int32."""
        return self._inputs.lengths + 1

    def attend(
        self,
        module: nn.Module,
        states: tuple[Tensor, Tensor, Tensor],
        attention: StepAttention,
        arguments: dict[str, Any],
    ) -> Tensor:
        """Returns the output of a layer, [1, B, H', W]; see CacheStep."""
        keys, values = self._pool.layer(int(module.layer_idx))  # type: ignore[arg-type]
        q, k, v = (x[0].transpose(0, 1)[:, None].to(keys.dtype) for x in states)
        plan = {"plan": self._plan(attention.windowed)} if attention.plans else {}
        out = attention.stored(
            q,
            keys,
            values,
            k=k,
            v=v,
            cache_seqlens=self._inputs.lengths,
            block_table=self._inputs.table,
            **plan,
        )
        return out.transpose(0, 1)

    def _run(self) -> Tensor:
        self._plans.clear()
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

    def _plan(self, windowed: bool) -> Any:
        """Returns the plan of layers with or without a window, made once per step.

        Layers with a window would read a prefix that none of their queries sees.
        """
        from lctrain_kernels.decode.plan import make_decode_plan

        shared = self._prefixes[0].prefixes if self._prefixes and not windowed else None
        found = self._plans.get(shared is not None)
        if found is None:
            shape = self._pool.shape
            found = self._plans[shared is not None] = make_decode_plan(
                self._inputs.lengths,
                self._width * PAGE,
                shape.head_dim,
                shape.dtype,
                shared_prefixes=shared,
            )
        return found


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
