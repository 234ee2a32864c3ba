"""Passes: the forward passes of a check, which all ranks run in step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tqdm import tqdm

from lctrain.distributed import ONE_RANK, Topology

BAR_DELAY_S = 1.0  # seconds before a progress bar appears


class Passes:
    """The forward passes of a check, which all ranks run in step, each on a pack of its own.

    Ranks with sharded parameters gather every layer together, so each rank needs as many passes as
    the others, through the same layers.

    Args:
        ranks: Ranks that run the check. All of them must call the same methods.
        progress: Whether to show a bar over the passes if they take more than a second.
        large: Whether the logits of this rank would be too large.

    Attributes:
        hidden: Whether passes return the last hidden states, since the logits of a rank would be
            too large.
    """

    def __init__(
        self, ranks: Topology = ONE_RANK, progress: bool = False, large: bool = False
    ) -> None:
        self._ranks = ranks
        self.hidden = any(ranks.gather(large))
        self._bar: Any = tqdm(
            desc="Isolation check",
            unit="pass",
            delay=BAR_DELAY_S,
            leave=False,
            disable=not progress,
        )

    def begin(self) -> None:
        """Waits until every rank begins a pass."""
        self._bar.update(1)
        self._ranks.gather(True)

    def end(self, error: Exception | None, idle: Callable[[], Any]) -> str | None:
        """Waits until every rank has finished its check.

        Args:
            error: The error of this rank's check, or None if it passed.
            idle: Runs a pass whose outputs are not used, while other ranks still check.

        Returns:
            The message of the first rank whose check failed, or None if all passed.
        """
        while any(self._ranks.gather(False)):
            idle()
        self._bar.close()
        messages = self._ranks.gather(None if error is None else str(error))
        return next((message for message in messages if message is not None), None)
