"""restored_settings: converts the data settings of an older checkpoint to today's names."""

from __future__ import annotations

from typing import Any


def restored_settings(
    settings: dict[str, Any], then: int | None, now: int, is_stream: bool
) -> dict[str, Any]:
    """Returns the data settings of a checkpoint under the names that this version uses.

    An older checkpoint records an order of rows by rank. Today the order is by packs of an
    optimizer step. Both are the same order if every rank has one pack per step.

    Args:
        settings: Settings in the checkpoint.
        then: Packs per rank in an optimizer step of the checkpoint's run; None if not stored.
        now: Packs per rank in an optimizer step of this run.
        is_stream: Whether the data are an endless stream.

    Raises:
        ValueError: if the checkpoint's rows are ordered by rank, and this run accumulates
            gradients.
    """
    if is_stream:
        return {"accumulated": now if then is None else then} | settings
    if then is not None or "world_size" not in settings or "packs_per_step" in settings:
        return settings
    if now != 1:
        raise ValueError(
            "accumulate_grad_batches must be 1 to resume from a checkpoint whose rows are ordered "
            f"by ranks, got {now}. Start a new run without ckpt_path."
        )
    renamed = dict(settings)
    renamed["packs_per_step"] = renamed.pop("world_size")
    return renamed
