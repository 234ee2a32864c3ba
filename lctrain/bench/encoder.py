"""`lctrain-bench encoder`: times forward and backward of encoders on rows with padding.

    lctrain-bench encoder --output encoder.json
    lctrain-bench encoder --tiny --output encoder.json

lctrain is compared with encoders that compute padding, and with encoders that remove it in each
layer. The lengths of the rows' texts rise evenly from 0.2 to 1 times the row's length, so they
average 0.6 of it. All contenders have the same weights and rows; on a GPU they run in bfloat16.
Kernel launches limit the speed of small batches. In `graph` cases every contender therefore replays
a CUDA graph of the step. There lctrain gets rows that a collator has already packed, and
FlashAttention-4 gets the places of the tokens, which it finds in each layer otherwise: reading them
from the mask synchronises. The record is written after every contender.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from lctrain.batch import PackedBatch
from lctrain.bench.fa4_rows import FA4_NAME, fa4_mask, fa4_rows, known_padding
from lctrain.models import patch_model
from lctrain_kernels.bench.__main__ import names_of, positive
from lctrain_kernels.bench.measure import Timer, graph_timer, peak_bytes_of
from lctrain_kernels.bench.peers import installed_version
from lctrain_kernels.bench.record import BenchmarkRecord, Result
from lctrain_kernels.bench.run import new_record

BERT: dict[str, Any] = {"vocab_size": 30_522, "hidden_size": 768, "num_hidden_layers": 12}
MODERNBERT: dict[str, Any] = {"vocab_size": 50_368, "hidden_size": 768, "num_hidden_layers": 22}
TINY: dict[str, Any] = {
    **{"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2},
    **{f"{name}_token_id": index for index, name in enumerate(("pad", "bos", "eos", "cls", "sep"))},
}


@dataclass(frozen=True)
class EncoderCase:
    """A case of the benchmark: a model family, and the size of its rows.

    Attributes:
        model_type: Name of the model family in transformers.
        rows: Number of rows B.
        tokens: Number of tokens S of a row, with padding.
        graph: Whether the step is replayed as a CUDA graph.
        layers: Number of layers; None takes the family's own number.
    """

    model_type: str
    rows: int
    tokens: int
    graph: bool = False
    layers: int | None = None

    @property
    def name(self) -> str:
        """Name on the command line and in records."""
        layers = "" if self.layers is None else f"_l{self.layers}"
        graph = "_graph" if self.graph else ""
        return f"{self.model_type}_b{self.rows}_s{self.tokens}{layers}{graph}"

    def lengths(self) -> list[int]:
        """Returns the number of tokens of each row that are not padding; 0.6 S on average."""
        shares = torch.linspace(0.2, 1.0, self.rows, dtype=torch.float64)
        order = torch.randperm(self.rows, generator=torch.Generator().manual_seed(0))
        return [max(1, round(share * self.tokens)) for share in shares[order].tolist()]

    def build(self, implementation: str, device: torch.device, tiny: bool) -> Any:
        """Builds the encoder with random weights of a fixed seed, without dropout."""
        from transformers import AutoModel, BertConfig, ModernBertConfig

        torch.manual_seed(0)
        smaller = dict(TINY) if tiny else {}
        if self.layers is not None:
            smaller["num_hidden_layers"] = self.layers
        if self.model_type == "bert":
            config: Any = BertConfig(
                **(BERT | smaller),
                max_position_embeddings=max(512, self.tokens),
                hidden_dropout_prob=0.0,
                attention_probs_dropout_prob=0.0,
            )
        else:
            config = ModernBertConfig(**(MODERNBERT | smaller), max_position_embeddings=self.tokens)
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        with device:  # a GPU draws weights in milliseconds, and a CPU in ten seconds or more
            model = AutoModel.from_config(config, attn_implementation=implementation, dtype=dtype)
        if hasattr(model, "pooler"):
            model.pooler = None
        return model.to(device).train()


@dataclass(frozen=True)
class Rows:
    """The inputs of a case.

    Attributes:
        input_ids: [B, S] int64.
        mask: [B, S] int64, 1 at tokens and 0 at padding.
        gradient: [B, S, E], gradient of the last hidden states, 0 at padding.
        lengths: Number of tokens of each row that are not padding.
    """

    input_ids: Tensor
    mask: Tensor
    gradient: Tensor
    lengths: list[int]

    @classmethod
    def of(cls, case: EncoderCase, model: Any) -> Rows:
        """Returns random rows for a model of a case, on its device."""
        weight = next(model.parameters())
        generator = torch.Generator().manual_seed(1)
        shape, lengths = (case.rows, case.tokens), case.lengths()
        mask = (torch.arange(case.tokens) < torch.tensor(lengths)[:, None]).long()
        ids = torch.randint(5, model.config.vocab_size, shape, generator=generator) * mask
        device = weight.device
        ids, mask = ids.to(device), mask.to(device)
        generator = torch.Generator(device).manual_seed(1)
        size = (*shape, model.config.hidden_size)
        gradient = torch.randn(size, generator=generator, device=device)
        gradient = (gradient * mask[..., None] / case.tokens).to(weight.dtype)
        return cls(ids, mask, gradient, lengths)

    def pack(self) -> tuple[dict[str, Any], Tensor]:
        """Returns the model's arguments for the rows as one pack, and its gradient [1, T, E]."""
        rows = zip(self.input_ids.cpu(), self.lengths, strict=True)
        batch = PackedBatch.from_documents([row[:length] for row, length in rows])
        arguments = batch.to(self.input_ids.device).model_kwargs()
        arguments.pop("use_cache")
        return arguments, self.gradient[self.mask.bool()][None].contiguous()


