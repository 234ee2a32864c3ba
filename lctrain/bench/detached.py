"""`lctrain-bench detached`: what a detached log-sum-exp does to gradients of a shared prompt.

    lctrain-bench detached --output detached.json

The completions of a prompt attend to themselves and to the prompt in two calls, whose outputs are
merged by their log-sum-exps. The gradients are exact only if the log-sum-exps have a gradient, too.
Many kernels return a log-sum-exp without one. Both ways are compared with float64 attention over
separate documents, by the norm of the difference over the norm of the float64 result. The tensors
are random; the larger the standard deviation of the logits, the fewer keys an output depends on.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lctrain.kernels import flash_attn_varlen_func, merge_attn_states
from lctrain_kernels.bench.__main__ import positive
from lctrain_kernels.bench.detached_report import detached_table
from lctrain_kernels.bench.run import new_record
from lctrain_kernels.strict_json import write_json

RESULTS = ("out", "dq", "dk", "dv")
WAYS = ("differentiable", "detached")
DEVIATIONS = (1, 2, 4)  # standard deviations of the logits
_HEADS, _HEAD_DIM = 4, 64


def offsets(lengths: Sequence[int]) -> Tensor:
    """Returns cumulative lengths, [N + 1] int32."""
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def attend(q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, int, int], detach: bool) -> Tensor:
    """Returns attention of a prompt and its completions, [T, H, D], by two calls and a merge.

    Args:
        q: Queries [T, H, D] of the prompt and then of the completions.
        k: Keys [T, H, D].
        v: Values [T, H, D].
        lengths: Tokens of the prompt, number of completions, and tokens of each.
        detach: Whether the log-sum-exps have no gradient.
    """
    prompt, count, length = lengths
    own = offsets([prompt, *[length] * count])
    longest = max(prompt, length)
    out, lse = flash_attn_varlen_func(
        q, k, v, own, own, longest, longest, causal=True, return_lse=True
    )
    cross, cross_lse = flash_attn_varlen_func(
        q[prompt:],
        k[:prompt],
        v[:prompt],
        offsets([count * length]),
        offsets([prompt]),
        count * length,
        prompt,
        return_lse=True,
    )
    if detach:
        lse, cross_lse = lse.detach(), cross_lse.detach()
    merged, _ = merge_attn_states(out[prompt:], lse[:, prompt:], cross, cross_lse)
    return torch.cat((out[:prompt], merged))


def attend_separately(q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, int, int]) -> Tensor:
    """Returns the same attention by plain PyTorch, one document per completion.

    Args:
        q: Queries [T, H, D], as in `attend`.
        k: Keys [T, H, D].
        v: Values [T, H, D].
        lengths: As in `attend`.
    """
    prompt, count, length = lengths
    parts = []
    for number in range(count):
        first = prompt + number * length
        rows = torch.cat((torch.arange(prompt), torch.arange(first, first + length)))
        query, key, value = (x[rows].transpose(0, 1) for x in (q, k, v))
        out = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        parts.append(out.transpose(0, 1))
    return torch.cat((parts[0][:prompt], *(part[prompt:] for part in parts)))


def measure(lengths: tuple[int, int, int], deviation: float) -> dict[str, dict[str, float]]:
    """Returns the relative error of output and gradients of both ways, in float32.

    Args:
        lengths: As in `attend`.
        deviation: Standard deviation of the logits.
    """
    prompt, count, length = lengths
    draw = torch.Generator().manual_seed(0)
    shape = (4, prompt + count * length, _HEADS, _HEAD_DIM)
    *given, gradient = torch.randn(shape, generator=draw)
    given[0] *= deviation  # the scale of the logits is 1 / sqrt(D)

    def results(function: Any, dtype: torch.dtype) -> list[Tensor]:
        leaves = [x.to(dtype).requires_grad_() for x in given]
        out = function(*leaves, lengths)
        return [out.detach(), *torch.autograd.grad(out, leaves, gradient.to(dtype))]

    exact = results(attend_separately, torch.float64)
    found = {}
    for way in WAYS:
        detach = way == "detached"
        got = results(partial(attend, detach=detach), torch.float32)
        errors = [float((x - y).norm() / y.norm()) for x, y in zip(got, exact, strict=True)]
        found[way] = dict(zip(RESULTS, errors, strict=True))
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures both ways, and writes the record."""
    parser = argparse.ArgumentParser(
        prog="lctrain-bench detached",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--prompt", type=positive, default=256, help="tokens of the prompt")
    parser.add_argument("--completions", type=positive, default=4, help="number of completions")
    parser.add_argument("--length", type=positive, default=64, help="tokens of a completion")
    parser.add_argument("--output", type=Path, default=Path("detached.json"), help="JSON file")
    options = parser.parse_args(arguments)
    lengths = (options.prompt, options.completions, options.length)
    header = new_record([], torch.device("cpu"), 1, 0)
    record = {
        "device": header.device,
        "date": header.date,
        "versions": header.versions,
        "prompt": options.prompt,
        "completions": options.completions,
        "length": options.length,
        "errors": {deviation: measure(lengths, deviation) for deviation in DEVIATIONS},
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    write_json(options.output, record, indent=1)
    print(detached_table(json.loads(options.output.read_text())))
    print(f"Wrote {options.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
