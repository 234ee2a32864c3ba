"""Tests bad arguments: each message names the fault, the value and the remedy."""

import pytest
import torch

from lctrain.kernels import flash_attn_func, flash_attn_varlen_func, make_schedule, select_backend
from lctrain_kernels import backend
from tests.kernels.oracle import cumulative

CU = cumulative([4, 3], "cpu")
META_CU = CU.to("meta")


def tensor(*shape: int, dtype=torch.float32, device="cpu") -> torch.Tensor:
    return torch.zeros(*shape, dtype=dtype, device=device)


ARGUMENTS = {
    "q": tensor(7, 4, 8),
    "k": tensor(7, 2, 8),
    "v": tensor(7, 2, 8),
    "cu_seqlens_q": CU,
    "cu_seqlens_k": CU,
    "max_seqlen_q": 4,
    "max_seqlen_k": 4,
}
CASES = {
    "q-list": ({"q": [1.0]}, TypeError, "q must be a torch.Tensor, got list"),
    "k-rank": (
        {"k": tensor(1, 7, 2, 8)},
        ValueError,
        r"k must have shape \[tokens, heads, head_dim\], got \(1, 7, 2, 8\).*flash_attn_func",
    ),
    "v-dtype": (
        {"v": tensor(7, 2, 8, dtype=torch.int32)},
        TypeError,
        "v must be float16, bfloat16, float32 or float64, got torch.int32",
    ),
    "dtypes": (
        {"v": tensor(7, 2, 8, dtype=torch.bfloat16)},
        TypeError,
        "one dtype, got .*bfloat16.*cast q and k to v's dtype",
    ),
    "devices": (
        {"k": tensor(7, 2, 8, device="meta")},
        ValueError,
        "on one device, got cpu, meta and cpu",
    ),
    "k-v-shape": (
        {"v": tensor(7, 4, 8)},
        ValueError,
        r"k and v must have one shape, got \(7, 2, 8\) and \(7, 4, 8\)",
    ),
    "head_dims": (
        {"k": tensor(7, 2, 16), "v": tensor(7, 2, 16)},
        ValueError,
        "one head dim, got 8 and 16",
    ),
    "head_dim-large": (
        {
            "q": tensor(7, 4, 264),
            "k": tensor(7, 2, 264),
            "v": tensor(7, 2, 264),
            "backend": "triton",
        },
        ValueError,
        "head_dim must be at most 256 for backend='triton', got 264. Pass backend='auto'",
    ),
    "head_dim-zero": (
        {"q": tensor(7, 4, 0), "k": tensor(7, 2, 0), "v": tensor(7, 2, 0)},
        ValueError,
        "head_dim must be at least 1, got 0",
    ),
    "groups": (
        {"k": tensor(7, 3, 8), "v": tensor(7, 3, 8)},
        ValueError,
        "multiple of key/value heads, got 4 and 3",
    ),
    "no-heads": (
        {"k": tensor(7, 0, 8), "v": tensor(7, 0, 8)},
        ValueError,
        "multiple of key/value heads, got 4 and 0",
    ),
    "cu-list": (
        {"cu_seqlens_q": [0, 4, 7]},
        TypeError,
        "cu_seqlens_q must be a torch.Tensor, got list",
    ),
    "cu-int64": (
        {"cu_seqlens_k": CU.long()},
        TypeError,
        r"cu_seqlens_k must be int32, got torch.int64. Call .to\(torch.int32\)",
    ),
    "cu-rank": (
        {"cu_seqlens_q": CU[None]},
        ValueError,
        r"cu_seqlens_q must have shape \[documents \+ 1\], got \(1, 3\)",
    ),
    "cu-empty": (
        {"cu_seqlens_q": CU[:0]},
        ValueError,
        r"cu_seqlens_q must have shape \[documents \+ 1\], got \(0,\).*leading 0",
    ),
    "cu-device": (
        {"cu_seqlens_q": META_CU},
        ValueError,
        r"cu_seqlens_q must be on q's device \(cpu\), got meta",
    ),
    "cu-start": ({"cu_seqlens_q": CU + 1}, ValueError, "must start at 0, got 1. Prepend a 0"),
    "cu-decreasing": (
        {"cu_seqlens_q": torch.tensor([0, 8, 7], dtype=torch.int32)},
        ValueError,
        "cu_seqlens_q must not decrease. Pass cumulative lengths, not lengths",
    ),
    "cu-tokens-beyond": (
        {"cu_seqlens_k": torch.tensor([0, 4, 6], dtype=torch.int32)},
        ValueError,
        r"cu_seqlens_k must end at the number of packed tokens \(7\), got 6.*beyond the last",
    ),
    "cu-documents": (
        {"cu_seqlens_k": torch.tensor([0, 7], dtype=torch.int32)},
        ValueError,
        "must describe the same documents, got 2 and 1",
    ),
    "max_seqlen-tensor": (
        {"max_seqlen_q": torch.tensor(4)},
        TypeError,
        "max_seqlen_q must be a Python int, got Tensor.*would stall",
    ),
    "max_seqlen-float": (
        {"max_seqlen_k": 4.0},
        TypeError,
        "max_seqlen_k must be a Python int, got float",
    ),
    "schedule-device": (
        {"schedule": make_schedule([4, 3]).to("meta")},
        ValueError,
        r"schedule must be on q's device \(cpu\), got meta. Call schedule.to\(device\)",
    ),
    "schedule-q": (
        {"schedule": make_schedule([4, 2], [4, 3])},
        ValueError,
        "q must hold the 6 tokens that schedule was built for, got 7",
    ),
    "schedule-k": (
        {"schedule": make_schedule([4, 3], [4, 4])},
        ValueError,
        "k must hold the 8 tokens that schedule was built for, got 7.*drop tokens beyond",
    ),
    "dropout-one": ({"dropout_p": 1.0}, ValueError, r"dropout_p must be in \[0, 1\), got 1.0"),
    "dropout-negative": ({"dropout_p": -0.1}, ValueError, r"dropout_p must be in \[0, 1\)"),
    "dropout-nan": ({"dropout_p": float("nan")}, ValueError, r"dropout_p must be in \[0, 1\)"),
    "dropout-tensor": (
        {"dropout_p": torch.tensor(0.1)},
        ValueError,
        r"dropout_p must be in \[0, 1\)",
    ),
    "seed-dtype": (
        {"dropout_seed": torch.tensor([1], dtype=torch.int32)},
        TypeError,
        "dropout_seed must be an int or a tensor of one int64 element, got torch.int32",
    ),
    "seed-shape": (
        {"dropout_seed": torch.tensor([1, 2])},
        TypeError,
        r"one int64 element, got torch.int64 of shape \(2,\)",
    ),
    "seed-float": ({"dropout_seed": 0.5}, TypeError, "dropout_seed must be an int64 .*got 0.5"),
    "seed-large": ({"dropout_seed": 1 << 63}, TypeError, "dropout_seed must be an int64 value"),
    "window-one": ({"window_size": (3,)}, TypeError, r"must be \(left, right\) ints.*got \(3,\)"),
    "window-int": ({"window_size": 3}, TypeError, r"must be \(left, right\) ints.*got 3"),
    "window-float": ({"window_size": (3.0, 0)}, TypeError, r"must be \(left, right\) ints"),
    "window-tensor": (
        {"window_size": torch.tensor([3, 0])},
        TypeError,
        r"int32 tensor of shape \[2\], got torch.int64 of shape \(2,\)",
    ),
    "window-device": (
        {"window_size": torch.tensor([3, 0], dtype=torch.int32, device="meta")},
        ValueError,
        r"window_size must be on q's device \(cpu\), got meta",
    ),
    "alibi-list": (
        {"alibi_slopes": [0.1] * 4},
        TypeError,
        "alibi_slopes must be a torch.Tensor, got list",
    ),
    "alibi-shape": (
        {"alibi_slopes": tensor(3)},
        ValueError,
        r"alibi_slopes must have shape \[4\] or \[2, 4\], got \(3,\)",
    ),
    "alibi-dtype": (
        {"alibi_slopes": tensor(4, dtype=torch.float16)},
        TypeError,
        r"alibi_slopes must be float32, got torch.float16. Call .float\(\)",
    ),
    "alibi-device": (
        {"alibi_slopes": tensor(4, device="meta")},
        ValueError,
        "alibi_slopes must be on q's device",
    ),
    "sink-shape": (
        {"learnable_sink": tensor(2)},
        ValueError,
        r"learnable_sink must have shape \[4\], got \(2,\)",
    ),
    "sink-device": (
        {"learnable_sink": tensor(4, device="meta")},
        ValueError,
        "learnable_sink must be on q's device",
    ),
    "ids-shape": (
        {"document_ids": torch.zeros(3, dtype=torch.int32)},
        ValueError,
        r"document_ids must have shape \[2\], got \(3,\)",
    ),
    "ids-dtype": (
        {"document_ids": torch.zeros(2, dtype=torch.int64)},
        TypeError,
        "document_ids must be int32, got torch.int64. Cast it",
    ),
    "ids-device": (
        {"document_ids": torch.zeros(2, dtype=torch.int32, device="meta")},
        ValueError,
        "document_ids must be on q's device",
    ),
    "softcap-negative": ({"softcap": -1.0}, ValueError, "softcap must be finite and >= 0"),
    "softcap-infinite": ({"softcap": float("inf")}, ValueError, "softcap must be finite"),
    "scale-nan": (
        {"softmax_scale": float("nan")},
        ValueError,
        "softmax_scale must be finite and > 0, got nan",
    ),
    "scale-negative": (
        {"softmax_scale": -1.0},
        ValueError,
        "softmax_scale must be finite and > 0, got -1.0. Fold the sign",
    ),
    "backend": (
        {"backend": "cuda"},
        ValueError,
        "backend must be one of auto, hopper, triton, pytorch, got 'cuda'",
    ),
}


