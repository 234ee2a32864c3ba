"""Lists the kernels of SwiGLU, GeGLU and bias + GELU that CI compiles ahead of time."""

from collections.abc import Iterator

from lctrain_kernels.mlp.launch import (
    ACTIVATION_NUMBERS,
    BACKWARD_BLOCK,
    BIAS_BLOCK,
    BIAS_ROWS,
    FORWARD_BLOCK,
    NUM_WARPS,
)
from lctrain_kernels.mlp.triton_kernels import (
    bias_gelu_bwd_kernel,
    bias_gelu_fwd_kernel,
    gated_bwd_kernel,
    gated_fwd_kernel,
)
from lctrain_kernels.tile.fused_variant import fused_variant
from lctrain_kernels.tile.variant import KernelVariant


def gated_variants(
    activation: str, dtype: str = "bf16", *, writes_product: bool = True
) -> tuple[KernelVariant, KernelVariant]:
    """Describes one compilation of gated_fwd_kernel and one of gated_bwd_kernel.

    Args:
        activation: Name of the activation, a key of ACTIVATION_NUMBERS.
        dtype: Triton's name of the tensors' dtype, such as "bf16".
        writes_product: Whether the backward recomputes activation(gate) * up and writes it, as the
            gradient of the next layer's weight needs it.
    """
    number = ACTIVATION_NUMBERS[activation]
    forward = {"BLOCK": FORWARD_BLOCK, "ACTIVATION": number}
    backward = {"BLOCK": BACKWARD_BLOCK, "ACTIVATION": number}
    others: dict[str, str | None] = {} if writes_product else {"out_ptr": None}
    name = f"{activation}-product" if writes_product else activation
    return (
        fused_variant(f"gated_fwd-{activation}", gated_fwd_kernel, dtype, {}, forward, NUM_WARPS),
        fused_variant(f"gated_bwd-{name}", gated_bwd_kernel, dtype, others, backward, NUM_WARPS),
    )


def bias_gelu_variants(
    activation: str, dtype: str = "bf16", *, has_bias: bool = True
) -> tuple[KernelVariant, KernelVariant]:
    """Describes one compilation of bias_gelu_fwd_kernel and one of bias_gelu_bwd_kernel.

    Args:
        activation: Name of the activation, a key of ACTIVATION_NUMBERS.
        dtype: Triton's name of the tensors' dtype, such as "bf16".
        has_bias: Whether a bias is added before the activation.
    """
    number = ACTIVATION_NUMBERS[activation]
    forward = {"BLOCK": FORWARD_BLOCK, "ACTIVATION": number}
    backward = {"ROWS": BIAS_ROWS, "BLOCK": BIAS_BLOCK, "ACTIVATION": number}
    others: dict[str, str | None] = {"dbias_ptr": "*fp32"}
    if not has_bias:
        others = dict.fromkeys(("bias_ptr", "dbias_ptr"))
    name = f"{activation}-bias" if has_bias else activation
    return (
        fused_variant(
            f"bias_gelu_fwd-{name}", bias_gelu_fwd_kernel, dtype, others, forward, NUM_WARPS
        ),
        fused_variant(
            f"bias_gelu_bwd-{name}", bias_gelu_bwd_kernel, dtype, others, backward, NUM_WARPS
        ),
    )


def kernel_variants() -> Iterator[KernelVariant]:
    """Yields the variants to compile: every activation in bf16, and SwiGLU in float32."""
    yield from gated_variants("silu")
    yield from gated_variants("gelu_tanh")
    yield from gated_variants("gelu", writes_product=False)
    yield from gated_variants("silu", "fp32")
    yield from bias_gelu_variants("gelu")
    yield from bias_gelu_variants("gelu_tanh", has_bias=False)
