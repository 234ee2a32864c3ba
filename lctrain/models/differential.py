"""to_differential and convert_head_order: convert weights for differential attention.

- `to_differential` turns a plain model into a differential one (version 2) with equal outputs.
- `convert_head_order` reorders the heads of a version 1 model between transformers and unilm.

To run a differential model on lctrain's kernels, call `lctrain.patch_model(model,
attention="differential")`.
"""

import copy
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lctrain.pluralize import pluralize

ORDERS = ("transformers", "unilm")
_INITIAL_LAMBDA = 0.5  # sigmoid(0)
Weights = TypeVar("Weights", nn.Module, dict[str, Tensor])


def to_differential(model: Any, version: int = 2) -> Any:
    """Returns a differential model (version 2) with the same outputs as a plain model.

    The conversion changes three weights of every attention layer:

    - Every query head becomes a pair of copies, which shares the head's key and value. Both
      branches of the pair have the old attention weights A.
    - A new projection for lambda is zero, so lambda = sigmoid(0) = 1/2 at every token, and a pair
      computes A v - A v / 2 = A v / 2.
    - The output projection is doubled, which undoes the factor 1/2.

    The factors are powers of two, so outputs differ from the plain model's by the rounding of the
    attention only, in any dtype. Training separates the two branches from the first step on: their
    gradients have the form G and -G / 2. The gradient of lambda is not zero either.

    The result has its own model_type, such as "lctrain_llama_diff". `save_pretrained` writes the
    model, and AutoModelForCausalLM.from_pretrained reads it if lctrain is imported.

    Args:
        model: A LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM or Qwen3ForCausalLM that is
            not patched. It does not change; the result has copies of its weights.
        version: Must be 2. Version 1 has values of another shape and a norm that plain models lack.

    Returns:
        The differential model, with the devices, dtypes and training mode of `model`.

    Raises:
        ValueError: if the version is not 2, or the model is of another class, patched, quantized,
            or on the meta device.
    """
    from lctrain.models.differential_configs import differential_config
    from lctrain.models.differential_v2 import MODELS
    from lctrain.models.registration import register_families

    if version != 2:
        raise ValueError(
            f"version must be 2, got {version!r}. A model of version 1 is trained from scratch: "
            "model=diff_llama, or transformers' DiffLlamaForCausalLM."
        )
    _require_plain(model)
    register_families()
    config = differential_config(model.config)
    with torch.device("meta"):
        result = MODELS[model.config.model_type](config)
    result.load_state_dict(_differential_state(model), assign=True)
    for name, buffer in model.named_buffers():  # rotary frequencies are in no state dict
        owner, _, leaf = name.rpartition(".")
        setattr(result.get_submodule(owner), leaf, buffer.clone())
    result.tie_weights()
    result.generation_config = copy.deepcopy(model.generation_config)
    return result.train(model.training)


def _differential_state(model: Any) -> dict[str, Tensor]:
    """Returns the state dict of the differential model of `to_differential`, as copies.

    Every weight keeps its dtype and device.
    """
    pairs, state = model.config.num_attention_heads, {}
    for name, weight in model.state_dict().items():
        if name.endswith((".self_attn.q_proj.weight", ".self_attn.q_proj.bias")):
            state[name] = weight.unflatten(0, (pairs, -1)).repeat_interleave(2, 0).flatten(0, 1)
        elif name.endswith(".self_attn.o_proj.weight"):
            state[name] = weight / (1 - _INITIAL_LAMBDA)
        else:
            state[name] = weight.clone()
        if name.endswith(".self_attn.q_proj.weight"):
            projection = name.replace("q_proj", "lambda_proj")
            state[projection] = weight.new_zeros(pairs, weight.shape[1])
    return state


