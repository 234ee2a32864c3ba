"""Lists the decode kernels that CI compiles ahead of time, without a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import triton

from lctrain_kernels.decode.launch import APPEND_TOKENS, APPEND_WARPS, MERGE_WARPS
from lctrain_kernels.decode.launch_config import DecodeConfig, table_config
from lctrain_kernels.decode.launch_plan import PLAN_SPLITS
from lctrain_kernels.decode.triton_append import decode_append_kernel
from lctrain_kernels.decode.triton_attention import decode_split_kernel, decode_whole_kernel
from lctrain_kernels.decode.triton_merge import decode_merge_kernel
from lctrain_kernels.decode.triton_plan import decode_plan_kernel
from lctrain_kernels.decode.triton_prefix import decode_prefix_kernel
from lctrain_kernels.decode.triton_tile import DecodeFlags, DecodeShape
from lctrain_kernels.tile.arguments import DOT_PRECISION, padded_head_dim
from lctrain_kernels.tile.config import TileConfig
from lctrain_kernels.tile.config import table_config as varlen_config
from lctrain_kernels.tile.variant import KernelVariant, describe_variant

KERNELS = {
    "decode_split": decode_split_kernel,
    "decode_whole": decode_whole_kernel,
    "decode_merge": decode_merge_kernel,
    "decode_append": decode_append_kernel,
    "decode_plan": decode_plan_kernel,
    "decode_prefix": decode_prefix_kernel,
}
GROUP = 4
_INTEGERS = (
    "seqlens",
    "batch_index",
    "leftpad",
    "block_table",
    "work",
    "cu_seqlens_q",
    "prefix",
    "members",
    "groups",
)
_FLOATS = ("partial", "stats", "lse", "alibi_slopes", "learnable_sink")
_SCALARS = ("scale", "softcap", "value_scale")


@dataclass(frozen=True)
class DecodeCase:
    """Kind of call for which the kernels are compiled.

    Attributes:
        name: Name in reports: "causal", or "all" for every feature.
        page: Tokens of a page; 0 for a dense cache.
        everything: Whether the call has a window, softcap, ALiBi, sinks, padding and a rotation.
        packed: Whether the queries are packed.
        shared: Whether requests share prefixes.
        differential: Whether the call is that of version 1 of differential attention: halves of
            key and value heads are paired, and out is float32.
    """

    name: str
    page: int = 0
    everything: bool = False
    packed: bool = False
    shared: bool = False
    differential: bool = False

    @property
    def absent(self) -> set[str]:
        """Names of the pointers that the call does not pass."""
        names = set()
        if self.page == 0:
            names.add("block_table")
        else:
            names.add("batch_index")
        if not self.packed:
            names.add("cu_seqlens_q")
        if not self.shared:
            names |= {"prefix", "prefix_ptr"}
        if not self.everything:
            names |= {"batch_index", "leftpad", "cos", "sin", "alibi_slopes", "learnable_sink"}
            names.add("leftpad_ptr")
        return names

    def flags(self) -> DecodeFlags:
        """Constant flags of the call."""
        return DecodeFlags(self.everything, True, self.everything, True, True)

    def shape(
        self, tile: TileConfig, head_dim: int, group: int = GROUP, prefetch: bool = False
    ) -> DecodeShape:
        """Compile-time sizes of the call."""
        return DecodeShape(
            head_dim=head_dim,
            block_d=padded_head_dim(head_dim),
            group=group,
            block_m=tile.block_m,
            block_n=tile.block_n,
            page=self.page,
            rotary=head_dim if self.everything else 0,
            scattered=self.page > 0
            and (self.everything or tile.block_n == 0 or self.page % tile.block_n != 0),
            prefetch=prefetch and self.page > 0,
            halves=self.differential,
        )


DENSE, PAGED = DecodeCase("causal"), DecodeCase("causal-page16", page=16)
ALL = DecodeCase("all-page64", page=64, everything=True)
PACKED = DecodeCase("packed-page16", page=16, packed=True)
SHARED = DecodeCase("shared-page16", page=16, shared=True)
DIFFERENTIAL = DecodeCase("differential", differential=True)
SHARED_DIFFERENTIAL = DecodeCase("shared-page64-diff", page=64, shared=True, differential=True)


def describe(
    kernel: str,
    case: DecodeCase,
    head_dim: int,
    tile: TileConfig,
    *,
    dtype: str = "bf16",
    constants: dict[str, object] | None = None,
    options: dict[str, Any] | None = None,
    absent: tuple[str, ...] = (),
    prefetch: bool = False,
    note: str = "",
    function: triton.JITFunction | None = None,
    flags: DecodeFlags | None = None,
    wide: bool = False,
) -> KernelVariant:
    """Describes one compilation of a decode kernel.

    Args:
        kernel: Name of the kernel, a key of KERNELS unless `function` is given.
        case: Kind of call.
        head_dim: Head dim D.
        tile: Tile configuration of the attention kernels.
        dtype: Triton's name of the tensors' dtype.
        constants: Values of the constexprs besides TILE, FLAGS and PRECISION.
        options: Compiler options; those of the tile by default.
        absent: Names of pointers that this variant does not pass, besides those of the case.
        prefetch: Whether page numbers are loaded one tile ahead.
        note: Text that is appended to the kernel's name.
        function: Attention kernel of another folder; by default, that of KERNELS.
        flags: Constant flags of the call; those of the case by default.
        wide: Whether out is float32, as it is with case.differential.
    """
    attends = function is not None or kernel in ("decode_split", "decode_whole", "decode_prefix")
    function = KERNELS[kernel] if function is None else function
    group = 1 if kernel == "decode_append" else GROUP
    missing = {*case.absent, *absent}
    shape = case.shape(tile, head_dim, group, prefetch)
    if kernel == "decode_plan" and not case.everything:
        missing.add("window_left")
    values: dict[str, object] = {
        "TILE": shape if attends else shape._replace(halves=False),
        "FLAGS": DecodeFlags(False, False, False, True, False)
        if kernel == "decode_append"
        else flags or case.flags(),
        "PRECISION": DOT_PRECISION,
        **(constants or {}),
    }

    def kind(name: str) -> str | None:
        if name in missing:
            return None
        if name in _SCALARS:
            return "fp32"
        if name in _FLOATS or (name == "out" and (wide or case.differential)):
            return "*fp32"
        return "*i32" if name in _INTEGERS or name.endswith("_ptr") else f"*{dtype}"

    groups = function.fn.__annotations__
    types: dict[str, Any] = {}
    for name in function.arg_names:
        fields = groups.get(name)
        if name == "pointers":
            types[name] = fields._make(kind(field) for field in fields._fields)
        elif name in ("groups", "ranges"):
            types[name] = fields._make("*i32" for _ in fields._fields)
        elif name == "strides":
            types[name] = fields._make("i32" for _ in fields._fields)
        elif name.endswith("_ptr") or name in _SCALARS or name in missing:
            types[name] = kind(name)
        else:
            types[name] = "i32"
    label = f"{kernel}{note}-D{head_dim}-{case.name}-{dtype}"
    if attends:
        label += f"-{tile.block_m}x{tile.block_n}"
    return describe_variant(
        label,
        function,
        types,
        values,
        tile.options if options is None else options,
        attends and tile.spill_free and not case.everything,
        multiplies=attends,
    )


def split_variant(
    case: DecodeCase, head_dim: int, config: DecodeConfig, dtype: str = "bf16"
) -> KernelVariant:
    """Describes decode_split_kernel, which reads a plan unless every feature is compiled."""
    absent = ("out", "lse", "learnable_sink", *(("work",) if case.everything else ()))
    return describe(
        "decode_split",
        case,
        head_dim,
        config.tile,
        dtype=dtype,
        absent=absent,
        prefetch=config.prefetch_pages,
    )


def whole_variant(
    case: DecodeCase, head_dim: int, config: DecodeConfig, exact: TileConfig | None = None
) -> KernelVariant:
    """Describes decode_whole_kernel, with splits, or with the tile of the training kernel."""
    has_splits = exact is None
    tile = config.tile if exact is None else exact
    return describe(
        "decode_whole",
        case,
        head_dim,
        tile,
        constants={"HAS_SPLITS": has_splits},
        absent=("partial", "stats", "work"),
        prefetch=config.prefetch_pages,
        note="" if has_splits else "_exact",
    )


def prefix_variants(
    case: DecodeCase, head_dim: int, config: DecodeConfig
) -> Iterator[KernelVariant]:
    """Yields the variants of decode_prefix_kernel, with each of its tiles."""
    for tile in (config.tile, *config.shared_tiles):
        yield describe(
            "decode_prefix",
            case,
            head_dim,
            tile,
            absent=("out", "lse", "learnable_sink"),
            prefetch=config.prefetch_pages,
        )


def merge_variant(case: DecodeCase, head_dim: int, config: DecodeConfig) -> KernelVariant:
    """Describes decode_merge_kernel."""
    return describe(
        "decode_merge",
        case,
        head_dim,
        config.tile,
        constants={"ROWS": config.merge_rows, "UNROLL": config.merge_unroll},
        options={"num_warps": MERGE_WARPS, "enable_fp_fusion": True},
    )


def plan_variant(case: DecodeCase, head_dim: int, config: DecodeConfig) -> KernelVariant:
    """Describes decode_plan_kernel."""
    return describe(
        "decode_plan",
        case,
        head_dim,
        config.tile,
        constants={"REQUESTS": 64, "SPLITS": PLAN_SPLITS},
        options={"num_warps": 4, "enable_fp_fusion": True},
    )


def small_variants(
    case: DecodeCase, head_dim: int, config: DecodeConfig
) -> Iterator[KernelVariant]:
    """Yields the variants of the kernels without matrix products: merge, append and plan."""
    yield merge_variant(case, head_dim, config)
    yield describe(
        "decode_append",
        case,
        head_dim,
        TileConfig(0, 0, APPEND_WARPS, 1),
        constants={"TOKENS": APPEND_TOKENS},
        options={"num_warps": APPEND_WARPS, "enable_fp_fusion": True},
    )
    yield plan_variant(case, head_dim, config)


def kernel_variants(
    table: str, head_dims: tuple[int, ...], features: tuple[str, ...]
) -> Iterator[KernelVariant]:
    """Yields the variants of the decode kernels to compile for one architecture.

    Plain calls are compiled with every head dim on the tuned architecture, and with the middle one
    elsewhere; the others with the middle one. The arguments are those of
    `lctrain_kernels.aot.kernel_variants`; "causal" and "all" have a meaning here.
    """
    middle = head_dims[len(head_dims) // 2]
    if "causal" in features:
        for head_dim in head_dims if table == "sm_90" else (middle,):
            config = table_config(table, head_dim)
            yield split_variant(DENSE, head_dim, config)
            yield split_variant(PAGED, head_dim, config)
            yield whole_variant(DENSE, head_dim, config)
            yield from prefix_variants(SHARED, head_dim, config)
        config = table_config(table, middle)
        exact = varlen_config(table, "varlen_fwd", middle, GROUP)
        yield whole_variant(DENSE, middle, config, exact)
        yield whole_variant(PACKED, middle, config, exact)
        yield from _grouped_variants(middle, config)
    config = table_config(table, middle)
    if "all" in features:
        yield split_variant(ALL, middle, config)
        yield whole_variant(ALL, middle, config)
    case = ALL if "all" in features else DENSE
    yield from small_variants(case, middle, config)
    if "causal" in features and table == "sm_90":
        config = table_config("float32", head_dims[0])
        yield split_variant(DENSE, head_dims[0], config, "fp32")


def _grouped_variants(head_dim: int, config: DecodeConfig) -> Iterator[KernelVariant]:
    """Yields the variants of packed queries, shared prefixes and differential attention."""
    for case in (PACKED, SHARED, DIFFERENTIAL):
        yield split_variant(case, head_dim, config)
        yield merge_variant(case, head_dim, config)
    yield plan_variant(SHARED, head_dim, config)
    yield from prefix_variants(SHARED_DIFFERENTIAL, head_dim, config)
