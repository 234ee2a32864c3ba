"""Finds the rotary embedding of a model, and checks that its layers use it as Llama does.

Families differ in ways that no name tells: interleaved pairs, heads rotated in part, layers without
rotation, norms after it. So one layer of each sort is run on a few tokens, at two sets of
positions, and what reaches its attention function is compared.
"""

import copy
from collections.abc import Iterator
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from lctrain.models.architectures import attention_layers
from lctrain.models.code import reads_argument

_IMPLEMENTATION = "lctrain_probe"
_POSITIONS = (0, 1, 5, 12)
_REMEDY = (
    "Patch it with attention='flash', and extend its window by the config's rope_parameters (YaRN, "
    "for example) instead."
)


class Probe(NamedTuple):
    """Query and key that one attention layer passes to its attention function.

    Attributes:
        layer: The layer.
        angles: [S, D / 2] float32, by which its rotary embedding rotates the tokens.
        still: Query [1, H, S, D] and key [1, Hk, S, D] of tokens that are all at position 0.
        rotated: The same at the positions of `angles`.
        arguments: The other arguments of the attention function.
    """

    layer: nn.Module
    angles: Tensor
    still: tuple[Tensor, Tensor]
    rotated: tuple[Tensor, Tensor]
    arguments: dict[str, Any]


def find_rotary(model: nn.Module) -> nn.Module:
    """Returns the module that computes a model's rotary embeddings; its inv_freq is [D / 2].

    Raises:
        ValueError: if there is none, or several.
    """
    found = [m for m in model.modules() if isinstance(getattr(m, "inv_freq", None), Tensor)]
    if len(found) == 1:
        return found[0]
    names = (name for name, _ in model.named_buffers())
    several = len(found) > 1 or any(name.endswith("_inv_freq") for name in names)
    raise ValueError(
        "model must have one rotary embedding (RoPE) for all layers, got "
        f"{type(model).__name__} with {'several' if several else 'none'}. {_REMEDY}"
    )


def probe_layers(model: Any, rotary: nn.Module) -> Iterator[Probe]:
    """Runs one attention layer of each sort; layers that differ in weights alone are of one sort.

    Raises:
        ValueError: if a layer cannot be run by itself, or reads positions itself.
    """
    from transformers.modeling_utils import AttentionInterface

    AttentionInterface.register(_IMPLEMENTATION, _record)
    sorts: dict[Any, nn.Module] = {}
    for layer in attention_layers(model).values():
        settings = (
            (name, value)
            for name, value in vars(layer).items()
            if name not in ("layer_idx", "training")
            and isinstance(value, (bool, int, float, str, type(None)))
        )
        sorts.setdefault((type(layer), frozenset(settings)), layer)
    for layer in sorts.values():
        if reads_argument(layer, "position_ids"):
            raise ValueError(
                "layers must use positions for rotary embeddings only, got "
                f"{type(layer).__name__}, which reads position_ids itself. {_REMEDY}"
            )
        try:
            yield _probe(model, layer, rotary)
        except (AttributeError, NotImplementedError, RuntimeError, TypeError) as error:
            raise ValueError(
                "layers must be of a known form for dual chunk attention, got "
                f"{type(layer).__name__}, which failed on its own ({error}). {_REMEDY}"
            ) from error


def require_half_split(probe: Probe) -> None:
    """Raises a ValueError unless a layer rotates whole heads as Llama does, as its last step.

    Then rotating its queries further is the same as moving them to other positions.
    """
    name = type(probe.layer).__name__
    for still, rotated in zip(probe.still, probe.rotated, strict=True):
        width, head_dim = 2 * probe.angles.shape[-1], still.shape[-1]
        if width != head_dim:
            raise ValueError(
                f"rotary embeddings must cover the whole head of {head_dim}, got {width} columns "
                f"in {name} (partial rotary embeddings). {_REMEDY}"
            )
        expected = _rotate(still.float(), probe.angles)
        tolerance = max(1e-4, 4 * torch.finfo(still.dtype).eps) * expected.norm()
        if (rotated.float() - expected).norm() <= tolerance:
            continue
        unmoved = (rotated - still).float().norm() <= tolerance
        raise ValueError(
            "layers must rotate queries and keys in halves, as Llama does, and do nothing to them "
            f"after, got {name}, which "
            + ("does not rotate them" if unmoved else "does otherwise (interleaved, for example)")
            + f". {_REMEDY}"
        )


