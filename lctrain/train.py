"""The command `lctrain-train`: trains a causal LM on packed documents, from a Hydra config."""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lctrain.allocator import expand_segments
from lctrain.command import Command
from lctrain.config import TrainConfig, to_dataclass
from lctrain.config.adapter import require_packages
from lctrain.preflight import (
    check_attention,
    check_chat_tokenizer,
    check_checkpoint,
    check_data_files,
    check_logger_folders,
    check_model,
    check_passkey_model,
    check_reference,
    check_targets,
)
from lctrain.run.launch import check_launch
from lctrain.run.rank import is_rank_zero
from lctrain.run.start import folder_to_go_on_in, was_requeued, without_empty_folder
from lctrain.schemas import register_schemas

if TYPE_CHECKING:
    import lightning.pytorch as pl
    from omegaconf import DictConfig

    from lctrain.closing import Closing
    from lctrain.module import LongContextModule
    from lctrain.report import RunReport
    from lctrain.run.folder import RunFolder
    from lctrain.run.signals import StopSignals

log = logging.getLogger(__name__)


def train(config: TrainConfig) -> RunReport:
    """Runs one training from beginning to end.

    Args:
        config: Settings of the run.

    Returns:
        The report, with results and paths.

    Raises:
        ValueError: before training, if the configuration, the data, the checkpoint or the folder
            cannot be used. Errors that do not depend on the data are raised before it is read.
        NonFiniteLossError: if the loss is NaN or infinite.
        IsolationError: if documents of a pack influence one another.
        StorageError: if a disk is full, a quota is used up, or a file system is read-only.
        SystemExit: if a signal stopped the run. The status is 128 + the signal's number.
    """
    from lctrain.run.signals import StopSignals, ends_in_order

    output_dir = Path(config.paths.output_dir).absolute()
    started = time.monotonic()
    with StopSignals() as signals, ends_in_order(signals, output_dir / "checkpoints"):
        return _train(config, output_dir, signals, started)


def _train(
    config: TrainConfig, output_dir: Path, signals: StopSignals, started: float
) -> RunReport:
    """Checks the configuration, finds the checkpoint, locks the folder, and trains."""
    from lctrain.build import instantiate_all, resolve_precision
    from lctrain.callbacks.checkpoint import check_writable, step_checkpoints
    from lctrain.run.identity import identity_of
    from lctrain.run.length import nothing_left
    from lctrain.run.log_file import log_file
    from lctrain.run.resume import find_checkpoint
    from lctrain.run.start import claim_folder
    from lctrain.run.storage import storage_errors

    if is_rank_zero():
        check_writable(output_dir)
    check_before_data(config)
    callbacks = list(instantiate_all("callbacks", config.callbacks).values())
    directories = [callback.directory for callback in step_checkpoints(callbacks)]
    if is_rank_zero():
        for directory in directories:
            check_writable(directory)
    runs_dir = Path(config.paths.runs_dir)
    identity = identity_of(config, trainer__precision=resolve_precision(config.trainer))
    checkpoint = find_checkpoint(config.ckpt_path, directories, runs_dir, identity)
    warning = None if checkpoint is None else nothing_left(config.trainer, checkpoint)
    with (
        claim_folder(output_dir, checkpoint, identity, runs_dir, directories) as folder,
        log_file(output_dir / "train.log", writes=is_rank_zero()),
        storage_errors(output_dir, "go on with ckpt_path=last"),
    ):
        if warning is not None and is_rank_zero():
            log.warning("%s", warning)
        callbacks += run_callbacks(config, folder, identity, signals, started)
        return _run(config, folder, callbacks, checkpoint, signals)


def check_before_data(config: TrainConfig) -> None:
    """Raises ValueError if model, attention, optimizer or evaluation cannot be used.

    The checks do not read the data.
    """
    from lctrain.build import check_model as check_model_builds
    from lctrain.eval import check_lengths
    from lctrain.optim import learning_rate_factor

    check_reference(config.memory)
    if config.evaluation.enabled:
        check_lengths(config.evaluation.lengths, config.evaluation.forward_tokens())
    if config.trainer.max_steps > 0:
        learning_rate_factor(config.optim, config.trainer.max_steps)  # raises for a long warmup
    lengths = {"data.max_tokens": config.data.max_tokens}
    if config.evaluation.enabled:
        lengths["evaluation.lengths"] = max(config.evaluation.lengths)
        if config.evaluation.passkey_lengths and config.evaluation.passkey_model is None:
            lengths["evaluation.passkey_lengths"] = max(config.evaluation.passkey_lengths)
    methods = config.evaluation.methods if config.evaluation.enabled else []
    check_model_builds(
        config.model,
        config.attention,
        lengths,
        methods,
        config.adapter,
        config.trainer,
        config.task,
    )


