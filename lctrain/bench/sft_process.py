"""Times supervised fine-tuning by one contender, in a process of its own.

    python -m lctrain.bench.sft_process CONTENDER

The process reads one job per line from its standard input, as JSON, and writes one line of results
per job, as `lctrain.bench.step_process` does.
"""

from __future__ import annotations

import importlib
import math
import random
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lctrain.batch import IGNORE_INDEX
from lctrain.bench.contenders import CONTENDERS
from lctrain.bench.shapes import SHAPES, build_shape, tiny
from lctrain.bench.step_process import answer_jobs
from lctrain_kernels.bench.peers import installed_version

WARMUP = 3
LEARNING_RATE = 1e-5
_SIGMA = 0.6  # of the natural logarithm of a message's length


@dataclass(frozen=True)
class SftJob:
    """Settings of one measurement.

    Attributes:
        shape: Name of the model's shape.
        row_tokens: Capacity of a packed row, and the longest conversation.
        mean_tokens: Mean length of a conversation in tokens.
        rows: Conversations in a batch with padding.
        steps: Number of timed steps.
        tiny: True for a model of a few thousand parameters.
    """

    shape: str
    row_tokens: int = 16_384
    mean_tokens: int = 700
    rows: int = 8
    steps: int = 12
    tiny: bool = False


@dataclass(frozen=True)
class SftContender:
    """One way to fine-tune.

    Attributes:
        title: Name in tables and records.
        train: Function from (job, model or None, device, clock) that trains, and calls the clock.
        modules: Modules that must be importable.
        distributions: Packages whose versions are recorded.
        attention: Name of a contender of `lctrain-bench step`, whose attention the model has.
    """

    title: str
    train: Callable[[SftJob, Any, torch.device, Clock], None]
    modules: tuple[str, ...] = ()
    distributions: tuple[str, ...] = ()
    attention: str = "sdpa"

    def missing(self, device: torch.device) -> str | None:
        """Returns why the contender cannot run on this machine, or None if it can."""
        for module in self.modules if device.type == "cuda" else self.modules[:1]:
            try:
                importlib.import_module(module)
            except Exception as error:  # importing a library may raise any error
                return f"{type(error).__name__}: {error}".splitlines()[0][:200]
        return None

    def versions(self) -> dict[str, str]:
        """Returns the versions of the contender's installed packages."""
        found = {name: installed_version(name) for name in self.distributions}
        return {name: version for name, version in found.items() if version is not None}


class Clock:
    """Counts trained tokens from the end of the warm-up to the end of the last step.

    Args:
        warmup: Number of steps before the timed ones.
        steps: Number of timed steps.
        device: Device of the training.

    Attributes:
        tokens: Trained tokens of every step, on the device.
        positions: Positions that the model computed in every step, padding included.
        seconds: Time of the timed steps.
    """

    def __init__(self, warmup: int, steps: int, device: torch.device) -> None:
        self.tokens: list[torch.Tensor] = []
        self.positions: list[int] = []
        self.seconds = 0.0
        self._warmup, self._last, self._device = warmup, warmup + steps, device
        self._started = 0.0

    def count(self, labels: torch.Tensor, shifted: bool) -> None:
        """Counts a step's tokens, without synchronising.

        Args:
            labels: [B, S] int64, -100 for tokens that are not trained on.
            shifted: Whether a label stands at the token that predicts it.
        """
        self.positions.append(labels.numel())
        labels = labels if shifted else labels[:, 1:]
        self.tokens.append((labels != IGNORE_INDEX).sum())

    def step_ends(self, number: int) -> None:
        """Reads the time at the end of the warm-up, and at the end of the last timed step.

        Args:
            number: Number of steps that have ended.
        """
        if number == self._last:
            self._wait()
            self.seconds = time.perf_counter() - self._started
        if number == self._warmup:
            self._wait()
            if self._device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(self._device)
            self._started = time.perf_counter()

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def conversations(count: int, job: SftJob, vocabulary: int) -> list[dict[str, list[int]]]:
    """Returns conversations of random tokens, whose answers are trained on.

    A conversation has one to four pairs of a question and an answer of twice the length on average.

    Args:
        count: Number of conversations.
        job: Settings of the lengths.
        vocabulary: Number of tokens in the vocabulary.
    """
    draw = random.Random(0)
    unit = job.mean_tokens / 2.5 / 3 / math.exp(_SIGMA**2 / 2)  # 2.5 pairs of three units
    found = []
    for _ in range(count):
        tokens: list[int] = []
        labels: list[int] = []
        for _ in range(draw.randint(1, 4)):
            for share, trained in ((1, False), (2, True)):
                length = max(2, round(unit * share * draw.lognormvariate(0, _SIGMA)))
                part = [draw.randrange(8, vocabulary) for _ in range(length)]
                tokens += part
                labels += part if trained else [IGNORE_INDEX] * length
        end = job.row_tokens
        found.append({"input_ids": tokens[:end], "labels": labels[:end]})
    return found


