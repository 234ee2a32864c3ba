"""AttentionOptions: scale, mask, softcap, dropout, ALiBi and sink of an attention call.

`checked_options` validates a call's arguments once and returns them as one object.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lctrain_kernels.layout import unit_stride


class AttentionOptions(NamedTuple):
    """Options of an attention call.

    Each option has the same name in public functions, operators and launchers.
    `operators.build_operators` gives every operator one argument per field of this class.

    Attributes:
        softmax_scale: Positive factor of q.k.
        window_left: Number of visible keys before a query's own position; -1 is unbounded.
        window_right: Number of visible keys after a query's own position; -1 is unbounded, 0 is a
            causal mask.
        window: (left, right) as an int32 device tensor [2], which replaces window_left and
            window_right; or None.
        softcap: A softcap c > 0 replaces a logit x by c tanh(x / c); 0 turns it off.
        dropout_p: Probability of dropping an attention weight.
        dropout_seed: Seed of the dropout mask, [1] int64; None without dropout.
        first_head: Index of the call's first query head for the dropout RNG. A rank that holds a
            slice of the heads passes its first one: its mask is then that of these heads in a call
            with all heads.
        alibi_slopes: ALiBi slopes, [H] or [N, H] float32, or None.
        learnable_sink: Logit of the attention sink of each head, [H], or None.
        deterministic: Whether the backward must give the same bits in every run.
        backend: Implementation: "hopper", "triton" or "pytorch".
    """

    softmax_scale: float
    window_left: int = -1
    window_right: int = -1
    window: Tensor | None = None
    softcap: float = 0.0
    dropout_p: float = 0.0
    dropout_seed: Tensor | None = None
    first_head: int = 0
    alibi_slopes: Tensor | None = None
    learnable_sink: Tensor | None = None
    deterministic: bool = False
    backend: str = "pytorch"

    @property
    def has_dropout(self) -> bool:
        """Returns whether attention weights are dropped."""
        return self.dropout_p > 0


def checked_options(
    device: torch.device,
    head_dim: int,
    documents: int,
    heads: int,
    backend: str,
    *,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] | Tensor = (-1, -1),
    softcap: float = 0.0,
    dropout_p: float = 0.0,
    dropout_seed: int | Tensor | None = None,
    first_head: int = 0,
    alibi_slopes: Tensor | None = None,
    learnable_sink: Tensor | None = None,
    deterministic: bool = False,
) -> AttentionOptions:
    """Checks the arguments of a public attention function and returns them as AttentionOptions.

    Args:
        device: Device of q.
        head_dim: Head dim D of queries and keys.
        documents: Number of documents N.
        heads: Number of query heads H.
        backend: Backend that select_backend returned.
        softmax_scale: Factor of q.k; D^-0.5 by default.
        causal: Whether a query sees only the keys up to its own position.
        window_size: (left, right) keys around a query's own position, two ints or an int32 tensor
            [2]; -1 is unbounded.
        softcap: Softcap c; 0 turns it off.
        dropout_p: Dropout probability, in [0, 1).
        dropout_seed: An int, an int64 tensor of one element, or None to draw a seed.
        first_head: Index of the call's first query head for the dropout RNG.
        alibi_slopes: ALiBi slopes, [H] or [N, H] float32, or None.
        learnable_sink: Logit of the attention sink of each head, [H], or None.
        deterministic: Whether the backward must give the same bits in every run.
            torch.use_deterministic_algorithms also turns it on.

    Raises:
        TypeError: if an argument has the wrong type or dtype.
        ValueError: if shapes, devices or values do not fit; the message names the remedy.
    """
    check_dropout(dropout_p, dropout_seed)
    check_first_head(first_head)
    check_window(window_size, device)
    check_softcap_and_scale(softcap, softmax_scale)
    check_head_tensors(documents, heads, device, alibi_slopes, learnable_sink)
    window, left, right = resolve_window(window_size, causal)
    window, alibi_slopes, learnable_sink = unit_stride(window, alibi_slopes, learnable_sink)
    return AttentionOptions(
        softmax_scale=head_dim**-0.5 if softmax_scale is None else float(softmax_scale),
        window_left=left,
        window_right=right,
        window=window,
        softcap=float(softcap),
        dropout_p=float(dropout_p),
        dropout_seed=resolve_seed(dropout_p, dropout_seed, device),
        first_head=first_head,
        alibi_slopes=alibi_slopes,
        learnable_sink=learnable_sink,
        deterministic=deterministic or torch.are_deterministic_algorithms_enabled(),
        backend=backend,
    )


def resolve_window(
    window_size: Sequence[int] | Tensor, causal: bool
) -> tuple[Tensor | None, int, int]:
    """Returns an attention window as (device tensor or None, left, right), in numbers of keys.

    With a device tensor, left and right are -1 and not used. -1 is unbounded; a causal mask has
    right = 0.
    """
    if isinstance(window_size, Tensor):
        if causal:
            window_size = torch.cat([window_size[:1], window_size.new_zeros(1)])
        return window_size, -1, -1
    left, right = window_size
    return None, left if left >= 0 else -1, 0 if causal else (right if right >= 0 else -1)


def resolve_seed(
    dropout_p: float, dropout_seed: int | Tensor | None, device: torch.device
) -> Tensor | None:
    """Returns the seed as one int64 element [1] on `device`; None without dropout.

    Args:
        dropout_p: Probability of dropping an attention weight.
        dropout_seed: An int, an int64 tensor of one element on `device`, or None to draw a seed
            from torch's generator of that device.
        device: Device of q, k and v.

    Raises:
        ValueError: if the seed is a tensor on another device.
    """
    if dropout_p == 0:
        return None
    if dropout_seed is None:
        # The seed is drawn from torch's generator, which activation checkpointing restores, so that
        # a recomputation draws the same seed.
        return torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64, device=device)
    if isinstance(dropout_seed, Tensor):
        if dropout_seed.device != device:
            raise ValueError(
                f"dropout_seed must be on q's device ({device}), got {dropout_seed.device}. "
                "Move it with .to(), or pass an int."
            )
        return dropout_seed.reshape(1)
    return torch.full((1,), dropout_seed, dtype=torch.int64, device=device)


def check_dropout(dropout_p: float, dropout_seed: object) -> None:
    """Raises unless 0 <= dropout_p < 1, and the seed is None, an int or one int64 element."""
    if not isinstance(dropout_p, (int, float)) or not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p must be in [0, 1), got {dropout_p}.")
    if isinstance(dropout_seed, Tensor):
        if dropout_seed.dtype != torch.int64 or dropout_seed.numel() != 1:
            raise TypeError(
                "dropout_seed must be an int or a tensor of one int64 element, got "
                f"{dropout_seed.dtype} of shape {tuple(dropout_seed.shape)}."
            )
    elif dropout_seed is not None and (
        not isinstance(dropout_seed, int) or not -(2**63) <= dropout_seed < 2**63
    ):
        raise TypeError(
            "dropout_seed must be an int64 value or a tensor of one int64 element, got "
            f"{dropout_seed!r}."
        )


def check_first_head(first_head: object) -> None:
    """Raises unless first_head is a Python int from 0 on; reading a tensor would synchronise."""
    if not isinstance(first_head, (int, torch.SymInt)):
        raise TypeError(
            f"first_head must be a Python int, got {type(first_head).__name__}. Pass the index of "
            "this rank's first query head."
        )
    if not 0 <= first_head < 2**30:
        raise ValueError(
            f"first_head must be at least 0 and below 2^30, got {first_head}. Pass the index of "
            "this rank's first query head."
        )


def check_window(window_size: Sequence[int] | Tensor, device: torch.device) -> None:
    """Raises unless a window is two ints, or an int32 tensor of two elements on q's device."""
    if isinstance(window_size, Tensor):
        if window_size.shape != (2,) or window_size.dtype != torch.int32:
            raise TypeError(
                "window_size must be two ints or an int32 tensor of shape [2], got "
                f"{window_size.dtype} of shape {tuple(window_size.shape)}."
            )
        if window_size.device != device:
            raise ValueError(
                f"window_size must be on q's device ({device}), got {window_size.device}. Move "
                "it with .to()."
            )
    elif (
        not isinstance(window_size, Sequence)
        or len(window_size) != 2
        or not all(isinstance(side, (int, torch.SymInt)) for side in window_size)
    ):
        raise TypeError(
            f"window_size must be (left, right) ints, -1 for unbounded, got {window_size!r}."
        )