def run_callbacks(
    config: TrainConfig,
    folder: RunFolder,
    identity: Mapping[str, Any],
    signals: StopSignals,
    started: float,
) -> list[pl.Callback]:
    """Returns the callbacks that lctrain adds to those of the configuration.

    They write run.json, stop the run at a signal, limit the number of steps to its time budget, and
    check the settings of the closing evaluation.
    """
    from lctrain.callbacks.budget import StepBudget
    from lctrain.callbacks.run_record import RunRecord
    from lctrain.callbacks.stop import StopAtSignal
    from lctrain.closing_checks import CheckClosing
    from lctrain.run.identity import plain_values

    callbacks = [RunRecord(folder, identity, plain_values(config)), StopAtSignal(signals)]
    if config.trainer.budget_s is not None:
        callbacks.append(StepBudget(config.trainer.budget_s, started, folder))
    if config.evaluation.enabled:
        callbacks.append(CheckClosing(config.evaluation))
    return callbacks


def _run(
    config: TrainConfig,
    folder: RunFolder,
    callbacks: list[pl.Callback],
    checkpoint: Path | None,
    signals: StopSignals,
) -> RunReport:
    """Trains, exports and evaluates the model, and writes the report into the run's folder."""
    import lightning.pytorch as pl

    from lctrain.build import build_datamodule, build_trainer, instantiate_all, model_factory
    from lctrain.distributed import Topology
    from lctrain.loggers import closing, with_run_id
    from lctrain.memory.remedies import with_remedies
    from lctrain.module import LongContextModule
    from lctrain.next_command import evaluation_arguments
    from lctrain.report import summarize
    from lctrain.run.log_file import log_to_file

    pl.seed_everything(config.seed, verbose=False)
    datamodule = build_datamodule(config.data, config.model, config.task)
    module = LongContextModule(
        model_factory(config.model, config.adapter, config.task),
        config.optim,
        config.attention,
        seed=config.seed,
        memory=config.memory,
        task=config.task,
    )
    loggers = list(instantiate_all("logger", with_run_id(config.logger, folder.id)).values())
    trainer = build_trainer(config.trainer, callbacks, loggers, str(folder.path))
    signals.end_others = lambda number: end_launched_ranks(trainer, number)
    if is_rank_zero():
        log.info("Run %s in %s", folder.id, folder.path)
    with closing(loggers):
        if checkpoint is None:
            trainer.validate(module, datamodule, verbose=False)
        elif is_rank_zero():
            log.info("Resuming from %s", checkpoint)
        with with_remedies(config, module):
            trainer.fit(module, datamodule, ckpt_path=checkpoint, weights_only=True)
        count_last_step(trainer)
        trainer.validate(module, datamodule, verbose=False)
        found = export_and_evaluate(config, trainer, module, folder.path)
    arguments = evaluation_arguments(config) if config.task == "causal" else None
    report = summarize(trainer, module, found, folder.path, arguments)
    if Topology.of(trainer).is_first:
        report.save(folder.path)
        print(report, flush=True)
        log_to_file(f"Report\n{report}")
    return report


def count_last_step(trainer: pl.Trainer) -> None:
    """Corrects Lightning's counts if `fit` resumed a run that was already finished.

    Lightning counts a step for the loggers after it has saved the step's checkpoint, and counts it
    when training resumes. In a finished run no training follows, so the last validation would be
    logged in the row of the last step. This function counts the step and the epoch instead.

    Args:
        trainer: Trainer that has run `fit`.
    """
    if trainer.fit_loop.restarting:
        trainer.fit_loop.epoch_loop._batches_that_stepped += 1
        trainer.fit_loop.epoch_progress.increment_completed()


def end_launched_ranks(trainer: pl.Trainer, number: int) -> None:
    """Sends a signal to the other ranks on this machine that Lightning started.

    Args:
        trainer: Trainer of this process.
        number: Number of the signal.
    """
    launcher = trainer.strategy.launcher
    if launcher is not None and getattr(launcher, "procs", None):
        launcher.kill(number)


def export_and_evaluate(
    config: TrainConfig, trainer: pl.Trainer, module: LongContextModule, output_dir: Path
) -> Closing:
    """Exports and evaluates the trained model on all ranks; rank 0 writes the files.

    Each rank writes the shards of a sharded model. The ranks share the evaluated documents.
    """
    from lctrain.closing import NOTHING, evaluate_at_end
    from lctrain.distributed import Topology
    from lctrain.distributed.sharding import through_root
    from lctrain.export import export_model

    closing = NOTHING
    paths: dict[str, Path] = {}
    if config.export:  # before the evaluation, whose failure must not lose the model
        data = trainer.datamodule
        paths["model"] = export_model(
            module,
            data.tokenizer,
            output_dir / "model",
            data.longest_document,
            merge=config.adapter is not None and config.adapter.merge,
            writes=Topology.of(trainer).is_first,
        )
    if config.evaluation.enabled:
        closing = through_root(
            trainer, evaluate_at_end, config.evaluation, trainer, module, output_dir
        )
    trainer.strategy.barrier("lctrain-train")
    return replace(closing, paths=paths | closing.paths)


