"""DecodeStep: one token of each running request, over static buffers that a CUDA graph replays."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lctrain.generation.forward import CachedForward
from lctrain.generation.pages import PAGE, PagePool
from lctrain.generation.shared_pages import PrefixBounds, PrefixBuffers

if TYPE_CHECKING:
    from lctrain_kernels import SharedPrefixes

Capture = Callable[[Callable[[], Tensor]], tuple[Callable[[], None], Tensor]]
"""Records a function; returns a function that runs it again, and the tensor with its result."""

WARM_UP = 8
"""Steps of a size before one is captured. A capture takes as long as many steps."""


def batch_sizes(most: int) -> list[int]:
    """Returns the sizes to which batches are padded: powers of 4 below `most`, and `most`."""
    sizes = [1]
    while sizes[-1] * 4 < most:
        sizes.append(sizes[-1] * 4)
    return sizes if most == 1 else [*sizes, most]


class DecodeStep:
    """Decodes one token of up to `size` requests. Rows beyond them have no keys.

    All inputs lie in buffers of a fixed place and size, so that a captured step can be replayed.

    Args:
        forward: The model.
        pool: Pages.
        size: Number of rows B.
        width: Most pages of a request.
        capture: Captures the step after WARM_UP steps; None runs it as it is.
        bounds: Sizes of the prefixes that requests share in every step; None for none.
    """

    def __init__(
        self,
        forward: CachedForward,
        pool: PagePool,
        size: int,
        width: int,
        capture: Capture | None = None,
        bounds: PrefixBounds | None = None,
    ) -> None:
        device = forward.device
        pinned = device.type == "cuda"
        self._forward_pass = forward
        self._pool = pool
        self._width = width
        self.capture = capture
        self._host_tokens = torch.zeros(2, size, dtype=torch.int64, pin_memory=pinned)
        rows = size * (1 + width)
        numbers = rows + (0 if bounds is None else PrefixBuffers.numbers(size, bounds))
        self._host_cache = torch.zeros(numbers, dtype=torch.int32, pin_memory=pinned)
        self._tokens = torch.empty_like(self._host_tokens, device=device)
        self._cache = torch.empty_like(self._host_cache, device=device)
        self._host_lengths, self._host_table = _split(self._host_cache[:rows], size)
        self._lengths, self._table = _split(self._cache[:rows], size)
        self._prefixes: PrefixBuffers | None = None
        if bounds is not None:
            parts = self._host_cache[rows:], self._cache[rows:]
            self._prefixes = PrefixBuffers(*parts, size, bounds, width * PAGE)
        self._plan: Any = None
        self._plan_of_windows: Any = None
        self._steps = 0
        self._replay: Callable[[], None] | None = None
        self._logits: Tensor | None = None

    def __call__(
        self,
        tokens: Sequence[int],
        stored: Sequence[int],
        tables: Tensor,
        shared: SharedPrefixes | None = None,
    ) -> Tensor:
        """Returns the logits after one more token of each request, [n, V].

        Args:
            tokens: Last token of each of n requests.
            stored: Tokens of each request in the cache, before this one.
            tables: Pages of each request, [n, width] int32, on the CPU.
            shared: Prefixes that requests share, on the CPU; given if the step has bounds for them.
        """
        count = len(tokens)
        self._host_tokens.zero_()
        self._host_tokens[0, :count] = torch.tensor(tokens)
        lengths = torch.tensor(stored)
        self._host_tokens[1, :count] = lengths
        self._host_lengths.fill_(-1)  # one new token: a row of -1 has no key
        self._host_lengths[:count] = lengths
        self._host_table[:count] = tables
        if self._prefixes is not None:
            assert shared is not None
            self._prefixes.fill(shared)
        self._tokens.copy_(self._host_tokens, non_blocking=True)
        self._cache.copy_(self._host_cache, non_blocking=True)
        if self.is_capturing:
            assert self.capture is not None
            self._replay, self._logits = self.capture(self._run)
        self._steps += 1
        if self._replay is None:
            return self._run()[:count]
        self._replay()
        assert self._logits is not None
        return self._logits[:count]

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

        keys, values = self._pool.layer(int(module.layer_idx))  # type: ignore[arg-type]
        q, k, v = (x[0].transpose(0, 1)[:, None].to(keys.dtype) for x in (query, key, value))
        out = flash_attn_with_kvcache(
            q,
            keys,
            values,
            k,
            v,
            cache_seqlens=self._lengths,
            block_table=self._table,
            causal=causal,
            plan=self._plan if options["window_size"][0] < 0 else self._windowed(),
            **options,
        )
        assert isinstance(out, Tensor)
        return out.transpose(0, 1)

    def _run(self) -> Tensor:
        self._plan = self._make_plan(None if self._prefixes is None else self._prefixes.prefixes)
        self._plan_of_windows = self._plan if self._prefixes is None else None
        return self._forward_pass(self._tokens[:1], self._tokens[1:], self)

    def _windowed(self) -> Any:
        """Returns the plan of layers with a window: they would read a prefix that none sees."""
        if self._plan_of_windows is None:
            self._plan_of_windows = self._make_plan(None)
        return self._plan_of_windows

    def _make_plan(self, shared: SharedPrefixes | None) -> Any:
        from lctrain_kernels.decode.plan import make_decode_plan

        shape = self._pool.shape
        return make_decode_plan(
            self._lengths,
            self._width * PAGE,
            shape.head_dim,
            shape.dtype,
            shared_prefixes=shared,
        )


def _split(buffer: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Returns lengths [size] and page table [size, width], two views of a buffer."""
    return buffer[:size], buffer[size:].view(size, -1)
