"""States which calls the Hopper kernels support. The portable kernels run the others."""

import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from importlib import metadata
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

# Gluon is experimental: a Triton outside this range may have changed what compat.py adapts.
OLDEST_TRITON, NEWEST_TRITON = (3, 6), (3, 9)
MAX_ROWS = 1 << 30  # of a descriptor's row dimension


class Call(NamedTuple):
    """Properties of a varlen or dual chunk call that decide whether the Hopper kernels support it.

    Attributes:
        q: Packed queries [T, H, D].
        k: Packed keys [Tk, Hk, D].
        v: Packed values [Tk, Hk, D].
        dout: Gradient of out, [T, H, D]; None in the forward.
        alibi: Whether ALiBi slopes are given.
        deterministic: Whether dq must have the same bits in every run.
        dropout: Whether attention weights are dropped.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor | None = None
    alibi: bool = False
    deterministic: bool = False
    dropout: bool = False


def unaligned(tensor: Tensor) -> bool:
    """Returns True if TMA cannot read a tensor.

    TMA needs strides that are positive multiples of 16 bytes, and an address aligned to 16 bytes.
    """
    size = tensor.element_size()
    for stride in tensor.stride()[:-1]:
        if stride * size % 16 or stride <= 0:
            return tensor.numel() > 0
    return tensor.data_ptr() % 16 != 0 and tensor.numel() > 0


_Call = TypeVar("_Call")
Limit = tuple[str, Callable[[Call], bool]]
FORWARD_LIMITS: tuple[Limit, ...] = (
    ("dtypes other than float16 and bfloat16", lambda c: c.q.element_size() != 2),
    ("head dims above 256", lambda c: c.q.shape[2] > 256),
    ("values of another head dim", lambda c: c.v.shape[2] != c.q.shape[2]),
    ("packs without keys", lambda c: c.k.shape[0] == 0),
    ("ALiBi slopes", lambda c: c.alibi),
    ("more than 2^30 tokens", lambda c: max(c.q.shape[0], c.k.shape[0]) > MAX_ROWS),
    ("strides or addresses that are no multiples of 16 bytes",
     lambda c: unaligned(c.q) or unaligned(c.k) or unaligned(c.v)),
)  # fmt: skip
DOUT_LIMIT: tuple[str, Callable[[Any], bool]] = (
    "a gradient of out whose strides are no multiples of 16 bytes",
    lambda c: c.dout is not None and c.dout.stride(2) == 1 and unaligned(c.dout),
)
# Calls that only the varlen kernels support.
ONLY_VARLEN: tuple[tuple[str, Callable[[Any], bool]], ...] = (
    ("the backward of dropout", lambda c: c.dropout),
    ("a deterministic backward", lambda c: c.deterministic),
)
BACKWARD_LIMITS: tuple[Limit, ...] = (
    *FORWARD_LIMITS,
    ("a deterministic backward of head dims above 128",
     lambda c: c.deterministic and c.q.shape[2] > 128),
    # The Hopper kernels can run this, but the portable kernels are faster: 29.4 against 36.1 ms on
    # 1x32k_d64, 1.83 against 3.05 ms on mix32k_d64.
    ("a deterministic backward of head dims up to 64",
     lambda c: c.deterministic and c.q.shape[2] <= 64),
    DOUT_LIMIT,
)  # fmt: skip


def refusal(call: _Call, limits: tuple[tuple[str, Callable[[_Call], bool]], ...]) -> str | None:
    """Returns the name of a call's first property that the kernels do not support, or None.

    Args:
        call: Properties of the call.
        limits: Pairs of a property's name and a function that returns whether a call has it.
    """
    for name, exceeds in limits:
        if exceeds(call):
            return name
    return None


def _installed_triton() -> tuple[int, int] | None:
    """Returns the (major, minor) version of the installed Triton, or None."""
    try:
        found = re.match(r"(\d+)\.(\d+)", metadata.version("triton"))
    except metadata.PackageNotFoundError:
        return None
    return (int(found[1]), int(found[2])) if found else None


def knows_triton(version: tuple[int, int] | None) -> bool:
    """Returns whether the Hopper kernels support a Triton release; warns if they do not.

    Args:
        version: (major, minor), or None if Triton is not installed.
    """
    if version is None:
        return False
    if OLDEST_TRITON <= version <= NEWEST_TRITON:
        return True
    oldest, newest, found = (".".join(map(str, v)) for v in (OLDEST_TRITON, NEWEST_TRITON, version))
    warnings.warn(
        f"lctrain's Hopper kernels know Triton {oldest} to {newest}, not {found}: attention takes "
        "the portable kernels, which are slower on a Hopper GPU. Install one of those versions.",
        stacklevel=2,
    )
    return False


def _hopper_devices() -> frozenset[int]:
    if torch.version.hip is not None or not torch.cuda.is_available():
        return frozenset()
    devices = range(torch.cuda.device_count())
    return frozenset(i for i in devices if torch.cuda.get_device_capability(i)[0] == 9)


# Determined once, on the first call with a GPU, because torch.compile cannot trace these checks.
_DEVICES = _hopper_devices()
_KNOWN_TRITON = bool(_DEVICES) and knows_triton(_installed_triton())


def available(device: torch.device) -> bool:
    """Returns whether the Hopper kernels run on a device: a Hopper GPU, with a supported Triton."""
    if device.type != "cuda" or not _KNOWN_TRITON:
        return False
    index = torch.cuda.current_device() if device.index is None else device.index
    return index in _DEVICES


SMALLEST_HOPPER = 79 << 30  # bytes of an H100's memory, rounded down
_planned_memory: ContextVar[int | None] = ContextVar("planned_memory", default=None)


@contextmanager
def planned_memory(limit: int | None) -> Iterator[None]:
    """Context manager around a memory plan, which tells how much memory its GPU has.

    Args:
        limit: Bytes; None if it is unknown.
    """
    token = _planned_memory.set(limit)
    try:
        yield
    finally:
        _planned_memory.reset(token)


def may_be_planned() -> bool:
    """Returns whether a memory plan may count on the Hopper kernels.

    It may if they run on a GPU here. If no GPU is here, a plan is for another machine: then it may,
    unless that machine's GPU has less memory than every Hopper GPU.
    """
    if torch.cuda.is_available():
        return _KNOWN_TRITON
    limit = _planned_memory.get()
    return limit is None or limit >= SMALLEST_HOPPER
