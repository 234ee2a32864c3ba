"""The command `lctrain-eval`: evaluates a causal LM of Hugging Face at several context lengths.

    lctrain-eval model=<folder or hub name> data=text 'data.files=[books/*.txt]' split=all \
        lengths=[1024,8192]

With methods, it compares several methods of reading beyond the trained window:

    lctrain-eval model=<folder or hub name> methods=[plain,linear,ntk,yarn,dual_chunk] \
        lengths=[1024,4096,16384] tasks=[perplexity,passkey]
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lctrain.command import Command
from lctrain.config import EvalConfig, PasskeyConfig, to_dataclass
from lctrain.limits import check_lengths, check_methods
from lctrain.model_names import check_model_name
from lctrain.preflight import check_evaluation, check_tasks
from lctrain.run.start import without_empty_folder
from lctrain.schemas import register_schemas

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from lctrain.eval import MethodComparison, PasskeyTable, PerplexityTable

__all__ = ["EvalConfig", "Evaluation", "PasskeyConfig", "evaluate", "main"]


@dataclass(frozen=True)
class Evaluation:
    """Results of an evaluation.

    Attributes:
        perplexity: Perplexity by length, or by method and length; None without the task perplexity.
        passkey: Number of keys found by method, length and depth; None without the task passkey.
        paths: Paths of the written files by name, such as "csv" or "passkey csv".
    """

    perplexity: PerplexityTable | MethodComparison | None
    passkey: PasskeyTable | None
    paths: dict[str, Path]

    def __str__(self) -> str:
        tables = [str(table) for table in (self.perplexity, self.passkey) if table is not None]
        return "\n\n".join(tables)


def evaluate(config: EvalConfig) -> Evaluation:
    """Measures perplexity by context length, finds passkeys, and writes tables and plots.

    Args:
        config: Settings of the evaluation.

    Returns:
        The results, and the paths of the written files.

    Raises:
        ValueError: if a setting is out of range, the data or the model cannot be used, or the
            folder contains a run.
    """
    from lctrain.build import build_datamodule, instantiate_all
    from lctrain.data.given import TokenPreparation
    from lctrain.eval import longest_documents, trained_window
    from lctrain.eval.begin import begin_tokens
    from lctrain.eval.documents import evaluation_documents
    from lctrain.loggers import closing
    from lctrain.measure import (
        find_passkeys,
        make_extensions,
        measure_perplexity,
        method_of,
        pick_device,
    )
    from lctrain.models.pretrained import check_dtype, load_pretrained

    max_tokens = config.forward_tokens()
    check_lengths(config.lengths, max_tokens)
    check_tasks(config.tasks)
    methods = check_methods(config.methods)
    check_methods(config.passkey.methods or ())
    longest_documents((), config.documents)  # raises ValueError if the number is below 1
    check_dtype(config.dtype)
    device = pick_device(config.device)
    check_model_name(config.model.name_or_path)
    loggers = instantiate_all("logger", config.logger)
    with own_folder(config), closing([*loggers.values()]):
        # The model is loaded before its tokenizer, so that an error about the name is the model's.
        model = load_pretrained(config.model, config.dtype)
        preparation = build_datamodule(config.data, config.model).preparation
        assert not isinstance(preparation, TokenPreparation)  # a config names a source of texts
        documents = evaluation_documents(preparation, config.split)
        model.to(device)
        perplexity: PerplexityTable | MethodComparison | None = None
        passkey = None
        paths: dict[str, Path] = {}
        if "passkey" in config.tasks:  # first, since it leaves the model unpatched
            chosen = config.passkey.methods or methods or [method_of(config.attention)]
            window = trained_window(model, config.window)
            passkey = find_passkeys(
                config,
                model,
                preparation.given_tokenizer(),
                documents,
                make_extensions(chosen, window, config.attention),
            )
            files = passkey.save(config.paths.output_dir)
            paths |= {f"passkey {kind}": path for kind, path in files.items()}
        if "perplexity" in config.tasks:
            begin = begin_tokens(preparation.given_tokenizer(), config.begin_token)
            perplexity = measure_perplexity(config, model, documents, methods, begin)
            paths |= perplexity.save(config.paths.output_dir)
        for logger in loggers.values():
            log_tables(logger, perplexity, passkey, paths)
            logger.finalize("success")
    return Evaluation(perplexity, passkey, paths)


@contextmanager
def own_folder(config: EvalConfig) -> Iterator[None]:
    """Context manager that creates and locks the folder of an evaluation.

    Raises:
        ValueError: if the folder contains a run or an evaluation, or another process has locked it.
        StorageError: if the disk is full or read-only.
        SystemExit: if a signal stops the evaluation.
    """
    from lctrain.run.folder import RunFolder
    from lctrain.run.identity import plain_values
    from lctrain.run.log_file import log_file
    from lctrain.run.signals import StopSignals, ends_in_order
    from lctrain.run.storage import storage_errors

    path = Path(config.paths.output_dir).absolute()
    with (
        StopSignals() as signals,
        ends_in_order(signals, None),
        RunFolder.create(path, "eval", {}) as folder,
        log_file(path / "eval.log"),
        storage_errors(path, "evaluate again"),
    ):
        folder.save_options(plain_values(config))
        yield


def log_tables(
    logger: Any,
    perplexity: PerplexityTable | MethodComparison | None,
    passkey: PasskeyTable | None,
    paths: dict[str, Path],
) -> None:
    """Logs the results of an evaluation with one logger: numbers, perplexity table and plot."""
    from lctrain.eval import MethodComparison
    from lctrain.loggers import log_evaluation

    metrics: dict[str, float] = {}
    if isinstance(perplexity, MethodComparison):
        metrics |= {
            f"perplexity_{method}_{row.length}": row.perplexity
            for method, table in perplexity.tables.items()
            for row in table.rows
        }
    elif perplexity is not None:
        metrics |= {f"perplexity_{row.length}": row.perplexity for row in perplexity.rows}
    if passkey is not None:
        for method in passkey.found:
            means = passkey.accuracy(method).mean(axis=1)
            metrics |= {
                f"passkey_{method}_{length}": float(mean)
                for length, mean in zip(passkey.lengths, means, strict=True)
            }
    logger.log_metrics(metrics, 0)
    if perplexity is not None:
        log_evaluation(logger, perplexity.as_dicts(), paths["png"])


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
lctrain-eval evaluates a causal language model of Hugging Face at several context lengths.

  lctrain-eval model=FOLDER lengths=[1024,8192]      perplexity on held-out text
  lctrain-eval model=NAME data=text 'data.files=[books/*.txt]' split=all
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
        "data.mask_fraction",
        "data.num_workers",
        "data.seed",
        "model.dtype",  # the option dtype
        "attention.dropout",
        "attention.deterministic",
        "attention.fused",
    ),
    only={"model": ("hf",)},
)


def run(config: DictConfig) -> None:
    """Evaluates with the configuration that Hydra composed, and prints the tables and files."""
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import OmegaConf

    if OmegaConf.is_missing(config.model, "name_or_path"):
        raise ValueError(
            "model must be given, got none. Call lctrain-eval model=<folder or hub name>."
        )
    with without_empty_folder(HydraConfig.get().runtime.output_dir):
        plain = to_dataclass(config, EvalConfig)
        check_evaluation(plain)
        evaluation = evaluate(plain)
    print(evaluation)
    width = max(map(len, evaluation.paths), default=0)
    for kind, path in evaluation.paths.items():
        print(f"{kind:<{width}} {path}")


def main() -> None:
    """Entry point of the console script."""
    sys.argv[1:] = name_the_model(sys.argv[1:])
    COMMAND.run(run)


if __name__ == "__main__":
    main()
