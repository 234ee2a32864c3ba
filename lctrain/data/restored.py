"""restored_settings: the settings of a checkpoint, named as this version names them."""

from __future__ import annotations

from typing import Any


def restored_settings(
    settings: dict[str, Any], then: int | None, now: int, is_stream: bool
) -> dict[str, Any]:
    """Returns the data settings of a checkpoint with the names of this version.

    In an older checkpoint rows are ordered by ranks. That is the order by the packs of a step if
    every rank has one pack per step.

    Args:
        settings: Settings in the checkpoint.
        then: Packs per rank in an optimizer step of the checkpoint's run; None if not stored.
        now: Packs per rank in an optimizer step of this run.
        is_stream: Whether the data are an endless stream.

    Raises:
        ValueError: if the rows of the checkpoint are ordered by ranks, and this run accumulates.
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
