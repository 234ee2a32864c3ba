"""The settings of adapters: small trainable matrices beside the frozen weights of a model."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, field

from lctrain.limits import require

QUANTIZATIONS = {"nf4": "bitsandbytes", "int8": "torchao"}
"""Formats of quantized frozen weights -> the package that computes with them."""
ALL_LINEAR = "all-linear"


@dataclass(frozen=True)
class AdapterConfig:
    """Settings of peft's low-rank adapters (LoRA, DoRA) on a pretrained model.

    Attributes:
        targets: Names of the linear layers that get an adapter, such as [q_proj, v_proj]. The
            single name all-linear takes every linear layer except the output projection.
        rank: Rank of an adapter.
        alpha: Scale of an adapter: the product of its two matrices is multiplied by alpha / rank.
        dropout: Dropout probability of an adapter's input in training.
        dora: Whether an adapter also trains the norm of every row of the weight (DoRA).
        quantize: Format of the frozen weights: nf4 (4 bits, by bitsandbytes) or int8 (8 bits, by
            torchao). None keeps them in model.dtype.
        merge: Whether the export adds the adapters to the weights and writes a whole model.
    """

    targets: list[str] = field(default_factory=lambda: [ALL_LINEAR])
    rank: int = 16
    alpha: int = 32
    dropout: float = 0.0
    dora: bool = False
    quantize: str | None = None
    merge: bool = False

    def __post_init__(self) -> None:
        require(
            len(self.targets) > 0 and all(name.strip() for name in self.targets),
            f"adapter.targets must name at least one linear layer, got {self.targets}. Use "
            f"[{ALL_LINEAR}] for every linear layer.",
        )
        require(
            ALL_LINEAR not in self.targets or len(self.targets) == 1,
            f"adapter.targets must not list {ALL_LINEAR} with other names, got {self.targets}. "
            f"Use [{ALL_LINEAR}] alone.",
        )
        require(self.rank >= 1, f"adapter.rank must be at least 1, got {self.rank}. Try 16.")
        require(
            self.alpha >= 1,
            f"adapter.alpha must be at least 1, got {self.alpha}. Try twice the rank.",
        )
        require(
            0.0 <= self.dropout < 1.0,
            f"adapter.dropout must be in [0, 1), got {self.dropout}. Use 0 for none.",
        )
        require(
            self.quantize in (None, *QUANTIZATIONS),
            f"adapter.quantize must be null, {' or '.join(QUANTIZATIONS)}, got {self.quantize!r}. "
            "null keeps the weights in model.dtype.",
        )
        require(
            not (self.merge and self.quantize),
            f"adapter.merge must be false with adapter.quantize={self.quantize}, got true: merged "
            "weights would be rounded again. Merge the exported adapters into the model's own "
            "weights by peft.",
        )


def require_packages(config: AdapterConfig) -> None:
    """Raises ValueError if peft, or the package of the quantized weights, is not installed.

    Args:
        config: Settings of the adapters.
    """
    needed = {"adapter": "peft", "adapter.quantize": QUANTIZATIONS.get(config.quantize or "")}
    for option, package in needed.items():
        if package is not None and importlib.util.find_spec(package) is None:
            value = "" if option == "adapter" else f"={config.quantize}"
            raise ValueError(
                f"{option}{value} needs the package {package}, got an environment without it. "
                f"Install it: pip install {package}."
            )
