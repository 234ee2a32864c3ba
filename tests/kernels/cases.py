"""Cases of the kernel tests: tiny ones for the interpreter and the CPU, broad ones for a GPU.

Each distinct combination of flags, head dim, group size and dtype compiles three kernels on a GPU.
So both lists cover pairs of features, not their product, and other GPU tests reuse these cases.
"""

import dataclasses

import torch

from tests.kernels.oracle import Case, equal_lengths

LONGER_KEYS = ((5, 37), (33, 40), (1, 20))
LONGER_QUERIES = ((37, 5), (20, 0), (0, 9), (16, 16))  # early queries see nothing if causal
TINY_CASES = {
    "causal": Case(equal_lengths(33, 0, 1, 20), causal=True),
    "full-float32-mha": Case(
        equal_lengths(18, 31), heads=2, head_dim=40, dtype=torch.float32, dout_order="htd"
    ),
    "longer_keys-causal-mqa": Case(LONGER_KEYS, heads=3, heads_k=1, head_dim=24, causal=True),
    "longer_queries-causal": Case(LONGER_QUERIES, head_dim=24, causal=True),
    "longer_queries-full": Case(LONGER_QUERIES, dout_order="tdh"),
    "window": Case(((40, 40), (12, 30)), window=(9, 3), head_dim=20),
    "window_left-causal": Case(equal_lengths(39, 17), window=(7, -1), causal=True),
    "window_left-blind": Case(((4, 40), (40, 8)), window=(3, -1), heads=2, heads_k=1),
    "window_right": Case(LONGER_KEYS, window=(-1, 4), heads=2),
    "window_on_device-dropout": Case(
        ((37, 30), (9, 25)), window=(8, 0), window_on_device=True, dropout_p=0.2
    ),
    "softcap-causal": Case(equal_lengths(35, 6), softcap=2.0, causal=True, magnitude=2.0),
    "alibi_heads-causal": Case(equal_lengths(40, 3), alibi="heads", causal=True),
    "alibi_documents-full": Case(((17, 33), (35, 12)), alibi="documents", heads=2, heads_k=1),
    "sink-causal-blind": Case(LONGER_QUERIES, sink=True, causal=True, heads=8, heads_k=4),
    "dropout-causal": Case(equal_lengths(33, 21), dropout_p=0.1, causal=True, head_dim=20),
    "dropout-softcap-gqa4": Case(((40, 20), (3, 35)), heads_k=1, dropout_p=0.3, softcap=3.0),
    "everything": Case(
        equal_lengths(38, 0, 1, 19),
        head_dim=40,
        causal=True,
        window=(11, -1),
        window_on_device=True,
        softcap=4.0,
        alibi="documents",
        sink=True,
        dropout_p=0.15,
        fused_qkv=True,
        dout_order="htd",
    ),
    "fused_qkv": Case(equal_lengths(20, 35), fused_qkv=True, dout_order="tdh", head_dim=24),
}

# Chunks of 16 to 23 tokens, none a multiple of the interpreter's tiles of 16 and 32.
TINY_DUAL_CHUNK_CASES = {
    "boundaries": Case(equal_lengths(23, 24, 31, 32, 0, 1), chunks=(30, 7)),  # c, c+1, S+1, S+2
    "many_chunks": Case(
        equal_lengths(97, 45), heads=2, heads_k=1, chunks=(30, 7), head_dim=24, dout_order="htd"
    ),
    "local_size_0": Case(equal_lengths(61), chunks=(19, 0), heads=2, heads_k=1),
    "local_size_close": Case(equal_lengths(70), chunks=(90, 73), heads=3, heads_k=1),
    "chunks_smaller_than_tiles": Case(equal_lengths(50, 7), chunks=(4, 1), head_dim=20),
    "longer_keys": Case(((5, 77), (33, 60), (1, 40), (1, 3)), chunks=(30, 7)),
    "longer_queries": Case(((50, 30), (4, 0)), chunks=(19, 3)),
    "dropout": Case(equal_lengths(80, 30), heads=2, chunks=(30, 7), dropout_p=0.2),
    "logit_scale-fused_qkv": Case(
        equal_lengths(60, 33), chunks=(21, 5), logit_scale=True, fused_qkv=True, dout_order="tdh"
    ),
    "everything": Case(
        ((41, 63), (38, 38), (0, 5), (2, 2)),
        chunks=(24, 6),
        heads_k=1,
        head_dim=40,
        logit_scale=True,
        dropout_p=0.15,
    ),
    "large_logits": Case(equal_lengths(55), chunks=(24, 6), magnitude=40.0),
}

