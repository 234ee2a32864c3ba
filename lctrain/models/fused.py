"""FusedSwap: replaces norms, rotary embeddings, MLPs and residual additions by fused kernels.

The `__class__` of each module becomes a subclass of its own class. Nothing else changes in the
module, and no other model changes. A class is supported if its forward has the same bytecode as a
known one (`same_code`); its name does not matter. The swap changes classes instead of patching
`forward`, since transformers turns gradient checkpointing off for layers with a patched `forward`.
"""

from __future__ import annotations

import functools
from collections import Counter
from types import FunctionType
from typing import Any

import torch
from torch import nn

from lctrain.kernels import geglu, swiglu
from lctrain.made_class import makes_class
from lctrain.models import encoder_layer, fused_encoders, fused_modules
from lctrain.models.code import own_forward, parameters, same_code, unwrapped, with_globals
from lctrain.warn import warn_caller

_ROTATION = "apply_rotary_pos_emb"
CALLS_CLASS = "calls_class"
"""Attribute of a forward on a module that calls the forward of the module's class."""
_LAYER_PARTS = ("input_layernorm", "self_attn", "post_attention_layernorm", "mlp")


class FusedSwap:
    """A Swap that replaces modules of one model by fused ones.

    It implements the protocol `lctrain.models.swap.Swap`.

    Attributes:
        swapped: Triples (module, its own class, its fused class), one per changed module.

    Args:
        model: A transformers model.

    Raises:
        ValueError: if the hub's package `kernels` has replaced forwards of the model, or another
            library has replaced modules of transformers.
    """

    name = "fused"

    def __init__(self, model: nn.Module) -> None:
        require_no_hub_kernels(model)
        require_own_modules()
        self.model = model
        self.swapped: list[tuple[nn.Module, type, type]] = []

    def apply(self) -> None:
        """Changes every module of a supported class to its fused class.

        A module whose own `forward` was patched keeps it, and there is a warning.
        """
        model = self.model
        own = [module for module in model.modules() if has_own_forward(module)]
        if own:
            warn_caller(
                f"{len(own)} modules keep their forward, which was replaced on the module, such as "
                f"that of {type(own[0]).__name__}. Patch a model before other libraries change it.",
            )
        for module in model.modules():
            if _norm_mixin(type(module)) is not None:
                self._swap(module, _norm_mixin(type(module)))
        for module in list(model.modules()):
            self._swap_attention(module)
            self._swap_mlp(module)
        encoder_layers = [one for one in model.modules() if encoder_layer.is_encoder_layer(one)]
        for module in list(model.modules()):
            if _is_residual_layer(module):
                self._swap(module, fused_modules.ResidualLayer)
            elif (encoder_mixin := fused_encoders.find_mixin(module)) is not None:
                self._swap(module, encoder_mixin)
        for module in encoder_layers:
            self._swap(module, encoder_layer.EncoderLayer)

    def undo(self) -> None:
        """Restores the class of every module."""
        for module, own, fused in reversed(self.swapped):
            if type(module) is fused:
                module.__class__ = own
                vars(module).pop(fused_modules.FUSED_FUNCTION, None)
            else:
                warn_caller(
                    f"a {type(module).__name__} keeps its fused forward: its class was changed "
                    "after patch_model. Call unpatch() before other changes are undone.",
                )
        self.swapped = []

    def describe(self) -> str:
        """Returns the number of changed modules per class as text, such as "65 LlamaRMSNorm"."""
        counts = Counter(own.__name__ for _, own, _ in self.swapped)
        return ", ".join(f"{count} {name}" for name, count in counts.items()) or "nothing"

    def _swap(self, module: Any, mixin: Any, **attributes: Any) -> bool:
        """Returns whether the module's class was changed."""
        if has_own_forward(module):
            return False
        own: Any = type(module)
        fused = fused_class(own, mixin, tuple(sorted(attributes.items())))
        module.__class__ = fused
        self.swapped.append((module, own, fused))
        return True

    def _swap_attention(self, module: nn.Module) -> None:
        forward = own_forward(type(module))
        if forward is None or not _rotates_like_llama(forward):
            return
        norms = [getattr(module, name, None) for name in ("q_norm", "k_norm")]
        if _defers_norms(forward) and all(_is_fused_norm(norm) for norm in norms):
            for norm in norms:
                self._swap(norm, fused_modules.DeferredNorm)
        own: Any = type(module)
        self._swap(module, _rotating_mixin(own))

    def _swap_mlp(self, module: nn.Module) -> None:
        mixin = _mlp_mixin(type(module))
        if mixin is None:
            return
        function = module.act_fn if mixin is fused_modules.GatedMLP else module.activation_fn
        activation = find_activation(function)
        if activation is not None and self._swap(module, mixin, fused_activation=activation):
            vars(module)[fused_modules.FUSED_FUNCTION] = function  # no submodule


