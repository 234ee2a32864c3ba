"""convert_progress: converts a checkpoint's batch counts for another gradient accumulation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lctrain.pluralize import pluralize


def convert_progress(checkpoint: Mapping[str, Any], then: int | None, now: int) -> None:
    """Converts Lightning's counts of micro-batches in a checkpoint, in place.

    A resumed run with another number of ranks accumulates another number of packs per rank. The
    optimizer steps are the same, but a step has other micro-batches, so Lightning's counts of
    micro-batches must change.

    Args:
        checkpoint: Lightning's checkpoint.
        then: Packs per rank in an optimizer step of the checkpoint's run; None if an older version
            wrote the checkpoint, which orders the rows of an accumulating run in another way.
        now: Packs per rank in an optimizer step of this run.

    Raises:
        ValueError: if the checkpoint was saved within an optimizer step, or an older version wrote
            it in a run that accumulated.
    """
    if then == now:
        return
    progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
    if then is None:
        batches, steps = progress["total"]["processed"], checkpoint["global_step"]
        if batches > 1.25 * steps:  # with two accumulated packs, at least 1.5 batches per step
            raise ValueError(
                "the checkpoint must be of a run that does not accumulate, or of this version of "
                f"lctrain, got {batches} batches in {pluralize(steps, 'optimizer step')} of an "
                "older version, "
                "which orders rows in another way. Start a new run without ckpt_path."
            )
        return
    for counts in (progress["total"], progress["current"]):
        if counts["processed"] % then != 0:
            raise ValueError(
                f"trainer.accumulate_grad_batches must be {then} for a checkpoint within an "
                f"optimizer step, got {now}. Restore it, and trainer.devices with it."
            )
        unfinished = counts["processed"] - counts["completed"]  # 1 if saved in a batch's hook
        batches = counts["processed"] // then * now
        counts |= {"ready": batches, "started": batches, "processed": batches}
        counts["completed"] = batches - unfinished