def quiet_lightning() -> None:
    """Hides Lightning's informational messages, and warnings that users need not act on."""
    import lightning.pytorch  # noqa: F401 (its import sets the levels)

    from lctrain.run.length import NOTHING_LEFT

    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*LeafSpec.*is deprecated")
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=NOTHING_LEFT)  # the run has logged it earlier


COMMAND = Command(
    "lctrain-train",
    "train",
    """\
lctrain-train trains a causal language model on packed documents.

  lctrain-train                                      a small model on this machine's Python library
  lctrain-train data=text 'data.files=[books/*.txt]' on text of your own
  lctrain-train model=hf model.name_or_path=NAME 'data.tokenizer=${model.name_or_path}'
  lctrain-train data=chat 'data.files=[chats/*.jsonl]' model=hf model.name_or_path=NAME show=3
                                                     prints 3 conversations, what is trained green
  lctrain-train ckpt_path=last                       goes on with a run that was interrupted
""",
)


def main() -> None:
    """Entry point of the console script."""
    COMMAND.run(run)


def run(config: DictConfig) -> None:
    """Trains with the configuration that Hydra composed."""
    from hydra.core.hydra_config import HydraConfig

    with without_empty_folder(HydraConfig.get().runtime.output_dir):
        if config.show:
            show(to_dataclass(config, TrainConfig))
            return
        if config.memory.name != "none":
            expand_segments()
        if config.memory.plan:
            print_plan(to_dataclass(config, TrainConfig))
            return
        plain = in_its_folder(config)

        from lctrain.process_group import leave_at_exit

        quiet_lightning()
        leave_at_exit()
        train(plain)


def show(config: TrainConfig) -> None:
    """Prints training documents with the tokens to train on, and trains nothing."""
    check_before_loading(config)

    from lctrain.build import build_datamodule
    from lctrain.show import show_documents

    quiet_lightning()
    datamodule = build_datamodule(config.data, config.model)
    datamodule.setup()
    show_documents(datamodule, config.show)


def print_plan(config: TrainConfig) -> None:
    """Prints the memory plan of a run; needs no data, no weights and no GPU."""
    check_before_loading(config)

    from lctrain.build import plan_memory

    quiet_lightning()
    print(plan_memory(config))


def in_its_folder(config: DictConfig) -> TrainConfig:
    """Returns the settings of the run, with the output folder of the run that it resumes.

    Args:
        config: Configuration that Hydra composed. An output folder that the user named is kept.
    """
    from hydra.core.hydra_config import HydraConfig

    plain = to_dataclass(config, TrainConfig)
    check_before_loading(plain)
    given = [*HydraConfig.get().overrides.task, *HydraConfig.get().overrides.hydra]
    named = ("paths.output_dir=", "hydra.run.dir=")  # Lightning sets them for the other ranks, too
    is_named = is_rank_zero() and any(text.lstrip("+").startswith(named) for text in given)
    is_new = plain.ckpt_path is None and not was_requeued()
    if is_named or is_new:
        _say(f"Loading PyTorch and Lightning. The run writes to {plain.paths.output_dir}")
        return plain
    _say("Loading PyTorch and Lightning.")  # they are needed to find the checkpoint's folder

    from lctrain.build import resolve_precision
    from lctrain.run.identity import identity_of
    from lctrain.run.resume import checkpoints_in

    identity = identity_of(plain, trainer__precision=resolve_precision(plain.trainer))
    own = Path(plain.paths.output_dir) / "checkpoints"
    goes_on = plain.ckpt_path == "last" and checkpoints_in(own)  # a multirun's job is repeated
    folder = None if goes_on else folder_to_go_on_in(plain, identity)
    if folder is None:
        _say(f"The run writes to {plain.paths.output_dir}")
        return plain
    with suppress(OSError):
        Path(plain.paths.output_dir).rmdir()
    _say(f"The run goes on in {folder}")
    config.paths.output_dir = str(folder)
    if plain.ckpt_path is None:
        config.ckpt_path = "last"
    return to_dataclass(config, TrainConfig)


def _say(text: str) -> None:
    """Logs a line on rank 0."""
    if is_rank_zero():
        log.info("%s", text)


def check_before_loading(config: TrainConfig) -> None:
    """Raises ValueError if a setting of the run is wrong. It does not import torch."""
    check_launch(config.trainer.devices_per_machine(), config.trainer.num_nodes)
    check_attention(config.attention)
    check_data_files(config.data)
    check_model(config.model, config.data.tokenizer)
    check_chat_tokenizer(config.data, config.model)
    check_reference(config.memory)
    if config.adapter is not None:
        require_packages(config.adapter)
    check_passkey_model(config.evaluation)
    check_checkpoint(config)
    check_targets("callbacks", config.callbacks)
    check_targets("logger", config.logger)
    check_logger_folders(config.logger, config.paths.output_dir)


register_schemas()

if __name__ == "__main__":
    main()
