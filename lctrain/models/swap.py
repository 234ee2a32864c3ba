"""Swap: a change of a model that can be undone; patch_model applies a list of swaps."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from types import TracebackType
from typing import Protocol, TypeVar, runtime_checkable

Self = TypeVar("Self", bound="Unpatchable")


@runtime_checkable
class Swap(Protocol):
    """A change of one model that can be undone, such as of its attention or its loss.

    The constructor takes the model and does not change it. If the model does not support the swap,
    the constructor raises a ValueError with a remedy.

    Attributes:
        name: Name of the swap in the report of PatchHandle, one word.
    """

    name: str

    def apply(self) -> None:
        """Changes the model."""

    def undo(self) -> None:
        """Restores the model as it was before `apply`, even if `apply` raised an error midway."""

    def describe(self) -> str:
        """Returns what was changed, as text for the report of PatchHandle."""


class Unpatchable(ABC):
    """A context manager that calls `unpatch` at its end."""

    @abstractmethod
    def unpatch(self) -> None:
        """Undoes every swap. A second call does nothing."""

    def __enter__(self: Self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.unpatch()


def apply_all(swaps: Sequence[Swap]) -> None:
    """Applies swaps in order. If one raises an error, undoes all of them and raises it again."""
    for number, swap in enumerate(swaps):
        try:
            swap.apply()
        except BaseException:
            undo_all(swaps[: number + 1])
            raise


def undo_all(swaps: Sequence[Swap]) -> None:
    """Undoes swaps in reverse order."""
    for swap in reversed(swaps):
        swap.undo()
