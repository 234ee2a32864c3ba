"""Builds the forward and backward torch.library operators of an attention.

Operators have fake implementations (for torch.compile and meta tensors), autograd and FLOP
formulas, and a policy of selective activation checkpointing can name them. The arguments of an
operator are the fields of its operands, of PackTensors and of AttentionOptions, in this order.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, get_type_hints

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from lctrain_kernels.by_head import is_by_head, run_by_head
from lctrain_kernels.fused_operator import Operation, define_autograd, define_operator
from lctrain_kernels.in_place import are_rebuilt, is_plain_backward, is_unheld
from lctrain_kernels.options import AttentionOptions
from lctrain_kernels.pack import Pack, PackTensors, TiledPack
from lctrain_kernels.registry import BACKWARD, FORWARD, choose

_KINDS = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    float: "float",
    int: "SymInt",
    bool: "bool",
    str: "str",
}


@dataclass(frozen=True)
class Attention:
    """Description of an attention from which build_operators makes its operators.

    Attributes:
        name: Name of the operation: its operators are `lctrain::<name>_forward` and `_backward`.
        operands: Named tuple class of the inputs of this attention. Its first field holds queries;
            its fields include q or q1, k or k1, and v.
        results: Names of the forward's results. The first is "out". Results whose names start with
            "lse" have gradients; further results are kept for the backward only.
        saved: Names of the results that the backward reads.
        gradients: Names of the backward's results: operands, and intermediate values for `finish`.
        fake_forward: Function from the operands to empty results of the forward.
        fake_backward: Function from operands and saved results to empty results of the backward.
        products: Two functions of the operands, for forward and backward, which return the FLOP per
            visible pair of query and key, for one head.
        finish: Function from (gradients by name, operands, pack, options, saved results by name) to
            the gradients of all fields by name. By default, the gradients of the operands.
        heads: Dimension of the heads in operands, results and gradients, by name; None if the
            backward always computes all heads at once.
        overwritten: Names of operands that the backward may overwrite with their gradients, which
            come first in `gradients`. `finish` does not read them, and one gradient follows them.
    """

    name: str
    operands: type
    results: tuple[str, ...]
    saved: tuple[str, ...]
    gradients: tuple[str, ...]
    fake_forward: Callable[..., tuple[Tensor, ...]]
    fake_backward: Callable[..., tuple[Tensor, ...]]
    products: tuple[Callable[..., int], Callable[..., int]]
    finish: Callable[..., dict[str, Tensor | None]] | None = None
    heads: Mapping[str, int] | None = None
    overwritten: tuple[str, ...] = ()


class Arguments(NamedTuple):
    """All arguments of an attention operator, grouped.

    Attributes:
        operands: Tensor inputs of the attention, such as q, k and v.
        pack: Document boundaries and tile schedule.
        options: Mask, scale, dropout and the other options of the call.
    """

    operands: Any
    pack: PackTensors
    options: AttentionOptions


class Operators(NamedTuple):
    """The operators of an attention. Calling the object runs the forward.

    Attributes:
        forward: Operation whose arguments are the fields of `Arguments`, one by one.
        backward: Operation whose arguments are the gradients of out and lse, those of the forward,
            and the saved results.
    """

    forward: Operation
    backward: Operation

    def __call__(self, operands: Any, pack: Pack, options: AttentionOptions) -> tuple[Tensor, ...]:
        """Returns the results of the forward."""
        found: tuple[Tensor, ...] = self.forward(*operands, *pack.tensors(), *options)
        return found


def build_operators(attention: Attention) -> Operators:
    """Defines the forward and the backward operator of an attention in torch.library.

    Args:
        attention: Description of the attention.

    Returns:
        The operators.
    """
    nouns = (attention.operands, PackTensors, AttentionOptions)
    fields = {name: kind for noun in nouns for name, kind in get_type_hints(noun).items()}
    flat = ", ".join(f"{_KINDS[kind]} {name}" for name, kind in fields.items())
    lse = [name for name in attention.results if name.startswith("lse")]
    gradients = ["Tensor dout", *(f"Tensor? d{name}" for name in lse)]
    saved = [f"Tensor {name}" for name in attention.saved]
    tensors = [position for position, kind in enumerate(fields.values()) if _is_tensor(kind)]
    places = {name: attention.results.index(name) for name in attention.saved}
    places_of = {name: place for place, name in enumerate(attention.operands._fields)}  # type: ignore[attr-defined]
    hidden = [
        place for place, name in enumerate(attention.results) if name != "out" and name not in lse
    ]

    size = len(attention.operands._fields)  # type: ignore[attr-defined]
    end = size + len(PackTensors._fields)

    def arguments(values: Sequence[Any]) -> Arguments:
        return Arguments(
            attention.operands(*values[:size]),
            PackTensors(*values[size:end]),
            AttentionOptions(*values[end:]),
        )

    def forward(*values: Any) -> tuple[Tensor, ...]:
        operands, pack, options = arguments(values)
        implementation = choose(attention.name, FORWARD, operands, options)
        return implementation.run(operands, _complete(pack, operands, options), options)

    def backward(*values: Any) -> tuple[Tensor, ...]:
        split = len(gradients) + len(fields)
        operands, pack, options = arguments(values[len(gradients) : split])
        implementation = choose(attention.name, BACKWARD, operands, options, values[0])
        tiled = _complete(pack, operands, options)
        douts, results = values[: len(gradients)], values[split:]
        return implementation.run(douts, operands, results, tiled, options)

    def fake_forward(*values: Any) -> tuple[Tensor, ...]:
        return attention.fake_forward(arguments(values).operands)

    def fake_backward(*values: Any) -> tuple[Tensor, ...]:
        split = len(gradients) + len(fields)
        operands = arguments(values[len(gradients) : split]).operands
        return attention.fake_backward(operands, values[split:])

    results = ", ".join(["Tensor"] * len(attention.results))
    forward_op = define_operator(
        f"{attention.name}_forward({flat}) -> ({results})", forward, fake_forward
    )
    results = ", ".join(["Tensor"] * len(attention.gradients))
    backward_schema = ", ".join([*gradients, flat, *saved])
    backward_op = define_operator(
        f"{attention.name}_backward({backward_schema}) -> ({results})", backward, fake_backward
    )

    overwritten = attention.overwritten

    def backward_into(*values: Any) -> Tensor:
        split, end = len(gradients) + len(fields), len(values) - len(overwritten)
        operands, pack, options = arguments(values[len(gradients) : split])
        implementation = choose(attention.name, BACKWARD, operands, options, values[0])
        tiled = _complete(pack, operands, options)
        douts, results, into = values[: len(gradients)], values[split:end], values[end:]
        rest: Tensor = implementation.run(douts, operands, results, tiled, options, into)[-1]
        return rest

    def fake_backward_into(*values: Any) -> Tensor:
        return fake_backward(*values[: len(values) - len(overwritten)])[-1]

    into_op: Operation | None = None
    if overwritten:
        into = [f"Tensor(a{n}!) into_{name}" for n, name in enumerate(overwritten)]
        schema = ", ".join([*gradients, flat, *saved, *into])
        into_op = define_operator(
            f"{attention.name}_backward_into({schema}) -> Tensor", backward_into, fake_backward_into
        )

    def run_backward(given: Sequence[Any], named: Mapping[str, Any], free: set[str]) -> Any:
        """Runs the backward, which may write gradients over the operands named in `free`."""
        operands, pack, options = arguments([named[name] for name in fields])
        if free and into_op is not None:
            choice = choose(attention.name, BACKWARD, operands, options, named["dout"])
            free &= choice.overwrites(operands, pack, options)
        if not free or into_op is None:
            return backward_op(*given)
        into = [
            named[name].detach() if name in free else torch.empty_like(named[name]).contiguous()
            for name in overwritten
        ]
        return *into, into_op(*given, *into)

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.set_materialize_grads(False)
        if hidden:
            ctx.mark_non_differentiable(*[output[place] for place in hidden])
        ctx.save_for_backward(
            *[inputs[place] for place in tensors], *[output[place] for place in places.values()]
        )
        ctx.by_head = is_by_head()
        ctx.is_rebuilt = are_rebuilt()
        ctx.constants = list(inputs)
        for place in tensors:
            ctx.constants[place] = None

    def autograd(ctx: Any, *douts: Tensor | None) -> tuple[Tensor | None, ...]:
        values = list(ctx.constants)
        saved_tensors = list(ctx.saved_tensors)  # checkpointing unpacks them once
        free = set()  # operands that nothing else holds
        if ctx.is_rebuilt and is_plain_backward(ctx):
            free = {name for name in overwritten if is_unheld(saved_tensors, places_of[name])}
        kept = saved_tensors[len(tensors) :]
        for position, tensor in zip(tensors, saved_tensors[: len(tensors)], strict=True):
            values[position] = tensor
        named = dict(zip(attention.results, douts, strict=True))
        dout = named["out"]
        if dout is None:
            dout = torch.zeros_like(kept[0])
        given = (dout, *(named[name] for name in lse), *values, *kept)
        names = ("dout", *(f"d{name}" for name in lse), *fields, *attention.saved)
        call = dict(zip(names, given, strict=True))
        if ctx.by_head and attention.heads is not None:
            results = run_by_head(backward_op, call, attention.heads, attention.gradients, free)
        else:
            results = run_backward(given, call, free)
        found: dict[str, Any] = dict(zip(attention.gradients, results, strict=True))
        if attention.finish is not None:
            saved_results = dict(zip(attention.saved, kept, strict=True))
            found = attention.finish(found, *arguments(values), saved_results)
        return tuple(
            found.get(name) if needed else None
            for name, needed in zip(fields, ctx.needs_input_grad, strict=True)
        )

    define_autograd(forward_op, setup_context, autograd)
    offset = len(gradients)
    counted = [
        (f"{attention.name}_forward", 0, attention.products[0]),
        (f"{attention.name}_backward", offset, attention.products[1]),
    ]
    if overwritten:
        counted.append((f"{attention.name}_backward_into", offset, attention.products[1]))
    for op, skipped, count in counted:
        register_flop_formula(getattr(torch.ops.lctrain, op), get_raw=True)(
            _flop_formula(arguments, skipped, len(fields), count)
        )

    return Operators(forward_op, backward_op)


def _is_tensor(kind: Any) -> bool:
    return _KINDS[kind].startswith("Tensor")


def _complete(
    pack: PackTensors, operands: Any, options: AttentionOptions
) -> PackTensors | TiledPack:
    """Returns the pack with its tile schedule, which is built on the device if it is missing.

    The PyTorch path reads no schedule, so for backend "pytorch" the pack is returned unchanged.
    """
    if options.backend == "pytorch":
        return pack
    return pack.with_tiles(operands[0].shape[0], operands.v.shape[0])


def _flop_formula(
    arguments: Callable[[Sequence[Any]], Arguments],
    skipped: int,
    size: int,
    count: Callable[..., int],
) -> Callable[..., int]:
    """Returns the function with which torch's FlopCounterMode counts the FLOP of an operator.

    The count is visible (query, key) pairs times heads times `count(operands)`.

    Args:
        arguments: Function that groups the operator's flat arguments.
        skipped: Number of the operator's leading arguments that `arguments` does not take.
        size: Number of arguments that `arguments` takes.
        count: Function from operands to the FLOP per visible pair and head.
    """

    def formula(*values: Any, out_val: Any = None, **_: Any) -> int:
        operands, pack, options = arguments(values[skipped : skipped + size])
        q = operands[0]
        return attended_pairs(pack, options, q, operands.v) * q.shape[1] * count(operands)

    return formula


def visible_pairs(
    cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, window_left: int, window_right: int
) -> int:
    """Returns the number of (query, key) pairs that the mask leaves visible, over all documents.

    The function reads the lengths, so it synchronises with a GPU. Only FLOP counters call it.
    """
    pairs = 0
    lengths_q, lengths_k = cu_seqlens_q.diff().tolist(), cu_seqlens_k.diff().tolist()
    for length_q, length_k in zip(lengths_q, lengths_k, strict=True):
        position = torch.arange(length_q, dtype=torch.int64) + length_k - length_q
        high = torch.full_like(position, length_k - 1)
        low = torch.zeros_like(position)
        if window_right >= 0:
            high = torch.minimum(high, position + window_right)
        if window_left >= 0:
            low = torch.maximum(low, position - window_left)
        pairs += int((high - low + 1).clamp(min=0).sum())
    return pairs


def attended_pairs(pack: PackTensors, options: AttentionOptions, q: Tensor, k: Tensor) -> int:
    """Returns the number of visible (query, key) pairs of a call.

    For meta tensors, whose lengths are unknown, all documents count as equally long.

    Args:
        pack: Boundaries of the documents.
        options: Options of the call, of which the window is read.
        q: Queries [T, H, D].
        k: Keys [Tk, Hk, D].
    """
    cu_q = pack.cu_seqlens_q
    left, right = options.window_left, options.window_right
    if cu_q.is_meta or isinstance(cu_q, torch._subclasses.FakeTensor):
        documents = max(1, pack.documents)
        per_document = (q.shape[0] // documents) * (k.shape[0] // documents) * documents
        return per_document // 2 if right == 0 else per_document
    if options.window is not None:
        left, right = options.window.tolist()
    return visible_pairs(cu_q, pack.cu_seqlens_k, left, right)
