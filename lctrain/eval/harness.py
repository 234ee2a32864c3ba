"""harness_model: a patched model as lm-evaluation-harness takes it, without lasting traces."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from torch import nn

from lctrain import models
from lctrain.attention import is_patched
from lctrain.eval.untouched import untouched

PACKAGE = "lm_eval"


@contextmanager
def harness_model(
    model: nn.Module,
    tokenizer: Any,
    attention: str | None = "flash",
    *,
    max_length: int | None = None,
    batch_size: int = 1,
    **options: Any,
) -> Iterator[Any]:
    """Context manager that gives lm-evaluation-harness a model with lctrain's attention.

    The harness switches a model to eval mode for good, seeds every random generator, and gives a
    tokenizer a padding token. At the end of the context, training modes, random numbers and
    attention are as before; the tokenizer is copied.

        with harness_model(model, tokenizer) as lm:
            lm_eval.simple_evaluate(model=lm, tasks=["my_task"])

    Args:
        model: A transformers causal LM.
        tokenizer: Its tokenizer.
        attention: Attention as in `lctrain.patch_model`; None, or a model that is patched already,
            leaves it as it is.
        max_length: Largest number of tokens of a prompt with its answer; None for that of the
            model's config.
        batch_size: Number of prompts in a forward pass.
        options: Options of the attention.

    Yields:
        The `HFLM` of the harness.

    Raises:
        ValueError: if the package is not installed, or the model does not support the attention.
    """
    if find_spec(PACKAGE) is None:
        raise ValueError(
            "harness must have the package lm_eval, got none. Install it: pip install lm_eval."
        )
    as_it_is = attention is None or is_patched(model)
    patched = nullcontext() if as_it_is else models.patch_model(model, str(attention), **options)
    with untouched(model), patched:
        yield import_module(f"{PACKAGE}.models.huggingface").HFLM(
            pretrained=model,
            tokenizer=copy.deepcopy(tokenizer),
            max_length=max_length,
            batch_size=batch_size,
        )