@pytest.mark.parametrize(("change", "error", "message"), CASES.values(), ids=CASES.keys())
def test_bad_arguments(change, error, message):
    with pytest.raises(error, match=message):
        flash_attn_varlen_func(**(ARGUMENTS | change))


def test_the_unchanged_arguments_are_good():
    assert flash_attn_varlen_func(**ARGUMENTS).shape == (7, 4, 8)
    schedule = make_schedule([4, 3])
    assert flash_attn_varlen_func(**ARGUMENTS, schedule=schedule).shape == (7, 4, 8)


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_rows_need_four_dimensions(name):
    rows = {"q": tensor(2, 5, 4, 8), "k": tensor(2, 5, 2, 8), "v": tensor(2, 5, 2, 8)}
    assert flash_attn_func(**rows).shape == (2, 5, 4, 8)
    with pytest.raises(
        ValueError, match=rf"{name} must have shape \[batch, .*\(10, .*flash_attn_varlen_func"
    ):
        flash_attn_func(**(rows | {name: rows[name].flatten(0, 1)}))
    with pytest.raises(ValueError, match=rf"{name} must have shape .* got list"):
        flash_attn_func(**(rows | {name: []}))


def test_rows_need_one_batch_size():
    with pytest.raises(ValueError, match="must have one batch size, got 2, 2 and 3"):
        flash_attn_func(tensor(2, 5, 4, 8), tensor(2, 5, 2, 8), tensor(3, 5, 2, 8))


