"""`lctrain-bench generation`: times greedy completions beside transformers' two ways.

    lctrain-bench generation --requests 64 --shortest 1024 --longest 8192 --new-tokens 512
    lctrain-bench generation --tiny --requests 4 --shortest 20 --longest 90 --new-tokens 12

The weights are random. The contenders are lctrain's continuous batching with CUDA graphs, the same
with tokens that are drawn by temperature and top-p, the same with a host that reads the tokens of a
step before it launches the next one, without graphs, and with batch_invariant=True; and, on an
unpatched model with SDPA, transformers' generate on a padded batch and its generate_batch. Further
cases have one request and a model of 135M parameters; and four beams of each of four prompts of
--longest tokens, by transformers' generate on a patched model with a PagedCache or a DynamicCache.

Contenders of transformers complete --peer-tokens tokens; their time for all tokens is projected
with the median step. The floor is the time to read the weights and the keys and values of all steps
at --bandwidth; that of prefills is the time of their products at --flops. Beams of a prompt read
its keys once. The record is saved after every result.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from lctrain.bench.generation_runs import (
    FEW,
    SAMPLED,
    run_beams,
    run_continuous,
    run_generate_batch,
    run_padded,
)
from lctrain.bench.generation_yardsticks import (
    floor_seconds,
    forward_seconds,
    log_prob_difference,
    make_prompts,
    prefill_flops,
)
from lctrain.bench.shapes import SHAPES, ModelShape, build_shape, llama_8b, llama_135m, tiny
from lctrain.models import patch_model
from lctrain_kernels.bench.__main__ import names_of, positive
from lctrain_kernels.bench.peers import installed_version
from lctrain_kernels.bench.run import new_record
from lctrain_kernels.strict_json import write_json

_SHAPES = {shape.name: shape for shape in (*SHAPES.values(), llama_8b, llama_135m)}
BEAM_SEARCHES = {"beams_paged": True, "beams_dynamic": False}  # whether the cache is paged
CONTENDERS = (
    *("graphs", "sampled", "waiting", "eager", "invariant", "padded", "generate_batch"),
    *BEAM_SEARCHES,
)
BEAM_REQUESTS = 4
COMPARED = 8
"""Completions whose log-probabilities are compared with a training forward."""


class Bench:
    """Runs the contenders and saves their results.

    Args:
        options: Command line.
        device: Device of the models.
    """

    def __init__(self, options: argparse.Namespace, device: torch.device) -> None:
        header = new_record([], device, 1, 0)
        self._options = options
        self._device = device
        self._start = time.perf_counter()
        self._tokens: list[list[int]] = []
        self.record: dict[str, Any] = {
            "device": header.device,
            "date": header.date,
            "versions": {**header.versions, "transformers": installed_version("transformers")},
            "bandwidth": options.bandwidth,
            "flops": options.flops,
            "cases": {},
        }

    def run(self) -> None:
        """Runs all contenders, as far as time allows; those of transformers last."""
        options = self._options
        shapes = {"batch": _SHAPES[options.shape], "single": llama_135m}
        if options.tiny:
            shapes = {name: tiny(shape) for name, shape in shapes.items()}
        sizes = {"batch": (options.requests, options.longest), "single": (1, options.shortest)}
        cases = []
        for name, shape in shapes.items():
            requests, longest = sizes[name]
            prompts = make_prompts(requests, options.shortest, longest, shape.vocab_size)
            cases.append(self._build(name, shape, prompts))
        for case, model, prompts in cases:
            with patch_model(model, fused=True):
                self._measure(case, "graphs", partial(self._compared, case, model, prompts))
                self._measure(
                    case, "sampled", partial(self._varied, case, model, prompts, "sampled")
                )
                self._measure(
                    case, "waiting", partial(self._varied, case, model, prompts, "waiting")
                )
                self._measure(case, "eager", partial(self._repeated, case, model, prompts))
            if "invariant" in options.contenders:
                with patch_model(model, batch_invariant=True):
                    self._measure(case, "invariant", partial(self._invariant, case, model, prompts))
        peer = min(options.peer_tokens, options.new_tokens)
        for case, model, prompts in cases:
            self._measure(case, "padded", partial(run_padded, model, prompts, peer))
        case, model, prompts = cases[0]
        self._measure(case, "generate_batch", partial(run_generate_batch, model, prompts, peer))
        cases.clear()  # the memory of beam search counts no other model
        del model
        gc.collect()
        if not set(BEAM_SEARCHES).isdisjoint(options.contenders):
            shape, count = shapes["batch"], min(BEAM_REQUESTS, options.requests)
            longest = options.longest
            prompts = make_prompts(count, longest, longest, shape.vocab_size)
            case, model, prompts = self._build("beams", shape, prompts)
            with patch_model(model, fused=True):
                for name, paged in BEAM_SEARCHES.items():
                    self._measure(case, name, partial(run_beams, model, prompts, peer, paged))

    def _build(
        self, name: str, shape: ModelShape, prompts: list[list[int]]
    ) -> tuple[dict[str, Any], Any, list[list[int]]]:
        """Returns the record of a new case, its model in eval mode, and its prompts."""
        options = self._options
        dtype = torch.bfloat16 if self._device.type == "cuda" else torch.float32
        model = build_shape(shape, "sdpa", self._device, dtype).eval()
        model.config.eos_token_id = model.generation_config.eos_token_id = None
        self.record["cases"][name] = case = {
            "shape": shape.title,
            "requests": len(prompts),
            "prompt_tokens": sum(map(len, prompts)),
            "longest_prompt": max(map(len, prompts)),
            "new_tokens": options.new_tokens,
            "floor_seconds": floor_seconds(
                model, shape, prompts, options.new_tokens, options.bandwidth
            ),
            "prefill_floor_seconds": prefill_flops(model, shape, prompts) / options.flops,
            "results": {},
        }
        return case, model, prompts

    def _compared(
        self, case: dict[str, Any], model: Any, prompts: list[list[int]]
    ) -> dict[str, Any]:
        """Runs lctrain with CUDA graphs, and compares log-probabilities with a training forward."""
        self._tokens = []
        run_continuous(model, prompts, min(FEW, case["new_tokens"]), True)  # compiles
        figures, found = run_continuous(model, prompts, case["new_tokens"], True)
        case["log_prob_difference"] = log_prob_difference(model, found[:COMPARED])
        case["forward_seconds"] = forward_seconds(model, found[:COMPARED])
        self._tokens = [one.token_ids for one in found]
        return figures

    def _invariant(
        self, case: dict[str, Any], model: Any, prompts: list[list[int]]
    ) -> dict[str, Any]:
        """Runs lctrain with CUDA graphs on a batch-invariant model, as _compared does."""
        run_continuous(model, prompts, min(FEW, case["new_tokens"]), True)
        figures, found = run_continuous(model, prompts, case["new_tokens"], True)
        case["batch_invariant"] = {
            "log_prob_difference": log_prob_difference(model, found[:COMPARED]),
            "forward_seconds": forward_seconds(model, found[:COMPARED]),
        }
        return figures

    def _varied(
        self, case: dict[str, Any], model: Any, prompts: list[list[int]], contender: str
    ) -> dict[str, Any]:
        """Runs lctrain with CUDA graphs and drawn tokens, or with a host that waits."""
        change: dict[str, Any] = {"options": SAMPLED} if contender == "sampled" else {"waits": True}
        run_continuous(model, prompts, min(FEW, case["new_tokens"]), True, **change)
        return run_continuous(model, prompts, case["new_tokens"], True, **change)[0]

    def _repeated(
        self, case: dict[str, Any], model: Any, prompts: list[list[int]]
    ) -> dict[str, Any]:
        """Runs lctrain without CUDA graphs, and counts the completions with the same tokens."""
        figures, found = run_continuous(model, prompts, case["new_tokens"], False)
        pairs = zip(found, self._tokens, strict=False)
        case["equal_completions"] = sum(one.token_ids == tokens for one, tokens in pairs)
        return figures

    def _measure(
        self, case: dict[str, Any], contender: str, run: Callable[[], dict[str, Any]]
    ) -> None:
        """Runs a contender, and saves its figures or the error."""
        if contender not in self._options.contenders:
            return
        spent = time.perf_counter() - self._start
        if spent > self._options.seconds:
            result: dict[str, Any] = {"error": f"not run after {spent:.0f} s"}
        else:
            try:
                result = run()
                rest = case["new_tokens"] - result["new_tokens"]
                seconds = result["seconds"] + rest * result["step_ms"] / 1e3
                made = case["requests"] * case["new_tokens"]
                result |= {
                    "all_seconds": round(seconds, 4),
                    "tokens_per_s": round(made / seconds, 2),
                    "share_of_floor": round(case["floor_seconds"] / seconds, 4),
                    "share_of_floors": round(
                        (case["floor_seconds"] + case["prefill_floor_seconds"]) / seconds, 4
                    ),
                    "decode_share": round(
                        case["floor_seconds"] / max(1e-9, seconds - result["prefill_seconds"]), 4
                    ),
                }
            except Exception as error:  # a contender that fails leaves the others their turn
                traceback.print_exc()
                result = {"error": f"{type(error).__name__}: {error}"[:400]}
        case["results"][contender] = result
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        print(f"{case['shape']}, {case['requests']} requests, {contender}: {result}", flush=True)
        write_json(self._options.output, self.record, indent=1)


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        prog="lctrain-bench generation",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--shape", choices=list(_SHAPES), default="llama-1b")
    parser.add_argument("--requests", type=positive, default=64, help="number of prompts")
    parser.add_argument("--shortest", type=positive, default=1024, help="tokens of a prompt")
    parser.add_argument("--longest", type=positive, default=8192, help="tokens of a prompt")
    parser.add_argument("--new-tokens", type=positive, default=512, help="tokens of a completion")
    parser.add_argument("--peer-tokens", type=positive, default=64, help="the same, of peers")
    parser.add_argument(
        "--contenders",
        type=names_of(dict.fromkeys(CONTENDERS), "contenders"),
        default=CONTENDERS,
        help=f"separated by commas; default: {','.join(CONTENDERS)}",
    )
    parser.add_argument("--bandwidth", type=float, default=4.2e12, help="bytes/s of the floor")
    parser.add_argument(
        "--flops", type=float, default=9.89e14, help="FLOP/s of the prefills' floor"
    )
    parser.add_argument(
        "--seconds", type=positive, default=140, help="no contender begins later; default 140"
    )
    parser.add_argument("--tiny", action="store_true", help="models that a CPU runs in seconds")
    parser.add_argument("--output", type=Path, default=Path("generation.json"), help="JSON file")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark. Returns 2 if the machine cannot run it, 1 if lctrain failed."""
    options = parse_arguments(arguments)
    if options.peer_tokens < 2:
        print("--peer-tokens must be at least 2, got 1: a step needs two tokens.", file=sys.stderr)
        return 2
    on_gpu = torch.cuda.is_available()
    if not (options.tiny or on_gpu):
        print(
            "lctrain-bench generation needs a GPU, and torch sees none. Try it with --tiny.",
            file=sys.stderr,
        )
        return 2
    bench = Bench(options, torch.device("cuda" if on_gpu else "cpu"))
    bench.run()
    cases = bench.record["cases"].values()
    return int(any("error" in case["results"].get("graphs", {}) for case in cases))


if __name__ == "__main__":
    sys.exit(main())
