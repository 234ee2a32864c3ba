"""Tests properties that only a GPU shows: synchronisation, recompilation, memory, large offsets."""

import os
import subprocess
import sys
import textwrap

import pytest
import torch

from lctrain.kernels import (
    dual_chunk_attn_varlen_func,
    flash_attn_varlen_func,
    make_schedule,
    select_backend,
    unpad_input,
)
from lctrain_kernels.backend import hopper_serves
from lctrain_kernels.bench.inputs import make_inputs
from lctrain_kernels.bench.peers import flash_attention_2, lctrain
from lctrain_kernels.bench.workloads import Workload
from tests.kernels.oracle import Case, cumulative, frequencies
from tests.numerics import assert_equal_sums

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def leave_memory_to_others():
    """Empties the allocator's cache after a test, so that other workers can use the memory."""
    yield
    torch.cuda.empty_cache()


def random_qkv(lengths, device, *, heads=4, heads_k=2, head_dim=64):
    """Returns q, k and v of a pack as bfloat16 leaves."""
    total = sum(lengths)
    return [
        torch.randn(total, n, head_dim, device=device, dtype=torch.bfloat16, requires_grad=True)
        for n in (heads, heads_k, heads_k)
    ]


def train_step(q, k, v, cu_seqlens, longest, chunks=None, **options) -> None:
    """Runs forward and backward of attention, as a layer of a causal model does."""
    if chunks is None:
        out = flash_attn_varlen_func(
            q, k, v, cu_seqlens, cu_seqlens, longest, longest, causal=True, **options
        )
    else:
        out = dual_chunk_attn_varlen_func(
            q,
            k,
            v,
            cu_seqlens,
            longest,
            inv_freq=frequencies(Case((), head_dim=q.shape[2]), "cpu")
            .pin_memory()
            .to(q.device, non_blocking=True),
            chunk_size=chunks[0],
            local_size=chunks[1],
            **options,
        )
    torch.autograd.backward(out, torch.ones_like(out))


