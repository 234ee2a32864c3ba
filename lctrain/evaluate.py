"""The command `lctrain-eval`: evaluates a model of Hugging Face at several context lengths.

    lctrain-eval model=<folder or hub name> data=text 'data.files=[books/*.txt]' split=all \
        lengths=[1024,8192]

With methods, it compares several methods of reading beyond the trained window:

    lctrain-eval model=<folder or hub name> methods=[plain,linear,ntk,yarn,dual_chunk] \
        lengths=[1024,4096,16384] tasks=[perplexity,passkey]
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lctrain.command import Command
from lctrain.config import DEFAULT_TASKS, EvalConfig, PasskeyConfig, to_dataclass
from lctrain.limits import check_lengths, check_methods, require
from lctrain.model_names import check_model_name
from lctrain.preflight import check_evaluation, check_task_methods, check_task_settings, check_tasks
from lctrain.run.rank import is_rank_zero, launched_size
from lctrain.run.start import without_empty_folder
from lctrain.schemas import register_schemas

if TYPE_CHECKING:
    import torch
    from omegaconf import DictConfig

    from lctrain.distributed import Topology
    from lctrain.eval.cells import Cell
    from lctrain.eval.records import Result, Subject, Table
    from lctrain.eval.task import Task

__all__ = ["EvalConfig", "Evaluation", "PasskeyConfig", "evaluate", "main"]


@dataclass(frozen=True)
class Evaluation:
    """Results of an evaluation.

    Attributes:
        tables: Table of each task, by name of the task.
        paths: Paths of the written files by task and kind, such as "perplexity csv".
    """

    tables: dict[str, Table]
    paths: dict[str, Path]

    @property
    def perplexity(self) -> Any:
        """Table of the task perplexity; None if it was not run."""
        return self.tables.get("perplexity")

    @property
    def passkey(self) -> Any:
        """Table of the task passkey; None if it was not run."""
        return self.tables.get("passkey")

    def __str__(self) -> str:
        return "\n\n".join(str(table) for table in self.tables.values())


def evaluate(config: EvalConfig) -> Evaluation:
    """Runs evaluation tasks on a stored model, and writes tables and plots.

    Under torchrun and srun, the ranks share the items of each task, and rank 0 writes the files.

    Args:
        config: Settings of the evaluation.

    Returns:
        The tables, and the paths of the written files, which only rank 0 has.

    Raises:
        ValueError: if a setting is out of range, the data or the model cannot be used, or the
            folder contains a run.
    """
    from lctrain.build import build_datamodule, instantiate_all
    from lctrain.data.given import TokenPreparation
    from lctrain.eval import longest_documents
    from lctrain.eval.device import pick_device
    from lctrain.eval.documents import evaluation_documents
    from lctrain.eval.limits import require_kind
    from lctrain.eval.ranks import device_of, first_rank_first
    from lctrain.eval.records import Subject
    from lctrain.eval.registry import make_task
    from lctrain.eval.resume import open_cells
    from lctrain.loggers import closing, log_evaluation
    from lctrain.models.pretrained import check_dtype, load_pretrained, stored_task
    from lctrain.process_group import launched_ranks

    check_lengths(config.lengths, config.forward_tokens())
    if config.tasks is not None:
        check_tasks(config.tasks, config.own_tasks)
    check_methods(config.methods)
    check_task_methods(config)
    check_task_settings(config)
    longest_documents((), config.documents)  # raises ValueError if the number is below 1
    check_dtype(config.dtype)
    device = pick_device(config.device)
    check_model_name(config.model.name_or_path)
    kind = stored_task(config.model)
    names = DEFAULT_TASKS[kind] if config.tasks is None else config.tasks
    tasks = [make_task(name, config) for name in dict.fromkeys(names)]
    with launched_ranks(launched_size()) as ranks, ExitStack() as opened:
        with ranks.failing_together():
            device = device_of(device, ranks)
            loggers = instantiate_all("logger", config.logger if ranks.is_first else {})
            opened.enter_context(own_folder(config) if ranks.is_first else nullcontext())
            opened.enter_context(closing([*loggers.values()]))
            # The model is loaded before its tokenizer: an error about the name is the model's.
            model = load_pretrained(config.model, config.dtype, task=kind)
            for task in tasks:
                require_kind(task.name, task.reads, model)
            check_kind_settings(config, kind)
            preparation = build_datamodule(config.data, config.model).preparation
            assert not isinstance(preparation, TokenPreparation)  # a config names a source of texts
        with first_rank_first(ranks):
            documents = evaluation_documents(preparation, config.split)
        with ranks.failing_together():
            subject = Subject(
                model=model,
                tokenizer=preparation.given_tokenizer(),
                documents=documents,
                window=config.window,
                name=Path(config.model.name_or_path).name,
            )
            cells = open_cells(config, subject) if ranks.is_first else None
            model.to(device)
        done = ranks.of_first(None if cells is None else dict(cells))
        tables = run_tasks(config, tasks, subject, device, done if cells is None else cells, ranks)
        if cells is None:
            return Evaluation(tables, {})
        files = {name: table.save(config.paths.output_dir) for name, table in tables.items()}
        metrics = {
            key: value for table in tables.values() for key, value in table.metrics().items()
        }
        for logger in loggers.values():
            logger.log_metrics(metrics, 0)
            for name, table in tables.items():
                log_evaluation(logger, table.as_dicts(), files[name]["png"], table.stem)
            logger.finalize("success")
        paths = {f"{name} {kind}": path for name in files for kind, path in files[name].items()}
        paths["report"] = report(config, tasks, tables, files)
    return Evaluation(tables, paths)


def check_kind_settings(config: EvalConfig, kind: str) -> None:
    """Raises ValueError if a setting does not fit the kind of the model, "causal" or "mlm"."""
    fraction = getattr(config.data, "mask_fraction", None)
    require(
        kind == "mlm" or fraction is None,
        f"data.mask_fraction must be null for a causal model, got {fraction}. Leave it out.",
    )
    require(
        kind == "causal" or not config.methods,
        "methods must be empty for a masked language model, got "
        f"{list(config.methods)}. They extend causal attention: leave them out.",
    )


def report(
    config: EvalConfig,
    tasks: Sequence[Task],
    tables: Mapping[str, Table],
    files: Mapping[str, Mapping[str, Path]],
) -> Path:
    """Writes report.html, with all tables and pictures, into the folder of the evaluation."""
    from lctrain.eval.report import Section, write_report
    from lctrain.eval.resume import REPORT
    from lctrain.run.identity import identity_of

    sections = [
        Section(task.title, str(table), table.as_dicts(), files[task.name]["png"])
        for task in tasks
        for table in [tables[task.name]]
    ]
    title = f"Long-context evaluation of {Path(config.model.name_or_path).name}"
    path = Path(config.paths.output_dir) / REPORT
    return write_report(path, title, sections, identity_of(config))


def run_tasks(
    config: EvalConfig,
    tasks: Sequence[Task],
    subject: Subject,
    device: torch.device,
    done: MutableMapping[Cell, Result],
    ranks: Topology,
) -> dict[str, Table]:
    """Computes all cells that are not done, and returns the tables of the tasks by name.

    Every task is checked before the first one is computed. One progress bar counts the tokens to
    read for all tasks.

    Args:
        config: Settings of the evaluation.
        tasks: The tasks.
        subject: Model, tokenizer and documents.
        device: Device of the model.
        done: Finished cells, the same on all ranks: a CellStore on rank 0.
        ranks: Ranks that share the items.
    """
    from lctrain.eval import trained_window
    from lctrain.eval.cells import CellStore
    from lctrain.eval.limits import warn_beyond_positions
    from lctrain.eval.reading import ConfiguredReading, Reading, make_extensions
    from lctrain.eval.run_task import Run, progress_bar

    runs: list[Run] = []
    unextended: dict[str, tuple[int, ...]] = {}
    with ranks.failing_together():
        for task in tasks:
            lengths = check_lengths(task.lengths or config.lengths, config.forward_tokens())
            methods = check_methods(task.methods or config.methods)
            readings: Sequence[Reading] = [ConfiguredReading(config.attention, config.window)]
            if methods:
                window = trained_window(subject.model, config.window)
                readings = make_extensions(methods, window, config.attention)
            elif config.attention is None or config.attention.name != "dual_chunk":
                unextended[task.name] = lengths
            shared: dict[str, Any] = {"max_tokens": config.forward_tokens(), "device": device}
            shared["ranks"] = ranks
            runs.append(Run.prepared(task, subject, readings, lengths, **shared))
            if isinstance(done, CellStore):
                done.describe(task)
        warn_beyond_positions(subject.model, config.window, unextended)
    own = sum(run.work(done) for run in runs) / ranks.data_size
    with progress_bar(own, "token", ranks.is_first, in_tokens=True) as bar:
        for run in runs:
            run.compute(done, bar, in_tokens=True)
    return {run.task.name: run.table(done) for run in runs}


@contextmanager
def own_folder(config: EvalConfig) -> Iterator[None]:
    """Context manager that creates and locks the folder of an evaluation.

    Raises:
        ValueError: if the folder contains a run or an evaluation, another process has locked it, or
            the evaluation to resume had other settings.
        StorageError: if the disk is full or read-only.
        SystemExit: if a signal stops the evaluation.
    """
    from lctrain.eval.resume import require_no_cells, require_same_settings
    from lctrain.run.folder import RunFolder
    from lctrain.run.identity import plain_values
    from lctrain.run.log_file import log_file
    from lctrain.run.signals import StopSignals, ends_in_order
    from lctrain.run.storage import storage_errors

    path = Path(config.paths.output_dir).absolute()
    if config.resume is None:
        require_no_cells(path)
    else:  # before the folder's options are replaced
        require_same_settings(config)
    open_folder = RunFolder.create if config.resume is None else RunFolder.reopen
    with (
        StopSignals() as signals,
        ends_in_order(signals, None),
        open_folder(path, "eval", {}) as folder,
        log_file(path / "eval.log"),
        storage_errors(path, f"go on with resume={path}"),
    ):
        folder.save_options(plain_values(config))
        yield


def name_the_model(arguments: list[str]) -> list[str]:
    """Replaces `model=x` by `model.name_or_path=x`, since Hydra reads `model=x` as a config."""
    return [
        f"model.name_or_path={argument.removeprefix('model=')}"
        if argument.startswith("model=")
        else argument
        for argument in arguments
    ]


register_schemas()


COMMAND = Command(
    "lctrain-eval",
    "eval",
    """\
