"""Checks that a pretrained model gets the token ids of the tokenizer that it was trained with."""

from __future__ import annotations

import os
from typing import Any

from lctrain.data.faults import warn_first_rank
from lctrain.data.tokenizer import load_tokenizer, same_ids


def require_own_tokenizer(module: Any) -> None:
    """Raises a ValueError if a LightningModule has, or will load, pretrained weights.

    A data module calls this function before it trains a new tokenizer, whose ids would mean other
    tokens than those of the pretrained model.

    Args:
        module: The LightningModule, with any models inside; None is accepted.
    """
    name = pretrained_name(module)
    if name is not None:
        raise ValueError(
            f"tokenizer must be the one that the weights of {name} were trained with, got none: a "
            f"tokenizer trained on the data gives every text other ids. Pass tokenizer={name!r} to "
            "the data module, or the tokenizer that you mean."
        )


def warn_of_other_ids(module: Any, tokenizer: Any) -> None:
    """Warns if a tokenizer's ids mean other tokens than those of the pretrained model's own.

    There is no warning if this cannot be compared: without pretrained weights, or without a
    tokenizer.

    Args:
        module: The LightningModule, with any models inside; None is accepted.
        tokenizer: Tokenizer of the token ids, its name, or None.
    """
    name = pretrained_name(module)
    if tokenizer is None or name is None or name == _name_of(tokenizer):
        return
    try:
        used = load_tokenizer(os.fspath(tokenizer)) if _is_path(tokenizer) else tokenizer
        own = load_tokenizer(name)
    except ValueError:
        return
    if not same_ids(own, used):
        warn_first_rank(
            f"The tokenizer's ids mean other tokens than those that {name} was trained on. Pass "
            f"tokenizer={name!r} to the data module, unless you mean to give the weights other ids."
        )


def pretrained_name(module: Any) -> str | None:
    """Returns the name or path of the pretrained weights that a module holds or will load.

    Args:
        module: A LightningModule or a model; None is accepted. If its attribute `pretrained_name`
            is a string, it is the result.

    Returns:
        The name; None if no model inside was loaded by transformers' from_pretrained.
    """
    planned = getattr(module, "pretrained_name", None)
    if isinstance(planned, str):
        return planned
    for part in module.modules() if hasattr(module, "modules") else ():
        name = getattr(part, "name_or_path", None)
        if isinstance(name, str) and name and _is_loaded(part):
            return name
    return None


def _is_path(tokenizer: Any) -> bool:
    return isinstance(tokenizer, (str, os.PathLike))


def _name_of(tokenizer: Any) -> Any:
    """Returns a tokenizer's name or path: the argument itself, or the tokenizer's attribute."""
    return os.fspath(tokenizer) if _is_path(tokenizer) else getattr(tokenizer, "name_or_path", None)


def _is_loaded(model: Any) -> bool:
    """Returns whether from_pretrained loaded a model's weights, and not only its config."""
    return hasattr(model, "_weight_conversions") or any(
        getattr(parameter, "_is_hf_initialized", False) for parameter in model.parameters()
    )
