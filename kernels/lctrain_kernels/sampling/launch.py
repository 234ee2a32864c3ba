"""Launches the kernels that choose a token per row of logits."""

from __future__ import annotations

import torch
from torch import Tensor

from lctrain_kernels.launch import launch
from lctrain_kernels.sampling.triton_kernels import draw_kernel, most_probable_kernel

BLOCK, NUM_WARPS, STAGES = 4096, 16, 3
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
            STAGES=STAGES,
            num_warps=NUM_WARPS,
            enable_fp_fusion=True,
        )
    return tokens, log_probs


def draw(
    logits: Tensor, keys: Tensor, numbers: Tensor, temperature: float, top_p: float
) -> tuple[Tensor, Tensor]:
    """Returns drawn tokens [B] int64 and their log-probabilities [B] float32; see api.draw."""
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    rows, words = logits.shape
    tokens = torch.empty(rows, dtype=torch.int64, device=logits.device)
    log_probs = torch.empty(rows, dtype=torch.float32, device=logits.device)
    if rows:
        launch(draw_kernel, (rows,))(
            logits,
            keys.contiguous(),
            numbers.contiguous(),
            tokens,
            log_probs,
            logits.stride(0),
            words,
            1.0 / temperature,
            top_p,
            HAS_TOP_P=top_p < 1,
            BLOCK=BLOCK,
            STAGES=STAGES,
            num_warps=NUM_WARPS,
            enable_fp_fusion=True,
        )
    return tokens, log_probs