lctrain-eval evaluates a causal or masked language model of Hugging Face at several context lengths.

  lctrain-eval model=FOLDER lengths=[1024,8192]      perplexity on held-out text
  lctrain-eval model=NAME data=text 'data.files=[books/*.txt]' split=all
  lctrain-eval model=FOLDER 'tasks=[perplexity,passkey,ruler]' resume=last
                                                     goes on where a stopped evaluation ended
  lctrain-eval 'compare=[RUN,RUN]'                   paired differences between evaluations
  lctrain-eval model=FOLDER methods=[plain,dual_chunk] 'tasks=[perplexity,passkey]' lengths=[...]
                                                     several ways to read beyond the window
""",
    unused=(
        "data.vocab_size",
        "data.max_tokens",
        "data.max_document_tokens",
        "data.overlong",
        "data.packing_window",
        "data.balance_window",
        "data.passkey_fraction",
        "data.num_workers",
        "data.seed",
        "model.dtype",  # the option dtype
        "attention.dropout",
        "attention.deterministic",
        "attention.batch_invariant",
        "attention.fused",
    ),
    only={"model": ("hf",)},
)


def run(config: DictConfig) -> None:
    """Evaluates with the configuration that Hydra composed, and prints the tables and files."""
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import OmegaConf

    if config.compare:
        with without_empty_folder(HydraConfig.get().runtime.output_dir):
            show_comparison(list(config.compare), Path(config.paths.output_dir))
        return
    if OmegaConf.is_missing(config.model, "name_or_path"):
        raise ValueError(
            "model must be given, got none. Call lctrain-eval model=<folder or hub name>."
        )
    with without_empty_folder(HydraConfig.get().runtime.output_dir):
        plain = to_dataclass(config, EvalConfig)
        check_evaluation(plain)
        if plain.resume is not None:
            plain = in_folder_to_resume(config, plain)
        evaluation = evaluate(plain)
    if is_rank_zero():
        print(evaluation)
        print_paths(evaluation.paths)


def in_folder_to_resume(config: DictConfig, plain: EvalConfig) -> EvalConfig:
    """Returns the settings with the folder of the evaluation that goes on."""
    from lctrain.eval.resume import folder_to_resume

    folder = folder_to_resume(str(plain.resume), plain.paths.runs_dir)
    with suppress(OSError):
        Path(plain.paths.output_dir).rmdir()  # Hydra created it
    config.paths.output_dir = str(folder.absolute())
    return to_dataclass(config, EvalConfig)


def show_comparison(folders: Sequence[str], output_dir: Path) -> None:
    """Compares finished evaluations, writes the differences, and prints them."""
    from lctrain.eval.paired import compare_runs
    from lctrain.eval.report import Section, write_report
    from lctrain.eval.resume import REPORT

    comparison = compare_runs(folders)
    paths = comparison.save(output_dir)
    rows = [row.as_dict() for row in comparison.rows]
    settings = {"compare": list(folders)}
    section = Section("Paired differences", str(comparison), rows)
    paths["report"] = write_report(
        output_dir / REPORT, "Comparison of evaluations", [section], settings
    )
    print(comparison)
    print_paths(paths)


def print_paths(paths: Mapping[str, Path]) -> None:
    """Prints the names and paths of the written files."""
    width = max(map(len, paths), default=0)
    for kind, path in paths.items():
        print(f"{kind:<{width}} {path}")


def main() -> None:
    """Entry point of the console script."""
    sys.argv[1:] = name_the_model(sys.argv[1:])
    COMMAND.run(run)


if __name__ == "__main__":
    main()
