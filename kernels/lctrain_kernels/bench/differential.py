"""Times differential attention against separate calls of plain attention.

    python -m lctrain_kernels.bench.differential --out run.json [--workloads v1_1x32k,v2_mix32k]

Version 1 is compared with four calls of plain attention, one per branch and half of the values; the
combination of their outputs is not timed. Version 2 is compared with one call over all heads and a
compiled subtraction. Plain attention is that of FlashAttention-4 and of lctrain. lctrain's
differential attention is checked against float64 before it is timed.
"""

import argparse
import importlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from statistics import median

import torch
import torch._functorch.config
from torch import Tensor

from lctrain_kernels import diff_attn_varlen_func, flash_attn_varlen_func, make_schedule
from lctrain_kernels.backend import BACKENDS
from lctrain_kernels.bench.__main__ import names_of, positive
from lctrain_kernels.bench.accuracy import ErrorRatio, error_ratio
from lctrain_kernels.bench.check import scale_down
from lctrain_kernels.bench.measure import Timer, gpu_timer
from lctrain_kernels.bench.peers import PEERS
from lctrain_kernels.bench.record import BenchmarkRecord, Result
from lctrain_kernels.bench.run import new_record
from lctrain_kernels.bench.workloads import WORKLOADS, Workload
from lctrain_kernels.differential.reference import dense_differential

OURS = "lctrain"
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
Call = Callable[[], Sequence[Tensor]]


@dataclass(frozen=True)
class DifferentialWorkload(Workload):
    """A pack of documents under a causal mask, for differential attention.

    The fields of Workload apply; `heads` counts pairs of branches.

    Attributes:
        value_dim: Head dim Dv of the values.
        version: Version of differential attention. Version 1 has one k per branch and one lambda;
            version 2 has one k for both branches and a lambda per token and head.
        backend: Backend of lctrain's kernels.
    """

    value_dim: int = 128
    version: int = 1
    backend: str = "auto"

    @property
    def forward_flops(self) -> int:
        """Returns the FLOPs of the forward: two products of D and two of Dv, causal half."""
        return self._pairs() * (2 * self.head_dim + 2 * self.value_dim)

    @property
    def backward_flops(self) -> int:
        """Returns the FLOPs of the backward: six products of D and two of Dv, causal half."""
        return self._pairs() * (6 * self.head_dim + 2 * self.value_dim)

    def _pairs(self) -> int:
        return sum(length**2 for length in self.lengths) * self.heads


DIFFERENTIAL_WORKLOADS = {
    workload.name: workload
    for pack in ("1x32k", "4x8k", "mix32k", "1x128k")
    for workload in (
        DifferentialWorkload(f"v1_{pack}", WORKLOADS[pack].lengths, 16, 16, 64),
        DifferentialWorkload(f"v2_{pack}", WORKLOADS[pack].lengths, 16, 8, 128, version=2),
    )
}


@dataclass(frozen=True)
class DifferentialInputs:
    """Tensors of a workload.

    Attributes:
        workload: Workload of the tensors.
        q: Queries. Version 1: q1 and q2 [T, H, D]; version 2: one tensor [T, 2 H, D], in which the
            heads of a pair are adjacent.
        k: Keys. Version 1: k1 and k2 [T, Hk, D]; version 2: one tensor [T, Hk, D].
        v: Packed values [T, Hk, Dv].
        lam: Lambda: a scalar in version 1, [T, H] in version 2.
        grad_out: Gradient of the output, [T, H, Dv].
        cu_seqlens: Cumulative document lengths, [N + 1] int32.
    """

    workload: DifferentialWorkload
    q: tuple[Tensor, ...]
    k: tuple[Tensor, ...]
    v: Tensor
    lam: Tensor
    grad_out: Tensor
    cu_seqlens: Tensor

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        """Returns the tensors that get a gradient."""
        return (*self.q, *self.k, self.v, self.lam)

    def branches(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Returns q1, q2, k1, k2. Version 2's q1 and q2 are views of one tensor, as in a model."""
        if self.workload.version == 1:
            (q1, q2), (k1, k2) = self.q, self.k
            return q1, q2, k1, k2
        q1, q2 = self.q[0].unflatten(1, (-1, 2)).unbind(2)
        return q1, q2, self.k[0], self.k[0]


def make_inputs(
    workload: DifferentialWorkload,
    device: torch.device | str,
    dtype: torch.dtype = torch.bfloat16,
) -> DifferentialInputs:
    """Draws standard normal tensors, and lambda in (0, 1); every call draws the same numbers."""
    generator = torch.Generator(device).manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=dtype)

    tokens, heads = workload.tokens, workload.heads
    if workload.version == 1:
        q = tuple(draw(tokens, heads, workload.head_dim) for _ in range(2))
        k = tuple(draw(tokens, workload.heads_kv, workload.head_dim) for _ in range(2))
        lam = torch.tensor(0.5, device=device)
    else:
        q = (draw(tokens, 2 * heads, workload.head_dim),)
        k = (draw(tokens, workload.heads_kv, workload.head_dim),)
        lam = torch.sigmoid(draw(tokens, heads))
    boundaries = torch.tensor([0, *workload.lengths]).cumsum(0)
    return DifferentialInputs(
        workload=workload,
        q=tuple(x.requires_grad_() for x in q),
        k=tuple(x.requires_grad_() for x in k),
        v=draw(tokens, workload.heads_kv, workload.value_dim).requires_grad_(),
        lam=lam.requires_grad_(),
        grad_out=draw(tokens, heads, workload.value_dim),
        cu_seqlens=boundaries.to(device, torch.int32),
    )


