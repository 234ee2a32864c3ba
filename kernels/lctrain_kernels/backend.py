"""Chooses the attention implementation of a call: "hopper", "triton" or "pytorch".

A backend that the caller names is used or raises an error; it never falls back silently."""

import importlib.util
import os
import warnings

import torch

BACKENDS = ("auto", "hopper", "triton", "pytorch")
MAX_HEAD_DIM = 256
"""Largest head dim of the attention kernels; the PyTorch path supports any."""

TRITON_INSTALLED = importlib.util.find_spec("triton") is not None


_warned: set[tuple[torch.dtype, bool]] = set()


def _warn_of_slow_path(dtype: torch.dtype, wide: bool) -> None:
    """Warns, once per dtype and reason, that attention on a GPU runs on the slow PyTorch path.

    Args:
        dtype: Dtype of q, k and v.
        wide: True if the head dim is the reason, False if the dtype is.
    """
    if torch.compiler.is_compiling() or (dtype, wide) in _warned:
        return
    _warned.add((dtype, wide))
    cause = f"the Triton kernels keep lse in float32, too coarse for {dtype}"
    remedy = "Use bfloat16 or float16 (precision=bf16-mixed), or name backend='triton'."
    if wide:
        cause = f"the Triton kernels take heads of at most {MAX_HEAD_DIM} columns"
        remedy = "Layers with smaller heads keep the kernels."
    if not TRITON_INSTALLED:
        cause, remedy = "Triton is not installed", "Install the package triton."
    warnings.warn(
        f"Attention on this GPU runs on the PyTorch path, which is slow and synchronises: {cause}. "
        f"{remedy}",
        stacklevel=3,
    )


def interpreting() -> bool:
    """Returns whether TRITON_INTERPRET=1 makes Triton kernels run on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def hopper_serves(device: torch.device) -> bool:
    """Returns whether the Hopper kernels run on a device: a Hopper GPU with a supported Triton."""
    if device.type != "cuda" or not TRITON_INSTALLED:
        return False
    from lctrain_kernels.gluon.support import available

    return available(device)


def select_backend(
    device: torch.device | str,
    dtype: torch.dtype = torch.bfloat16,
    backend: str = "auto",
    *,
    head_dim: int = 1,
    warn: bool = True,
) -> str:
    """Returns the implementation that serves tensors of this device and dtype.

    Args:
        device: Device of q, k and v.
        dtype: Dtype of q, k and v.
        backend: "auto", "hopper", "triton" or "pytorch".
        head_dim: Head dim; "auto" chooses "pytorch" if it is larger than MAX_HEAD_DIM.
        warn: Whether to warn once if a GPU will run the slow path.

    Returns:
        "hopper", "triton" or "pytorch". "auto" may give "hopper" for a call that the Hopper kernels
        do not support (see `lctrain_kernels.gluon.support`); "triton" then runs the call.

    Raises:
        ValueError: if the name is unknown, or the named implementation cannot serve these tensors.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}.")
    if not isinstance(device, str | torch.device):
        raise TypeError(
            f"device must be a torch.device, got {type(device).__name__}. Pass that of q."
        )
    try:
        device = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device must be one of torch, got {device!r}: {error}") from None
    supported = dtype in (torch.float16, torch.bfloat16, torch.float32)
    wide = head_dim > MAX_HEAD_DIM
    if backend == "auto":
        if device.type != "cuda":  # ROCm devices carry this name too
            return "pytorch"
        if TRITON_INSTALLED and not wide and dtype in (torch.float16, torch.bfloat16):
            return "hopper" if hopper_serves(device) else "triton"
        if warn:
            _warn_of_slow_path(dtype, wide)
        return "pytorch"
    if wide and backend != "pytorch":
        raise ValueError(
            f"head_dim must be at most {MAX_HEAD_DIM} for backend={backend!r}, got {head_dim}. "
            "Pass backend='auto' or 'pytorch': the PyTorch path takes any."
        )
    if backend == "hopper":
        if dtype not in (torch.float16, torch.bfloat16):
            raise ValueError(
                f"backend='hopper' takes float16 or bfloat16, got {dtype}. "
                "Cast the tensors, or pass backend='auto'."
            )
        if not hopper_serves(device):
            raise ValueError(
                f"backend='hopper' needs tensors on a Hopper GPU (compute capability 9.0) and a "
                f"Triton that it knows, got a tensor on {device}. Pass backend='auto'."
            )
    if backend == "triton":
        if not TRITON_INSTALLED:
            raise ValueError(
                "backend='triton' needs the package triton, which is not installed. "
                "Install it, or pass backend='pytorch'."
            )
        if device.type != "cuda" and not interpreting():
            raise ValueError(
                f"backend='triton' needs tensors on a GPU, got {device.type}. Move them, pass "
                "backend='auto', or set TRITON_INTERPRET=1 before the first import to run the "
                "kernels in Triton's interpreter."
            )
        if device.type != "cuda" and dtype == torch.bfloat16:
            raise ValueError(
                "Triton's interpreter does not multiply bfloat16. Use float16 or float32 there."
            )
        if not supported:
            raise ValueError(
                f"backend='triton' takes float16, bfloat16 or float32, got {dtype}. "
                "Cast the tensors, or pass backend='pytorch'."
            )
    return backend
