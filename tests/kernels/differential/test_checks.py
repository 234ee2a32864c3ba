"""Tests bad arguments of diff_attn_varlen_func: each message has fault, value and remedy."""

import pytest
import torch

from lctrain.kernels import diff_attn_varlen_func, make_schedule
from tests.kernels.oracle import cumulative

CU = cumulative([4, 3], "cpu")


def tensor(*shape: int, dtype=torch.float32, device="cpu") -> torch.Tensor:
    return torch.zeros(*shape, dtype=dtype, device=device)


ARGUMENTS = {
    "q1": tensor(7, 4, 8),
    "q2": tensor(7, 4, 8),
    "k1": tensor(7, 2, 8),
    "k2": tensor(7, 2, 8),
    "v": tensor(7, 2, 16),
    "lam": torch.tensor(0.5),
    "cu_seqlens": CU,
    "max_seqlen": 4,
}
WIDE = {"q1": tensor(7, 4, 136), "q2": tensor(7, 4, 136)} | {
    name: tensor(7, 2, 136) for name in ("k1", "k2", "v")
}
CASES = {
    "q2-list": ({"q2": [1.0]}, TypeError, "q2 must be a torch.Tensor, got list"),
    "k1-rank": (
        {"k1": tensor(1, 7, 2, 8)},
        ValueError,
        r"k1 must have shape \[tokens, heads, head_dim\], got \(1, 7, 2, 8\). Pack the documents",
    ),
    "v-dtype": ({"v": tensor(7, 2, 16, dtype=torch.int32)}, TypeError, "got torch.int32. Cast it"),
    "dtypes": (
        {"q2": tensor(7, 4, 8, dtype=torch.bfloat16)},
        TypeError,
        "one dtype, got torch.float32, torch.bfloat16, .*cast them to v's dtype",
    ),
    "devices": (
        {"k2": tensor(7, 2, 8, device="meta")},
        ValueError,
        "on one device, got cpu, cpu, cpu, meta, cpu. Move them",
    ),
    "odd-heads": (
        {"q2": tensor(7, 3, 8)},
        ValueError,
        r"q1 and q2 must have one shape, got \(7, 4, 8\) and \(7, 3, 8\).*an even number of heads",
    ),
    "k-heads-do-not-pair": (
        {"k2": tensor(7, 1, 8)},
        ValueError,
        r"k1 and k2 must have one shape, got \(7, 2, 8\) and \(7, 1, 8\).*x\[:, 0::2\]",
    ),
    "head_dims": (
        {"k1": tensor(7, 2, 16), "k2": tensor(7, 2, 16)},
        ValueError,
        "q1 and k1 must have one head dim, got 8 and 16",
    ),
    "head_dim-large": (
        WIDE,
        ValueError,
        "head_dim must be between 1 and 128, got 136. Call flash_attn_varlen_func once per branch",
    ),
    "value_dim": (
        {"v": tensor(7, 2, 24)},
        ValueError,
        r"v must have a head dim of 8 \(D\) or 16 \(2 D\), got 24.*unflatten",
    ),
    "value-heads": (
        {"v": tensor(7, 4, 8)},
        ValueError,
        r"same tokens and heads, got \(7, 2\) and \(7, 4\). One value head serves both",
    ),
    "groups": (
        {"k1": tensor(7, 3, 8), "k2": tensor(7, 3, 8), "v": tensor(7, 3, 8)},
        ValueError,
        "multiple of those of k1, got 4 and 3. Count pairs, not query heads",
    ),
    "lam-float": ({"lam": 0.5}, TypeError, r"lam must be a torch.Tensor, got float. Pass torch"),
    "lam-int": ({"lam": torch.tensor(1)}, TypeError, r"lam must be floating point, got torch.int"),
    "lam-shape": (
        {"lam": tensor(8)},
        ValueError,
        r"a scalar or have shape \[4\] or \[7, 4\], got \(8,\). One per head is one per pair",
    ),
    "lam-transposed": ({"lam": tensor(4, 7)}, ValueError, r"or \[7, 4\], got \(4, 7\)"),
    "lam-device": (
        {"lam": torch.zeros((), device="meta")},
        ValueError,
        r"lam must be on q1's device \(cpu\), got meta",
    ),
    "cu-int64": ({"cu_seqlens": CU.long()}, TypeError, "cu_seqlens must be int32"),
    "cu-documents": (
        {"cu_seqlens_k": torch.tensor([0, 7], dtype=torch.int32)},
        ValueError,
        "must describe the same documents, got 2 and 1",
    ),
    "max_seqlen-tensor": (
        {"max_seqlen": torch.tensor(4)},
        TypeError,
        "max_seqlen must be a Python int, got Tensor",
    ),
    "max_seqlen_k-float": ({"max_seqlen_k": 4.0}, TypeError, "max_seqlen_k must be a Python int"),
    "dropout": ({"dropout_p": 1.0}, ValueError, r"dropout_p must be in \[0, 1\), got 1.0"),
    "window": ({"window_size": 3}, TypeError, r"must be \(left, right\) ints.*got 3"),
    "scale": ({"softmax_scale": -1.0}, ValueError, "softmax_scale must be finite and > 0"),
    "ids": (
        {"document_ids": torch.zeros(3, dtype=torch.int32)},
        ValueError,
        r"document_ids must have shape \[2\], got \(3,\)",
    ),
    "schedule": (
        {"schedule": make_schedule([4, 2], [4, 3])},
        ValueError,
        "must hold the 6 tokens that schedule was built for, got 7",
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
        diff_attn_varlen_func(**(ARGUMENTS | change))


def test_the_unchanged_arguments_are_good():
    assert diff_attn_varlen_func(**ARGUMENTS).shape == (7, 4, 16)
    schedule = make_schedule([4, 3])
    assert diff_attn_varlen_func(**ARGUMENTS, schedule=schedule).shape == (7, 4, 16)


def test_values_on_a_device_are_not_read():
    """Reading values would synchronise; meta tensors have none."""
    arguments = {
        name: value.to("meta") if isinstance(value, torch.Tensor) else value
        for name, value in ARGUMENTS.items()
    }
    assert diff_attn_varlen_func(**arguments).shape == (7, 4, 16)