def has_own_forward(module: nn.Module) -> bool:
    """Returns whether a forward on the module replaces that of its class."""
    forward = vars(module).get("forward")
    return forward is not None and not getattr(forward, CALLS_CLASS, False)


@makes_class
def fused_class(own: type, mixin: type, attributes: tuple[tuple[str, Any], ...] = ()) -> type:
    """Returns a subclass of a module's class with a mixin's fused forward; cached.

    Args:
        own: The module's own class.
        mixin: A class of `lctrain.models.fused_modules`.
        attributes: Pairs (name, value) of class attributes to set.
    """
    return type(f"Fused{own.__name__}", (mixin, own), {"__module__": __name__, **dict(attributes)})


def find_activation(function: Any) -> str | None:
    """Returns the name of an activation function in `gated_linear`; None if it is another one.

    The function is recognised by its values on test inputs.

    Args:
        function: Activation function from a tensor to a tensor.
    """
    x = torch.linspace(-8.0, 8.0, 257, dtype=torch.float64)
    ones = torch.ones_like(x)
    known = {
        "silu": swiglu(x, ones),
        "gelu_tanh": geglu(x, ones, approximate="tanh"),
        "gelu": geglu(x, ones, approximate="none"),
    }
    if isinstance(function, nn.Module):
        function = function.forward  # so that hooks do not see this call
    try:
        with torch.no_grad():
            value = function(x)
    except (RuntimeError, TypeError):
        return None
    for name, expected in known.items():
        if value.shape == x.shape and torch.allclose(value, expected, rtol=0.0, atol=1e-12):
            return name
    return None


def require_no_hub_kernels(model: nn.Module) -> None:
    """Raises a ValueError if Hugging Face's package `kernels` has replaced forwards of a model.

    That package replaces the forwards again on every train() and eval(), which would undo the swap.

    Args:
        model: A transformers model.
    """
    if getattr(model, "_use_kernels", False):
        raise ValueError(
            "model must not use kernels from the hub, got use_kernels=True: they replace forwards "
            "again on every train() and eval(). Load it with use_kernels=False, or pass "
            "fused=False."
        )


def require_own_modules() -> None:
    """Raises a ValueError if another library has replaced transformers' modules.

    FusedSwap compares classes with these modules. Liger-Kernel's `apply_liger_kernel_to_*` replaces
    them for the whole process and cannot be undone.
    """
    from transformers.models.gemma2 import modeling_gemma2
    from transformers.models.llama import modeling_llama
    from transformers.models.phi3 import modeling_phi3

    known = {
        modeling_llama: ("LlamaRMSNorm", "LlamaMLP", _ROTATION),
        modeling_gemma2: ("Gemma2RMSNorm",),
        modeling_phi3: ("Phi3MLP", _ROTATION),
    }
    for module, names in known.items():
        for name in names:
            home = getattr(module, name).__module__
            # The package `kernels` wraps transformers' functions in modules, which are accepted.
            if home.partition(".")[0] not in ("transformers", "kernels"):
                raise ValueError(
                    f"transformers must have its own {name} for fused=True, got one of {home}. Do "
                    "not call that library's process-wide patch, or pass fused=False."
                )


