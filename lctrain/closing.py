"""The evaluation at the end of a training run: perplexity by context length, and passkeys."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import numpy as np

from lctrain.config import EvaluationConfig
from lctrain.data.passkey import PasskeyFormat
from lctrain.distributed import Topology
from lctrain.eval import (
    Extension,
    begin_tokens,
    compare_methods,
    longest_documents,
    masked_perplexity_by_length,
    passkey_retrieval,
    perplexity_by_length,
    trained_window,
)
from lctrain.eval.findings import beyond_window, context_gain, keys_found
from lctrain.eval.shipped import PasskeyModel, load_passkey_model
from lctrain.loggers import log_evaluation
from lctrain.module import LongContextModule

if TYPE_CHECKING:
    from lctrain.data import TokenizedDocument

from lctrain.warn import warn_once

log = logging.getLogger(__name__)

DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True)
class Closing:
    """Results of the evaluation at the end of a run.

    Attributes:
        perplexities: Pairs (context length, perplexity). If methods are compared, those of the last
            method.
        findings: Sentences about the results, for the report, by name.
        paths: Paths of the written files, by name. Rank 0 writes them.
    """

    perplexities: tuple[tuple[int, float], ...]
    findings: dict[str, str]
    paths: dict[str, Path]


NOTHING = Closing((), {}, {})


def evaluate_at_end(
    config: EvaluationConfig, trainer: pl.Trainer, module: LongContextModule, output_dir: Path
) -> Closing:
    """Evaluates the trained model on held-out documents, and writes, plots and logs the results.

    All ranks must call this function; they share the documents, and rank 0 writes the files.

    Args:
        config: Settings of the evaluation.
        trainer: Trainer that has run `fit`.
        module: Module with the trained model.
        output_dir: Folder of the run.
    """
    held_out = trainer.datamodule.held_out_documents()
    documents = longest_documents(held_out, config.documents, config.document_tokens)
    if not documents or len(documents[0].input_ids) < 2:
        if Topology.of(trainer).is_first:
            warn_once(
                log,
                "No perplexity by length: data.held_out_fraction holds out no document of two "
                "tokens.",
            )
        return NOTHING
    module.to(trainer.strategy.root_device)
    with trainer.precision_plugin.forward_context():
        if not config.methods:
            return measure_as_trained(config, documents, trainer, module, output_dir)
        # The patch of training is removed, since each method patches the model itself.
        if module.patch_handle is not None:
            module.patch_handle.unpatch()
            module.patch_handle = None
        window = trained_window(module.model, None)
        extensions = [Extension(method, window) for method in config.methods]
        closing = compare_beyond_window(config, documents, extensions, trainer, module, output_dir)
        if not config.passkey_lengths:
            return closing
        return find_keys(config, held_out, trainer, module, output_dir, closing)


def measure_as_trained(
    config: EvaluationConfig,
    documents: Sequence[TokenizedDocument],
    trainer: pl.Trainer,
    module: LongContextModule,
    output_dir: Path,
) -> Closing:
    """Measures perplexity by context length, with the attention that training used.

    For a masked language model it is the perplexity of masked tokens.
    """
    shared: dict[str, Any] = {
        "max_tokens": config.forward_tokens(),
        "progress": _shows_progress(trainer),
        "ranks": Topology.of(trainer),
    }
    read = module.model, documents, config.lengths
    if module.task == "mlm":
        table = masked_perplexity_by_length(*read, trainer.datamodule.masking, **shared)
    else:
        begin = begin_tokens(trainer.datamodule.tokenizer, config.begin_token)
        table = perplexity_by_length(*read, begin=begin, **shared)
    files = _save(table, output_dir / "perplexity", trainer)
    for logger in trainer.loggers if Topology.of(trainer).is_first else ():
        log_evaluation(logger, table.as_dicts(), files["png"])
    return Closing(
        tuple((row.length, row.perplexity) for row in table.rows),
        {"context": context_gain(table.rows)},
        _named(files, "perplexity"),
    )


def compare_beyond_window(
    config: EvaluationConfig,
    documents: Sequence[TokenizedDocument],
    extensions: Sequence[Extension],
    trainer: pl.Trainer,
    module: LongContextModule,
    output_dir: Path,
) -> Closing:
    """Measures perplexity by context length, for each method of reading beyond the window."""
    comparison = compare_methods(
        module.model,
        documents,
        config.lengths,
        extensions,
        max_tokens=config.forward_tokens(),
        stride=config.stride,
        begin=begin_tokens(trainer.datamodule.tokenizer, config.begin_token),
        progress=_shows_progress(trainer),
        name=output_dir.parent.name,
        ranks=Topology.of(trainer),
    )
    files = _save(comparison, output_dir / "perplexity", trainer)
    for logger in trainer.loggers if Topology.of(trainer).is_first else ():
        log_evaluation(logger, comparison.as_dicts(), files["png"])
    if Topology.of(trainer).is_first:
        print(comparison, flush=True)
    last = comparison.tables[config.methods[-1]]
    return Closing(
        tuple((row.length, row.perplexity) for row in last.rows),
        {
            "context": context_gain(last.rows, comparison.window),
            "beyond": beyond_window(comparison),
        },
        _named(files, "perplexity"),
    )


def find_keys(
    config: EvaluationConfig,
    held_out: Sequence[TokenizedDocument],
    trainer: pl.Trainer,
    module: LongContextModule,
    output_dir: Path,
    closing: Closing,
) -> Closing:
    """Runs the passkey test on held-out text; returns `closing` with the test's results added."""
    tokenizer = trainer.datamodule.tokenizer
    documents = [document.input_ids for document in held_out]
    if config.passkey_model is None:
        reader = PasskeyModel(module.model, tokenizer, output_dir.parent.name)
    else:
        reader = load_passkey_model(config.passkey_model)
        reader.model.to(trainer.strategy.root_device)
        chosen = longest_documents(held_out, config.documents, config.document_tokens)
        texts = [tokenizer.decode(d.input_ids, skip_special_tokens=True) for d in chosen]
        encoded = reader.tokenizer(texts, verbose=False)["input_ids"]
        documents = [np.array(ids) for ids in encoded if len(ids)]
    window = trained_window(reader.model, None)
    table = passkey_retrieval(
        reader.model,
        PasskeyFormat.of(reader.tokenizer),
        documents,
        config.passkey_lengths,
        [Extension(method, window) for method in config.methods],
        max_tokens=max(config.forward_tokens(), *config.passkey_lengths),
        depths=DEPTHS,
        keys_per_cell=config.keys_per_cell,
        progress=_shows_progress(trainer),
        name=reader.name,
        ranks=Topology.of(trainer),
    )
    files = _save(table, output_dir / "passkeys", trainer)
    if Topology.of(trainer).is_first:
        print(table, flush=True)
    found = keys_found(table)
    if config.passkey_model is not None:
        found += f" (by {reader.name}; not by the model of this run)"
    return Closing(
        closing.perplexities,
        closing.findings | {"keys": found},
        closing.paths | _named(files, "passkey"),
    )


def _shows_progress(trainer: pl.Trainer) -> bool:
    """Whether this rank shows a progress bar."""
    return trainer.progress_bar_callback is not None and Topology.of(trainer).is_first


def _save(table: Any, folder: Path, trainer: pl.Trainer) -> dict[str, Path]:
    """Writes the files of a table on rank 0, and returns their paths by kind; {} on other ranks."""
    return dict(table.save(folder)) if Topology.of(trainer).is_first else {}


def _named(files: dict[str, Path], what: str) -> dict[str, Path]:
    """Returns the files of a table under the names that the report uses."""
    kinds = {"table": "csv", "plot": "png"}
    return {f"{what} {name}": files[kind] for name, kind in kinds.items() if kind in files}
