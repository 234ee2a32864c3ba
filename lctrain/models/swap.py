"""Swap: a reversible change of a model. What patch_model does is a list of them."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from types import TracebackType
from typing import Protocol, TypeVar, runtime_checkable

Self = TypeVar("Self", bound="Unpatchable")


@runtime_checkable
class Swap(Protocol):
    """A reversible change of one model.

    The constructor fits the swap to the model: it changes nothing, and raises a ValueError that
    says what to do if the model cannot have it.

    Attributes:
        name: What is swapped, one word.
    """

    name: str

    def apply(self) -> None:
        """Changes the model."""

    def undo(self) -> None:
        """Restores the model as it was before `apply`, also where `apply` failed midway."""

    def describe(self) -> str:
        """Returns what was swapped, for people."""


class Unpatchable(ABC):
    """A context manager whose end unpatches."""

    @abstractmethod
    def unpatch(self) -> None:
        """Undoes every swap. Does nothing if called again."""

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
    """Applies swaps in their order: all of them, or, after an error, none."""
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
