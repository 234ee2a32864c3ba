"""Log-probabilities of tokens from logits, with the bits of linear_cross_entropy.

A decode step has logits, since it draws tokens from them; a training forward has hidden states and
targets. Both go through one product, one pass over a row of logits, and one logarithm.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lctrain_kernels.cross_entropy.operators import accumulation_dtype
from lctrain_kernels.cross_entropy.options import LossOptions
from lctrain_kernels.cross_entropy.products import logits_buffer, project
from lctrain_kernels.cross_entropy.rows import (
    finish_logits,
    new_statistics,
    row_pass,
    token_losses,
)
from lctrain_kernels.fused_backend import FusedCall, fused_backend

NOT_IGNORED = -1
"""The ignore_index of calls without ignored tokens; no token has this id."""


class BatchInvariantHead:
    """Computes logits of hidden states, and log-probabilities of tokens from these logits.

    The log-probabilities have the bits of `-linear_cross_entropy(hidden, weight, tokens,
    bias=bias, softcap=softcap, logit_scale=logit_scale / temperature, batch_invariant=True,
    reduction="none")[0]`, and so have those of the same tokens in other batches.

    Args:
        weight: Output embedding [V, E].
        bias: Bias of the logits, [V], or None.
        softcap: Bound of the logits; 0 turns it off.
        logit_scale: Factor of the logits.
        temperature: Divisor of the logits, above 0.
        backend: Implementation: "auto", "triton" or "pytorch".
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None = None,
        *,
        softcap: float = 0.0,
        logit_scale: float = 1.0,
        temperature: float = 1.0,
        backend: str = "auto",
    ) -> None:
        self._weight = weight
        self._bias = bias
        self._softcap = float(softcap)
        self._scale = float(logit_scale)
        self._temperature = float(temperature)
        self._backend = backend

    def products(self, hidden: Tensor) -> Tensor:
        """Returns `hidden @ weight.T` [n, V], of which the other methods compute logits.

        Args:
            hidden: Hidden states [n, E]. Under autocast, the product has autocast's dtype.
        """
        device = hidden.device
        dtype = hidden.dtype
        if dtype != torch.float64 and torch.is_autocast_enabled(device.type):
            dtype = torch.get_autocast_dtype(device.type)
        backend = fused_backend("linear_cross_entropy", FusedCall(device, dtype), self._backend)
        out = logits_buffer(len(hidden), len(self._weight), dtype, backend, device)
        with torch.autocast(device.type, enabled=False):
            project(hidden.to(dtype), self._weight.to(dtype), None, out, batch_invariant=True)
        return out

    def logits(self, products: Tensor) -> Tensor:
        """Returns the logits [n, V], at least float32, before the temperature."""
        return finish_logits(products, self._bias, self._options(products, self._scale))

    def log_probs(self, products: Tensor, tokens: Tensor) -> Tensor:
        """Returns the log-probability of a token per row at the temperature, [n].

        It is NaN where the logits give no distribution.

        Args:
            products: Results of `products`, or rows of them.
            tokens: Token ids [n] int64.
        """
        if products.stride() != _strides(products):
            buffer = torch.empty_strided(
                products.shape, _strides(products), dtype=products.dtype, device=products.device
            )
            products = buffer.copy_(products)
        options = self._options(products, self._scale / self._temperature)
        dtype = accumulation_dtype(products.dtype, products)
        statistics = new_statistics(len(tokens), dtype, products.device, True)
        row_pass(
            products, self._bias, tokens, statistics, None, None, options,
            reads_statistics=False, writes_gradient=False,
        )  # fmt: skip
        found = -token_losses(statistics, tokens, options)[0]
        return torch.where(found == -torch.inf, torch.nan, found)

    def _options(self, products: Tensor, scale: float) -> LossOptions:
        call = FusedCall(products.device, products.dtype)
        return LossOptions(
            softcap=self._softcap,
            logit_scale=scale,
            ignore_index=NOT_IGNORED,
            label_smoothing=0.0,
            z_loss=0.0,
            first_word=0,
            num_words=products.shape[1],
            group_name="",
            chunk_tokens=max(1, len(products)),
            matmul_dtype=products.dtype,
            batch_invariant=True,
            backend=fused_backend("linear_cross_entropy", call, self._backend),
        )


def _strides(products: Tensor) -> tuple[int, int]:
    """Returns the strides of rows and columns of logits_buffer, for logits [n, V]."""
    meta = logits_buffer(1, products.shape[1], products.dtype, "triton", torch.device("meta"))
    return meta.stride(0), 1
