"""Routed blocks: layers whose rounding depends on how many tokens are routed to an expert.

An expert of a mixture multiplies the tokens that were routed to it in one product. Change a
document, and other tokens meet there; the sums of those that stayed are formed in another order and
may differ in their last bits. All other layers are row-wise: they give a token the same bits
whatever the others are.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

_EXPERTS = re.compile(r"Experts?(MLP)?$")
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
ULPS = 8
"""Units in the last place of a block's dtype that its rounding may move a row, as a norm."""


def find_routed(model: nn.Module) -> list[nn.Module]:
    """Returns the outermost modules that hold experts and no attention."""
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
    """Keeps rounding in routed blocks from being reported as a leak between documents.

    The first run of a model is recorded: a hash of every row that enters a routed block, and what
    leaves it. In a later run a row of an unchanged document must enter with the same bits. What
    leaves may differ by rounding: it is then replaced by the recorded row, so that the layers after
    it must again agree bit by bit. Rows that enter with other bits, or differ by more, are left as
    they are, and so reach the outputs.

    The bound for a row y of a block whose longest sums have K terms: products are sums in float32
    or better, which another order moves by about sqrt(K) eps(float32) |y|. Results in between are
    rounded to the block's dtype, which moves them by a few eps(dtype) |y|.
    """

    def __init__(self, model: nn.Module) -> None:
        self.blocks = find_routed(model)
        self._recorded: dict[nn.Module, list[tuple[Tensor, list[Tensor]]]] = {}
        self._calls: dict[nn.Module, int] = {}
        self._watched: Tensor | None = None

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Context in which the model's run is recorded."""
        self._recorded = {block: [] for block in self.blocks}
        with self._hooks(self._record):
            yield

    @contextmanager
    def replaying(self, watched: Tensor) -> Iterator[None]:
        """Context in which a run of as many tokens gets the recorded rounding.

        Args:
            watched: [T] bool, True at tokens of documents that were not changed.
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
        handles = [block.register_forward_hook(hook, with_kwargs=True) for block in self.blocks]
        try:
            with torch.compiler.set_stance("force_eager"):  # compiled code has no such hooks
                yield
        finally:
            for handle in handles:
                handle.remove()

    def _record(
        self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        tokens = _tokens(output)
        self._recorded[block].append(
            (_fingerprints((args, kwargs), tokens), [value.clone() for value in _tensors(output)])
        )

    def _replay(
        self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        assert self._watched is not None
        call = self._calls[block]
        self._calls[block] = call + 1
        if call >= len(self._recorded[block]):
            return output
        fingerprints, recorded = self._recorded[block][call]
        tokens = len(self._watched)
        if len(fingerprints) != tokens or _tokens(output) != tokens:
            return output
        same = self._watched & (_fingerprints((args, kwargs), tokens) == fingerprints)
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
    """Returns the bound of RoutedRounding for a row, relative to its norm."""
    weights = [weight for weight in block.parameters() if weight.dim() > 1]
    dtypes = {value.dtype for value in (*weights, *_tensors(output)) if value.is_floating_point()}
    device = next(_tensors(output)).device.type
    if torch.is_autocast_enabled(device):
        dtypes.add(torch.get_autocast_dtype(device))
    longest_sum = max((max(weight.shape[-2:]) for weight in weights), default=1)
    coarsest = max(torch.finfo(dtype).eps for dtype in dtypes)
    return ULPS * coarsest + 2 * longest_sum**0.5 * torch.finfo(torch.float32).eps


def _without_rounding(value: Tensor, recorded: Tensor, same: Tensor, rounding: float) -> Tensor:
    """Returns `value`, with rows from `recorded` where they differ by rounding only."""
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
    """[T] int64: a hash of the bits of each token's row in all tensors that have one."""
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


def _tokens(output: Any) -> int:
    """Returns the number of rows of a block's first output."""
    first = next(iter(_tensors(output)), None)
    return 0 if first is None or first.dim() < 2 else first.numel() // first.shape[-1]


def _has_rows(value: Tensor, tokens: int) -> bool:
    rows = value.numel() // value.shape[-1] if value.dim() > 1 and value.numel() else 0
    return rows == tokens


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
    """Returns the same structure with function(tensor) for every tensor, in the order above."""
    if isinstance(values, Tensor):
        return function(values)
    if isinstance(values, tuple | list):
        mapped = [_map(value, function) for value in values]
        return type(values)(*mapped) if hasattr(values, "_fields") else type(values)(mapped)
    if isinstance(values, dict):
        return type(values)({name: _map(value, function) for name, value in values.items()})
    return values