def build_ours(case: EncoderCase, device: torch.device, tiny: bool) -> Any:
    """Returns the encoder with lctrain's attention and fused modules, which removes padding."""
    model = case.build("sdpa", device, tiny)
    patch_model(model, fused=True, unpad=True)
    return model


def build_sdpa(case: EncoderCase, device: torch.device, tiny: bool) -> Any:
    """Returns transformers' own encoder with SDPA, which also computes padding."""
    return case.build("sdpa", device, tiny)


def build_fa4(case: EncoderCase, device: torch.device, tiny: bool) -> Any:
    """Returns the encoder with FlashAttention-4, where every layer removes and restores padding."""
    import flash_attn.cute  # noqa: F401  (raises if it is not installed)
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(FA4_NAME, fa4_rows)
    AttentionMaskInterface.register(FA4_NAME, fa4_mask)
    return case.build(FA4_NAME, device, tiny)


CONTENDERS: dict[str, Callable[[EncoderCase, torch.device, bool], Any]] = {
    "lctrain": build_ours,
    "sdpa": build_sdpa,
    "fa4": build_fa4,
}
_ALL = (
    EncoderCase("bert", 64, 512),
    EncoderCase("bert", 32, 1024),
    EncoderCase("bert", 16, 512),
    EncoderCase("bert", 16, 512, graph=True),
    EncoderCase("modernbert", 8, 8192),
)
CASES = {case.name: case for case in _ALL}
CPU_CASES = (EncoderCase("bert", 2, 512, layers=2),)
TINY_CASES = (EncoderCase("bert", 4, 32), EncoderCase("modernbert", 3, 48))


def run_case(
    record: BenchmarkRecord,
    case: EncoderCase,
    contenders: Sequence[str],
    device: torch.device,
    milliseconds: int,
    tiny: bool = False,
    tell: Callable[[Result], None] = lambda result: None,
) -> None:
    """Adds the results of a case to the record.

    Args:
        record: Record to which the results are added.
        case: Model and rows.
        contenders: Names in CONTENDERS. The outputs of the others are compared with those of the
            first one that runs.
        device: Device of the runs.
        milliseconds: Time to spend on one measurement.
        tiny: Whether to run a tiny model.
        tell: Called with every result as soon as it is in the record.
    """
    differences: dict[str, float] = {}
    facts = {"tokens_of_rows": sum(case.lengths()), "differences": differences}
    record.workloads[case.name] = asdict(case) | facts
    reference = None
    for name in contenders:
        try:
            model = CONTENDERS[name](case, device, tiny)
            rows = Rows.of(case, model)
            with torch.no_grad():
                hidden = model(rows.input_ids, attention_mask=rows.mask)[0][rows.mask.bool()]
            reference = hidden if reference is None else reference
            distance = (hidden.float() - reference.float()).norm() / reference.float().norm()
            differences[name] = round(distance.item(), 6)
            step_ms, peak = _time(name, case, model, rows, milliseconds)
        except Exception as error:  # the error is recorded; the other contenders are still timed
            text = str(error).splitlines() or [""]
            cause = f"{type(error).__name__}: {text[0]}"[:300]
            record.results.append(Result(case.name, name, "error", cause))
        else:
            result = Result(case.name, name, "ok", step_ms=step_ms, peak_bytes=peak)
            record.results.append(result)
        tell(record.results[-1])
        model = rows = hidden = None  # type: ignore[assignment]
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def _time(
    name: str, case: EncoderCase, model: Any, rows: Rows, milliseconds: int
) -> tuple[float, int | None]:
    """Returns the milliseconds of forward and backward, and their peak memory in bytes."""
    device = rows.input_ids.device
    if not case.graph:
        step = step_of(
            model, {"input_ids": rows.input_ids, "attention_mask": rows.mask}, rows.gradient
        )
        return timer_of(device, milliseconds)(step), peak_bytes_of(step, device)
    if device.type != "cuda":
        raise ValueError(f"{case.name} must run on a GPU, got {device}. Choose other --cases.")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        arguments: dict[str, Any] = {"input_ids": rows.input_ids, "attention_mask": rows.mask}
        gradient = rows.gradient
        if name == "lctrain":
            arguments, gradient = rows.pack()
        with known_padding(rows.mask):
            return graph_timer(milliseconds)(step_of(model, arguments, gradient)), None


