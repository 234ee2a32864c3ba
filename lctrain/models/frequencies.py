"""DocumentFrequencies: rotary frequencies by the length of each document, not of the batch.

Two rope types of transformers choose their frequencies in the forward pass: 'longrope' has a set
for short and one for long inputs, and 'dynamic' (NTK) scales its base with the length. transformers
uses the highest position of the batch for both, and 'dynamic' also depends on earlier batches, so a
document's output would depend on other documents. DocumentFrequencies rotates every token at the
frequencies that transformers uses for the token's document alone.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lctrain.models.cache import CACHE_ARGUMENTS, given_cache
from lctrain.models.code import find_wrapper, multiplies_matrices, parameters, says
from lctrain.pluralize import pluralize

_REMEDY = (
    "Set the config's rope_parameters to a type with fixed frequencies ('yarn' or 'linear', for "
    "example), or train it unpatched with one document per row."
)


def follows_length(rope_type: Any) -> bool:
    """Returns whether the frequencies of a rope type depend on the input's length."""
    return isinstance(rope_type, str) and ("dynamic" in rope_type or rope_type == "longrope")


def length_dependent(model: nn.Module) -> dict[str, nn.Module]:
    """Returns, by name, the rotary embeddings whose frequencies depend on the input's length."""
    found = {}
    for name, module in model.named_modules():
        types = getattr(module, "rope_type", None)
        types = types.values() if isinstance(types, dict) else (types,)
        if any(map(follows_length, types)) and _decorated(type(module)) is not None:
            found[name] = module
    return found


class DocumentFrequencies:
    """Computes cosines and sines of RoPE with frequencies by each document's length.

    It is the `forward` of one rotary embedding whose rope type depends on the input's length.
    `attach_frequencies` sets it.

    Args:
        rotary: A rotary embedding of transformers.

    Attributes:
        rotary: The rotary embedding.
        lengths: [B, S] int64, the length of each token's document. If None, every row is one
            document, whose length is its highest position plus 1.
    """

    def __init__(self, rotary: Any) -> None:
        self.rotary = rotary
        self.lengths: Tensor | None = None
        self._long: dict[Any, Tensor] = {}
        self._broadcasts = _broadcasts(rotary)

    def __call__(
        self, x: Tensor, position_ids: Tensor, layer_type: str | None = None
    ) -> Tensor | tuple[Tensor, ...]:
        """Returns cosines and sines, as the rotary embedding's own forward does.

        Args:
            x: Tensor with the device and dtype of the result.
            position_ids: [B, S], or [A, B, S] for A axes of positions.
            layer_type: Layer type, for modules with frequencies per layer type; None for others.
        """
        types = self.rotary.rope_type
        arguments = {} if layer_type is None else {"layer_type": layer_type}
        if not follows_length(types if layer_type is None else types[layer_type]):
            return type(self.rotary).forward(self.rotary, x, position_ids, **arguments)
        lengths = self.lengths
        if lengths is None:
            lengths = (position_ids.amax(-1, keepdim=True) + 1).expand_as(position_ids)
        elif lengths.shape[-1] != position_ids.shape[-1]:
            raise ValueError(
                f"rotary embeddings must be made for the {pluralize(lengths.shape[-1], 'token')} "
                "of the input, "
                f"got {pluralize(position_ids.shape[-1], 'position')} in "
                f"{type(self.rotary).__name__}. {_REMEDY}"
            )
        with torch.no_grad():
            inv_freq = self.frequencies(lengths.to(x.device), layer_type)
            return self._rotate(x, position_ids, inv_freq, layer_type)

    def frequencies(self, lengths: Tensor, layer_type: str | None = None) -> Tensor:
        """Returns the rotary frequencies for documents of given lengths.

        Args:
            lengths: Lengths of documents in tokens, [...] integers.
            layer_type: Layer type, for modules with frequencies per layer type; None for others.

        Returns:
            One row of frequencies per length, [..., D / 2] float32.
        """
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        rotary, device = self.rotary, lengths.device
        rope_type, parameters = rotary.rope_type, rotary.config.rope_parameters
        if layer_type is not None:
            rope_type, parameters = rope_type[layer_type], parameters[layer_type]
        short = getattr(rotary, f"{_prefix(layer_type)}original_inv_freq").to(device)
        if rope_type == "longrope":
            threshold = parameters["original_max_position_embeddings"]
            scaled = self._long_set(device, layer_type, threshold)
        else:
            threshold = rotary.original_max_seq_len
            scaled, _ = ROPE_INIT_FUNCTIONS[rope_type](
                rotary.config, device, seq_len=lengths[..., None], layer_type=layer_type
            )
        return torch.where(lengths[..., None] > threshold, scaled, short)

    def _long_set(self, device: torch.device, layer_type: str | None, threshold: int) -> Tensor:
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        key = (device, layer_type)
        if key not in self._long:
            self._long[key], _ = ROPE_INIT_FUNCTIONS["longrope"](
                self.rotary.config, device, seq_len=threshold + 1, layer_type=layer_type
            )
        return self._long[key]

    def _rotate(
        self, x: Tensor, position_ids: Tensor, inv_freq: Tensor, layer_type: str | None
    ) -> Any:
        """Returns the result of the module's own forward with frequencies per token.

        Args:
            x: Tensor with the device and dtype of the result.
            position_ids: [B, S] or [A, B, S].
            inv_freq: [..., S, D / 2] float32.
            layer_type: Layer type, for modules with frequencies per layer type; None for others.
        """
        forward: Any = _decorated(type(self.rotary))
        forward = forward.__wrapped__
        name = f"{_prefix(layer_type)}inv_freq"
        arguments = {} if layer_type is None else {"layer_type": layer_type}
        if self._broadcasts:
            return forward(_View(self.rotary, name, inv_freq), x, position_ids, **arguments)

        def rotate(row: Tensor, position: Tensor) -> Any:
            position = position[..., None, None]
            return forward(_View(self.rotary, name, row), x, position, **arguments)

        # In transformers 5.17, a forward uses one row of frequencies for all positions, so vmap
        # calls it once per token.
        rows = torch.broadcast_shapes(inv_freq.shape[:-1], position_ids.shape[-2:])
        positions = position_ids.expand(*position_ids.shape[:-2], *rows[-2:]).flatten(-2)
        of_tokens = inv_freq.expand(*rows, -1).flatten(0, -2)
        made = torch.vmap(rotate)(of_tokens, positions.movedim(-1, 0))

        def shape(value: Tensor) -> Tensor:
            return value.reshape(*rows, -1)

        return shape(made) if isinstance(made, Tensor) else tuple(map(shape, made))