OPTIONS = {
    "plain": {},
    "dropout": {"dropout_p": 0.1},
    "dropout-seed": {"dropout_p": 0.1, "dropout_seed": 3},
    "dual_chunk": {"chunks": (60, 11)},
    "dual_chunk-dropout": {"chunks": (60, 11), "dropout_p": 0.1},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("scheduled", [False, True], ids=["", "schedule"])
def test_no_synchronisation(options, scheduled, device, no_synchronisation):
    def step(lengths):
        """Runs one step; only the batch comes from the CPU, pinned, as in a training loop."""
        cu = cumulative(lengths, "cpu").pin_memory().to(device, non_blocking=True)
        schedule = None
        if scheduled:
            schedule = make_schedule(lengths).pin_memory().to(device, non_blocking=True)
        train_step(*random_qkv(lengths, device), cu, max(lengths), schedule=schedule, **options)

    step([70, 3, 200])  # compiles
    with no_synchronisation():
        step([70, 3, 200])
        step([5, 0, 129, 64])


def test_windows_on_the_device_do_not_synchronise(device, no_synchronisation):
    window = torch.tensor([50, -1], dtype=torch.int32, device=device)
    cu, qkv = cumulative([70, 200], device), random_qkv([70, 200], device)
    train_step(*qkv, cu, 200, window_size=window)
    with no_synchronisation():
        train_step(*qkv, cu, 200, window_size=window)


def test_unpadding_with_known_counts_does_not_synchronise(device, no_synchronisation):
    rows = torch.randn(3, 8, 4, device=device)
    mask = torch.arange(8, device=device) < torch.tensor([[8], [3], [5]], device=device)
    with no_synchronisation():
        tokens, *_ = unpad_input(rows, mask, num_tokens=16, max_seqlen=8)
    assert tokens.shape == (16, 4)


def compiled_kernels() -> int:
    """Returns the number of specialisations in the caches of the attention kernels."""
    from lctrain_kernels.aot import KERNELS

    hopper = []
    if hopper_serves(torch.device("cuda")):
        from lctrain_kernels.differential import hopper as differential
        from lctrain_kernels.dual_chunk import hopper as dual_chunk
        from lctrain_kernels.varlen import hopper as varlen

        hopper = [
            value
            for module in (varlen, dual_chunk, differential)
            for value in vars(module).values()
            if hasattr(value, "device_caches")
        ]
    kernels = {id(kernel): kernel for kernel in [*KERNELS.values(), *hopper]}.values()
    return sum(len(caches[0]) for kernel in kernels for caches in kernel.device_caches.values())


@pytest.mark.parametrize("dual_chunk", [False, True], ids=["flash", "dual_chunk"])
@pytest.mark.parametrize("scheduled", [False, True], ids=["", "schedule"])
def test_no_recompilation_over_fifty_packings(scheduled, dual_chunk, device):
    """Lengths, documents, tokens, rates, windows and chunks change; no kernel is compiled again."""
    generator = torch.Generator().manual_seed(0)
    counts = []
    for packing in range(51):
        documents = int(torch.randint(1, 40, (1,), generator=generator))
        lengths = torch.randint(0, 150, (documents,), generator=generator).tolist()
        lengths[0] += 1 + packing % 17  # totals of every residue modulo 16
        options = {"window_size": (20 + packing, -1)}
        if dual_chunk:
            options = {"chunks": (16 + 8 * packing, packing % 16)}
        train_step(
            *random_qkv(lengths, device),
            cumulative(lengths, device),
            max(lengths),
            schedule=make_schedule(lengths).to(device) if scheduled else None,
            dropout_p=0.05 + 0.001 * packing,
            **options,
            document_ids=torch.arange(documents, dtype=torch.int32, device=device),
        )
        counts.append(compiled_kernels())
    assert len(set(counts)) == 1, f"compiled during these packings: {counts}"


def peak_bytes(call, leaves, grad_out) -> int:
    """Returns the peak memory of forward and backward beyond the start, after a first run."""
    for _ in range(2):
        for leaf in leaves:
            leaf.grad = None
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call().backward(grad_out)
        torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def our_call(inputs):
    q, k, v = inputs.leaves
    cu, longest = inputs.cu_seqlens, inputs.max_seqlen
    return lambda: flash_attn_varlen_func(q, k, v, cu, cu, longest, longest, causal=True)


@pytest.mark.xdist_group("gpu_memory")
def test_memory_is_linear_and_that_of_torch(device):
    """128k tokens take at most 1.1 times torch's varlen_attn, and twice the memory of 64k."""
    pytest.importorskip("torch.nn.attention.varlen")
    peaks = {}
    for documents in (4, 8):
        workload = Workload("memory", (16 * 1024,) * documents, 32, 8, 128)
        inputs = make_inputs(workload, device)
        peaks[workload.tokens] = peak_bytes(our_call(inputs), inputs.leaves, inputs.grad_out)
    theirs = peak_bytes(flash_attention_2(inputs), inputs.leaves, inputs.grad_out)
    assert peaks[128 * 1024] <= 1.1 * theirs
    allocation_granularity = 1 << 21
    assert peaks[128 * 1024] <= 2 * peaks[64 * 1024] + allocation_granularity


@pytest.mark.xdist_group("gpu_memory")
@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_deterministic_needs_no_scratch(backend, device):
    """deterministic=True takes no more memory than False, and O(T H D) at most."""
    inputs = make_inputs(Workload("memory", (4096,) * 4, 32, 8, 128), device)
    q, k, v = inputs.leaves
    peak, default = (
        peak_bytes(
            lctrain(inputs, backend, deterministic=deterministic), inputs.leaves, inputs.grad_out
        )
        for deterministic in (True, False)
    )
    assert peak <= default
    results = 2 * q.nbytes + k.nbytes + v.nbytes  # out, dq, dk, dv
    statistics = 6 * 4 * q.shape[0] * q.shape[1]  # lse, delta and four numbers per row and head
    granularity = 16 << 21
    float32_dq = 4 * q.numel() if select_backend(device, q.dtype, backend) == "hopper" else 0
    assert peak <= results + statistics + float32_dq + granularity


def require_sixty_gigabytes(device) -> None:
    """Skips the test if it would leave too little memory for tests that run in parallel."""
    beside = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")) - 1
    needed = 60e9 + beside * 4e9
    if torch.cuda.mem_get_info(device)[0] < needed:
        torch.cuda.empty_cache()
    if torch.cuda.mem_get_info(device)[0] < needed:
        pytest.skip(f"needs {needed / 1e9:.0f} GB of free device memory")


@pytest.mark.xdist_group("gpu_memory")
@pytest.mark.parametrize("head_major", [False, True], ids=["tokens-heads", "heads-tokens"])
def test_offsets_past_two_to_the_31(device, head_major):
    """q, k, v, out and all gradients have 2.4e9 elements; the last document must keep its bits.

    Only deterministic=True promises the bits of dq: otherwise programs add it in varying order.
    """
    require_sixty_gigabytes(device)
    lengths = [1500] * 399 + [1200, 300]
    heads, head_dim, total = 32, 128, sum(lengths)
    assert total * heads * head_dim > 2**31
    shape = (heads, total, head_dim) if head_major else (total, heads, head_dim)
    tensors = [torch.randn(shape, device=device, dtype=torch.bfloat16) for _ in range(4)]
    q, k, v, dout = (x.transpose(0, 1) if head_major else x for x in tensors)
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    options = {"causal": True, "deterministic": True}
    out = flash_attn_varlen_func(q, k, v, *[cumulative(lengths, device)] * 2, 1500, 1500, **options)
    grads = torch.autograd.grad(out, (q, k, v), dout)
    for rows in (slice(0, 1500), slice(total - 1500, total - 300), slice(total - 300, total)):
        own = [x[rows].detach().clone().requires_grad_() for x in (q, k, v)]
        length = len(own[0])
        cu = cumulative([length], device)
        alone = flash_attn_varlen_func(*own, cu, cu, length, length, **options)
        expected = torch.autograd.grad(alone, own, dout[rows].clone())
        assert torch.equal(out[rows], alone)
        for name, grad, other in zip(("dq", "dk", "dv"), grads, expected, strict=True):
            assert torch.equal(grad[rows], other), name


@pytest.mark.xdist_group("gpu_memory")
def test_dual_chunk_attention_with_offsets_past_two_to_the_31(device):
    """q, out and dq have 2.4e9 elements; the last document must keep its bits.

    Programs add dq in varying order, so its sums may round differently.
    """
    require_sixty_gigabytes(device)
    lengths = [3000] * 199 + [2700, 300]
    heads, total = 32, sum(lengths)
    assert total * heads * 128 > 2**31
    q, dout = (
        torch.randn(total, heads, 128, device=device, dtype=torch.bfloat16) for _ in range(2)
    )
    k, v = (torch.randn(total, 8, 128, device=device, dtype=torch.bfloat16) for _ in range(2))
    inv_freq = frequencies(Case((), head_dim=128), device)

    def run(rows, lengths):
        leaves = [x[rows].detach().requires_grad_() for x in (q, k, v)]
        out = dual_chunk_attn_varlen_func(
            *leaves,
            cumulative(lengths, device),
            max(lengths),
            inv_freq=inv_freq,
            chunk_size=1000,
            local_size=128,
        )
        return out.detach(), *torch.autograd.grad(out, leaves, dout[rows])

    everything = run(slice(0, total), lengths)
    for rows in (slice(0, 3000), slice(total - 3000, total - 300), slice(total - 300, total)):
        alone = run(rows, [rows.stop - rows.start])
        for name, whole, own in zip(("out", "dq", "dk", "dv"), everything, alone, strict=True):
            if name == "dq":
                assert_equal_sums(whole[rows], own)
            else:
                assert torch.equal(whole[rows], own), name


def test_tokens_beyond_the_last_document_are_refused_before_the_launch(device):
    """The schedule keeps totals on the CPU, so the check reads nothing from the device."""
    q, k, v = random_qkv([70, 10], device)
    cu = cumulative([70], device)
    schedule = make_schedule([70]).to(device)
    with pytest.raises(ValueError, match=r"q must hold the 70 tokens .* got 80.*beyond the last"):
        flash_attn_varlen_func(q, k, v, cu, cu, 70, 70, schedule=schedule)


def test_tokens_beyond_the_last_document_stop_the_program_without_a_schedule():
    """The check is a device-side assertion, which ends a process, so it runs in one of its own."""
    program = """
        import torch
        from lctrain.kernels import flash_attn_varlen_func
        q, k = (torch.randn(80, n, 64, device="cuda", dtype=torch.bfloat16) for n in (4, 2))
        cu = torch.tensor([0, 70], device="cuda", dtype=torch.int32)
        flash_attn_varlen_func(q, k, k, cu, cu, 70, 70, causal=True)
        torch.cuda.synchronize()
        print("survived")
    """
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True
    )
    assert result.returncode != 0
    assert "survived" not in result.stdout
    assert "assert" in result.stderr
