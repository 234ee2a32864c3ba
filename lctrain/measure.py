"""Measurements of lctrain-eval: perplexity by context length, and passkey retrieval."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lctrain.config import AttentionConfig, EvalConfig

if TYPE_CHECKING:
    import torch

    from lctrain.data import TokenizedDocument
    from lctrain.eval import BeginTokens, Extension, MethodComparison, PasskeyTable, PerplexityTable

log = logging.getLogger(__name__)


def measure_perplexity(
    config: EvalConfig,
    model: Any,
    documents: Sequence[TokenizedDocument],
    methods: Sequence[str],
    begin: BeginTokens,
) -> PerplexityTable | MethodComparison:
    """Measures perplexity by context length, of the model as it is or with each method.

    Args:
        config: Settings of the evaluation.
        model: A transformers causal LM.
        documents: Tokenized documents.
        methods: Methods of reading beyond the window; empty for none.
        begin: Begin tokens of the windows.
    """
    from lctrain.eval import (
        compare_methods,
        longest_documents,
        perplexity_by_length,
        trained_window,
    )

    chosen = longest_documents(documents, config.documents, config.document_tokens)
    name = Path(config.model.name_or_path).name
    if methods:
        window = trained_window(model, config.window)
        return compare_methods(
            model,
            chosen,
            config.lengths,
            make_extensions(methods, window, config.attention),
            max_tokens=config.forward_tokens(),
            stride=config.stride,
            min_context=config.min_context,
            begin=begin,
            progress=True,
            name=name,
        )
    patch(model, config.attention, config.window)
    return perplexity_by_length(
        model,
        chosen,
        config.lengths,
        max_tokens=config.forward_tokens(),
        overlap=config.overlap,
        stride=config.stride,
        min_context=1 if config.min_context is None else config.min_context,
        begin=begin,
        progress=True,
        name=name,
    )


def find_passkeys(
    config: EvalConfig,
    model: Any,
    tokenizer: Any,
    documents: Sequence[TokenizedDocument],
    extensions: Sequence[Extension],
) -> PasskeyTable:
    """Hides passkeys in the documents, and counts those that the model finds with each method."""
    from lctrain.data.passkey import PasskeyFormat
    from lctrain.eval import passkey_retrieval

    options = config.passkey
    return passkey_retrieval(
        model,
        PasskeyFormat.of(tokenizer),
        [document.input_ids for document in documents],
        options.lengths or config.lengths,
        extensions,
        max_tokens=config.forward_tokens(),
        depths=options.depths,
        keys_per_cell=options.keys_per_cell,
        seed=options.seed,
        progress=True,
        name=Path(config.model.name_or_path).name,
    )


def make_extensions(
    methods: Sequence[str], window: int, attention: AttentionConfig | None
) -> list[Extension]:
    """Returns an Extension per method, with the options of the method's attention.

    Options of dual chunk attention apply to the dual chunk methods only.

    Args:
        methods: Names of the methods.
        window: Length of the texts that the model was trained on, in tokens.
        attention: Settings of the attention; None for the defaults.
    """
    from lctrain.eval import DUAL_CHUNK_METHODS, Extension

    attention = attention or AttentionConfig()
    shared = AttentionConfig(
        dropout=attention.dropout, deterministic=attention.deterministic, backend=attention.backend
    ).options()
    return [
        Extension(method, window, attention.options() if method in DUAL_CHUNK_METHODS else shared)
        for method in methods
    ]


def method_of(attention: AttentionConfig | None) -> str:
    """Returns the method to which an attention belongs: "dual_chunk", or "plain" for all others."""
    return "dual_chunk" if attention is not None and attention.name == "dual_chunk" else "plain"


def patch(model: Any, attention: AttentionConfig | None, window: int | None) -> None:
    """Patches the model's attention, so that the model reads packs.

    If flash attention does not support the model, the model is not patched and a warning is logged:
    evaluation then uses padded rows, which changes its speed but not its results.

    Args:
        model: A transformers causal LM.
        attention: Settings of the attention; None does not patch the model.
        window: Window of dual chunk attention, in tokens, unless `attention` sets one.

    Raises:
        ValueError: if dual chunk or differential attention does not support the model.
    """
    from lctrain.models import patch_model

    if attention is None:
        return
    options = attention.options()
    if attention.name == "dual_chunk" and window is not None:
        options = {"window": window, **options}
    try:
        patch_model(model, attention=attention.name, **options)
    except ValueError as error:
        if attention.name != "flash":
            raise
        log.warning("Evaluating the model as it is, on padded rows instead of packs: %s", error)


def pick_device(name: str) -> torch.device:
    """Returns the device with this name; "auto" is a GPU if there is one, else the CPU.

    Raises:
        ValueError: if this machine does not have the device.
    """
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"device must be one that this machine has, got {name!r} ({reason}). Try auto."
        ) from error
    return device