def train_lctrain(job: SftJob, model: Any, device: torch.device, clock: Clock) -> None:
    """Trains with LongContextModule and PackedDataModule, in rows without padding."""
    import lightning.pytorch as pl

    from lctrain.config import AttentionConfig, OptimConfig
    from lctrain.data import PackedDataModule, pack
    from lctrain.module import LongContextModule

    class Timing(pl.Callback):
        def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, index: int) -> None:
            clock.count(batch.labels, shifted=True)

        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            clock.step_ends(trainer.global_step)

    steps = WARMUP + job.steps
    count = math.ceil(1.5 * steps * job.row_tokens / job.mean_tokens)
    rows = pack(conversations(count, job, model.config.vocab_size), max_tokens=job.row_tokens)
    module = LongContextModule(
        model,
        OptimConfig(learning_rate=LEARNING_RATE, weight_decay=0.0, schedule="linear"),
        AttentionConfig(fused=True),
    )
    trainer = pl.Trainer(
        accelerator="gpu" if device.type == "cuda" else "cpu",
        devices=1,
        precision="bf16-true" if device.type == "cuda" else "32-true",
        max_steps=steps,
        callbacks=[Timing()],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, PackedDataModule(rows, max_tokens=job.row_tokens, num_workers=0))


def train_trl_packed(job: SftJob, model: Any, device: torch.device, clock: Clock) -> None:
    """Trains with TRL's SFTTrainer in packed rows, and Liger on a GPU."""
    count = math.ceil(1.5 * (WARMUP + job.steps) * job.row_tokens / job.mean_tokens)
    _train_trl(
        job,
        model,
        device,
        clock,
        count,
        packing=True,
        max_length=job.row_tokens,
        per_device_train_batch_size=1,
        use_liger_kernel=device.type == "cuda",
    )


def train_trl_padded(job: SftJob, model: Any, device: torch.device, clock: Clock) -> None:
    """Trains with TRL's SFTTrainer in padded rows."""
    count = (WARMUP + job.steps) * job.rows
    _train_trl(
        job,
        model,
        device,
        clock,
        count,
        max_length=job.row_tokens,
        per_device_train_batch_size=job.rows,
    )


def _train_trl(
    job: SftJob, model: Any, device: torch.device, clock: Clock, count: int, **settings: Any
) -> None:
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    class Timing(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            clock.step_ends(state.global_step)

    def count_tokens(module: Any, inputs: Any, named: dict[str, Any]) -> None:
        clock.count(named["labels"], shifted=False)

    words = Tokenizer(models.WordLevel({"<end>": 0}, unk_token="<end>"))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token="<end>", pad_token="<end>"
    )
    on_gpu = device.type == "cuda"
    with tempfile.TemporaryDirectory() as folder:
        configuration = SFTConfig(
            folder,
            max_steps=WARMUP + job.steps,
            learning_rate=LEARNING_RATE,
            gradient_checkpointing=False,
            bf16=on_gpu,
            use_cpu=not on_gpu,
            report_to="none",
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            **settings,
        )
        trainer = SFTTrainer(
            model,
            configuration,
            train_dataset=Dataset.from_list(conversations(count, job, model.config.vocab_size)),
            processing_class=tokenizer,
            callbacks=[Timing()],
        )
        trained: Any = trainer.model
        trained.register_forward_pre_hook(count_tokens, with_kwargs=True)
        trainer.train()


SFT_CONTENDERS = {
    "lctrain": SftContender(
        "lctrain, packed rows, fused=True",
        train_lctrain,
        modules=("lightning.pytorch",),
        distributions=("lctrain", "lightning"),
    ),
    "trl_packed": SftContender(
        "TRL SFTTrainer, packed rows, FlashAttention-4, Liger",
        train_trl_packed,
        modules=("trl", "flash_attn.cute", "liger_kernel.transformers"),
        distributions=("trl", "flash-attn-4", "liger-kernel"),
        attention="fa4",
    ),
    "trl_padded": SftContender(
        "TRL SFTTrainer, padded rows, SDPA",
        train_trl_padded,
        modules=("trl",),
        distributions=("trl",),
    ),
}


def measure(contender: SftContender, job: SftJob, device: torch.device) -> dict[str, Any]:
    """Trains, and returns trained tokens per second, seconds, positions and peak memory.

    Args:
        contender: Contender to measure.
        job: Settings of the measurement.
        device: Device of the model.
    """
    shape = tiny(SHAPES[job.shape]) if job.tiny else SHAPES[job.shape]
    on_gpu = device.type == "cuda"
    attention = CONTENDERS[contender.attention if on_gpu else "sdpa"]
    if attention.register is not None:
        attention.register()
    dtype = torch.bfloat16 if on_gpu else torch.float32
    model = build_shape(shape, attention.implementation, device, dtype)
    clock = Clock(WARMUP, job.steps, device)
    try:
        contender.train(job, model, device, clock)
    except torch.OutOfMemoryError as error:
        return {"status": "out_of_memory", "reason": str(error).splitlines()[0][:200]}
    except Exception as error:  # reported as a result; the parent measures the others
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:300]
        return {"status": "error", "reason": reason}
    timed = slice(WARMUP, WARMUP + job.steps)
    tokens = int(sum(clock.tokens[timed]))
    found = {
        "status": "ok",
        "seconds": round(clock.seconds, 3),
        "trained_tokens": tokens,
        "positions": sum(clock.positions[timed]),
        "trained_tokens_per_s": round(tokens / clock.seconds, 1),
        "peak_gib": None,
    }
    if on_gpu:
        found["peak_gib"] = round(torch.cuda.max_memory_allocated(device) / 2**30, 2)
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Answers jobs until the standard input ends."""
    (name,) = sys.argv[1:] if arguments is None else arguments
    contender = SFT_CONTENDERS[name]
    answer_jobs(contender, lambda fields, device: measure(contender, SftJob(**fields), device))


if __name__ == "__main__":
    main()
