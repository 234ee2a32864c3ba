"""Makes the launch arguments that all portable attention kernels share.

A kernel's docstring describes its tensors and its own arguments. All kernels take these:

- pointers, strides: Named tuples of the tensors' addresses, and of their strides in elements.
- stride_alibi: Stride between the ALiBi slopes of two documents; 0 if all documents share them.
- num_tiles: Number of tiles in the schedule.
- total_q: Number of packed queries T, the stride of heads in tensors [H, T].
- window_left, window_right: Numbers of keys that a query sees before and after its own position;
  negative is unbounded. If pointers.window is given, the kernel reads both numbers there.
- scale: softmax_scale, the factor of q.k.
- softcap: Softcap c, which replaces a logit x by c tanh(x / c).
- threshold: An attention weight is dropped if its 16 random bits are below this number.
- keep_scale: 1 / keep probability, the factor of kept weights.
- first_head: Index of the call's first query head for the dropout RNG; None instead of 0.
- TILE: Sizes of the tile, a TileShape. BLOCK_M, BLOCK_N, PACK and GROUP are its fields.
- FLAGS: Features beyond plain attention, a Flags.
- PRECISION: Precision of matrix products, for tl.dot.
"""

from torch import Tensor

from lctrain_kernels.launch import next_power_of_2
from lctrain_kernels.options import AttentionOptions
from lctrain_kernels.pack import TiledPack
from lctrain_kernels.tile.mask import UNBOUNDED

# Lengths, counts and windows change from batch to batch; Triton would recompile for each value.
RUNTIME_INTEGERS = [
    "num_tiles",
    "total_q",
    "window_left",
    "window_right",
    "threshold",
    "first_head",
    "stride_alibi",
    "chunk_length",
    "succ_length",
    "inter_position",
]

# Products of float32 inputs are computed in float32 ("ieee"). For half-precision inputs the setting
# has no effect; gfx950 rejects the name "tf32" all the same.
DOT_PRECISION = "ieee"


def token_head_strides(*tensors: Tensor | None) -> tuple[int, ...]:
    """Returns the strides of tokens and of heads, in elements, of each tensor [T, H, D].

    The result has two numbers per tensor, in order; a tensor that is None has strides 0 and 0.
    """
    return tuple(
        stride
        for tensor in tensors
        for stride in ((0, 0) if tensor is None else tensor.stride()[:2])
    )


def padded_head_dim(head_dim: int) -> int:
    """Returns the columns of a kernel's tile: the smallest power of two >= head_dim, at least 16.

    Triton's tiles have powers of two as sizes; tl.dot needs at least 16 columns.
    """
    return max(16, next_power_of_2(head_dim))


def window_arguments(options: AttentionOptions) -> tuple[Tensor | None, int, int, bool, bool]:
    """Returns the window arguments of a kernel launch: (tensor, left, right, has_left, has_right).

    If the window is a device tensor ([2] int32), the kernel reads it, and both sides count as
    bounded. Otherwise the tensor is None, and left and right are numbers of keys; -1 is unbounded.
    """
    if options.window is not None:
        return options.window, -1, -1, True, True
    left, right = (min(side, UNBOUNDED) for side in (options.window_left, options.window_right))
    return None, left, right, left >= 0, right >= 0


def dropout_arguments(options: AttentionOptions) -> tuple[int, float, int | None]:
    """Returns a launch's dropout arguments: (threshold, 1 / keep probability, first head).

    The threshold is round(65536 * dropout_p). A weight is dropped if its 16 random bits are below
    the threshold; see reference/philox.py. The first head is None instead of 0, and without
    dropout: Triton then compiles no argument for it.
    """
    threshold = min(round(options.dropout_p * 65536), 65535)
    first_head = (options.first_head or None) if options.has_dropout else None
    return threshold, 65536 / (65536 - threshold), first_head


def dropout_tensors(
    options: AttentionOptions, pack: TiledPack
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Returns the tensors that the dropout RNG reads: dropout_seed, document_ids and query_offsets.

    dropout_seed is [1] int64, the others are [N] int32 or None. Without dropout all three are None.
    """
    if not options.has_dropout:
        return None, None, None
    return options.dropout_seed, pack.document_ids, pack.query_offsets


def alibi_strides(alibi_slopes: Tensor | None) -> int:
    """Returns the stride, in elements, between the ALiBi slopes of two documents.

    The stride is 0 for slopes [H], which all documents share, and without slopes.
    """
    return alibi_slopes.stride(0) if alibi_slopes is not None and alibi_slopes.dim() == 2 else 0
