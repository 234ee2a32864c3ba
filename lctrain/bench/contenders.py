"""The contenders of the step benchmark: lctrain, and combinations of other libraries.

Every contender trains the same model with the same weights on the same pack. Liger patches
transformers' modules for the whole process, so each contender has a process of its own.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from lctrain.batch import PackedBatch
from lctrain.bench.shapes import ModelShape, build_shape
from lctrain.models import patch_model
from lctrain_kernels.bench.peers import fa2_varlen, fa4_varlen, installed_version

OURS = "lctrain"
NEEDS_GPU = "needs a GPU"
NAMES = (  # of transformers, for packed documents
    *("input_ids", "labels", "position_ids"),
    *("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"),
)
Attention = Callable[..., tuple[torch.Tensor, None]]


@dataclass(frozen=True)
class Contender:
    """One way to train a transformers model on packs.

    Attributes:
        name: Name on the command line, in `--contenders`.
        title: Name in tables and records.
        modules: Modules that must be importable.
        distributions: Packages whose versions are recorded.
        implementation: Name of the attention in transformers.
        register: Function that registers the attention of that name, if transformers has none.
        patch: Function that changes the model after it is built.
        on_cpu: True if it runs without a GPU.
    """

    name: str
    title: str
    modules: tuple[str, ...] = ()
    distributions: tuple[str, ...] = ()
    implementation: str = "sdpa"
    register: Callable[[], None] | None = None
    patch: Callable[[Any], None] | None = None
    on_cpu: bool = False

    def missing(self, device: torch.device) -> str | None:
        """Returns why the contender cannot run on this machine, or None if it can."""
        if device.type == "cpu" and not self.on_cpu:
            return NEEDS_GPU
        for module in self.modules:
            try:
                importlib.import_module(module)
            except Exception as error:  # importing a library may raise any error
                return f"{type(error).__name__}: {error}".splitlines()[0][:200]
        return None

    def versions(self) -> dict[str, str]:
        """Returns the versions of the contender's installed packages."""
        found = {name: installed_version(name) for name in self.distributions}
        return {name: version for name, version in found.items() if version is not None}

    def build(
        self, shape: ModelShape, device: torch.device, dtype: torch.dtype, seed: int = 0
    ) -> Any:
        """Builds and patches a model of a shape, with random weights of a seed."""
        if self.register is not None:
            self.register()
        model = build_shape(shape, self.implementation, device, dtype, seed)
        if self.patch is not None:
            self.patch(model)
        return model

    def arguments(self, batch: PackedBatch) -> dict[str, Any]:
        """Returns the arguments with which the model computes its loss on a pack."""
        given = batch.arguments()
        if self.name == OURS:
            return {**given, "schedule": batch.schedule}
        return {**{name: given[name] for name in NAMES}, "use_cache": False}


def _patch_ours(model: Any) -> None:
    patch_model(model, attention="flash", fused=True, loss=True)


def _patch_liger(model: Any) -> None:
    from liger_kernel.transformers.monkey_patch import _apply_liger_kernel_to_instance

    _apply_liger_kernel_to_instance(model)


def _registration(name: str, varlen: Callable[..., torch.Tensor]) -> Callable[[], None]:
    """Returns a function that registers a packed attention with transformers under a name."""

    def attention(
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        **options: Any,
    ) -> tuple[torch.Tensor, None]:
        packed = [x.transpose(1, 2)[0] for x in (query, key, value)]  # [T, heads, D]
        out = varlen(*packed, options["cu_seq_lens_q"], options["max_length_q"])
        return out[None], None

    def register() -> None:
        from transformers import AttentionInterface, AttentionMaskInterface
        from transformers.masking_utils import flash_attention_mask

        AttentionInterface.register(name, attention)
        AttentionMaskInterface.register(name, flash_attention_mask)

    return register


_FA4 = _registration("bench_fa4", fa4_varlen)
_TORCH_FA2 = _registration("bench_torch_fa2", fa2_varlen)
_ALL = (
    Contender(
        OURS,
        "lctrain, fused=True, its loss",
        distributions=("lctrain",),
        patch=_patch_ours,
        on_cpu=True,
    ),
    Contender(
        "fa4_liger",
        "transformers, FlashAttention-4, Liger",
        modules=("flash_attn.cute", "liger_kernel.transformers.monkey_patch"),
        distributions=("flash-attn-4", "liger-kernel"),
        implementation="bench_fa4",
        register=_FA4,
        patch=_patch_liger,
    ),
    Contender(
        "fa4",
        "transformers, FlashAttention-4",
        modules=("flash_attn.cute",),
        distributions=("flash-attn-4",),
        implementation="bench_fa4",
        register=_FA4,
    ),
    Contender(
        "fa2",
        "transformers, FlashAttention-2",
        modules=("flash_attn.flash_attn_interface",),
        distributions=("flash-attn",),
        implementation="flash_attention_2",
    ),
    Contender(
        "torch_fa2",
        "transformers, FlashAttention-2 in torch",
        modules=("torch.nn.attention.varlen",),
        implementation="bench_torch_fa2",
        register=_TORCH_FA2,
    ),
    Contender("sdpa", "transformers, SDPA", on_cpu=True),
)
CONTENDERS = {contender.name: contender for contender in _ALL}
