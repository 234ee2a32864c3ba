"""Reads the dropout mask of each attention kernel from its outputs or gradients.

With q = 0 every key has the weight 1 / Lk. Z_ij is 1 / (1 - p) where a weight is kept, otherwise 0.

- Forward: with one-hot values, out[i, j] = Z_ij / Lk.
- Kernel of dk and dv: with one-hot gradients of out, dv[j, i] = Z_ij / Lk.
- Kernel of dq: with one-hot keys and v.dout = 1 everywhere,
  dq[i, j] = scale (Z_ij - mean_j Z_ij + dlse) / Lk. If dlse is a small positive number, this is
  positive where the weight is kept.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from tests.kernels.oracle import DROPOUT_SEED, Case, Inputs, Result, attention, cumulative

KERNELS = ("varlen_fwd", "varlen_dq", "varlen_dkv")


def read_masks(
    lengths: Sequence[int],
    dropout_p: float,
    *,
    backend: str,
    device: torch.device | str,
    heads: int = 2,
    dtype: torch.dtype = torch.float16,
    head_dim: int | None = None,
    dropout_seed: int | Tensor = DROPOUT_SEED,
    document_ids: Tensor | None = None,
) -> dict[str, list[Tensor]]:
    """Returns each document's mask by kernel, [H, L, L] bool, True where a weight is kept.

    One key/value head serves all query heads, so tiles that hold several heads are tested too.

    Args:
        lengths: Tokens of each document; heads times the longest must not exceed head_dim.
        dropout_p: Dropout probability; each row must keep at least one weight.
        backend: Backend, as in the public function.
        device: Device of the tensors.
        heads: Query heads.
        dtype: Dtype of the tensors.
        head_dim: Head dim; default the smallest that suffices.
        dropout_seed: Seed, as in the public function.
        document_ids: Document ids; default 0, 1, 2, ...
    """
    if document_ids is None:
        document_ids = torch.arange(len(lengths), dtype=torch.int32, device=device)
    longest = max(lengths)
    head_dim = -(-heads * longest // 16) * 16 if head_dim is None else head_dim
    assert heads * longest <= head_dim, "a unit vector per head and position does not fit"
    case = Case(
        tuple((length, length) for length in lengths),
        heads=heads,
        heads_k=1,
        head_dim=head_dim,
        dropout_p=dropout_p,
    )
    position = torch.cat([torch.arange(length) for length in lengths])
    unit = torch.nn.functional.one_hot(position, head_dim)[:, None].to(device, dtype)
    by_head = torch.cat(
        [
            torch.nn.functional.one_hot(position + head * longest, head_dim)[:, None]
            for head in range(heads)
        ],
        dim=1,
    ).to(device, dtype)
    first = torch.zeros_like(unit)
    first[..., 0] = 1
    zeros = torch.zeros_like(by_head)
    cu_seqlens = cumulative(lengths, device)
    dlse = torch.full((heads, sum(lengths)), 0.5 / longest, device=device)

    def run(k: Tensor, v: Tensor, dout: Tensor) -> Result:
        inputs = Inputs(zeros, k, v, dout, dlse, None, None, cu_seqlens, cu_seqlens)
        return attention(
            case, inputs, backend=backend, dropout_seed=dropout_seed, document_ids=document_ids
        )

    units = run(torch.zeros_like(unit), unit, by_head)
    ones = run(unit, first, first.expand(-1, heads, -1))
    masks: dict[str, list[Tensor]] = {kernel: [] for kernel in KERNELS}
    for index, length in enumerate(lengths):
        rows = slice(*cu_seqlens[index : index + 2].tolist())
        forward = units.out[rows, :, :length].transpose(0, 1)
        backward = torch.stack(
            [
                units.dv[rows, 0, head * longest : head * longest + length].t()
                for head in range(heads)
            ]
        )
        masks["varlen_fwd"].append(forward != 0)
        masks["varlen_dkv"].append(backward != 0)
        masks["varlen_dq"].append(ones.dq[rows, :, :length].transpose(0, 1) > 0)
    return masks
