"""Checks of the values of settings that need neither torch nor a file.

The schemas call them, so that a command fails before it loads anything, and so do the objects that
are built from Python. Messages name the setting as the caller knows it: `prefix` is "data." on the
command line.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

MIN_TOKENS = 2
"""Tokens of the shortest row, document and context: one token has no target."""
OVERLONG = ("split", "truncate", "drop")
MODEL_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
)
ACCELERATORS = ("auto", "cpu", "gpu", "cuda", "mps", "tpu")
PRECISIONS = ("auto", "32-true", "32", "bf16-mixed", "bf16-true", "16-mixed", "16-true", "64-true")
BACKENDS = ("auto", "hopper", "triton", "pytorch")
SPECIAL_TOKENS = ("text", "token")
ROPE_METHODS = ("linear", "ntk", "yarn")
DUAL_CHUNK_METHODS = ("dual_chunk", "dual_chunk_yarn")
METHODS = ("plain", *ROPE_METHODS, *DUAL_CHUNK_METHODS, "intra_chunk")
LARGEST_SEED = 2**32 - 1  # of NumPy, which is seeded too


def require(holds: bool, message: str) -> None:
    """Raises ValueError with the message unless a condition holds."""
    if not holds:
        raise ValueError(message)


@contextmanager
def named(prefix: str) -> Iterator[None]:
    """Context that adds a prefix to the messages of errors, which begin with a setting's name."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{prefix}{error}") from error


def check_seed(seed: int, name: str = "seed") -> None:
    """Raises ValueError for a seed that torch and NumPy do not both take."""
    require(
        0 <= seed <= LARGEST_SEED,
        f"{name} must be in [0, {LARGEST_SEED}], got {seed}. Choose another one.",
    )


def check_stream(source: Any, passkey_fraction: float, prefix: str = "") -> None:
    """Raises ValueError for a setting that a stream without an end does not have.

    Args:
        source: Has the attribute `endless` if it can be one.
        passkey_fraction: Share of every row.
        prefix: Text before the names in messages.
    """
    require(
        not getattr(source, "endless", False) or passkey_fraction == 0,
        f"{prefix}passkey_fraction must be 0 for a stream without an end, got {passkey_fraction}. "
        f"Set {prefix}max_documents or {prefix}max_bytes: then what is read of it is kept.",
    )


def check_lengths(
    lengths: Sequence[int], max_tokens: int | None = None, prefix: str = ""
) -> tuple[int, ...]:
    """Returns context lengths sorted and without duplicates.

    Args:
        lengths: Context lengths in tokens.
        max_tokens: Tokens of a forward pass; None for no bound.
        prefix: Text before the names in messages.

    Raises:
        ValueError: if there is none, one is below 2 or no integer, or a batch cannot hold one.
    """
    require(
        len(lengths) > 0,
        f"{prefix}lengths must name at least one context length, got none. Try [1024].",
    )
    for length in lengths:
        require(
            not isinstance(length, bool) and hasattr(length, "__index__"),
            f"{prefix}lengths must be integers, got {length!r}. Give tokens, as in 4096.",
        )
        require(
            length >= MIN_TOKENS,
            f"{prefix}lengths must be at least {MIN_TOKENS}, got {length}. Leave it out: one token "
            "is no context.",
        )
    require(
        max_tokens is None or max(lengths) <= max_tokens,
        f"{prefix}lengths must be at most max_tokens = {max_tokens}, got {max(lengths)}. Raise "
        f"{prefix}max_tokens, which bounds the tokens of a forward pass, or leave that length out.",
    )
    return tuple(sorted({int(length) for length in lengths}))


def check_model_sizes(config: Mapping[str, Any]) -> None:
    """Raises ValueError for a size in a model's configuration that no model has.

    Args:
        config: Arguments of a configuration class of transformers.
    """
    for name in MODEL_SIZES:
        value = config.get(name)
        require(
            value is None or (isinstance(value, int) and not isinstance(value, bool) and value > 0),
            f"model.config.{name} must be an integer of at least 1, got {value!r}. Correct the "
            "number.",
        )
    heads, width = config.get("num_attention_heads"), config.get("hidden_size")
    require(
        not (heads and width) or config.get("head_dim") is not None or width % heads == 0,
        f"model.config.hidden_size must be a multiple of num_attention_heads = {heads}, got "
        f"{width}. Change one of them, or set model.config.head_dim.",
    )
    shared = config.get("num_key_value_heads")
    require(
        not (heads and shared) or heads % shared == 0,
        f"model.config.num_attention_heads must be a multiple of num_key_value_heads = {shared}, "
        f"got {heads}. Change one of them.",
    )