def step_of(model: Any, arguments: dict[str, Any], gradient: Tensor) -> Callable[[], None]:
    """Returns a function that runs forward and backward, and discards the gradients."""
    weights = [p for p in model.parameters() if p.requires_grad]

    def step() -> None:
        hidden = model(**arguments)[0]
        torch.autograd.grad(hidden, weights, gradient, allow_unused=True)

    return step


def timer_of(device: torch.device, milliseconds: int) -> Timer:
    """Returns a function that times a step: the median of repeats in milliseconds, host included.

    Args:
        device: Device of the steps.
        milliseconds: Time to spend on the repeats of one timing.
    """

    def synchronize() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    def timed(call: Callable[[], object]) -> float:
        synchronize()
        begin = time.perf_counter()
        call()
        synchronize()
        return 1e3 * (time.perf_counter() - begin)

    def timer(call: Callable[[], object]) -> float:
        for _ in range(2):
            once = timed(call)
        repeats = max(3, min(50, int(milliseconds / max(once, 1e-3))))
        return median(timed(call) for _ in range(repeats))

    return timer


def describe(record: BenchmarkRecord, result: Result) -> str:
    """Returns a line with a contender's time, and how much longer it takes than lctrain."""
    start = f"{result.workload:24s} {result.peer:8s}"
    if result.step_ms is None:
        return f"{start} {result.reason}"
    line = f"{start} {result.step_ms:9.2f} ms"
    ours = record.find(result.workload, "lctrain")
    if ours is not None and ours.step_ms:
        line += f"  {result.step_ms / ours.step_ms:5.2f}x"
    return line


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        prog="lctrain-bench encoder",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    cases = {case.name: case for case in (*_ALL, *CPU_CASES)}
    parser.add_argument("--cases", type=names_of(cases, "cases"), help=f"of {', '.join(cases)}")
    parser.add_argument(
        "--contenders",
        type=names_of(CONTENDERS, "contenders"),
        default=list(CONTENDERS),
        help="default lctrain,sdpa,fa4",
    )
    parser.add_argument(
        "--milliseconds", type=positive, default=1500, help="of one timing; default 1500"
    )
    parser.add_argument("--tiny", action="store_true", help="tiny models, in seconds on a CPU")
    parser.add_argument("--output", type=Path, default=Path("encoder.json"), help="JSON file")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark. Returns 1 if lctrain failed in a case."""
    options = parse_arguments(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    chosen: tuple[EncoderCase, ...] = (
        TINY_CASES if options.tiny else _ALL if device.type == "cuda" else CPU_CASES
    )
    if options.cases and not options.tiny:
        known = {case.name: case for case in (*_ALL, *CPU_CASES)}
        chosen = tuple(known[name] for name in options.cases)
    record = new_record([], device, 1, options.milliseconds)
    record.settings["dtype"] = "bfloat16" if device.type == "cuda" else "float32"
    record.settings["threads"] = torch.get_num_threads()
    for name in ("transformers", "flash-attn-4"):
        version = installed_version(name)
        if version is not None:
            record.versions[name] = version

    def tell(result: Result) -> None:
        print(describe(record, result), flush=True)
        record.save(options.output)

    for case in chosen:
        run_case(record, case, options.contenders, device, options.milliseconds, options.tiny, tell)
    print(f"Wrote {options.output}")
    ours = [result for result in record.results if result.peer == "lctrain"]
    return int(any(result.status != "ok" for result in ours))


if __name__ == "__main__":
    sys.exit(main())
