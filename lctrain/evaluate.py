"""`lctrain-eval`: evaluates any causal LM of Hugging Face at several context lengths.

    lctrain-eval model=<folder or hub name> data=text 'data.files=[books/*.txt]' split=all \
        lengths=[1024,8192]
"""

from __future__ import annotations

import logging
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra

from lctrain.config import (
    MISSING,
    AttentionConfig,
    PathsConfig,
    PretrainedModelConfig,
    store_schema,
    to_dataclass,
)
from lctrain.schemas import register_schemas

if TYPE_CHECKING:
    import torch
    from omegaconf import DictConfig

    from lctrain.eval import PerplexityTable

log = logging.getLogger(__name__)

MIN_MAX_TOKENS = 8192  # of a forward pass, where nothing else is said


@dataclass(frozen=True)
class EvalConfig:
    """Everything that `lctrain-eval` does.

    Attributes:
        name: Of the evaluation; part of its folder.
        model: What is evaluated. On the command line, `model=x` is short for
            `model.name_or_path=x`.
        data: What is read, as in training; its tokenizer is the model's own.
        attention: How the model's attention is patched; None leaves it as it is. The numbers are
            the same, up to rounding.
        logger: By name, each with a `_target_`.
        paths: Where the evaluation writes.
        split: "held_out" for what training on this data holds out; "all" for every document.
        documents: Number of documents, the longest first; None for all.
        lengths: Context lengths in tokens.
        max_tokens: Tokens in a forward pass; None takes the longest length, but at least 8,192.
        overlap: Share of a window that is only context.
        min_context: Score tokens that have at least this many predecessors.
        dtype: Of the weights: auto (as they are stored), float32, bfloat16 or float16.
        device: auto, cpu, cuda, cuda:1, ...
    """

    name: str = "eval"
    model: PretrainedModelConfig = MISSING
    data: Any = MISSING
    attention: AttentionConfig | None = None
    logger: dict[str, Any] = field(default_factory=dict)
    paths: PathsConfig = MISSING
    split: str = "held_out"
    documents: int | None = 16
    lengths: list[int] = field(default_factory=lambda: [256, 512, 1024, 2048, 4096])
    max_tokens: int | None = None
    overlap: float = 0.5
    min_context: int = 1
    dtype: str = "auto"
    device: str = "auto"


def evaluate(config: EvalConfig) -> tuple[PerplexityTable, dict[str, Path]]:
    """Measures perplexity by context length and writes table and plot.

    Args:
        config: Everything, as plain dataclasses.

    Returns:
        The table, and the files by "csv", "json" and "png".

    Raises:
        ValueError: if the configuration, the data or the model does not fit.
    """
    from lctrain.build import build_datamodule, instantiate_all
    from lctrain.eval import check_lengths, longest_documents, perplexity_by_length
    from lctrain.eval.documents import evaluation_documents
    from lctrain.loggers import closing, log_evaluation
    from lctrain.models.pretrained import check_dtype, check_model_name, load_pretrained

    max_tokens = config.max_tokens
    if max_tokens is None:
        max_tokens = max([MIN_MAX_TOKENS, *config.lengths])
    check_lengths(config.lengths, max_tokens)
    longest_documents((), config.documents)  # raises for a number that cannot be
    check_dtype(config.dtype)
    device = pick_device(config.device)
    check_model_name(config.model.name_or_path)
    loggers = instantiate_all("logger", config.logger)
    with closing([*loggers.values()]):
        # First, since the tokenizer has the model's name, and an error should blame the model.
        model = load_pretrained(config.model, config.dtype)
        documents = longest_documents(
            evaluation_documents(build_datamodule(config.data).preparation, config.split),
            config.documents,
        )
        patch(model, config.attention)
        table = perplexity_by_length(
            model.to(device),
            documents,
            config.lengths,
            max_tokens=max_tokens,
            overlap=config.overlap,
            min_context=config.min_context,
            progress=True,
            name=Path(config.model.name_or_path).name,
        )
        paths = table.save(config.paths.output_dir)
        for logger in loggers.values():
            metrics = {f"perplexity_{row.length}": row.perplexity for row in table.rows}
            logger.log_metrics(metrics, 0)
            log_evaluation(logger, table.as_dicts(), paths["png"])
            logger.finalize("success")
    return table, paths


def patch(model: Any, attention: AttentionConfig | None) -> None:
    """Patches the model's attention, so that its documents are packed.

    A model that plain flash attention does not support is left as it is, with a warning: its
    numbers do not depend on it, only the speed does. Any other attention is what one measures.
    """
    from lctrain.models import patch_model

    if attention is None:
        return
    try:
        patch_model(model, attention=attention.name, **attention.options())
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


register_schemas()
store_schema("eval", EvalConfig)


@hydra.main(version_base="1.3", config_path="pkg://lctrain.configs", config_name="eval")
def run(config: DictConfig) -> None:
    """Evaluates what Hydra composed, and prints table and files."""
    from omegaconf import OmegaConf

    if OmegaConf.is_missing(config.model, "name_or_path"):
        raise ValueError(
            "model must be given, got none. Call lctrain-eval model=<folder or hub name>."
        )
    plain = to_dataclass(config, EvalConfig)
    folder = Path(plain.paths.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    OmegaConf.save(config, folder / "config.yaml", resolve=True)
    table, paths = evaluate(plain)
    print(table)
    for kind, path in paths.items():
        print(f"{kind:<5} {path}")


def main() -> None:
    """Entry point of the console script."""
    sys.argv[1:] = name_the_model(sys.argv[1:])
    run()


if __name__ == "__main__":
    main()
