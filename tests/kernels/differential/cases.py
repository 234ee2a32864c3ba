"""Cases of differential attention: tiny ones for the interpreter, broad ones for a GPU."""

import dataclasses

import torch

from tests.kernels.cases import LENGTHS, LONGER_KEYS, LONGER_QUERIES, UNEQUAL
from tests.kernels.differential.oracle import DifferentialCase
from tests.kernels.oracle import equal_lengths

FLOAT16, BFLOAT16, FLOAT32 = torch.float16, torch.bfloat16, torch.float32

TINY_CASES = {
    "v1": DifferentialCase(equal_lengths(33, 0, 1, 20), heads_k=4, lam="scalar", views="halves"),
    "v2": DifferentialCase(
        equal_lengths(34, 19), value_dim=16, shared_k=True, views="adjacent", dout_order="htd"
    ),
    "filled_cache": DifferentialCase(LONGER_KEYS, heads=3, heads_k=1, head_dim=24, value_dim=48),
    "longer_queries": DifferentialCase(LONGER_QUERIES, lam="heads", dout_order="tdh"),
    "full": DifferentialCase(
        equal_lengths(18, 31), heads=2, head_dim=32, value_dim=64, causal=False
    ),
    "window": DifferentialCase(
        ((40, 40), (12, 30)), causal=False, window=(9, 3), head_dim=20, value_dim=20, lam="scalar"
    ),
    "window_left-blind": DifferentialCase(
        ((4, 40), (40, 8)), window=(3, -1), heads=2, heads_k=1, shared_k=True
    ),
    "dropout-v1": DifferentialCase(
        equal_lengths(33, 21), dropout_p=0.1, heads=2, lam="scalar", head_dim=20, value_dim=40
    ),
    "dropout-v2-window_on_device": DifferentialCase(
        ((37, 30), (9, 25)),
        value_dim=16,
        shared_k=True,
        window=(8, 0),
        window_on_device=True,
        dropout_p=0.3,
    ),
}

V1 = DifferentialCase(
    LENGTHS,
    heads=4,
    heads_k=4,
    head_dim=64,
    value_dim=128,
    lam="scalar",
    dtype=BFLOAT16,
    views="halves",
)
V2 = DifferentialCase(
    LENGTHS, head_dim=128, value_dim=128, shared_k=True, dtype=BFLOAT16, views="adjacent"
)
GPU_CASES = {
    "v1": V1,
    "v1-unequal": dataclasses.replace(V1, documents=UNEQUAL),
    "v1-large_logits": dataclasses.replace(V1, magnitude=45.0),
    "v1-dropout": dataclasses.replace(V1, dropout_p=0.1),
    "v1-window_left-gqa": dataclasses.replace(V1, documents=UNEQUAL, heads_k=2, window=(50, -1)),
    "v1-tokens-full": dataclasses.replace(V1, lam="tokens", causal=False, documents=UNEQUAL),
    "v2": V2,
    "v2-unequal-mqa": dataclasses.replace(V2, documents=UNEQUAL, heads=8, heads_k=1),
    "v2-dropout": dataclasses.replace(V2, dropout_p=0.3, dout_order="htd"),
    "v2-window_on_device": dataclasses.replace(
        V2, documents=UNEQUAL, causal=False, window=(66, 12), window_on_device=True
    ),
    "v2-float16": dataclasses.replace(V2, dtype=FLOAT16, lam="heads"),
    "D32v32": dataclasses.replace(V1, head_dim=32, value_dim=32),
    "D32v64-shared": dataclasses.replace(V2, head_dim=32, value_dim=64),
    "D64v64-g8": dataclasses.replace(V1, head_dim=64, value_dim=64, heads=8, heads_k=1),
    "D96v96": dataclasses.replace(V2, head_dim=96, value_dim=96, shared_k=False),
    "D96v192": dataclasses.replace(V1, head_dim=96, value_dim=192),
    "D128v128": dataclasses.replace(V2, shared_k=False, dropout_p=0.1),
    "D128v256": dataclasses.replace(V1, head_dim=128, value_dim=256),
    "D20v40": dataclasses.replace(V1, head_dim=20, value_dim=40, heads_k=2),
    "v1-float32": dataclasses.replace(V1, dtype=FLOAT32),
}