def check_head_tensors(
    documents: int,
    heads: int,
    device: torch.device,
    alibi_slopes: Tensor | None,
    learnable_sink: Tensor | None,
) -> None:
    """Raises unless alibi_slopes is [H] or [N, H] float32 and learnable_sink [H], on q's device.

    Both may be None. N is the number of documents, H the number of query heads.
    """
    optional = {"alibi_slopes": alibi_slopes, "learnable_sink": learnable_sink}
    for name, tensor in optional.items():
        if tensor is not None and not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}.")
    if alibi_slopes is not None:
        if tuple(alibi_slopes.shape) not in ((heads,), (documents, heads)):
            raise ValueError(
                f"alibi_slopes must have shape [{heads}] or [{documents}, {heads}], got "
                f"{tuple(alibi_slopes.shape)}. Pass one slope per query head."
            )
        if alibi_slopes.dtype != torch.float32:
            raise TypeError(
                f"alibi_slopes must be float32, got {alibi_slopes.dtype}. Call .float()."
            )
    if learnable_sink is not None and tuple(learnable_sink.shape) != (heads,):
        raise ValueError(
            f"learnable_sink must have shape [{heads}], got {tuple(learnable_sink.shape)}."
        )
    for name, tensor in optional.items():
        if tensor is not None and tensor.device != device:
            raise ValueError(
                f"{name} must be on q's device ({device}), got {tensor.device}. Move it with .to()."
            )


def check_softcap_and_scale(softcap: float, softmax_scale: float | None) -> None:
    """Raises unless softcap is finite and >= 0, and softmax_scale finite and > 0, or None."""
    if softcap < 0 or not softcap < math.inf:
        raise ValueError(f"softcap must be finite and >= 0, got {softcap}. 0 turns it off.")
    if softmax_scale is not None and not 0 < softmax_scale < math.inf:
        raise ValueError(
            f"softmax_scale must be finite and > 0, got {softmax_scale}. "
            "Fold the sign of a negative scale into q."
        )