def ours(inputs: DifferentialInputs) -> Call:
    """Returns a call of lctrain's differential attention, with a schedule built beforehand."""
    lengths = inputs.workload.lengths
    schedule = make_schedule(lengths).to(inputs.v.device)
    longest = max(lengths)

    def call() -> Sequence[Tensor]:
        out = diff_attn_varlen_func(
            *inputs.branches(),
            inputs.v,
            inputs.lam,
            inputs.cu_seqlens,
            longest,
            schedule=schedule,
            backend=inputs.workload.backend,
        )
        assert isinstance(out, Tensor)
        return [out]

    return call


def our_attention(inputs: DifferentialInputs) -> Attention:
    """Returns a function of (q, k, v): lctrain's plain attention, by portable kernels."""
    lengths = inputs.workload.lengths
    schedule = make_schedule(lengths).to(inputs.v.device)
    cu, longest = inputs.cu_seqlens, max(lengths)
    backend = "triton" if inputs.v.is_cuda else "auto"

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = flash_attn_varlen_func(
            *(q, k, v, cu, cu, longest, longest),
            causal=True,
            schedule=schedule,
            backend=backend,
        )
        assert isinstance(out, Tensor)
        return out

    return attention


def flash_attention_4(inputs: DifferentialInputs) -> Attention:
    """Returns a function of (q, k, v): plain attention by FlashAttention-4."""
    flash = importlib.import_module("flash_attn.cute").flash_attn_varlen_func
    cu, longest = inputs.cu_seqlens, max(inputs.workload.lengths)

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = flash(
            q,
            k,
            v,
            cu_seqlens_q=cu,
            cu_seqlens_k=cu,
            max_seqlen_q=longest,
            max_seqlen_k=longest,
            causal=True,
        )
        return out[0] if isinstance(out, tuple) else out

    return attention


def separate_calls(inputs: DifferentialInputs, attention: Attention) -> Call:
    """Returns a call that computes differential attention by separate calls of a plain attention.

    Version 1 takes four calls (two branches, two halves of the values), version 2 one call over all
    heads and a compiled subtraction.

    Args:
        inputs: Tensors of the workload.
        attention: Function of (q, k, v) that computes plain attention.
    """
    if inputs.workload.version == 1:
        q1, q2, k1, k2 = inputs.branches()
        # Contiguous halves, as a model would project them.
        halves = inputs.v.split(inputs.workload.head_dim, 2)
        values = [half.detach().contiguous().requires_grad_() for half in halves]
        return lambda: [attention(q, k, value) for q, k in ((q1, k1), (q2, k2)) for value in values]
    torch._functorch.config.donated_buffer = False  # one graph is run backward many times
    subtract = torch.compile(_subtract)
    return lambda: [subtract(attention(inputs.q[0], inputs.k[0], inputs.v), inputs.lam)]


def _subtract(both: Tensor, lam: Tensor) -> Tensor:
    return both[:, 0::2] - lam[..., None] * both[:, 1::2]


