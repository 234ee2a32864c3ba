"""Named tuples that the Hopper kernels of differential attention take or pass to functions."""

from typing import Any, NamedTuple


class Outputs(NamedTuple):
    """TMA descriptors of the results, each [T, H, Dv].

    Attributes:
        out: Differential output, out1 - lam * out2.
        out1: Output A1 v of branch 1.
        out2: Output A2 v of branch 2.
    """

    out: Any
    out1: Any
    out2: Any


class BranchPointers(NamedTuple):
    """Tensors that a consumer warpgroup of the forward accesses without TMA.

    Attributes:
        lam: Lambda of each token and head, [T, H] float32, any strides.
        lse1: Log-sum-exp of branch 1, [H, T] float32; written.
        lse2: Log-sum-exp of branch 2, [H, T] float32; written.
        dropout_seed: Seed of the dropout mask, [1] int64; None without dropout.
        document_ids: Ids of the documents, [N] int32, an input of the dropout RNG; or None.
        query_offsets: Position within its document of the first query that this rank holds, [N]
            int32, for the dropout mask; None takes 0: the rank holds whole documents.
    """

    lam: Any
    lse1: Any
    lse2: Any
    dropout_seed: Any
    document_ids: Any
    query_offsets: Any


class ForwardInputs(NamedTuple):
    """Inputs of a consumer warpgroup of the forward.

    Attributes:
        out_descs: TMA descriptors of the results, an Outputs.
        shared: Shared memory of the kernel, a gluon.structures.ForwardBuffers.
        out_bufs: Shared memory for results that do not fit into the queries' buffer,
            [n, 64, block_dv].
        window: Window of the call: left and right bounds, or their device tensor.
        pointers: Lambda, dropout inputs and the lse results, a BranchPointers.
        stride_lt: Stride of lam's tokens, in elements.
        stride_lh: Stride of lam's heads, in elements.
        scalars: Scale, dropout factors and number of packed queries, a gluon.structures.Scalars.
    """

    out_descs: Any
    shared: Any
    out_bufs: Any
    window: Any
    pointers: Any
    stride_lt: Any
    stride_lh: Any
    scalars: Any


class ForwardPointers(NamedTuple):
    """Pointers to the tensors that differential_fwd_hopper_kernel accesses without TMA.

    The kernel's docstring gives the shapes of operands and results. Boundaries, tiles, document_ids
    and query_offsets are those of TiledPack; options are those of AttentionOptions.
    """

    lam: Any
    lse1: Any
    lse2: Any
    cu_seqlens_q: Any
    cu_seqlens_k: Any
    tiles: Any
    counter: Any
    window: Any
    dropout_seed: Any
    document_ids: Any
    query_offsets: Any


class BackwardPointers(NamedTuple):
    """Pointers to the tensors that differential_bwd_hopper_kernel accesses without TMA.

    The kernel's docstring gives the shapes of operands and results. Boundaries, tiles, document_ids
    and query_offsets are those of TiledPack; options are those of AttentionOptions.
    """

    stats: Any
    dk1: Any
    dk2: Any
    dv: Any
    dq_sum: Any
    cu_seqlens_q: Any
    cu_seqlens_k: Any
    tiles: Any
    window: Any


class BackwardStrides(NamedTuple):
    """Strides of tokens and heads of dk1 and dk2, and of dv, in elements."""

    k_token: Any
    k_head: Any
    v_token: Any
    v_head: Any


class ResultPointers(NamedTuple):
    """Gradients that a backward program stores: dk1 and dk2 [Tk, Hk, D], and dv [Tk, Hk, Dv].

    dk2 is None if both branches read k1.
    """

    dk1: Any
    dk2: Any
    dv: Any


class BackwardInputs(NamedTuple):
    """Inputs of a consumer warpgroup of the backward.

    Attributes:
        shared: Shared memory of the kernel, a gluon.structures.BackwardBuffers; q, lse and delta
            have two buffers per stage, one per branch.
        dq: Two float32 shared-memory buffers of partial dq, one per branch; DqSlabs of branch 1 if
            the consumers add partial dq.
        ds: dS of both branches and both warpgroups, [4, 64, block_m]; of two steps with DqSlabs.
        results: Pointers to which the gradients of keys and values are stored, a ResultPointers.
        strides: Strides of the stored gradients.
        tile: Tile of keys that the program works on, a gluon.structures.KeyTile.
        window: Keys visible to the left and right of each query.
        scale: softmax_scale, the factor of q.k.
    """

    shared: Any
    dq: Any
    ds: Any
    results: Any
    strides: Any
    tile: Any
    window: Any
    scale: Any


class PreparePointers(NamedTuple):
    """Pointers to the tensors that differential_prepare_kernel accesses.

    out1, out2 and dout are [T, H, Dv]; lam is [T, H]; lse1, lse2, dlse1, dlse2 and dlam are [H, T];
    dq1 and dq2 are float32 sums [T, H, D]; stats is [4, H, T] float32.
    """

    out1: Any
    out2: Any
    dout: Any
    lam: Any
    lse1: Any
    lse2: Any
    dlse1: Any
    dlse2: Any
    dq1: Any
    dq2: Any
    dlam: Any
    stats: Any


class PrepareStrides(NamedTuple):
    """Strides of tokens and heads of out1 and out2, and of dout, in elements."""

    out_token: Any
    out_head: Any
    dout_token: Any
    dout_head: Any
