"""UnpadSwap: makes an encoder compute nothing for padding.

Before the embeddings, the model's input hook (a forward pre-hook) packs the tokens of padded rows
[B, S] into one row [1, T]. After the model, a forward hook moves the outputs back into rows, with
zeros at padding. So embeddings, norms, projections, MLPs and heads compute nothing for padding, and
no layer has to remove padding by itself. A batch that is already packed stays packed.

In a model with one output per token, the whole model runs on the pack. In a model whose head pools
over a row, as for sequence classification, only the base model does.
"""

import re
from typing import Any

import torch
from torch import Tensor, nn

from lctrain.attention.boundaries import Boundaries, Padding
from lctrain.attention.documents import find_documents
from lctrain.attention.forward import BOUNDARIES_ARGUMENT, is_causal_layer
from lctrain.attention.mask import read_mask
from lctrain.models.architectures import (
    attention_layers,
    embeddings_read_mask,
)
from lctrain.models.cache import given_cache
from lctrain.models.code import parameters, strings, unwrapped
from lctrain.models.holes import refuse_holes
from lctrain.transfer import upload
from lctrain_kernels.schedule import make_schedule

_PER_TOKEN = re.compile(r"For(MaskedLM|TokenClassification)$")


class UnpadSwap:
    """A reversible change of a patched encoder, after which it computes nothing for padding.

    It implements the protocol `lctrain.models.swap.Swap`, and is applied after an AttentionSwap.

    Args:
        model: A transformers model.

    Raises:
        ValueError: if padding cannot be left out of the model; the message names the reason.
    """

    name = "padding"

    def __init__(self, model: nn.Module) -> None:
        reason = why_padded(model)
        if reason is not None:
            raise ValueError(
                f"unpad=True needs an encoder that works on single tokens outside its attention, "
                f"got {type(model).__name__}: {reason}. Pass unpad=False; the attention still "
                "skips padding."
            )
        self._model = model
        self._hooks: list[Any] = []

    def apply(self) -> None:
        """Makes the input hooks remove padding."""
        for module in self._model.modules():
            hooks: list[Any] = list(module._forward_pre_hooks.values())
            for hook in hooks:
                if hasattr(hook, "unpads") and (is_per_token(module) or hook.pools_rows):
                    hook.unpads = True
                    self._hooks.append(hook)

    def undo(self) -> None:
        """Makes the input hooks keep padding again."""
        for hook in self._hooks:
            hook.unpads = False
        self._hooks = []

    def describe(self) -> str:
        """Returns what is done with padding, as text for the report of PatchHandle."""
        return "left out from the embeddings to the heads"


def unpad_late(module: nn.Module, hook: Any) -> None:
    """Removes padding in a model whose attention is selected by name, without patch_model.

    Args:
        module: A transformers model in an encoder for which `why_padded` returns None.
        hook: Its InputHook, which a LateHook runs.
    """
    hook.unpads = is_per_token(module) or hook.pools_rows


def is_per_token(module: nn.Module) -> bool:
    """Returns whether a module is a transformers model with one output per token."""
    from transformers import PreTrainedModel

    return isinstance(module, PreTrainedModel) and (
        module.base_model is module or _PER_TOKEN.search(_class_name(module)) is not None
    )


def why_padded(model: Any) -> str | None:
    """Returns why padding must stay in a model's inputs; None if it can be removed.

    Args:
        model: A transformers model that patch_model supports.
    """
    base = model.base_model
    if getattr(model.config, "is_decoder", False) or any(
        is_causal_layer(layer, None) for layer in attention_layers(model).values()
    ):
        return "its attention is causal"
    if any("ForQuestionAnswering" in name for name in _class_names(model)):
        return "its head compares all positions of a row, padding included"
    code = getattr(unwrapped(type(base).forward), "__code__", None)
    words = set() if code is None else {*strings(code), *code.co_names}
    if "is_causal" in words or {"create_causal_mask", "create_bidirectional_mask"} & words == {
        "create_causal_mask"
    }:
        return "its forward asks for causal attention"
    if "pooler_output" in words and not hasattr(base, "pooler"):
        return f"{type(base).__name__} pools its rows itself"
    if "position_ids" not in parameters(base):
        return f"{type(base).__name__} takes no position_ids"
    if "lang_ids" in parameters(base):
        return f"{type(base).__name__} has one language per row"
    if embeddings_read_mask(model):
        return "its embeddings read the attention mask"
    return None


@torch.compiler.disable
@torch.inference_mode(mode=False)
def find_unpadded(mask: Tensor, device: torch.device, windows: str | None) -> Boundaries | None:
    """Returns the Boundaries of rows with padding, from their mask.

    Lengths are counted on the CPU, and the tile schedule that all layers share is built there. So a
    mask on a GPU costs one synchronisation, and a mask on the CPU none.

    Args:
        mask: [B, S], 0 at padding and 1 elsewhere, on any device.
        device: Device of the boundaries.
        windows: Class name of the model if rows reach beyond its windows, for the message; None if
            they do not.

    Returns:
        The boundaries; None if the mask numbers documents.

    Raises:
        ValueError: if the mask has other values, or if rows reach beyond the windows and one has
            padding between its tokens.
    """
    real, numbers = read_mask(mask.to("cpu"), torch.device("cpu"))
    if numbers is not None:
        return None
    rows = (real.shape[0], real.shape[1])
    found = find_documents(rows, rows, real.device, real=real)
    if windows is not None:
        refuse_holes(found, windows)
    if device.type == "cpu":
        return found
    ends, tokens = found.pack.cu_seqlens_q, found.indices_q
    schedule = make_schedule(ends.diff().tolist())
    schedule = schedule._replace(
        q_tiles=_moved(schedule.q_tiles, device), k_tiles=_moved(schedule.k_tiles, device)
    )
    ends, tokens = _moved(ends, device), _moved(tokens, device)
    pack = found.pack._replace(cu_seqlens_q=ends, cu_seqlens_k=ends, schedule=schedule)
    return Boundaries(pack, found.queries, found.keys, tokens, tokens)


