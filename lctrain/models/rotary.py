"""Finds the rotary embedding of a model, and checks that its layers use it as Llama does.

Families differ in their use of RoPE: some rotate interleaved columns, only a part of each head, or
not in all layers, and some have a norm after the rotation. Names do not show these differences. So
the check is an experiment: it runs one layer of each kind on a few tokens at two sets of positions,
and compares the queries and keys that reach the layer's attention function.
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
    """Queries and keys that one attention layer passes to its attention function in a test run.

    Attributes:
        layer: The layer.
        angles: [S, D / 2] float32, angles of the rotary embedding at the S test positions.
        still: Query [1, H, S, D] and key [1, Hk, S, D] of a test run with all tokens at position 0.
        rotated: Query and key of a test run with the same tokens at the test positions.
        arguments: Other keyword arguments that the layer passes to its attention function.
    """

    layer: nn.Module
    angles: Tensor
    still: tuple[Tensor, Tensor]
    rotated: tuple[Tensor, Tensor]
    arguments: dict[str, Any]


def find_rotary(model: nn.Module) -> nn.Module:
    """Returns the one module of a model that computes rotary embeddings.

    Args:
        model: A transformers model.

    Raises:
        ValueError: if there is no such module, or more than one.
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
    """Runs one attention layer of each kind on test inputs, and yields its Probe.

    Layers are of one kind if they differ in their index and weights only.

    Args:
        model: A transformers model.
        rotary: The model's rotary embedding.

    Raises:
        ValueError: if a layer cannot be run alone, or reads position ids itself.
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

    In such a layer, rotating the queries again is equivalent to moving them to other positions,
    which dual chunk attention relies on.

    Args:
        probe: Result of the layer's test run.
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
    """An attention function that appends its arguments to a list and returns zeros.

    Args:
        module: The attention layer.
        query: [B, H, S, D].
        key: [B, Hk, S, D].
        value: [B, Hk, S, Dv].
        attention_mask: Ignored.
        lctrain_probe: The list, which gets a dictionary of query, key and `arguments`.
        **arguments: The other arguments of the call.

    Returns:
        Zeros [B, S, H, Dv], and None in place of attention weights.
    """
    lctrain_probe.append({"query": query, "key": key, **arguments})
    batch, heads, tokens, _ = query.shape
    return value.new_zeros((batch, tokens, heads, value.shape[-1])), None


def _runnable(layer: nn.Module, dtype: torch.dtype) -> tuple[nn.Module, torch.device, torch.dtype]:
    """Returns a copy of a layer that calls `_record`, with random float32 weights on the CPU.

    Random weights serve two purposes: the layer may still be on the meta device, and a norm after
    the rotation shows only if its weights are not all 1. A quantized layer keeps its weights and
    device.

    Args:
        layer: An attention layer.
        dtype: Dtype of the model, for quantized layers.

    Returns:
        The copy, and the device and dtype of its inputs.
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
    """Returns a copy of a rotary embedding on `device`; running it leaves the model unchanged."""
    rotary = copy.deepcopy(rotary)
    for name, buffer in list(rotary.named_buffers()):
        known = (
            buffer if not buffer.is_meta else torch.linspace(1.0, 0.1, len(buffer), device="cpu")
        )
        setattr(rotary, name, known.to(device))
    return rotary


def _rotate(states: Tensor, angles: Tensor) -> Tensor:
    """Returns states [..., S, D] rotated by angles [S, D / 2], with each head split in halves."""
    first, second = states.chunk(2, dim=-1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def _normal(shape: Any) -> Tensor:
    """Returns normal random numbers of variance 1 / shape[-1], float32 on the CPU.

    The numbers come from a generator of their own, so torch's global generator does not change.
    """
    generator = torch.Generator(device="cpu").manual_seed(0)
    size = tuple(shape)
    numbers = torch.randn(size, generator=generator, dtype=torch.float32, device="cpu")
    return numbers / max(1, size[-1] if size else 1) ** 0.5