def _gradients(inputs: DifferentialInputs, outputs: Sequence[Tensor]) -> list[Tensor]:
    """Returns the outputs' gradients: grad_out, or its halves, which branch 2 gets negated."""
    if len(outputs) == 1:
        return [inputs.grad_out]
    halves = [half.contiguous() for half in inputs.grad_out.split(inputs.workload.head_dim, 2)]
    return [*halves, *(-half for half in halves)]


CONTENDERS: dict[str, Callable[[DifferentialInputs], Call]] = {
    OURS: ours,
    "lctrain_calls": lambda inputs: separate_calls(inputs, our_attention(inputs)),
    "fa4_calls": lambda inputs: separate_calls(inputs, flash_attention_4(inputs)),
}
TITLES = {
    OURS: "lctrain, one launch",
    "lctrain_calls": "lctrain, separate calls",
    "fa4_calls": "FlashAttention-4, separate calls",
}


def backward_of(
    prepare: Callable[[DifferentialInputs], Call], inputs: DifferentialInputs
) -> Callable[[], Sequence[Tensor]]:
    """Returns a function that runs the backward of one of CONTENDERS, whose graph is kept."""
    outputs = prepare(inputs)()
    gradients = _gradients(inputs, outputs)
    # Version 1's separate calls have values of their own and no lambda.
    reached = [leaf for leaf in inputs.leaves if len(outputs) == 1 or leaf is not inputs.lam]
    leaves = [leaf for leaf in reached if len(outputs) == 1 or leaf is not inputs.v]
    return lambda: torch.autograd.grad(outputs, leaves, gradients, retain_graph=True)


def measure(
    prepare: Callable[[DifferentialInputs], Call],
    inputs: DifferentialInputs,
    timer: Timer,
    repetitions: int = 1,
) -> tuple[float, float]:
    """Returns one of CONTENDERS' median milliseconds: a forward without a graph, a backward."""
    call = prepare(inputs)

    def forward() -> None:
        with torch.no_grad():
            call()

    backward = backward_of(lambda _: call, inputs)
    times = [(timer(forward), timer(backward)) for _ in range(repetitions)]
    return median(ms for ms, _ in times), median(ms for _, ms in times)


def check(workload: DifferentialWorkload, device: torch.device | str) -> dict[str, ErrorRatio]:
    """Measures lctrain's error against float64 over plain PyTorch's, on shortened documents.

    If lambda is one number, the gradients of its copies per token and head are compared.
    """
    lengths = scale_down(workload).lengths
    inputs = make_inputs(replace(workload, lengths=lengths), device)
    q1, q2, k1, k2 = (x.detach() for x in inputs.branches())
    every_lam = inputs.lam.detach().expand(q1.shape[:2]).contiguous()
    shared = workload.version == 2
    names = ("q1", "q2", "k", "v", "lam") if shared else ("q1", "q2", "k1", "v", "lam", "k2")
    tensors = [q1, q2, k1, inputs.v.detach(), every_lam, *([] if shared else [k2])]
    schedule = make_schedule(lengths).to(device)

    def run(leaves: Sequence[Tensor]) -> Tensor:
        a, b, k, v, lam, *rest = leaves
        other = rest[0] if rest else k
        out = diff_attn_varlen_func(
            *(a, b, k, other, v, lam, inputs.cu_seqlens, max(lengths)),
            schedule=schedule,
            backend=workload.backend,
        )
        assert isinstance(out, Tensor)
        return out

    def dense(leaves: Sequence[Tensor]) -> Tensor:
        a, b, k, v, lam, *rest = leaves
        other = rest[0] if rest else k
        parts = [
            dense_differential(*(x[begin:end] for x in (a, b, k, other, v, lam)), window=(-1, 0))[0]
            for begin, end in pairwise(inputs.cu_seqlens.tolist())
        ]
        return torch.cat(parts)

    def evaluate(
        function: Callable[[Sequence[Tensor]], Tensor], dtype: torch.dtype
    ) -> list[Tensor]:
        leaves = [x.to(dtype).requires_grad_() for x in tensors]
        out = function(leaves)
        return [out.detach(), *torch.autograd.grad(out, leaves, inputs.grad_out.to(dtype))]

    dtype = inputs.v.dtype
    results = zip(
        evaluate(run, dtype), evaluate(dense, dtype), evaluate(dense, torch.float64), strict=True
    )
    titles = ("out", *(f"d{name}" for name in names))
    return {title: error_ratio(*three) for title, three in zip(titles, results, strict=True)}


