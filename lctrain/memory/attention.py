"""KeptResults: keeps attention outputs of the forward for layers that the backward recomputes.

With activation checkpointing, the backward runs a layer's forward a second time. KeptResults gives
the second run the attention outputs of the first one, so attention is not computed twice. lctrain's
attentions are operators of torch.library, so a TorchDispatchMode sees their calls.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

ATTENTION_OPERATORS = frozenset(
    f"lctrain::{name}_forward" for name in ("varlen", "dual_chunk", "differential")
)
Keep = Callable[[Tensor], Any]  # from a tensor to an OnDevice or OnHost


class KeptResults:
    """Outputs and lse of the attention calls in one forward of one layer.

    Args:
        keep: Function that stores a tensor, and returns an OnDevice or OnHost.
    """

    def __init__(self, keep: Keep) -> None:
        self.keep = keep
        self.calls: list[tuple[Any, ...]] = []
        self.suspended = False

    @contextmanager
    def suspend(self) -> Iterator[None]:
        """Context manager in which attention is computed, although results are kept.

        Another layer runs in it, whose attention calls must not get this layer's results.
        """
        self.suspended = True
        try:
            yield
        finally:
            self.suspended = False

    def contexts(self) -> tuple[Any, Any]:
        """Returns (context of the forward, context of the recomputation)."""
        return _Recording(self), _Replaying(self)

    def rebuilding(self) -> Any:
        """Returns the context of the run that rebuilds the next layer's input."""
        return _Replaying(self, own=False)

    def take(self, position: int) -> tuple[Any, ...] | None:
        """Returns the results of an attention call; None if the call must be computed.

        Args:
            position: Number of the call in the layer, from 0.
        """
        return tuple(kept.get() for kept in self.calls[position])

    def prefetch(self) -> None:
        """Starts to copy what the backward of the layer before needs from the host."""
        for kept in [kept for call in self.calls for kept in call]:
            kept.prefetch()


class RebuiltResults(KeptResults):
    """Outputs and lse of the attention calls in the run that rebuilds the next layer's input.

    The forward keeps nothing. The layer's recomputation takes the results, and drops them. If that
    run did not happen, attention is computed.

    Args:
        keep: As of KeptResults.
    """

    def contexts(self) -> tuple[Any, Any]:
        """Returns (context of the forward, context of the recomputation)."""
        return nullcontext(), _Replaying(self)

    def rebuilding(self) -> Any:
        """Returns the context of the run that rebuilds the next layer's input."""
        self.calls.clear()
        return _Recording(self)

    def take(self, position: int) -> tuple[Any, ...] | None:
        """Returns the results of an attention call, and drops them; None if there are none."""
        if position >= len(self.calls):
            return None
        found, self.calls[position] = self.calls[position], ()
        return tuple(kept.get() for kept in found) or None


class _Recording(TorchDispatchMode):
    """Dispatch mode of the forward: stores the results of every attention call."""

    def __init__(self, results: KeptResults) -> None:
        super().__init__()
        self.results = results

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        found = func(*args, **(kwargs or {}))
        if _is_attention(func):
            self.results.calls.append(tuple(self.results.keep(x) for x in found))
        return found


class _Replaying(TorchDispatchMode):
    """Dispatch mode of the recomputation: returns the stored results of each attention call.

    Args:
        results: The stored results.
        own: Whether the layer's own backward follows, not that of a later layer in its segment.
    """

    def __init__(self, results: KeptResults, own: bool = True) -> None:
        super().__init__()
        self.results = results
        self.own = own
        self.position = 0

    def __enter__(self) -> Any:
        self.position = 0
        return super().__enter__()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        if self.results.suspended or not _is_attention(func):
            return func(*args, **(kwargs or {}))
        found = self.results.take(self.position)
        if self.own:
            self.results.prefetch()
        self.position += 1
        return func(*args, **(kwargs or {})) if found is None else found


def _is_attention(func: Any) -> bool:
    schema = getattr(func, "_schema", None)  # torch's higher-order operators have none
    return schema is not None and schema.name in ATTENTION_OPERATORS