def _probe(model: Any, layer: nn.Module, rotary: nn.Module) -> Probe:
    runnable, device, dtype = _runnable(layer, model.dtype)
    rotary = _runnable_rotary(rotary, device)
    positions = torch.tensor([_POSITIONS], device=device)
    states = _normal((1, len(_POSITIONS), model.config.hidden_size)).to(device, dtype)
    recorded: list[dict[str, Any]] = []
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        for position_ids in (torch.zeros_like(positions), positions):
            runnable(
                hidden_states=states,
                position_embeddings=rotary(states, position_ids),
                attention_mask=None,
                lctrain_probe=recorded,
            )
    still, rotated = recorded
    frequencies = cast(Tensor, rotary.inv_freq).float()
    return Probe(
        layer,
        positions[0, :, None].float() * frequencies,
        (still.pop("query"), still.pop("key")),
        (rotated.pop("query"), rotated.pop("key")),
        still,
    )


def _record(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    lctrain_probe: list[dict[str, Any]],
    **arguments: Any,
) -> tuple[Tensor, None]:
    """An attention function that records its arguments and returns zeros [B, S, H, Dv]."""
    lctrain_probe.append({"query": query, "key": key, **arguments})
    batch, heads, tokens, _ = query.shape
    return value.new_zeros((batch, tokens, heads, value.shape[-1])), None


def _runnable(layer: nn.Module, dtype: torch.dtype) -> tuple[nn.Module, torch.device, torch.dtype]:
    """A copy of a layer for `_record`, with random weights in float32 on the CPU.

    So a layer is judged by its form: weights may have no memory yet, and a norm after the rotation
    does no harm while its weights are all 1. Quantized layers keep their weights and place.
    """
    weights = [*layer.parameters(), *layer.buffers()]
    if all(weight.is_floating_point() for weight in layer.parameters()):
        memo: dict[int, Any] = {id(weight): _normal(weight.shape) for weight in weights}
        for weight in layer.parameters():
            memo[id(weight)] = nn.Parameter(memo[id(weight)])
        runnable = copy.deepcopy(layer, memo)
        device, dtype = torch.device("cpu"), torch.float32
    else:
        runnable = copy.copy(layer)
        device = weights[0].device
    config = copy.copy(runnable.config)
    config._attn_implementation_internal = _IMPLEMENTATION  # type: ignore[union-attr, assignment]
    runnable.config = config
    return runnable, device, dtype


def _runnable_rotary(rotary: nn.Module, device: torch.device) -> nn.Module:
    """Returns a copy of a rotary embedding, whose forward does not change the model's."""
    rotary = copy.deepcopy(rotary)
    for name, buffer in list(rotary.named_buffers()):
        known = (
            buffer if not buffer.is_meta else torch.linspace(1.0, 0.1, len(buffer), device="cpu")
        )
        setattr(rotary, name, known.to(device))
    return rotary


def _rotate(states: Tensor, angles: Tensor) -> Tensor:
    """states [..., S, D] by angles [S, D / 2], half-split."""
    first, second = states.chunk(2, dim=-1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def _normal(shape: Any) -> Tensor:
    """Returns float32 normal numbers of variance 1 / shape[-1], without the global generator."""
    generator = torch.Generator(device="cpu").manual_seed(0)
    size = tuple(shape)
    numbers = torch.randn(size, generator=generator, dtype=torch.float32, device="cpu")
    return numbers / max(1, size[-1] if size else 1) ** 0.5
