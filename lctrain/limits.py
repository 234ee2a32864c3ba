"""Checks the values of settings; needs neither torch nor a file.

The config schemas call these checks, so that a command with a wrong setting fails before it loads
torch. Objects that are built from Python call the same checks. `prefix` is the text before the name
of a setting in messages: "data." on the command line, and empty in Python.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from lctrain.instances import require_sequence
from lctrain.pluralize import pluralize

MIN_TOKENS = 2
"""Number of tokens in the shortest row, document and context; a single token has no target."""
TASKS = ("causal", "mlm")  # what a model is trained to predict: the next token, or masked ones
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
EXCHANGES = ("auto", "heads", "keys")
PRECISIONS = ("auto", "32-true", "32", "bf16-mixed", "bf16-true", "16-mixed", "16-true", "64-true")
BACKENDS = ("auto", "hopper", "triton", "pytorch")
SPECIAL_TOKENS = ("text", "token")
ROPE_METHODS = ("linear", "ntk", "yarn")
DUAL_CHUNK_METHODS = ("dual_chunk", "dual_chunk_yarn")
RULER_TASKS = (
    *("niah_single_1", "niah_single_2", "niah_single_3"),
    *("niah_multikey_1", "niah_multikey_2", "niah_multikey_3"),
    *("niah_multivalue", "niah_multiquery", "vt", "cwe", "fwe", "qa"),
)
ANSWERS_BY = ("generation", "likelihood")
METHODS = ("plain", *ROPE_METHODS, *DUAL_CHUNK_METHODS, "intra_chunk")
REFUSED_STRATEGIES = {
    "deepspeed": "DeepSpeed runs a backward of its own, which would not divide by the tokens",
    "fsdp": "FSDP1 hides the parameters from loss and clipping",
    "modelparallel": "tensor and expert parallelism are not supported",
}
"""Why a strategy is refused, by the beginning of its name in lower case."""
LARGEST_SEED = 2**32 - 1  # the largest seed that NumPy accepts


def require(holds: bool, message: str) -> None:
    """Raises ValueError with the given message unless a condition holds."""
    if not holds:
        raise ValueError(message)


@contextmanager
def named(prefix: str) -> Iterator[None]:
    """Context manager that adds a prefix to a ValueError, whose message begins with a setting."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{prefix}{error}") from error


def check_seed(seed: int, name: str = "seed") -> None:
    """Raises ValueError unless both torch and NumPy accept a seed."""
    require(
        0 <= seed <= LARGEST_SEED,
        f"{name} must be in [0, {LARGEST_SEED}], got {seed}. Choose another one.",
    )


def check_passkey_source(source: Any, passkey_fraction: float, prefix: str = "") -> None:
    """Raises ValueError if passkey documents are asked for with a mix or with conversations.

    Args:
        source: Source of documents, or the settings of one.
        passkey_fraction: Fraction of every row that belongs to passkey documents.
        prefix: Text before the names in messages.
    """
    require(
        not hasattr(source, "sources") or passkey_fraction == 0,
        f"{prefix}passkey_fraction must be 0 for a mix of sources, got {passkey_fraction}. Train "
        "on one source with passkeys.",
    )
    require(
        not hasattr(source, "train_on") or passkey_fraction == 0,
        f"{prefix}passkey_fraction must be 0 for conversations, got {passkey_fraction}. Passkey "
        "documents are plain text.",
    )


def check_stream(source: Any, passkey_fraction: float, prefix: str = "") -> None:
    """Raises ValueError if an endless stream has a passkey fraction, which it does not support.

    Args:
        source: Source of documents. Its attribute `endless`, if it has one, is true for an endless
            stream.
        passkey_fraction: Fraction of every row that belongs to passkey documents.
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
        max_tokens: Largest number of tokens in a forward pass; None for no limit.
        prefix: Text before the names in messages.

    Raises:
        ValueError: if the list is empty, or a length is not an integer, below 2 or above
            max_tokens.
    """
    require_sequence(f"{prefix}lengths", lengths, "Give tokens, as in [1024, 4096].")
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
    """Raises ValueError if sizes of a model are not positive integers, or do not fit together.

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
    """Raises ValueError if the warmup is longer than the run."""
    require(
        warmup_steps is None or max_steps <= 0 or warmup_steps <= max_steps,
        f"optim.warmup_steps must be at most the {pluralize(max_steps, 'step')} of the run, got "
        f"{warmup_steps}. "
        "Shorten the warmup or train longer.",
    )


def check_trainer(trainer: Any) -> None:
    """Raises ValueError if Lightning does not accept a setting of hardware, precision or length.

    Args:
        trainer: Settings of the Trainer, a `lctrain.config.TrainerConfig`.
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


def check_exchange(exchange: str, ranks: int) -> None:
    """Raises ValueError for an unknown way to share packs, or fewer than one rank per pack.

    Args:
        exchange: What the ranks that share a pack exchange.
        ranks: Number of ranks that share a pack.
    """
    require(
        ranks >= 1,
        f"trainer.context_parallel must be at least 1, got {ranks}. 1 gives every rank a pack of "
        "its own.",
    )
    require(
        exchange in EXCHANGES,
        f"trainer.context_exchange must be one of {', '.join(EXCHANGES)}, got {exchange!r}. auto "
        "exchanges heads where their number can be divided, else keys.",
    )


def check_shared_task(ranks: int, given: str) -> None:
    """Raises ValueError if ranks would share packs with masked tokens, or of another task.

    Args:
        ranks: Number of ranks that share a pack.
        given: Option and value that need whole packs, such as task=mlm.
    """
    require(
        ranks == 1,
        f"trainer.context_parallel must be 1 with {given}, got {ranks}: shared packs of encoders "
        "are not supported. Leave it out.",
    )