LENGTHS = equal_lengths(0, 1, 63, 64, 65, 127, 129, 300)
UNEQUAL = ((64, 129), (129, 64), (1, 127), (65, 0), (0, 63), (127, 127), (300, 20), (20, 300))
BFLOAT16, FLOAT16, FLOAT32 = torch.bfloat16, torch.float16, torch.float32

GPU_PLAIN = Case(LENGTHS, heads=4, heads_k=2, head_dim=64, dtype=BFLOAT16, causal=True)
GPU_CASES = {
    "D64-causal": GPU_PLAIN,
    "D64-causal-unequal": dataclasses.replace(GPU_PLAIN, documents=UNEQUAL),
    "D64-causal-large_logits": dataclasses.replace(GPU_PLAIN, magnitude=45.0),
    "D64-causal-fused_qkv": dataclasses.replace(GPU_PLAIN, fused_qkv=True, dout_order="htd"),
    "D64-causal-dropout": dataclasses.replace(GPU_PLAIN, dropout_p=0.1),
    "D64-full-unequal-g1": Case(UNEQUAL, heads_k=4, head_dim=64, dtype=BFLOAT16, dout_order="tdh"),
    "D64-window_left-causal": dataclasses.replace(GPU_PLAIN, window=(50, -1), documents=UNEQUAL),
    "D64-window_right": dataclasses.replace(GPU_PLAIN, causal=False, window=(-1, 37)),
    "D128-causal-g4": Case(LENGTHS, heads_k=1, head_dim=128, dtype=BFLOAT16, causal=True),
    "D128-full-dropout-g4-float16": Case(
        UNEQUAL, heads_k=1, head_dim=128, dtype=FLOAT16, dropout_p=0.3
    ),
    "D128-window-sink-causal": Case(
        UNEQUAL, head_dim=128, dtype=BFLOAT16, causal=True, window=(70, -1), sink=True
    ),
    "D128-everything-g8": Case(
        UNEQUAL,
        heads=16,
        head_dim=128,
        dtype=BFLOAT16,
        causal=True,
        window=(100, -1),
        window_on_device=True,
        softcap=20.0,
        alibi="documents",
        sink=True,
        dropout_p=0.15,
        dout_order="htd",
    ),
    "D80-causal-dropout-g8": Case(
        LENGTHS, heads=8, heads_k=1, head_dim=80, dtype=BFLOAT16, causal=True, dropout_p=0.5
    ),
    "D96-window-g1": Case(LENGTHS, heads_k=4, head_dim=96, dtype=BFLOAT16, window=(66, 12)),
    "D96-softcap-causal": Case(
        LENGTHS, head_dim=96, dtype=BFLOAT16, causal=True, softcap=3.0, magnitude=2.0
    ),
    "D256-causal-g4": Case(LENGTHS, heads_k=1, head_dim=256, dtype=BFLOAT16, causal=True),
    "D256-dropout-softcap-g1": Case(
        UNEQUAL, heads_k=4, head_dim=256, dtype=BFLOAT16, dropout_p=0.1, softcap=5.0
    ),
    "D20-causal-alibi-float16": Case(
        LENGTHS, head_dim=20, dtype=FLOAT16, causal=True, alibi="heads", sink=True
    ),
    "D40-full-dropout": Case(LENGTHS, head_dim=40, dtype=BFLOAT16, dropout_p=0.1),
    "D8-causal-g3": Case(LENGTHS, heads=3, heads_k=1, head_dim=8, dtype=BFLOAT16, causal=True),
    "D200-causal-fused_qkv": Case(
        LENGTHS, head_dim=200, dtype=FLOAT16, causal=True, fused_qkv=True
    ),
    "D64-causal-float32": dataclasses.replace(GPU_PLAIN, dtype=FLOAT32),
    "D72-window-dropout-float32": Case(
        UNEQUAL, head_dim=72, dtype=FLOAT32, window=(40, 40), dropout_p=0.2
    ),
}