def check_warmup(warmup_steps: int | None, max_steps: int) -> None:
    """Raises ValueError for a warmup that is longer than the run."""
    require(
        warmup_steps is None or max_steps <= 0 or warmup_steps <= max_steps,
        f"optim.warmup_steps must be at most the {max_steps} steps of the run, got {warmup_steps}. "
        "Shorten the warmup or train longer.",
    )


def check_trainer(trainer: Any) -> None:
    """Raises ValueError for hardware, precision or length of a run that Lightning has not.

    Args:
        trainer: Has the attributes of `lctrain.config.TrainerConfig`.
    """
    for name, known in (("accelerator", ACCELERATORS), ("precision", PRECISIONS)):
        value = getattr(trainer, name)
        require(
            value in known,
            f"trainer.{name} must be one of {', '.join(known)}, got {value!r}. Try auto.",
        )
    require(
        re.fullmatch(r"auto|-1|[1-9]\d*|\d+(,\d+)+,?|\d+,", trainer.devices) is not None,
        f"trainer.devices must be a number of devices, their numbers with commas, or auto, got "
        f"{trainer.devices!r}. Try 1.",
    )
    require(
        trainer.max_time is None
        or re.fullmatch(r"\d+:\d\d?:\d\d?:\d\d?", trainer.max_time) is not None,
        f"trainer.max_time must read days:hours:minutes:seconds, got {trainer.max_time!r}. Half an "
        "hour is 00:00:30:00.",
    )
    require(
        trainer.budget_s is None or trainer.budget_s > 0,
        f"trainer.budget_s must be above 0, got {trainer.budget_s}. It is the number of seconds "
        "until training ends; use null for a run of max_steps.",
    )
    require(
        trainer.budget_s is None or trainer.max_steps > 0,
        f"trainer.max_steps must be at least 1 with trainer.budget_s, got {trainer.max_steps}. It "
        "is the most steps that the run may take.",
    )
    require(
        trainer.limit_val_batches is None or trainer.limit_val_batches >= 0,
        f"trainer.limit_val_batches must be at least 0, got {trainer.limit_val_batches}. Use null "
        "for all of them.",
    )
    require(
        trainer.max_steps >= 0 or trainer.max_epochs >= 0,
        "trainer.max_steps or trainer.max_epochs must be set, got neither. A run needs an end.",
    )


def check_backend(backend: str, name: str) -> None:
    """Raises ValueError for an unknown backend."""
    require(
        backend in BACKENDS,
        f"{name} must be one of {', '.join(BACKENDS)}, got {backend!r}. auto picks the fastest.",
    )


def check_methods(methods: Sequence[str], name: str = "methods") -> tuple[str, ...]:
    """Returns the methods to read beyond the window, without duplicates.

    Raises:
        ValueError: for one that does not exist.
    """
    for method in methods:
        require(
            method in METHODS,
            f"{name} must be among {', '.join(METHODS)}, got {method!r}. Check the spelling.",
        )
    return tuple(dict.fromkeys(methods))


def check_windows(
    overlap: float, min_context: int | None, stride: int | None, shortest: int
) -> None:
    """Raises ValueError for windows of an evaluation that cannot be.

    Args:
        overlap: Fraction of a window that is only context.
        min_context: Predecessors of a scored token; None where it is chosen later.
        stride: Positions that a window scores; None where it is chosen later.
        shortest: Shortest context length.
    """
    require(0.0 <= overlap < 1.0, f"overlap must be in [0, 1), got {overlap}. Try 0.5.")
    require(
        min_context is None or min_context >= 1,
        f"min_context must be at least 1, got {min_context}. The first token of a document has "
        "nothing to be predicted from.",
    )
    require(
        stride is None or 1 <= stride <= shortest,
        f"stride must be in [1, shortest length = {shortest}], got {stride}. Use null for a share "
        "of each length.",
    )


def check_passkeys(
    depths: Sequence[float], keys_per_cell: int, seed: int, prefix: str = ""
) -> tuple[float, ...]:
    """Returns depths sorted and without duplicates.

    Raises:
        ValueError: if a depth is outside of [0, 1], or no key is to be hidden.
    """
    require(len(depths) > 0, f"{prefix}depths must name at least one, got none. Try [0.0,0.5,1.0].")
    for depth in depths:
        require(
            0.0 <= depth <= 1.0,
            f"{prefix}depths must be in [0, 1], got {depth}. It is the share of the text before "
            "the key.",
        )
    require(
        keys_per_cell >= 1,
        f"{prefix}keys_per_cell must be at least 1, got {keys_per_cell}. Try 20.",
    )
    require(seed >= 0, f"{prefix or 'passkey '}seed must be at least 0, got {seed}. Raise it.")
    return tuple(sorted(set(depths)))