class _View:
    """A rotary embedding with another buffer of frequencies, for one call of its forward.

    All other attributes are those of the rotary embedding.
    """

    def __init__(self, rotary: nn.Module, name: str, inv_freq: Tensor) -> None:
        self._rotary = rotary
        setattr(self, name, inv_freq)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._rotary, name)


def attach_frequencies(rotary: nn.Module) -> DocumentFrequencies:
    """Returns a rotary embedding's DocumentFrequencies, which it sets if there is none yet.

    Args:
        rotary: A module that `length_dependent` returns.
    """
    found = vars(rotary).get("forward")
    if not isinstance(found, DocumentFrequencies):
        found = DocumentFrequencies(rotary)
        rotary.forward = found  # type: ignore[assignment]
    return found


def detach_frequencies(model: nn.Module) -> None:
    """Removes every DocumentFrequencies and CrossingCache from a model and its modules."""
    for module in model.modules():
        if isinstance(vars(module).get("forward"), DocumentFrequencies):
            del module.forward
        if isinstance(vars(module).get("prepare_inputs_for_generation"), CrossingCache):
            del module.prepare_inputs_for_generation


@contextmanager
def row_frequencies(model: nn.Module, lengths: Tensor) -> Iterator[None]:
    """Context manager in which the rotary frequencies of a row depend only on the row's length.

    The model is not patched, and its frequencies depend on the length of the input.

    Args:
        model: A transformers model.
        lengths: [B] integers, tokens of each row without padding.
    """
    modules = length_dependent(model)
    before = {name: vars(module).get("forward") for name, module in modules.items()}
    for module in modules.values():
        attach_frequencies(module).lengths = None
    hooks = [
        module.register_forward_pre_hook(_lengths_of_rows(lengths), with_kwargs=True)
        for module in modules.values()
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for name, module in modules.items():
            if before[name] is None:
                del module.forward


def _lengths_of_rows(lengths: Tensor) -> Callable[..., None]:
    def tell(rotary: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        states = kwargs["x"] if "x" in kwargs else args[0]
        positions = kwargs["position_ids"] if "position_ids" in kwargs else args[1]
        told = None  # a call with other rows, such as the verification of the output head
        if states.shape[0] == len(lengths):
            told = lengths.to(positions.device)[:, None].expand(-1, positions.shape[-1])
        attach_frequencies(rotary).lengths = told

    return tell


class CrossingCache:
    """A `prepare_inputs_for_generation` that drops a cache whose keys have outdated frequencies.

    With rope type 'longrope', texts longer than `original_max_position_embeddings` use other
    frequencies, so the keys cached before are invalid. Phi-3 recomputes its key/value cache when
    the padded length of the batch exceeds that value. A row that is padded on the left exceeds it
    later. This method also drops the cache at that later step.

    Args:
        model: The model whose method is replaced.
    """

    def __init__(self, model: Any) -> None:
        self.model = model

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Returns the model's inputs for the next token, as the model's own method does.

        If a row has just become longer than `original_max_position_embeddings`, the inputs have no
        cache.
        """
        original = type(self.model).prepare_inputs_for_generation
        cache, mask = given_cache(kwargs), kwargs.get("attention_mask")
        seen = 0 if cache is None else int(cache.get_seq_length())
        if seen and isinstance(mask, Tensor) and mask.dim() == 2 and mask.shape[1] > seen:
            limit = self.model.config.original_max_position_embeddings
            before, now = mask[:, :seen].sum(1), mask.sum(1)
            if bool(((before <= limit) & (now > limit)).any()):
                kwargs |= {name: None for name in CACHE_ARGUMENTS if name in kwargs}
                kwargs["next_sequence_length"] = None
        return original(self.model, *args, **kwargs)


def attach_crossing(model: nn.Module) -> None:
    """Sets a CrossingCache on a model that drops its cache at a certain length, as Phi-3 does.

    Does nothing to other models.
    """
    method = getattr(type(model), "prepare_inputs_for_generation", None)
    drops = says(method, "original_max_position_embeddings")
    if drops and hasattr(getattr(model, "config", None), "original_max_position_embeddings"):
        model.prepare_inputs_for_generation = CrossingCache(model)  # type: ignore[assignment]


def require_document_frequencies(model: nn.Module) -> None:
    """Raises a ValueError if packed documents would change each other's rotary frequencies.

    Args:
        model: A transformers model.

    Raises:
        ValueError: if frequencies depend on the longest document in a way that DocumentFrequencies
            does not support.
    """
    known = length_dependent(model).values()
    for module in model.modules():
        with torch.device("cpu"):  # while transformers loads a model, the default device is meta
            if module in known:
                serves = all(_serves(module, layer_type) for layer_type in _layer_types(module))
            else:
                serves = _decorated(type(module)) is not None or not _mixes(module)
        if not serves:
            raise ValueError(
                f"rotary frequencies must be known per document, got {type(module).__name__} with "
                f"rope_type {getattr(module, 'rope_type', None)!r}, which follows the longest "
                f"document of a batch in a way of its own. {_REMEDY}"
            )


def _mixes(module: nn.Module) -> bool:
    """Returns whether an unknown rotary embedding's output at a position depends on the others."""
    if not any(name.endswith("inv_freq") for name in module._buffers):
        return False
    if "position_ids" not in parameters(module):
        return False
    x, positions = torch.zeros(1, 1, 8), torch.arange(3)[None]
    far = torch.cat([positions, torch.tensor([[0, 1, 10**6]])], -1)
    try:
        alone = _as_tuple(_fresh(module).forward(x, position_ids=positions))
        beside = _as_tuple(_fresh(module).forward(x, position_ids=far))
        return any(
            not torch.equal(one, both[..., :3, :]) for one, both in zip(alone, beside, strict=True)
        )
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError):
        return False  # the module takes other arguments than a rotary embedding


def _serves(rotary: Any, layer_type: str | None) -> bool:
    """Returns whether DocumentFrequencies gives a packed document the values it has alone.

    Args:
        rotary: A rotary embedding.
        layer_type: Layer type, for modules with frequencies per layer type; None for others.
    """
    arguments = {} if layer_type is None else {"layer_type": layer_type}
    copied = _fresh(rotary)
    x = torch.zeros(1, 1, 8)
    threshold = _threshold(copied, layer_type)
    documents = [
        torch.tensor([0, 1, length - 1])
        for length in (3, threshold, threshold + 1, 3 * threshold)
        if length >= 3
    ]
    lengths = torch.cat([(tokens.amax() + 1).expand(3) for tokens in documents])[None]
    substitute = DocumentFrequencies(copied)
    substitute.lengths = lengths
    try:
        found = substitute(x, torch.cat(documents)[None], layer_type)
        alone = [
            _fresh(rotary).forward(x, position_ids=tokens[None], **arguments)
            for tokens in documents
        ]
    except (AttributeError, IndexError, RuntimeError, TypeError):
        return False
    for place, value in enumerate(_as_tuple(found)):
        expected = torch.cat([_as_tuple(one)[place] for one in alone], dim=-2)
        if expected.shape != value.shape:
            return False
        # The last positions are not compared: there one bit of a frequency is a large angle.
        near = [i for i in range(expected.shape[-2]) if i % 3 < 2]
        if not torch.allclose(value[..., near, :], expected[..., near, :], atol=1e-5):
            return False
    return True


def _threshold(rotary: Any, layer_type: str | None) -> int:
    """Returns the length in tokens above which a document's frequencies depend on its length."""
    parameters = rotary.config.rope_parameters
    parameters = parameters if layer_type is None else parameters[layer_type]
    if parameters["rope_type"] == "longrope":
        return int(parameters["original_max_position_embeddings"])
    return int(rotary.original_max_seq_len)


def _layer_types(rotary: Any) -> list[str | None]:
    if not isinstance(rotary.rope_type, dict):
        return [None]
    return [name for name, rope_type in rotary.rope_type.items() if follows_length(rope_type)]


def _fresh(rotary: nn.Module) -> Any:
    """Returns a copy of a rotary embedding on the CPU, as it was before its first forward.

    If the module is on the meta device, its frequencies have no values, and the copy gets arbitrary
    ones.
    """
    copied: Any = copy.copy(rotary)
    vars(copied).pop("forward", None)
    vars(copied)["_buffers"] = dict(copied._buffers)
    for name in [name for name in vars(copied) if name.endswith("long_inv_freq")]:
        del vars(copied)[name]
    for name in [name for name in vars(copied) if name.endswith("max_seq_len_cached")]:
        setattr(copied, name, copied.original_max_seq_len)
    for name, buffer in list(copied._buffers.items()):
        if buffer is None or not name.endswith("inv_freq"):
            continue
        # "sliding_attention_original_inv_freq" and so on
        prefix = name.removesuffix("inv_freq").removesuffix("original_")
        known = getattr(rotary, f"{prefix}original_inv_freq", buffer)
        if known.is_meta:
            known = torch.linspace(1.0, 0.1, len(known))
        copied._buffers[name] = known.detach().to("cpu", copy=True)
    return copied


def _broadcasts(rotary: nn.Module) -> bool:
    """Returns whether a rotary embedding's forward accepts frequencies per token, [B, S, D / 2]."""
    return not multiplies_matrices(_decorated(type(rotary)).__wrapped__)


def _decorated(kind: type) -> Any:
    """Returns the wrapper of a class's forward by transformers' dynamic_rope_update, or None."""
    return find_wrapper(getattr(kind, "forward", None), "wrapper", "modeling_rope")


def _prefix(layer_type: str | None) -> str:
    return "" if layer_type is None else f"{layer_type}_"


def _as_tuple(values: Any) -> tuple[Tensor, ...]:
    return (values,) if isinstance(values, Tensor) else tuple(values)