def _require_plain(model: Any) -> None:
    from lctrain.attention.spec import is_patched
    from lctrain.models.differential_v2 import MODELS

    plain = {family.__mro__[2]: name for name, family in MODELS.items()}
    if type(model) not in plain:
        names = ", ".join(sorted(kind.__name__ for kind in plain))
        raise ValueError(
            f"model must be one of {names}, got {type(model).__name__}. Only these have a "
            "differential form; one that is differential already needs no conversion."
        )
    if is_patched(model):
        raise ValueError(
            "model must not be patched, got one that is. Call unpatch() on its handle first, and "
            "patch the result with attention='differential'."
        )
    weights = list(model.parameters())
    if any(weight.is_meta for weight in weights):
        raise ValueError(
            "model must have its weights in memory, got weights on the meta device. Load it "
            "without device_map='meta', or build the differential model of its config."
        )
    if not all(weight.is_floating_point() for weight in weights):
        raise ValueError(
            "model must have floating-point weights, got a quantized one. Convert it first, and "
            "quantize the result."
        )


def convert_head_order(weights: Weights, *, source: str, target: str) -> Weights:
    """Reorders the heads of a version 1 differential model.

    There are two orders of H query heads and K key/value heads of width D:

    - "transformers" (DiffLlama) pairs query heads h and h + H / 2, and key and value heads g and g
      + K / 2;
    - "unilm" (the flash files of microsoft/unilm) pairs neighbours, heads 2 h and 2 h + 1.

    The rows of `q_proj`, `k_proj` and `v_proj` are reordered. The output projection has the same
    order in both: 2 D columns per pair.

    Names of weights, and the order of rows inside a head, do not change. Note that unilm's RoPE
    rotates neighbouring columns of a head (interleaved), and transformers' RoPE its two halves.

    Args:
        weights: A state dict or a model. Its layers have a weight `lambda_q1` [D] beside the
            projections.
        source: Order of `weights`, "transformers" or "unilm".
        target: Order of the result, "transformers" or "unilm".

    Returns:
        For a state dict, a new one with copies of the reordered weights; for a model, the same
        model, changed in place.

    Raises:
        ValueError: if an order is unknown, there is no differential layer, or the number of heads
            is odd.
    """
    for name, order in (("source", source), ("target", target)):
        if order not in ORDERS:
            raise ValueError(
                f"{name} must be one of {', '.join(map(repr, ORDERS))}, got {order!r}. "
                "'transformers' pairs heads h and h + H / 2, 'unilm' 2 h and 2 h + 1."
            )
    if isinstance(weights, nn.Module):
        state = weights.state_dict()
        weights.load_state_dict(convert_head_order(state, source=source, target=target))
        return weights
    layers = {
        name.removesuffix("lambda_q1"): len(vector)
        for name, vector in weights.items()
        if name.endswith("lambda_q1")
    }
    if not layers:
        raise ValueError(
            "weights must hold layers of differential attention (version 1), got none with "
            "lambda_q1. Pass the state dict of a whole model."
        )
    reorder = {
        ("transformers", "unilm"): _halves_to_neighbours,
        ("unilm", "transformers"): _neighbours_to_halves,
    }.get((source, target))
    if reorder is None:
        return dict(weights)
    return {name: _reordered(name, x, layers, reorder) for name, x in weights.items()}


def _reordered(
    name: str, weight: Tensor, layers: dict[str, int], reorder: Callable[[Tensor], Tensor]
) -> Tensor:
    module = name.rpartition(".")[0]
    before, dot, projection = module.rpartition(".")
    layer = before + dot
    if layer not in layers or projection not in ("q_proj", "k_proj", "v_proj"):
        return weight
    head_dim = layers[layer]
    if weight.shape[0] % (2 * head_dim):
        raise ValueError(
            f"{name} must have an even number of heads of {head_dim}, got "
            f"{pluralize(weight.shape[0], 'row')}. "
            "Every head is one of a pair."
        )
    return reorder(weight.unflatten(0, (-1, head_dim))).flatten(0, 1)


def _halves_to_neighbours(heads: Tensor) -> Tensor:
    """Returns heads [H, D, ...] in the order 0, H / 2, 1, H / 2 + 1, ..."""
    return heads.unflatten(0, (2, -1)).transpose(0, 1).flatten(0, 1)


def _neighbours_to_halves(heads: Tensor) -> Tensor:
    """Returns heads [H, D, ...] in the order 0, 2, ..., 1, 3, ..."""
    return heads.unflatten(0, (-1, 2)).transpose(0, 1).flatten(0, 1)
