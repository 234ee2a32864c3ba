"""Writes a trained model so that plain transformers loads it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lctrain.module import LongContextModule


def export_model(module: LongContextModule, tokenizer: Any, folder: Path) -> Path:
    """Writes model and tokenizer so that plain transformers loads them.

    Args:
        module: With the trained model; its attention is unpatched for as long as this takes.
        tokenizer: Of the run.
        folder: Is made.

    Returns:
        The folder.
    """
    if module.patch_handle is not None:
        module.patch_handle.unpatch()
        module.patch_handle = None
    module.model.cpu().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    module.configure_model()
    return folder