def run_workload(
    record: BenchmarkRecord,
    workload: DifferentialWorkload,
    contenders: Sequence[str],
    device: torch.device,
    timer: Timer,
    repetitions: int = 1,
) -> None:
    """Times contenders (keys of CONTENDERS) on one workload, and adds the results to the record."""
    record.workloads[workload.name] = asdict(workload)
    found = check(workload, device)
    ratios = {name: round(max(r.norm, r.maximum), 3) for name, r in found.items()}
    inputs = make_inputs(workload, device)
    for name in contenders:
        judged = ratios if name == OURS else None
        if name == OURS and not all(ratio.passes for ratio in found.values()):
            reason = f"error above twice that of plain PyTorch: {ratios}"
            record.results.append(
                Result(workload.name, name, "failed_check", reason, error_ratios=ratios)
            )
            continue
        try:
            forward_ms, backward_ms = measure(CONTENDERS[name], inputs, timer, repetitions)
        except Exception as error:  # record the error and time the other contenders
            cause = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            record.results.append(Result(workload.name, name, "error", cause))
            continue
        record.results.append(
            Result(
                workload.name,
                name,
                "ok",
                forward_ms=forward_ms,
                backward_ms=backward_ms,
                forward_tflops=workload.forward_flops / forward_ms / 1e9,
                backward_tflops=workload.backward_flops / backward_ms / 1e9,
                error_ratios=judged,
            )
        )


def describe(record: BenchmarkRecord, workload: str) -> str:
    """Returns lines for the terminal: times of one workload, and lctrain's speed-ups."""
    mine = record.find(workload, OURS)
    lines = [workload]
    for result in record.results:
        if result.workload != workload:
            continue
        if result.status != "ok":
            lines.append(f"  {result.peer:14s} {result.status}: {result.reason}")
            continue
        line = f"  {result.peer:14s} {result.forward_ms:8.3f} / {result.backward_ms:8.3f} ms"
        if mine is not None and result is not mine:
            assert result.forward_ms
            assert result.backward_ms
            assert mine.forward_ms
            assert mine.backward_ms
            line += (
                f"   ours is {result.forward_ms / mine.forward_ms:.2f}x"
                f" / {result.backward_ms / mine.backward_ms:.2f}x"
            )
        if result.error_ratios:
            worst = max(result.error_ratios.values())
            line += f"   error at most {worst:.2f}x plain PyTorch's"
        lines.append(line)
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark. Returns 1 if an lctrain kernel failed, 2 if the machine cannot run it."""
    parser = argparse.ArgumentParser(
        prog="python -m lctrain_kernels.bench.differential", description=__doc__
    )
    parser.add_argument("--out", type=Path, required=True, help="the JSON file")
    parser.add_argument(
        "--workloads",
        type=names_of(DIFFERENTIAL_WORKLOADS, "workloads"),
        default=list(DIFFERENTIAL_WORKLOADS),
    )
    parser.add_argument(
        "--contenders", type=names_of(CONTENDERS, "contenders"), default=list(CONTENDERS)
    )
    parser.add_argument("--backend", choices=BACKENDS, default="auto", help="of ours")
    parser.add_argument("--repetitions", type=positive, default=3)
    parser.add_argument("--milliseconds", type=positive, default=200)
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("This benchmark needs a GPU, and torch sees none.", file=sys.stderr)
        return 2
    contenders = list(options.contenders)
    missing = PEERS["fa4"].missing()
    if missing is not None and "fa4_calls" in contenders:
        contenders.remove("fa4_calls")
        print(f"FlashAttention-4: not timed, {missing}")
    device = torch.device("cuda", torch.cuda.current_device())
    peers = [PEERS["fa4"]] if "fa4_calls" in contenders else []
    record = new_record(peers, device, options.repetitions, options.milliseconds)
    record.settings["titles"] = {name: TITLES[name] for name in contenders}
    timer = gpu_timer(options.milliseconds)
    for name in options.workloads:
        workload = replace(DIFFERENTIAL_WORKLOADS[name], backend=options.backend)
        run_workload(record, workload, contenders, device, timer, options.repetitions)
        print(describe(record, name), flush=True)
        record.save(options.out)
        torch.cuda.empty_cache()
    print(f"Wrote {options.out}")
    mine = [result.status for result in record.results if result.peer == OURS]
    return int("failed_check" in mine or "error" in mine)


if __name__ == "__main__":
    sys.exit(main())