DUAL_CHUNK_LENGTHS = equal_lengths(0, 1, 147, 148, 201, 202, 127, 129, 640, 1000)
GPU_DUAL_CHUNK_PLAIN = Case(
    DUAL_CHUNK_LENGTHS, heads=4, heads_k=2, head_dim=64, dtype=BFLOAT16, chunks=(200, 53)
)
GPU_DUAL_CHUNK_CASES = {
    "D64": GPU_DUAL_CHUNK_PLAIN,
    "D64-unequal": dataclasses.replace(
        GPU_DUAL_CHUNK_PLAIN, documents=((64, 529), (529, 64), (1, 700), (65, 0), (300, 640))
    ),
    "D64-large_logits": dataclasses.replace(GPU_DUAL_CHUNK_PLAIN, magnitude=45.0),
    "D64-local_size_0": dataclasses.replace(GPU_DUAL_CHUNK_PLAIN, chunks=(147, 0)),
    "D64-local_size_close": dataclasses.replace(GPU_DUAL_CHUNK_PLAIN, chunks=(700, 611)),
    "D64-chunks_smaller_than_tiles": dataclasses.replace(GPU_DUAL_CHUNK_PLAIN, chunks=(40, 11)),
    "D64-dropout-scale-fused_qkv": dataclasses.replace(
        GPU_DUAL_CHUNK_PLAIN,
        dropout_p=0.1,
        logit_scale=True,
        fused_qkv=True,
        dout_order="htd",
    ),
    "D128-g4": Case(DUAL_CHUNK_LENGTHS, heads_k=1, head_dim=128, dtype=BFLOAT16, chunks=(200, 53)),
    "D128-dropout-g4-float16": Case(
        DUAL_CHUNK_LENGTHS,
        heads_k=1,
        head_dim=128,
        dtype=FLOAT16,
        chunks=(300, 31),
        dropout_p=0.3,
        dout_order="tdh",
    ),
    "D128-window_of_4096": Case(
        equal_lengths(4095, 4096, 4097, 9000, 300),
        heads=2,
        heads_k=1,
        head_dim=128,
        dtype=BFLOAT16,
        chunks=(4095, 512),
    ),
    "D96-g1": Case(DUAL_CHUNK_LENGTHS, heads_k=4, head_dim=96, dtype=BFLOAT16, chunks=(200, 53)),
    "D256-g4-scale": Case(
        DUAL_CHUNK_LENGTHS,
        heads_k=1,
        head_dim=256,
        dtype=BFLOAT16,
        chunks=(200, 53),
        logit_scale=True,
    ),
    "D256-dropout-g8": Case(
        DUAL_CHUNK_LENGTHS,
        heads=8,
        heads_k=1,
        head_dim=256,
        dtype=BFLOAT16,
        chunks=(200, 53),
        dropout_p=0.1,
    ),
    "D20-float16": Case(DUAL_CHUNK_LENGTHS, head_dim=20, dtype=FLOAT16, chunks=(200, 53)),
    "D64-float32": dataclasses.replace(GPU_DUAL_CHUNK_PLAIN, dtype=FLOAT32),
}