def _moved(values: Tensor | None, device: torch.device) -> Any:
    return None if values is None else upload(values, device)


def is_padded(boundaries: Boundaries) -> bool:
    """Returns whether rows have padding that can be removed, and at least one token."""
    return boundaries.indices_q is not None and boundaries.indices_q.shape[0] > 0


def is_packable(model: Any, inputs: dict[str, Any]) -> bool:
    """Returns whether a call supports packing: named outputs, and no key/value cache."""
    given = inputs.get("return_dict")
    named = getattr(model.config, "return_dict", True) if given is None else given
    return bool(named) and given_cache(inputs) is None


def row_positions(first_counted: int | None, inputs: dict[str, Any], tokens: Tensor) -> Tensor:
    """Returns the position ids that an encoder would use for rows if none are passed.

    Args:
        first_counted: Position id of a row's first token, for encoders that count the tokens that
            are not padding, as RoBERTa does; None for other encoders.
        inputs: Keyword arguments of the encoder's forward.
        tokens: Its `input_ids` [B, S] or `inputs_embeds` [B, S, E].

    Returns:
        [B, S] int64. Models like RoBERTa count the tokens that are not the padding token, from
        padding_idx + 1. Other models number the columns from 0.
    """
    columns = torch.arange(tokens.shape[1], device=tokens.device)
    if first_counted is None:
        return columns.expand(tokens.shape[:2])
    if inputs.get("input_ids") is None:
        return (columns + first_counted).expand(tokens.shape[:2])
    real = tokens != first_counted - 1
    return real.cumsum(1) * real + first_counted - 1


def unpad(
    model: nn.Module,
    inputs: dict[str, Any],
    tokens: Tensor,
    boundaries: Boundaries,
    first_counted: int | None,
) -> tuple[dict[str, Any], Boundaries]:
    """Packs the tokens of an encoder's padded rows into one row.

    Args:
        model: The encoder; `check_outputs` must be its forward hook.
        inputs: Keyword arguments of its forward. Tensors [B, S, ...] and [1, S, ...] among them
            are packed, and so are position and token type ids [S].
        tokens: `input_ids` [B, S] or `inputs_embeds` [B, S, E] among the inputs.
        boundaries: Boundaries of N documents with T tokens in rows [B, S]; `indices_q` is given.
        first_counted: See `row_positions`.

    Returns:
        The inputs as one row [1, T, ...] with an attention mask of ones, and the boundaries of this
        row.
    """
    places, rows = boundaries.indices_q, boundaries.queries
    assert places is not None
    packed = dict(inputs)
    if packed.get("position_ids") is None:
        packed["position_ids"] = row_positions(first_counted, inputs, tokens)
    for name, value in packed.items():
        if not isinstance(value, Tensor) or value.dim() == 0:
            continue
        if value.dim() == 1 and name in ("position_ids", "token_type_ids"):
            value = value[None]
        if value.dim() >= 2 and value.shape[1] == rows[1] and value.shape[0] in (1, rows[0]):
            value = value.expand(rows[0], *value.shape[1:]).flatten(0, 1)
            packed[name] = value.index_select(0, places.to(value.device))[None]
    count = (1, places.shape[0])
    packed["attention_mask"] = torch.ones(count, dtype=torch.int64, device=tokens.device)
    packing = Padding(rows, places, _class_name(model))
    found = Boundaries(boundaries.pack, count, count, padding=packing)
    packed[BOUNDARIES_ARGUMENT] = found
    return packed, found


def restore_rows(model: Any, output: Any, boundaries: Boundaries) -> Any:
    """Moves an encoder's outputs from a pack back into rows; `check_outputs` calls it.

    Args:
        model: The encoder.
        output: Output of its forward; values [1, T, ...] become [B, S, ...], zero at padding.
        boundaries: Boundaries of its forward.

    Returns:
        The output in rows; unchanged if padding was not removed for this model.
    """
    padding = boundaries.padding
    if padding is None or padding.owner != _class_name(model):
        return output
    for name, value in list(output.items()):
        if isinstance(value, tuple):
            output[name] = tuple(_in_rows(one, boundaries, padding) for one in value)
        elif isinstance(value, Tensor):
            output[name] = _in_rows(value, boundaries, padding)
    return output


def _in_rows(value: Any, boundaries: Boundaries, padding: Padding) -> Any:
    if not isinstance(value, Tensor) or value.dim() < 3 or value.shape[1] != boundaries.queries[1]:
        return value
    rows = padding.rows[0] * padding.rows[1]
    empty = value.new_zeros((rows, *value.shape[2:]))
    return empty.index_copy(0, padding.places, value.flatten(0, 1)).unflatten(0, padding.rows)


def _class_name(model: nn.Module) -> str:
    return type(model).__name__


def _class_names(model: nn.Module) -> list[str]:
    return [base.__name__ for base in type(model).__mro__]