def test_values_on_a_device_are_not_read():
    """Reading values would synchronise; meta tensors have none."""
    arguments = {
        name: value.to("meta") if isinstance(value, torch.Tensor) else value
        for name, value in ARGUMENTS.items()
    }
    assert flash_attn_varlen_func(**arguments).shape == (7, 4, 8)


def test_auto_needs_a_gpu_triton_and_a_supported_dtype(monkeypatch):
    assert select_backend("cpu") == "pytorch"
    assert select_backend("cuda", torch.float64) == "pytorch"
    monkeypatch.setattr(backend, "TRITON_INSTALLED", True)
    assert select_backend("cuda", torch.bfloat16) == "triton"
    monkeypatch.setattr(backend, "TRITON_INSTALLED", False)
    assert select_backend("cuda", torch.bfloat16) == "pytorch"
    with pytest.raises(ValueError, match=r"needs the package triton.*Install it, or pass"):
        select_backend("cuda", torch.bfloat16, "triton")


def test_heads_wider_than_the_kernels_take_go_to_pytorch(monkeypatch):
    monkeypatch.setattr(backend, "TRITON_INSTALLED", True)
    monkeypatch.setattr(backend, "_warned", set())
    assert select_backend("cuda", torch.bfloat16, head_dim=256) != "pytorch"
    with pytest.warns(UserWarning, match="heads of at most 256 columns"):
        assert select_backend("cuda", torch.bfloat16, head_dim=512) == "pytorch"
    for name in ("triton", "hopper"):
        with pytest.raises(ValueError, match=f"at most 256 for backend='{name}', got 512"):
            select_backend("cuda", torch.bfloat16, name, head_dim=512)


def test_triton_on_the_cpu_is_the_interpreter(monkeypatch):
    monkeypatch.setattr(backend, "TRITON_INSTALLED", True)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert select_backend("cpu", torch.float16, "triton") == "triton"
    with pytest.raises(ValueError, match=r"does not multiply bfloat16. Use float16 or float32"):
        select_backend("cpu", torch.bfloat16, "triton")
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(ValueError, match=r"needs tensors on a GPU, got cpu.*backend='auto'"):
        select_backend("cpu", torch.float16, "triton")


def test_triton_takes_no_float64(monkeypatch):
    monkeypatch.setattr(backend, "TRITON_INSTALLED", True)
    with pytest.raises(ValueError, match=r"takes float16, bfloat16 or float32, got torch.float64"):
        select_backend("cuda", torch.float64, "triton")