def _norm_mixin(own: type) -> type | None:
    from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    forward = own_forward(own)
    if forward is None:
        return None
    if same_code(forward, LlamaRMSNorm.forward):
        return fused_modules.LlamaNorm
    norm = getattr(own, "_norm", None)
    if same_code(forward, Gemma2RMSNorm.forward) and same_code(norm, Gemma2RMSNorm._norm):
        return fused_modules.GemmaNorm
    return None


def _mlp_mixin(own: type) -> type | None:
    from transformers.models.llama.modeling_llama import LlamaMLP
    from transformers.models.phi3.modeling_phi3 import Phi3MLP

    forward = own_forward(own)
    if forward is None:
        return None
    if same_code(forward, LlamaMLP.forward):
        return fused_modules.GatedMLP
    return fused_modules.PackedMLP if same_code(forward, Phi3MLP.forward) else None


def _rotates_like_llama(forward: FunctionType) -> bool:
    from transformers.models.llama import modeling_llama
    from transformers.models.modernbert import modeling_modernbert
    from transformers.models.phi3 import modeling_phi3

    inner = unwrapped(forward)
    if inner is None or _ROTATION not in inner.__code__.co_names:
        return False
    rotation = inner.__globals__.get(_ROTATION)
    half = inner.__globals__.get("rotate_half")
    known = [module.apply_rotary_pos_emb for module in (modeling_llama, modeling_phi3)]
    known.append(modeling_modernbert.apply_rotary_pos_emb)  # computes in float32
    return same_code(half, modeling_llama.rotate_half) and any(
        same_code(rotation, function) for function in known
    )


def _defers_norms(forward: FunctionType) -> bool:
    """Returns whether an attention's forward passes normalised queries and keys only to RoPE."""
    from transformers.models.gemma3.modeling_gemma3 import Gemma3Attention
    from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention

    return any(same_code(forward, own.forward) for own in (Qwen3Attention, Gemma3Attention))


def _projects_like_llama(forward: FunctionType) -> bool:
    """Returns whether an attention's forward passes its hidden states only to q, k and v_proj."""
    from transformers.models.gemma2.modeling_gemma2 import Gemma2Attention
    from transformers.models.gemma3.modeling_gemma3 import Gemma3Attention
    from transformers.models.llama.modeling_llama import LlamaAttention
    from transformers.models.mistral.modeling_mistral import MistralAttention
    from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention

    known = (LlamaAttention, MistralAttention, Qwen3Attention, Gemma2Attention, Gemma3Attention)
    return any(same_code(forward, own.forward) for own in known)


def _is_fused_norm(module: Any) -> bool:
    return isinstance(module, fused_modules.LlamaNorm | fused_modules.GemmaNorm)


@makes_class
def _rotating_mixin(own: type) -> type:
    """Returns a mixin with an attention class's own forward, which calls the fused rotation."""
    forward = own_forward(own)
    assert forward is not None
    rotating = with_globals(forward, **{_ROTATION: fused_modules.rotate_states})
    if not _projects_like_llama(forward):
        return type("FusedRotation", (), {"forward": rotating})

    @functools.wraps(rotating)
    def projecting(self: Any, hidden_states: torch.Tensor, *arguments: Any, **named: Any) -> Any:
        shared = fused_modules.share_input(self, hidden_states)
        return rotating(self, shared, *arguments, **named)

    return type("FusedProjections", (), {"forward": projecting, "shares_input": True})


def _is_residual_layer(module: nn.Module) -> bool:
    """Returns whether a module is a decoder layer like Llama's.

    Such a layer has two norms, attention and MLP, and its forward uses these four parts in Llama's
    order and nothing else. The second norm is a LlamaNorm, and the forward passes its keyword
    arguments on to the attention.
    """
    if tuple(sorted(dict(module.named_children()))) != tuple(sorted(_LAYER_PARTS)):
        return False
    forward = unwrapped(type(module).forward)
    if forward is None or forward.__code__.co_names != _LAYER_PARTS:
        return False
    names = list(parameters(module))
    if names[0] != "hidden_states" or names[-1] != "kwargs":
        return False
    return isinstance(module.post_attention_layernorm, fused_modules.LlamaNorm)
