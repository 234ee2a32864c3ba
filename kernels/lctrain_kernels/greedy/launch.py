"""Launches the kernel of the most probable token."""

from __future__ import annotations

import torch
from torch import Tensor

from lctrain_kernels.greedy.triton_kernels import most_probable_kernel
from lctrain_kernels.launch import launch

BLOCK, NUM_WARPS = 4096, 16
"""Logits that a program reads at a time: 16 bytes per lane in half precision."""


def most_probable(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Returns tokens [B] int64 and log-probabilities [B] float32 of logits [B, V]."""
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    rows, words = logits.shape
    tokens = torch.empty(rows, dtype=torch.int64, device=logits.device)
    log_probs = torch.empty(rows, dtype=torch.float32, device=logits.device)
    if rows:
        launch(most_probable_kernel, (rows,))(
            logits,
            tokens,
            log_probs,
            logits.stride(0),
            words,
            BLOCK=BLOCK,
            num_warps=NUM_WARPS,
            enable_fp_fusion=True,
        )
    return tokens, log_probs
