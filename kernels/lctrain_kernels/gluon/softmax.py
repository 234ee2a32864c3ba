"""The online softmax of the Hopper forward kernels, which rescales the accumulator rarely.

A consumer warpgroup has 64 rows of scores. In the layout of wgmma's result, four lanes of a warp
hold a row. The softmax state is m and l, both [64, 4] (row, lane): the running maximum m is equal
in all four lanes of a row; each lane has its own part of the running sum l.

m is raised lazily, so it may be less than the largest logit so far:

    first block of a row    m is raised if the block exceeds it by more than 8 (base 2);
    later blocks            m is raised if a lane's weights sum to more than 2^13.

The accumulator is rescaled only when m is raised. Weights up to 2^13 are as precise in half
precision as weights up to 1. In most blocks no row of a warp raises m, and the lanes exchange
nothing.

The PTX below votes and shuffles among all lanes of a warp and is declared pure. Both are allowed,
because all threads of a program take the same branches around it.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from lctrain_kernels.gluon.primitives import drop_weights, rounded, tanh
from lctrain_kernels.tile.logits import LOG2_E

_LOG2_E = gl.constexpr(LOG2_E)
# m of a row before its first key: below all logits, and finite, so that -inf - m is -inf.
INITIAL_MAX = gl.constexpr(-3.4028234663852886e38)

# Results for two rows of a lane: m ($0, $1), factors of the accumulator ($2, $3), and l times these
# factors ($4, $5). Operands: m and l in the same registers, the lane's largest s ($10, $11) and the
# multiplier ($12).
RAISE_MAX = gl.constexpr(
    """{
    .reg .pred far, first, second;
    .reg .f32 over0, over1, x0, x1;
    mov.f32 $2, 0f3F800000;
    mov.f32 $3, 0f3F800000;
    neg.f32 x0, $0;
    neg.f32 x1, $1;
    fma.rn.f32 over0, $10, $12, x0;
    fma.rn.f32 over1, $11, $12, x1;
    setp.gt.f32 far, over0, 0f41000000;
    setp.gt.or.f32 far, over1, 0f41000000, far;
    vote.sync.any.pred far, far, 0xffffffff;
    @!far bra DONE;
    shfl.sync.bfly.b32 over0, $10, 1, 31, 0xffffffff;
    shfl.sync.bfly.b32 over1, $11, 1, 31, 0xffffffff;
    max.f32 x0, $10, over0;
    max.f32 x1, $11, over1;
    shfl.sync.bfly.b32 over0, x0, 2, 31, 0xffffffff;
    shfl.sync.bfly.b32 over1, x1, 2, 31, 0xffffffff;
    max.f32 x0, x0, over0;
    max.f32 x1, x1, over1;
    neg.f32 over0, $0;
    neg.f32 over1, $1;
    fma.rn.f32 over0, x0, $12, over0;
    fma.rn.f32 over1, x1, $12, over1;
    setp.gt.f32 first, over0, 0f41000000;
    setp.gt.f32 second, over1, 0f41000000;
    mul.rn.f32 x0, x0, $12;
    mul.rn.f32 x1, x1, $12;
    selp.f32 x0, x0, $0, first;
    selp.f32 x1, x1, $1, second;
    sub.rn.f32 over0, $0, x0;
    sub.rn.f32 over1, $1, x1;
    ex2.approx.ftz.f32 $2, over0;
    ex2.approx.ftz.f32 $3, over1;
    mul.rn.f32 $4, $4, $2;
    mul.rn.f32 $5, $5, $3;
    mov.f32 $0, x0;
    mov.f32 $1, x1;
    DONE:
    }"""
)
RAISE_MAX_CONSTRAINTS = gl.constexpr("=&f,=&f,=&f,=&f,=&f,=&f,0,1,4,5,f,f,f,f")


@gluon.constexpr_function
def quads_layout(columns):
    """Returns the register layout of split_rows' result, for scores [64, columns]."""
    registers = [[0, 0, 0, 1], [8, 0, 0, 0]]
    registers += [[0, 1 << i, 0, 0] for i in range((columns // 8).bit_length() - 1)]
    lanes = [[0, 0, 1, 0], [0, 0, 2, 0], [1, 0, 0, 0], [2, 0, 0, 0], [4, 0, 0, 0]]
    warps = [[16, 0, 0, 0], [32, 0, 0, 0]]
    return gl.DistributedLinearLayout(registers, lanes, warps, [], [64, columns // 8, 4, 2])


@gluon.constexpr_function
def lanes_layout(columns):
    """Returns the register layout of m and l, [64, 4], for scores [64, columns]."""
    return gl.SliceLayout(1, gl.SliceLayout(3, quads_layout(columns)))


@gluon.constexpr_function
def scale_assembly(elements):
    """Returns PTX that multiplies a thread's accumulator by the factors of its two rows.

    If all factors of a warp are 1, the multiplications are skipped. Registers alternate: two of one
    row, two of the other. Operands: the results, the inputs in the same registers, and a factor for
    each input.

    Args:
        elements: Number of accumulator registers of a thread.
    """
    lines = [
        ".reg .pred some;",
        f"setp.neu.f32 some, ${2 * elements}, 0f3F800000;",
        f"setp.neu.or.f32 some, ${2 * elements + 2}, 0f3F800000, some;",
        "vote.sync.any.pred some, some, 0xffffffff;",
        "@!some bra DONE;",
        *(f"mul.rn.f32 ${i}, ${i}, ${2 * elements + i % 4};" for i in range(elements)),
        "DONE:",
    ]
    return "{" + " ".join(lines) + "}"


@gluon.constexpr_function
def scale_constraints(elements):
    """Returns the inline assembly constraints of the operands of scale_assembly(elements)."""
    tied = [str(i) for i in range(elements)]
    return ",".join(["=&f"] * elements + tied + ["f"] * elements)


@gluon.constexpr_function
def known_max_assembly(elements, half):
    """Returns PTX that computes a thread's weights of a block of keys after a row's first block.

    The weights are computed with the running maximum m of the blocks before. Only if a lane's
    weights sum to more than 2^13, the warp raises m to the block's maximum, and computes the
    weights again.

    Results: pairs of weights in half precision; then, numbered from 0, m of both rows ($0, $2),
    factors of the accumulator ($1, $3) and sums ($4, $6). Operands: s, m, l and the multiplier.
    Registers alternate: two of one row, two of the other.

    Args:
        elements: Number of scores of a thread.
        half: PTX name of the weights' dtype, "bf16" or "f16".
    """
    out, s = elements // 2, elements * 3 // 2
    m, l, multiplier = s + elements, s + 2 * elements, f"${s + 3 * elements}"

    def weights():
        yield "mov.f32 t0, 0f00000000; mov.f32 t1, 0f00000000;"
        for pair in range(elements // 2):
            row = pair % 2
            yield f"fma.rn.f32 u, ${s + 2 * pair}, {multiplier}, n{row};"
            yield f"fma.rn.f32 v, ${s + 2 * pair + 1}, {multiplier}, n{row};"
            yield "ex2.approx.ftz.f32 u, u; ex2.approx.ftz.f32 v, v;"
            yield f"cvt.rn.{half}x2.f32 ${pair}, v, u;"
            yield f"add.rn.f32 u, u, v; add.rn.f32 t{row}, t{row}, u;"

    lines = [".reg .pred far, hit0, hit1;", ".reg .f32 n0, n1, t0, t1, l0, l1, u, v;"]
    for row in range(2):
        lines.append(f"mov.f32 ${out + 2 * row}, ${m + 2 * row};")
        lines.append(f"mov.f32 ${out + 2 * row + 1}, 0f3F800000;")
        lines.append(f"mov.f32 l{row}, ${l + 2 * row}; neg.f32 n{row}, ${m + 2 * row};")
    lines += weights()
    lines.append("setp.gt.f32 far, t0, 0f46000000; setp.gt.or.f32 far, t1, 0f46000000, far;")
    lines.append("vote.sync.any.pred far, far, 0xffffffff; @!far bra DONE;")
    for row in range(2):
        for lane in (1, 2):
            lines.append(f"shfl.sync.bfly.b32 u, t{row}, {lane}, 31, 0xffffffff;")
            lines.append(f"max.f32 t{row}, t{row}, u;")
        lines.append(f"setp.gt.f32 hit{row}, t{row}, 0f46000000;")
        lines.append(f"mov.f32 u, ${s + 2 * row};")
        for i in range(elements):
            if i // 2 % 2 == row:
                lines.append(f"max.f32 u, u, ${s + i};")
        for lane in (1, 2):
            lines.append(f"shfl.sync.bfly.b32 v, u, {lane}, 31, 0xffffffff; max.f32 u, u, v;")
        lines.append(f"mul.rn.f32 u, u, {multiplier};")
        lines.append(f"selp.f32 u, u, ${m + 2 * row}, hit{row};")
        lines.append(f"add.rn.f32 v, n{row}, u; neg.f32 v, v; neg.f32 n{row}, u;")
        lines.append(f"mov.f32 ${out + 2 * row}, u; ex2.approx.ftz.f32 v, v;")
        lines.append(f"mov.f32 ${out + 2 * row + 1}, v; mul.rn.f32 l{row}, l{row}, v;")
    lines += weights()
    lines.append("DONE:")
    lines += [f"add.rn.f32 ${out + 4 + 2 * row}, l{row}, t{row};" for row in range(2)]
    return "{" + " ".join(lines) + "}"


@gluon.constexpr_function
def known_max_constraints(elements):
    """Returns the inline assembly constraints of the operands of known_max_assembly."""
    return ",".join(["=&r"] * (elements // 2) + ["=&f"] * elements + ["f"] * (4 * elements))


@gluon.jit
def split_rows(x):
    """Returns scores x [64, N] as [64, N // 8, 4, 2], without moving data between threads.

    The third dimension is the lane of a row that holds the scores.
    """
    COLUMNS: gl.constexpr = x.shape[1]
    return gl.convert_layout(
        gl.reshape(x, [64, COLUMNS // 8, 4, 2]), quads_layout(COLUMNS), assert_trivial=True
    )


@gluon.jit
def _column_block(x, INDEX: gl.constexpr):
    """Returns x[:, INDEX] of x [64, N, 4], without moving data between threads."""
    for bit in gl.static_range(8):
        if x.shape[1] > 1:
            halves = gl.reshape(x, [64, x.shape[1] // 2, 2, 4])
            even, odd = gl.split(gl.permute(halves, (0, 1, 3, 2)))
            x = odd if INDEX >> bit & 1 else even
    return gl.reshape(x, [64, 4])


@gluon.jit
def _weights_by_known_max(s, m, l, multiplier, s_layout: gl.constexpr, dtype: gl.constexpr):
    """Computes the weights of a block by known_max_assembly.

    Arguments and results are those of online_softmax.
    """
    ELEMENTS: gl.constexpr = s.shape[1] // 2
    lanes: gl.constexpr = lanes_layout(s.shape[1])
    operands = (split_rows(s), m[:, None, :, None], l[:, None, :, None], multiplier)
    if dtype == gl.bfloat16:
        p, found = gl.inline_asm_elementwise(
            known_max_assembly(ELEMENTS, "bf16"),
            known_max_constraints(ELEMENTS),
            operands,
            dtype=(gl.bfloat16, gl.float32),
            is_pure=True,
            pack=ELEMENTS,
        )
    else:
        p, found = gl.inline_asm_elementwise(
            known_max_assembly(ELEMENTS, "f16"),
            known_max_constraints(ELEMENTS),
            operands,
            dtype=(gl.float16, gl.float32),
            is_pure=True,
            pack=ELEMENTS,
        )
    m_and_l, alpha = gl.split(found)
    m = gl.convert_layout(_column_block(m_and_l, 0), lanes, assert_trivial=True)
    l = gl.convert_layout(_column_block(m_and_l, 1), lanes, assert_trivial=True)
    alpha = gl.convert_layout(_column_block(alpha, 0), lanes, assert_trivial=True)
    p = gl.convert_layout(gl.reshape(p, s.shape), s_layout, assert_trivial=True)
    return p, alpha, m, l


@gluon.jit
def initial_state(BLOCK_N: gl.constexpr):
    """Returns m and l of the online softmax before a row's first block, [64, 4] float32.

    m is the most negative finite float32, so that masked scores of -inf give weights of 0; l is 0.
    BLOCK_N is the number of keys of a block, on which the layout of m and l depends.
    """
    layout: gl.constexpr = lanes_layout(BLOCK_N)
    return gl.full([64, 4], INITIAL_MAX, gl.float32, layout), gl.zeros([64, 4], gl.float32, layout)


@gluon.jit
def reduce_rows(m, l, row_layout: gl.constexpr):
    """Returns m and l of each row, [64] in row_layout, from the state [64, 4] of its four lanes."""
    return (
        gl.convert_layout(gl.max(m, 1), row_layout, assert_trivial=True),
        gl.convert_layout(gl.sum(l, 1), row_layout, assert_trivial=True),
    )


@gluon.jit
def rescale(acc, alpha, o_layout: gl.constexpr):
    """Returns the accumulator acc [64, D] float32, each row times its factor alpha.

    alpha is [64, 4] (row, lane), as m and l are: the four lanes that hold a row have the same
    factor. o_layout is the layout of acc and of the result.
    """
    COLUMNS: gl.constexpr = acc.shape[1]
    ELEMENTS: gl.constexpr = COLUMNS // 2
    factor = gl.convert_layout(alpha, lanes_layout(COLUMNS), assert_trivial=True)
    acc = gl.inline_asm_elementwise(
        scale_assembly(ELEMENTS),
        scale_constraints(ELEMENTS),
        [split_rows(acc), factor[:, None, :, None]],
        dtype=gl.float32,
        is_pure=True,
        pack=ELEMENTS,
    )
    return gl.convert_layout(gl.reshape(acc, [64, COLUMNS]), o_layout, assert_trivial=True)


@gluon.jit
def softmax_step(
    s,
    m,
    l,
    block,
    rows,
    visible,
    bits,
    threshold,
    scale,
    softcap,
    s_layout: gl.constexpr,
    dtype: gl.constexpr,
    FLAGS: gl.constexpr,
    FEW_REGISTERS: gl.constexpr = False,
    HAS_MAX: gl.constexpr = False,
):
    """Applies softcap and mask to a block of scores, and updates the online softmax by it.

    Args:
        s: Scores q.k, [64, BLOCK_N] float32.
        m: Running maximum, [64, 4] float32.
        l: Running sum, [64, 4] float32.
        block: Index of the block of keys.
        rows: Query positions of the rows, a LocalQueries.
        visible: Range of keys that the rows see, a Visible.
        bits: One random 32-bit word per weight, from block_bits.
        threshold: A weight is dropped if the 16 bits taken from its word are below this number.
        scale: softmax_scale, the factor of q.k.
        softcap: Softcap c, which replaces a logit x by c tanh(x / c).
        s_layout: Layout of s.
        dtype: Dtype of p.
        FLAGS: Features beyond plain attention, a tile.structures.Flags.
        FEW_REGISTERS: Whether to use fewer registers at the cost of more instructions.
        HAS_MAX: Whether an earlier block has set m.

    Returns:
        The weights p [64, BLOCK_N] in `dtype`, the factor alpha [64, 4] of the accumulator, and the
        new m and l.
    """
    BLOCK_N: gl.constexpr = s.shape[1]
    IN_DOCUMENT: gl.constexpr = FLAGS.has_dropout or FEW_REGISTERS
    query = rows.first + rows.local_query
    local_key = gl.arange(0, BLOCK_N, gl.SliceLayout(0, s_layout))
    key = block * BLOCK_N
    multiplier = scale * _LOG2_E
    if FLAGS.has_softcap:
        s = tanh(s * (scale / softcap)) * (softcap * _LOG2_E)
        multiplier = 1.0
    if (key + BLOCK_N > visible.clear_high) | (key < visible.clear_low):
        # Positions in the block take fewer instructions; positions in the document take fewer
        # registers, which random bits need.
        start = 0 if IN_DOCUMENT else key
        keys = local_key + key if IN_DOCUMENT else local_key
        last = gl.minimum(query + visible.shift + visible.right, visible.length_k - 1) - start
        s = gl.where(keys[None, :] <= last[:, None], s, float("-inf"))
        if FLAGS.has_left:
            first_seen = query + visible.shift - visible.left - start
            s = gl.where(keys[None, :] >= first_seen[:, None], s, float("-inf"))
    return online_softmax(
        s, m, l, bits, threshold, multiplier, s_layout, dtype, FLAGS.has_dropout, HAS_MAX
    )


@gluon.jit
def online_softmax(
    s,
    m,
    l,
    bits,
    threshold,
    multiplier,
    s_layout: gl.constexpr,
    dtype: gl.constexpr,
    HAS_DROPOUT: gl.constexpr,
    HAS_MAX: gl.constexpr,
):
    """Updates the online softmax by a block of masked scores.

    Args:
        s: Scores, [64, BLOCK_N] float32; -inf where masked.
        m: Running maximum of s * multiplier, [64, 4] float32.
        l: Running sum of the weights, [64, 4] float32.
        bits: One random 32-bit word per weight, from block_bits.
        threshold: A weight is dropped if the 16 bits taken from its word are below this number.
        multiplier: Factor of s in the base-2 exponent.
        s_layout: Layout of s.
        dtype: Dtype of p.
        HAS_DROPOUT: Whether weights are dropped.
        HAS_MAX: Whether an earlier block has set m.

    Returns:
        The weights p = 2^(s * multiplier - m), [64, BLOCK_N] in `dtype`, the factor alpha [64, 4]
        by which `rescale` multiplies the accumulator, and the new m and l.
    """
    if HAS_MAX and not HAS_DROPOUT:
        return _weights_by_known_max(s, m, l, multiplier, s_layout, dtype)
    x = split_rows(s)
    largest = gl.max(gl.max(x, 3), 1)
    m, alpha, l = gl.inline_asm_elementwise(
        RAISE_MAX,
        RAISE_MAX_CONSTRAINTS,
        [m, l, largest, multiplier],
        dtype=(gl.float32, gl.float32, gl.float32),
        is_pure=True,
        pack=2,
    )
    x = gl.exp2(x * multiplier - m[:, None, :, None])
    l += gl.sum(gl.sum(x, 3), 1)
    p = gl.convert_layout(gl.reshape(x, s.shape), s_layout, assert_trivial=True)
    if HAS_DROPOUT:
        local_key = gl.arange(0, s.shape[1], gl.SliceLayout(0, s_layout))
        p = rounded(drop_weights(p, bits, local_key[None, :], threshold), dtype)
    return p.to(dtype), alpha, m, l