def check_machines(ranks: int, devices: int, machines: int) -> None:
    """Raises ValueError if the ranks that share a pack divide their machines unevenly.

    They must be on one machine, or be all ranks of several machines.

    Args:
        ranks: Number of ranks that share a pack.
        devices: Ranks per machine.
        machines: Number of machines.
    """
    require(
        machines == 1 or devices % ranks == 0 or ranks % devices == 0,
        f"trainer.context_parallel must divide the {devices} ranks of a machine, or be a multiple "
        f"of them, got {ranks}. Change trainer.context_parallel or trainer.devices.",
    )


def why_refused(strategy: str) -> str | None:
    """Returns why a strategy of Lightning is refused; None for every other strategy.

    Args:
        strategy: Name of the strategy, as Lightning's Trainer takes it, or of its class.
    """
    name = strategy.lower().replace("_", "")
    return next((why for start, why in REFUSED_STRATEGIES.items() if name.startswith(start)), None)


def check_backend(backend: str, name: str) -> None:
    """Raises ValueError for an unknown backend of the kernels."""
    require(
        backend in BACKENDS,
        f"{name} must be one of {', '.join(BACKENDS)}, got {backend!r}. auto picks the fastest.",
    )


def check_methods(methods: Sequence[str], name: str = "methods") -> tuple[str, ...]:
    """Returns the methods of reading beyond the window, without duplicates.

    Args:
        methods: Names of methods.
        name: Name of the setting, for the message.

    Raises:
        ValueError: if a method does not exist.
    """
    require_sequence(name, methods, "Name some, or leave them out.")
    for method in methods:
        require(
            method in METHODS,
            f"{name} must be among {', '.join(METHODS)}, got {method!r}. Check the spelling.",
        )
    return tuple(dict.fromkeys(methods))


def check_windows(
    overlap: float, min_context: int | None, stride: int | None, shortest: int
) -> None:
    """Raises ValueError if a setting of the evaluation windows is out of range.

    Args:
        overlap: Fraction of a window that is context and not scored.
        min_context: Smallest number of preceding tokens of a scored token; None is not checked.
        stride: Number of positions that a window scores; None is not checked.
        shortest: Shortest context length in tokens.
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


def check_by(by: str, name: str) -> None:
    """Raises ValueError for an unknown way to score answers."""
    require(
        by in ANSWERS_BY,
        f"{name} must be one of {', '.join(ANSWERS_BY)}, got {by!r}. Base models are better "
        "scored by likelihood.",
    )


def check_longppl(short_context: int, step: int, lengths: Sequence[int] | None) -> None:
    """Raises ValueError if a setting of the task longppl is out of range.

    Args:
        short_context: Largest number of tokens in a short context.
        step: Number of tokens that a window of the short context scores.
        lengths: Lengths of the long context in tokens; None is not checked.
    """
    require(
        1 <= step <= short_context,
        f"longppl.step must be in [1, longppl.short_context = {short_context}], got {step}. Try a "
        "quarter of it.",
    )
    require(
        not lengths or min(lengths) > short_context + 1,
        f"lengths must be above longppl.short_context + 1 = {short_context + 1}, got "
        f"{min(lengths or [0])}. Set longppl.lengths, or lower longppl.short_context.",
    )


def check_ruler(
    tasks: Sequence[str] | None, items: int, seed: int, by: str, questions: str | None
) -> tuple[str, ...]:
    """Returns the names of RULER's tasks to run, without duplicates.

    Args:
        tasks: Names of the tasks; None for all but qa, and for qa too if there are questions.
        items: Number of prompts of each task at each length.
        seed: Seed of the prompts.
        by: Way to score answers.
        questions: File of the task qa.

    Raises:
        ValueError: if a task does not exist or lacks its questions, or a number is out of range.
    """
    known = RULER_TASKS if questions is not None else RULER_TASKS[:-1]
    chosen = known if tasks is None else tuple(dict.fromkeys(tasks))
    require(
        bool(chosen) and set(chosen) <= set(RULER_TASKS),
        f"ruler.tasks must be some of {', '.join(RULER_TASKS)}, got {list(chosen)}. Use null for "
        "all of them.",
    )
    require(
        set(chosen) <= set(known),
        "ruler.questions must be a file of JSON lines for the task qa, got none. Give one, or "
        "leave qa out of ruler.tasks.",
    )
    require(items >= 1, f"ruler.items must be at least 1, got {items}. Try 10.")
    require(seed >= 0, f"ruler.seed must be at least 0, got {seed}. Raise it.")
    check_by(by, "ruler.by")
    return chosen


def check_passkeys(
    depths: Sequence[float],
    keys_per_cell: int,
    seed: int,
    prefix: str = "",
    count: str = "keys_per_cell",
) -> tuple[float, ...]:
    """Returns the depths of the passkey test, sorted and without duplicates.

    Args:
        depths: Fractions of the text before the key.
        keys_per_cell: Number of keys for each length and depth.
        seed: Seed of the keys and the text.
        prefix: Text before the names in messages.
        count: Name of `keys_per_cell` in messages.

    Raises:
        ValueError: if there is no depth, a depth is outside of [0, 1], keys_per_cell is below 1, or
            the seed is negative.
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
        f"{prefix}{count} must be at least 1, got {keys_per_cell}. Try 20.",
    )
    require(seed >= 0, f"{prefix or 'passkey '}seed must be at least 0, got {seed}. Raise it.")
    return tuple(sorted(set(depths)))
