"""`lctrain-train`: trains a causal LM on packed documents, from a Hydra config."""

from __future__ import annotations

import logging
import os
import signal
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from lctrain.command import Command
from lctrain.config import EvaluationConfig, TrainConfig, to_dataclass
from lctrain.schemas import register_schemas

if TYPE_CHECKING:
    import lightning.pytorch as pl
    from omegaconf import DictConfig

    from lctrain.module import LongContextModule
    from lctrain.report import RunReport

log = logging.getLogger(__name__)

SIGTERM_STATUS = 128 + signal.SIGTERM
"""What a shell reports of a process that SIGTERM ended."""


def train(config: TrainConfig) -> RunReport:
    """Runs one training from beginning to end.

    Args:
        config: Everything, as plain dataclasses.

    Returns:
        What was reached and where it was written.

    Raises:
        ValueError: if the configuration, the data or the checkpoint does not fit: before training,
            and before the data are read wherever they have no part in it.
        NonFiniteLossError: if the loss became NaN or infinite.
        IsolationError: if documents of a pack mix.
        SystemExit: with status 143 if SIGTERM stopped the run.
    """
    import lightning.pytorch as pl
    from lightning.pytorch.utilities.exceptions import SIGTERMException

    from lctrain.build import (
        build_datamodule,
        build_trainer,
        check_model,
        instantiate_all,
        model_factory,
    )
    from lctrain.callbacks.checkpoint import StepCheckpoint, check_writable, find_checkpoint
    from lctrain.eval import check_lengths
    from lctrain.loggers import closing
    from lctrain.module import LongContextModule
    from lctrain.optim import learning_rate_factor
    from lctrain.report import summarize

    output_dir = Path(config.paths.output_dir).absolute()
    check_writable(output_dir)
    if config.evaluation.enabled:
        check_lengths(config.evaluation.lengths, forward_tokens(config.evaluation))
    if config.trainer.max_steps > 0:
        learning_rate_factor(config.optim, config.trainer.max_steps)  # raises for a long warmup
    lengths = {"data.max_tokens": config.data.max_tokens}
    if config.evaluation.enabled:
        lengths["evaluation.lengths"] = max(config.evaluation.lengths)
    check_model(config.model, config.attention, lengths)
    pl.seed_everything(config.seed, verbose=False)

    datamodule = build_datamodule(config.data, config.model)
    module = LongContextModule(
        model_factory(config.model), config.optim, config.attention, seed=config.seed
    )
    callbacks = list(instantiate_all("callbacks", config.callbacks).values())
    for callback in callbacks:
        if isinstance(callback, StepCheckpoint):
            check_writable(callback.directory)
    loggers = list(instantiate_all("logger", config.logger).values())
    trainer = build_trainer(config.trainer, callbacks, loggers, str(output_dir))
    checkpoint = find_checkpoint(config.ckpt_path, callbacks, Path(config.paths.runs_dir))

    with closing(loggers):
        try:
            if checkpoint is None:
                trainer.validate(module, datamodule, verbose=False)
            else:
                log.info("Resuming from %s", checkpoint)
            trainer.fit(module, datamodule, ckpt_path=checkpoint, weights_only=False)
            trainer.validate(module, datamodule, verbose=False)
        except SIGTERMException as stop:
            # Lightning ends the process with status 0, which a job script takes for success.
            print(
                f"Stopped by SIGTERM at step {trainer.global_step}. The same command with "
                "ckpt_path=last goes on from the last checkpoint, if one was written by then "
                "(callbacks.checkpoint.every_n_steps).",
                file=sys.stderr,
                flush=True,
            )
            raise SystemExit(SIGTERM_STATUS) from stop
        paths, perplexities = export_and_evaluate(config, trainer, module, output_dir)
    report = summarize(trainer, module, perplexities, paths)
    if trainer.is_global_zero:
        print(report, flush=True)
    return report


