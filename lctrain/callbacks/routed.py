"""RoutedRounding: keeps rounding in mixture-of-experts blocks from being reported as a leak.

An expert multiplies all tokens that are routed to it in one matrix product. If one document of a
pack changes, other tokens are routed to the expert. The product may then add up in another order,
and the outputs of unchanged documents may differ in their last bits. IsolationCheck compares bits,
so it would report this as a leak between documents. In all other layers, the bits of a token's
output do not depend on other tokens of the batch.

A routed block is a module with experts, to which a router sends tokens.
"""

import itertools
import operator
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

_EXPERTS = re.compile(r"Experts?(MLP)?$")
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
ULPS = 8
"""Largest change of an output row by rounding, relative to its norm, in eps of the dtype."""


def find_routed(model: nn.Module) -> list[nn.Module]:
    """Returns a model's routed blocks: the outermost modules with experts and without attention."""
    found: list[nn.Module] = []
    pending = [model]
    while pending:
        module = pending.pop()
        if _is_routed(module):
            found.append(module)
        else:
            pending.extend(module.children())
    return found


class RoutedRounding:
    """Removes differences by rounding from the outputs of a model's mixture-of-experts blocks.

    `recording` stores, for one forward pass of the model, a hash of every input row of a block and
    the block's output rows. In a later pass, `replaying` compares the rows of unchanged documents
    with the stored ones. If an input row has the same bits, and the output row differs by rounding
    only, the stored output row replaces it, so that later layers get the same bits. All other rows
    stay as they are, so a leak still reaches the outputs of the model. For a block without a
    forward, such as JetMoe's mixture of attention heads, this applies to each of its methods that
    is called.

    Bound on rounding in an output row y: reordering a float32 sum of K terms changes y by about
    sqrt(K) eps(float32) |y|, where K is the longest sum of the block. Rounding intermediate results
    to the block's dtype changes y by a few eps(dtype) |y|.

    Args:
        model: The model.

    Attributes:
        blocks: The routed blocks of the model.
    """

    def __init__(self, model: nn.Module) -> None:
        self.blocks = find_routed(model)
        self._recorded: dict[nn.Module, list[tuple[Tensor, list[Tensor]]]] = {}
        self._calls: dict[nn.Module, int] = {}
        self._watched: Tensor | None = None
        self._count = 0

    @contextmanager
    def recording(self, tokens: int) -> Iterator[None]:
        """Context manager: records one forward pass of the model.

        Args:
            tokens: Number of tokens T of the pass.
        """
        self._count = tokens
        self._recorded = {block: [] for block in self.blocks}
        with self._hooks(self._record):
            yield

    @contextmanager
    def replaying(self, watched: Tensor) -> Iterator[None]:
        """Context manager: gives a second forward pass the rounding of the recorded pass.

        Both passes must have the same number of tokens.

        Args:
            watched: [T] bool, True at tokens of documents that have not changed since the recorded
                pass.
        """
        self._watched = watched
        self._calls = dict.fromkeys(self.blocks, 0)
        with self._hooks(self._replay):
            yield

    @contextmanager
    def _hooks(self, hook: Any) -> Iterator[None]:
        if not self.blocks:
            yield
            return
        called = [block for block in self.blocks if _has_forward(block)]
        handles = [block.register_forward_hook(hook, with_kwargs=True) for block in called]
        try:
            with (
                torch.compiler.set_stance("force_eager"),  # compiled code may skip the hooks
                ExitStack() as wrapped,
            ):
                for block in self.blocks:
                    if block not in called:
                        wrapped.enter_context(_hooked_methods(block, hook))
                yield
        finally:
            for handle in handles:
                handle.remove()

    def _record(
        self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        fingerprints = _fingerprints((args, kwargs), self._count)
        self._recorded[block].append((fingerprints, [value.clone() for value in _tensors(output)]))

    def _replay(
        self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        assert self._watched is not None
        call = self._calls[block]
        self._calls[block] = call + 1
        if call >= len(self._recorded[block]):
            return output
        fingerprints, recorded = self._recorded[block][call]
        same = self._watched & (_fingerprints((args, kwargs), self._count) == fingerprints)
        rounding = _rounding(block, output)
        pending = iter(recorded)

        def replace(value: Tensor) -> Tensor:
            return _without_rounding(value, next(pending), same, rounding)

        return _map(output, replace)


def _is_routed(module: nn.Module) -> bool:
    if isinstance(module, nn.ModuleList | nn.ModuleDict) or any(
        re.search(r"Attention|Attn|Mixer", type(inner).__name__) for inner in module.modules()
    ):
        return False
    children = module.named_children()
    return bool(_EXPERTS.search(type(module).__name__)) or any(
        name in ("expert", "experts") or _EXPERTS.search(type(child).__name__)
        for name, child in children
    )


def _rounding(block: nn.Module, output: Any) -> float:
    """Returns the bound on rounding in an output row of a block, relative to the row's norm."""
    weights = [weight for weight in block.parameters() if weight.dim() > 1]
    dtypes = {value.dtype for value in (*weights, *_tensors(output)) if value.is_floating_point()}
    device = next(_tensors(output)).device.type
    if torch.is_autocast_enabled(device):
        dtypes.add(torch.get_autocast_dtype(device))
    longest_sum = max((max(weight.shape[-2:]) for weight in weights), default=1)
    coarsest = max(torch.finfo(dtype).eps for dtype in dtypes)
    return ULPS * coarsest + 2 * longest_sum**0.5 * torch.finfo(torch.float32).eps


def _without_rounding(value: Tensor, recorded: Tensor, same: Tensor, rounding: float) -> Tensor:
    """Returns `value`, with the recorded row where a row differs from it by rounding only.

    Args:
        value: Output of a block, T rows.
        recorded: Output of the block in the recorded pass, T rows.
        same: [T] bool, True at rows that may be replaced.
        rounding: Bound on rounding, relative to a row's norm.
    """
    tokens = len(same)
    if value.shape != recorded.shape or not _has_rows(value, tokens):
        return value
    now, then = value.reshape(tokens, -1), recorded.reshape(tokens, -1)
    if value.is_floating_point():
        size = then.float().norm(dim=1)
        size = torch.maximum(size, size[same].square().mean().sqrt()) if bool(same.any()) else size
        same = same & ((now.float() - then.float()).norm(dim=1) <= rounding * size)
    return torch.where(same[:, None], then, now).view_as(value)


def _fingerprints(values: Any, tokens: int) -> Tensor:
    """Returns a hash of the bits of each token's rows, [T] int64.

    Args:
        values: Nested tuples, lists and dictionaries of tensors. Tensors with T rows are hashed.
        tokens: Number of tokens T.
    """
    rows = [
        value.detach().reshape(tokens, -1) for value in _tensors(values) if _has_rows(value, tokens)
    ]
    found = torch.zeros(tokens, dtype=torch.int64, device=rows[0].device if rows else None)
    for place, row in enumerate(rows):
        if row.is_floating_point():
            row = row.contiguous().view(_INTEGERS[row.element_size()])
        generator = torch.Generator().manual_seed(place)
        factors = torch.randint(-(2**62), 2**62, (row.shape[1],), generator=generator)
        found = found + (row.long() * (2 * factors + 1).to(row.device)).sum(1)  # modulo 2^64
    return found


def _has_rows(value: Tensor, tokens: int) -> bool:
    """Returns whether the product of a tensor's first dimensions is `tokens`.

    Such a tensor has one row per token. The last dimension does not belong to the product.
    """
    return value.numel() > 0 and tokens in itertools.accumulate(value.shape[:-1], operator.mul)


def _has_forward(block: nn.Module) -> bool:
    """Returns whether a block has a forward of its own, so that forward hooks see its calls."""
    code = getattr(type(block).forward, "__code__", None)
    return code is None or "NotImplementedError" not in code.co_names


@contextmanager
def _hooked_methods(block: nn.Module, hook: Any) -> Iterator[None]:
    """Context manager that calls a hook after each method of a block without a forward.

    Args:
        block: The block.
        hook: Function (block, args, kwargs, output) -> output or None, as a forward hook.
    """

    def hooked(method: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            output = method(*args, **kwargs)
            changed = hook(block, args, kwargs, output)
            return output if changed is None else changed

        return call

    names = [
        name
        for name, value in vars(type(block)).items()
        if callable(value) and name != "forward" and not name.startswith("_")
    ]
    own = {name: vars(block)[name] for name in names if name in vars(block)}
    for name in names:
        setattr(block, name, hooked(getattr(block, name)))
    try:
        yield
    finally:
        for name in names:
            delattr(block, name)
        vars(block).update(own)


def _tensors(values: Any) -> Iterator[Tensor]:
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, dict):
        for value in values.values():
            yield from _tensors(value)
    elif isinstance(values, tuple | list):
        for value in values:
            yield from _tensors(value)


def _map(values: Any, function: Any) -> Any:
    """Returns `values` with function(tensor) in place of every tensor, in the order of `_tensors`.

    Args:
        values: Nested tuples, lists and dictionaries of tensors.
        function: Function from a tensor to a tensor.
    """
    if isinstance(values, Tensor):
        return function(values)
    if isinstance(values, tuple | list):
        mapped = [_map(value, function) for value in values]
        return type(values)(*mapped) if hasattr(values, "_fields") else type(values)(mapped)
    if isinstance(values, dict):
        return type(values)({name: _map(value, function) for name, value in values.items()})
    return values
