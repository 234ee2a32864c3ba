"""PreparedData: packed rows, and the settings by which a resumed run knows its data."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lctrain.data.collator import PackedRows
from lctrain.data.streaming import StreamRecipe

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

OWN_SET = "data"
"""Name of the held-out set that is a part of the data, if there are other sets as well."""


@dataclass(frozen=True, eq=False)
class PreparedData:
    """Result of Preparation: packed rows, and the settings that determine them.

    Attributes:
        tokenizer: Tokenizer of the token ids. For documents of token ids it is the value that the
            user gave: a tokenizer, its name, or None.
        train_rows: The training rows. For an endless stream, they are those of its first window.
        held_out_rows: Rows of the held-out sets by name; a set without documents has no row.
        settings: Plain values that determine the rows; a resumed run compares them.
        stream: Recipe by which training reads an endless stream; None for other sources.
    """

    tokenizer: PreTrainedTokenizerBase
    train_rows: PackedRows
    held_out_rows: Mapping[str, PackedRows]
    settings: dict[str, Any]
    stream: StreamRecipe | None = None


def fingerprint_settings(settings: dict[str, Any]) -> str:
    """Returns a hash of settings, without the description of the source."""
    text = json.dumps(_compared(settings), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def check_same_settings(now: dict[str, Any], then: dict[str, Any]) -> None:
    """Raises ValueError if a resumed run has other data settings than its checkpoint.

    Args:
        now: Settings of this run.
        then: Settings in the checkpoint.

    Raises:
        ValueError: if settings differ; the message names them with both values.
    """
    compared_now, compared_then = _compared(now), _compared(then)
    changes = [
        f"{name} was {compared_then.get(name)!r}, is {compared_now.get(name)!r}"
        for name in compared_now | compared_then
        if compared_now.get(name) != compared_then.get(name)
    ]
    if not changes:
        return
    if now.get("training_documents") != then.get("training_documents"):
        changes.append(f"source was {then.get('source')}, is {now.get('source')}")
    if now.get("chat_date") != then.get("chat_date"):
        changes.append(
            "the chat template writes today's date (a new run with a fixed date in "
            "data.template_arguments can be resumed on any day)"
        )
    raise ValueError(
        "a resumed run must have the data and packing settings of its checkpoint, got others: "
        f"{'; '.join(changes)}. Restore them, or start a new run without ckpt_path."
    )


def _compared(settings: dict[str, Any]) -> dict[str, Any]:
    """Returns the settings that are compared: all but the description of the source.

    The hash of the training texts is compared instead, so files may be moved.
    """
    return {name: value for name, value in settings.items() if name != "source"}