def export_and_evaluate(
    config: TrainConfig, trainer: pl.Trainer, module: LongContextModule, output_dir: Path
) -> tuple[dict[str, Path], tuple[tuple[int, float], ...]]:
    """Writes the trained model and its perplexities, on rank 0; the others wait.

    Returns:
        The files by name and [(context length, perplexity)].
    """
    from lctrain.export import export_model

    perplexities: tuple[tuple[int, float], ...] = ()
    paths: dict[str, Path] = {}
    if trainer.is_global_zero:
        if config.export:  # first: whatever happens in the evaluation, the model is there
            data = trainer.datamodule
            paths["model"] = export_model(
                module, data.tokenizer, output_dir / "model", data.longest_document
            )
        if config.evaluation.enabled:
            perplexities, files = evaluate_by_length(config.evaluation, trainer, module, output_dir)
            paths.update(files)
    trainer.strategy.barrier("lctrain-train")
    return paths, perplexities


def evaluate_by_length(
    config: EvaluationConfig, trainer: pl.Trainer, module: LongContextModule, output_dir: Path
) -> tuple[tuple[tuple[int, float], ...], dict[str, Path]]:
    """Measures held-out perplexity by context length; writes, plots and logs it.

    Args:
        config: Lengths and number of documents.
        trainer: After `fit`.
        module: With the trained model.
        output_dir: Folder of the run.

    Returns:
        [(context length, perplexity)] and the files by name.
    """
    from lctrain.eval import longest_documents, perplexity_by_length
    from lctrain.loggers import log_evaluation

    documents = longest_documents(trainer.datamodule.held_out_documents(), config.documents)
    if not documents or len(documents[0].input_ids) < 2:
        log.warning(
            "No perplexity by length: data.held_out_fraction holds out no document of two tokens."
        )
        return (), {}
    if config.document_tokens is not None:
        documents = [
            replace(document, input_ids=document.input_ids[: config.document_tokens])
            for document in documents
        ]
    module.to(trainer.strategy.root_device)
    with trainer.precision_plugin.forward_context():
        table = perplexity_by_length(
            module.model,
            documents,
            config.lengths,
            max_tokens=forward_tokens(config),
            progress=trainer.progress_bar_callback is not None,
        )
    files = table.save(output_dir / "perplexity")
    for logger in trainer.loggers:
        log_evaluation(logger, table.as_dicts(), files["png"])
    paths = {"perplexity table": files["csv"], "perplexity plot": files["png"]}
    return tuple((row.length, row.perplexity) for row in table.rows), paths


def forward_tokens(config: EvaluationConfig) -> int:
    """Tokens per forward pass of the evaluation."""
    return max([2, *config.lengths]) if config.max_tokens is None else config.max_tokens


def quiet_lightning() -> None:
    """Leaves out what Lightning says about itself, and a deprecation inside of it."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*LeafSpec.*is deprecated")
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")


COMMAND = Command(
    "lctrain-train",
    "train",
    """\
lctrain-train trains a causal language model on packed documents.

  lctrain-train                                      a small model on this machine's Python library
  lctrain-train data=text 'data.files=[books/*.txt]' on text of your own
  lctrain-train model=hf model.name_or_path=NAME 'data.tokenizer=${model.name_or_path}'
  lctrain-train ckpt_path=last                       goes on with a run that was interrupted
""",
)


def main() -> None:
    """Entry point of the console script."""
    COMMAND.run(run)


def run(config: DictConfig) -> None:
    """Trains with what Hydra composed, and keeps that beside the results."""
    from omegaconf import OmegaConf

    plain = to_dataclass(config, TrainConfig)
    if os.environ.get("LOCAL_RANK", "0") == "0":
        folder = Path(plain.paths.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        OmegaConf.save(config, folder / "config.yaml", resolve=True)

    from lctrain.process_group import leave_at_exit

    quiet_lightning()
    leave_at_exit()
    train(plain)


register_schemas()

if __name__ == "__main__":
    main()
