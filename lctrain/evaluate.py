"""`lctrain-eval`: evaluates any causal LM of Hugging Face at several context lengths.

    lctrain-eval model=<folder or hub name> data=text 'data.files=[books/*.txt]' split=all \
        lengths=[1024,8192]

With methods, the same for several ways to read beyond the trained window:

    lctrain-eval model=<folder or hub name> methods=[plain,linear,ntk,yarn,dual_chunk] \
        lengths=[1024,4096,16384] tasks=[perplexity,passkey]
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lctrain.command import Command
from lctrain.config import (
    MISSING,
    AttentionConfig,
    PathsConfig,
    PretrainedModelConfig,
    store_schema,
    to_dataclass,
)
from lctrain.limits import (
    check_lengths,
    check_methods,
    check_passkeys,
    check_windows,
    require,
)
from lctrain.local_paths import check_run_name
from lctrain.preflight import check_attention, check_data_files, check_targets
from lctrain.run.start import without_empty_folder
from lctrain.schemas import register_schemas

if TYPE_CHECKING:
    import torch
    from omegaconf import DictConfig

    from lctrain.data import TokenizedDocument
    from lctrain.eval import BeginTokens, Extension, MethodComparison, PasskeyTable, PerplexityTable

log = logging.getLogger(__name__)

MIN_MAX_TOKENS = 8192  # of a forward pass, where nothing else is said
TASKS = ("perplexity", "passkey")
DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class PasskeyConfig:
    """How keys are hidden: see `lctrain.eval.passkey_retrieval`.

    Attributes:
        lengths: Tokens of the texts; None for the lengths of the evaluation.
        methods: None for the methods of the evaluation.
        depths: Share of the text before the key.
        keys_per_cell: Keys of each length and depth.
        seed: Seed of keys and text.
    """

    lengths: list[int] | None = None
    methods: list[str] | None = None
    depths: list[float] = field(default_factory=lambda: [0.0, 0.2, 0.4, 0.6, 0.8, 1.0])
    keys_per_cell: int = 20
    seed: int = 0


@dataclass(frozen=True)
class EvalConfig:
    """Everything that `lctrain-eval` does.

    Attributes:
        name: Name of the evaluation; part of its folder.
        model: What is evaluated. On the command line, `model=x` is short for
            `model.name_or_path=x`.
        data: What is read, as in training; its tokenizer is the model's own.
        attention: How the model's attention is patched; None leaves it as it is. The numbers are
            the same, up to rounding, unless it is dual chunk attention. With methods, its options
            are those of the methods that use it, and the others use flash.
        logger: By name, each with a `_target_`.
        paths: Where the evaluation writes.
        split: "held_out" for what training on this data holds out; "all" for every document.
        tasks: perplexity, passkey, or both.
        methods: Ways to read beyond the window, to compare: see `lctrain.eval.extension`. With
            none, the model is evaluated as it is.
        window: Tokens that the model was trained on; None for what its config says. For dual chunk
            attention, `attention.window` wins.
        documents: Number of documents, the longest first; None for all.
        document_tokens: Tokens of each document, from its beginning; None for all.
        lengths: Context lengths in tokens.
        max_tokens: Tokens in a forward pass; None takes the longest length, but at least 8,192.
        overlap: Share of a window that is only context; not used with methods.
        stride: Positions that a window scores at every length; None for a share of each length,
            with methods for half the shortest length.
        min_context: Score tokens that have at least this many predecessors; None for all of them,
            with methods for those for which every length is filled.
        begin_token: Whether each window begins with the begin token; None where the tokenizer adds
            one to a text. Of texts with a passkey, each is whole and begins as the tokenizer's.
        passkey: How keys are hidden.
        dtype: Type of the weights: auto (as they are stored), float32, bfloat16 or float16.
        device: auto, cpu, cuda, cuda:1, ...
    """

    name: str = "eval"
    model: PretrainedModelConfig = MISSING
    data: Any = MISSING
    attention: AttentionConfig | None = None
    logger: dict[str, Any] = field(default_factory=dict)
    paths: PathsConfig = MISSING
    split: str = "held_out"
    tasks: list[str] = field(default_factory=lambda: ["perplexity"])
    methods: list[str] = field(default_factory=list)
    window: int | None = None
    documents: int | None = 16
    document_tokens: int | None = None
    lengths: list[int] = field(default_factory=lambda: [256, 512, 1024, 2048, 4096])
    max_tokens: int | None = None
    overlap: float = 0.5
    stride: int | None = None
    min_context: int | None = None
    begin_token: bool | None = None
    passkey: PasskeyConfig = field(default_factory=PasskeyConfig)
    dtype: str = "auto"
    device: str = "auto"

    def __post_init__(self) -> None:
        check_run_name(self.name)


@dataclass(frozen=True)
class Evaluation:
    """What was measured.

    Attributes:
        perplexity: By length, or by method and length; None if it was not a task.
        passkey: By method, length and depth; None if it was not a task.
        paths: The files, as "csv" for instance, or "passkey csv".
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
        config: Everything, as plain dataclasses.

    Returns:
        The tables and the files.

    Raises:
        ValueError: if the configuration, the data or the model does not fit, or the folder holds
            a run.
    """
    from lctrain.build import build_datamodule, instantiate_all
    from lctrain.data.prepare import Preparation
    from lctrain.eval import longest_documents, trained_window
    from lctrain.eval.begin import begin_tokens
    from lctrain.eval.documents import evaluation_documents
    from lctrain.loggers import closing
    from lctrain.models.pretrained import check_dtype, check_model_name, load_pretrained

    max_tokens = forward_tokens(config)
    check_lengths(config.lengths, max_tokens)
    check_tasks(config.tasks)
    methods = check_methods(config.methods)
    check_methods(config.passkey.methods or ())
    longest_documents((), config.documents)  # raises for a number that cannot be
    check_dtype(config.dtype)
    device = pick_device(config.device)
    check_model_name(config.model.name_or_path)
    loggers = instantiate_all("logger", config.logger)
    with own_folder(config), closing([*loggers.values()]):
        # First: an error about a name that is also the tokenizer's should blame the model.
        model = load_pretrained(config.model, config.dtype)
        preparation = build_datamodule(config.data, config.model).preparation
        assert isinstance(preparation, Preparation)  # a config names a source of texts
        documents = evaluation_documents(preparation, config.split)
        model.to(device)
        perplexity: PerplexityTable | MethodComparison | None = None
        passkey = None
        paths: dict[str, Path] = {}
        if "passkey" in config.tasks:  # first: it leaves the model as it was
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
    """Takes the folder of an evaluation: no other one, and no training run, writes there.

    Raises:
        ValueError: if one does, or has.
        StorageError: if the block cannot write for want of space.
        SystemExit: if a signal ends the block.
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


