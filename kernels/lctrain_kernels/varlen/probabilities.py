"""Computes the attention weights that flash_attn_varlen_func returns for debugging."""

import torch
from torch import Tensor

from lctrain_kernels.options import AttentionOptions
from lctrain_kernels.pack import Pack
from lctrain_kernels.reference.attention import dense_attention
from lctrain_kernels.varlen.operators import Operands


def attention_probabilities(operands: Operands, pack: Pack, options: AttentionOptions) -> Tensor:
    """Computes all attention weights of a call, [N, H, max_seqlen_q, max_seqlen_k] in q's dtype.

    Weights that dropout dropped are negative. The arithmetic is in float32, or in float64 for
    float64 inputs.

    Args:
        operands: Tensors q [T, H, D], k and v [Tk, Hk, D].
        pack: Documents of the call; its lengths are read, which synchronises with a GPU.
        options: Mask, scale and the other attention options of the call.
    """
    q, k, v = operands
    dtype = torch.promote_types(q.dtype, torch.float32)
    shape = (pack.documents, q.shape[1], pack.max_seqlen_q, pack.max_seqlen_k)
    result = q.new_zeros(shape)
    begin_q, begin_k = pack.cu_seqlens_q.tolist(), pack.cu_seqlens_k.tolist()
    window = (options.window_left, options.window_right)
    if options.window is not None:
        window = tuple(options.window.tolist())
    for document in range(pack.documents):
        rows = slice(begin_q[document], begin_q[document + 1])
        columns = slice(begin_k[document], begin_k[document + 1])
        slopes = options.alibi_slopes
        if slopes is not None and slopes.dim() == 2:
            slopes = slopes[document]
        key = document if pack.document_ids is None else int(pack.document_ids[document])
        offsets = pack.query_offsets
        with torch.autocast(q.device.type, enabled=False):
            _, _, signed = dense_attention(
                q[rows].detach().to(dtype),
                k[columns].detach().to(dtype),
                v[columns].detach().to(dtype),
                softmax_scale=options.softmax_scale,
                window=window,
                softcap=options.softcap,
                alibi_slopes=slopes,
                learnable_sink=options.learnable_sink,
                dropout_p=options.dropout_p,
                dropout_seed=0 if options.dropout_seed is None else options.dropout_seed,
                document_id=key,
                first_query=0 if offsets is None else int(offsets[document]),
                first_head=options.first_head,
            )
        result[document, :, : signed.shape[1], : signed.shape[2]] = signed.to(q.dtype)
    return result