def measure_perplexity(
    config: EvalConfig,
    model: Any,
    documents: Sequence[TokenizedDocument],
    methods: Sequence[str],
    begin: BeginTokens,
) -> PerplexityTable | MethodComparison:
    """Perplexity by length of the model as it is, or of every method."""
    from lctrain.eval import (
        compare_methods,
        longest_documents,
        perplexity_by_length,
        trained_window,
    )

    chosen = longest_documents(documents, config.documents)
    if config.document_tokens is not None:
        chosen = [
            replace(document, input_ids=document.input_ids[: config.document_tokens])
            for document in chosen
        ]
    name = Path(config.model.name_or_path).name
    if methods:
        window = trained_window(model, config.window)
        return compare_methods(
            model,
            chosen,
            config.lengths,
            make_extensions(methods, window, config.attention),
            max_tokens=forward_tokens(config),
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
        max_tokens=forward_tokens(config),
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
    """Passkeys hidden in the documents, for every method."""
    from lctrain.data.passkey import PasskeyFormat
    from lctrain.eval import passkey_retrieval

    options = config.passkey
    return passkey_retrieval(
        model,
        PasskeyFormat.of(tokenizer),
        [document.input_ids for document in documents],
        options.lengths or config.lengths,
        extensions,
        max_tokens=forward_tokens(config),
        depths=options.depths,
        keys_per_cell=options.keys_per_cell,
        seed=options.seed,
        progress=True,
        name=Path(config.model.name_or_path).name,
    )


def make_extensions(
    methods: Sequence[str], window: int, attention: AttentionConfig | None
) -> list[Extension]:
    """The methods, each with the options of the attention that it uses.

    Options that only dual chunk attention has go to it alone.
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
    """The method that an attention stands for by itself."""
    return "dual_chunk" if attention is not None and attention.name == "dual_chunk" else "plain"


def log_tables(
    logger: Any,
    perplexity: PerplexityTable | MethodComparison | None,
    passkey: PasskeyTable | None,
    paths: dict[str, Path],
) -> None:
    """Gives the numbers, and table and plot of the perplexities, to one logger."""
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


def check_tasks(tasks: Sequence[str]) -> None:
    """Raises ValueError unless there are tasks, each one of TASKS."""
    if not tasks or not set(tasks) <= set(TASKS):
        raise ValueError(
            f"tasks must be some of {', '.join(TASKS)}, got {list(tasks)}. The default is "
            "[perplexity]."
        )


def forward_tokens(config: EvalConfig) -> int:
    """Most tokens in a forward pass."""
    if config.max_tokens is not None:
        return config.max_tokens
    return max([MIN_MAX_TOKENS, *config.lengths, *(config.passkey.lengths or ())])


def patch(model: Any, attention: AttentionConfig | None, window: int | None) -> None:
    """Patches the model's attention, so that its documents are packed.

    The window is that of dual chunk attention, unless its options name one.

    A model that plain flash attention does not support is left as it is, with a warning: its
    numbers do not depend on it, only the speed does. Any other attention is what one measures.
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
    """The device of this name; "auto" is a GPU if there is one.

    Raises:
        ValueError: if this machine has no such device.
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


def name_the_model(arguments: list[str]) -> list[str]:
    """Turns `model=x` into `model.name_or_path=x`: in Hydra's eyes the first picks a config."""
    return [
        f"model.name_or_path={argument.removeprefix('model=')}"
        if argument.startswith("model=")
        else argument
        for argument in arguments
    ]


def check_before_loading(config: EvalConfig) -> None:
    """Raises ValueError for what shows without torch, in the first second of an evaluation."""
    check_lengths(config.lengths, forward_tokens(config))
    check_tasks(config.tasks)
    check_methods(config.methods)
    check_methods(config.passkey.methods or (), "passkey.methods")
    check_passkeys(
        config.passkey.depths, config.passkey.keys_per_cell, config.passkey.seed, "passkey."
    )
    check_windows(config.overlap, config.min_context, config.stride, min(config.lengths))
    for name, known in (("split", ("held_out", "all")), ("dtype", DTYPES)):
        value = getattr(config, name)
        require(
            value in known, f"{name} must be one of {', '.join(known)}, got {value!r}. Correct it."
        )
    require(
        config.documents is None or config.documents >= 1,
        f"documents must be at least 1, got {config.documents}. Use null for all of them.",
    )
    check_attention(config.attention)
    check_data_files(config.data)
    check_targets("logger", config.logger)
    if config.window is not None:
        require(
            config.window >= 2,
            f"window must be at least 2, got {config.window}. It is the number of tokens that the "
            "model was trained on.",
        )


register_schemas()
store_schema("eval", EvalConfig)


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
        "data.num_workers",
        "data.seed",
        "model.gradient_checkpointing",
    ),
    only={"model": ("hf",)},
)


def run(config: DictConfig) -> None:
    """Evaluates what Hydra composed, and prints table and files."""
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import OmegaConf

    if OmegaConf.is_missing(config.model, "name_or_path"):
        raise ValueError(
            "model must be given, got none. Call lctrain-eval model=<folder or hub name>."
        )
    with without_empty_folder(HydraConfig.get().runtime.output_dir):
        plain = to_dataclass(config, EvalConfig)
        check_before_loading(plain)
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
