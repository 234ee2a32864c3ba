"""Extension: a method of reading texts beyond the trained window, without training.

The methods, for a text of f times the window and rotary embeddings of width D and base theta:

- `plain`: the unchanged model.
- `linear`: position interpolation (arXiv 2306.15595).
- `ntk`: NTK-aware scaling, with the base theta * f^(D / (D - 2)), fixed for each length.
- `yarn`: YaRN (arXiv 2309.00071), with its attention factor.
- `dual_chunk`: lctrain's dual chunk attention.
- `dual_chunk_yarn`: dual chunk attention with sharper logits beyond the window (`scale="yarn"`).
- `intra_chunk`: documents are cut at multiples of the window, and attention stays within a part.

transformers computes the rotary embeddings of `linear`, `ntk` and `yarn`. At lengths up to the
window, every method computes the same as `plain`.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from lctrain.instances import require_instance, require_int
from lctrain.limits import DUAL_CHUNK_METHODS, ROPE_METHODS, check_methods
from lctrain.models import patch_model
from lctrain.models.rotary import find_rotary
from lctrain.models.window import configured_window
from lctrain.warn import warn_once

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Extension:
    """A method of reading beyond the trained window, which can be applied to a model and undone.

    Attributes:
        method: Name of the method, one of METHODS.
        window: Length of the texts that the model was trained on, in tokens.
        options: Options of the method's attention, as keywords of `lctrain.patch_model`.
    """

    method: str
    window: int
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_methods([self.method])
        if self.window < 2:
            raise ValueError(
                f"window must be at least 2, got {self.window}. It is the number of tokens that "
                "the model was trained on."
            )

    @property
    def segment(self) -> int | None:
        """Length in tokens of the parts into which documents are cut; None for whole documents."""
        return self.window if self.method == "intra_chunk" else None

    @property
    def scales(self) -> bool:
        """Whether the method changes the model with the length of the texts."""
        return self.method in ROPE_METHODS

    def factor(self, length: int) -> float:
        """Returns the length divided by the window, at least 1."""
        return max(1.0, length / self.window)

    @contextmanager
    def patched(self, model: nn.Module) -> Iterator[None]:
        """Context manager that patches the model with the attention of this method.

        If the method uses flash attention and the model does not support it, the model is not
        patched and a warning is logged: evaluation then uses padded rows, which is slower.

        Raises:
            ValueError: if the model does not support the method; the message says why.
        """
        if self.method in ROPE_METHODS:
            check_rotary(model, self.method)
        try:
            if self.method in DUAL_CHUNK_METHODS:
                options = {"window": self.window, **self.options}
                if self.method == "dual_chunk_yarn":
                    options["scale"] = "yarn"
                handle = patch_model(model, "dual_chunk", **options)
            else:
                handle = patch_model(model, "flash", **self.options)
        except ValueError as error:
            if self.method in (*DUAL_CHUNK_METHODS, "intra_chunk"):
                raise
            warn_once(
                log, "Evaluating the model as it is, on padded rows instead of packs: %s", error
            )
            yield
            return
        with handle:
            yield

    @contextmanager
    def at(self, model: nn.Module, length: int) -> Iterator[None]:
        """Context manager that scales the model's rotary embedding for texts of `length` tokens.

        Methods that do not scale rotary embeddings change nothing.
        """
        factor = self.factor(length)
        if self.method not in ROPE_METHODS or factor == 1.0:
            yield
            return
        rotary: Any = check_rotary(model, self.method)
        scaled = type(rotary)(config=_scaled_config(rotary, self.method, factor, self.window))
        before = rotary.inv_freq, rotary.attention_scaling
        rotary.inv_freq = scaled.inv_freq.to(before[0].device, before[0].dtype)
        rotary.attention_scaling = scaled.attention_scaling
        try:
            yield
        finally:
            rotary.inv_freq, rotary.attention_scaling = before


def trained_window(model: Any, window: int | None) -> int:
    """Returns the length of the texts that a model was trained on, in tokens.

    Args:
        model: A transformers causal LM.
        window: Length that the user gave. None takes the value of the model's config, as dual chunk
            attention does.

    Raises:
        ValueError: if `window` is None and the config has no such value, or the length is below 2.
    """
    require_instance("model", model, nn.Module, "Pass a causal LM of transformers.")
    if window is None:
        window = configured_window(model.config)  # type: ignore[arg-type]
    if window is None:
        raise ValueError(
            f"window must be given for {type(model).__name__}, whose config does not say on how "
            "many tokens it was trained. Give its config max_position_embeddings; lctrain-eval and "
            "the functions of lctrain.eval also take window=..."
        )
    require_int("window", window, 2, "It is the number of tokens that the model was trained on.")
    return window


def check_supported(model: Any, methods: Sequence[str]) -> None:
    """Checks that a model supports methods of reading beyond its window, by patching the model.

    Args:
        model: A transformers causal LM that is not patched, on any device, such as meta.
        methods: Names of the methods. Their window is that of the model's config.

    Raises:
        ValueError: if the model's config states no window, or the model does not support a method.
    """
    if not methods:
        return
    if configured_window(model.config) is None:
        raise ValueError(
            f"methods must be empty for {type(model).__name__}, whose config does not say on how "
            f"many tokens it was trained, got {list(methods)}. Give its config "
            "max_position_embeddings."
        )
    window = trained_window(model, None)
    for method in methods:
        with Extension(method, window).patched(model):
            pass


def check_rotary(model: nn.Module, method: str) -> nn.Module:
    """Returns the module that computes a model's rotary embedding.

    Args:
        model: A transformers causal LM.
        method: Name of the method that scales the embedding, for messages.

    Raises:
        ValueError: if the model has no rotary embedding, several, or one that is already scaled.
    """
    try:
        rotary: Any = find_rotary(model)
    except ValueError as error:
        raise ValueError(
            f"methods must not name {method} for {type(model).__name__}, which has not one rotary "
            "embedding (RoPE) for all layers. Leave it out."
        ) from error
    kind = getattr(rotary, "rope_type", None)
    if kind != "default" or not hasattr(rotary, "attention_scaling"):
        raise ValueError(
            f"methods must not name {method} for {type(model).__name__}, whose rotary embeddings "
            f"are of the type {kind!r} already. Compare plain and dual_chunk, or set its config's "
            "rope_parameters to the default type."
        )
    return rotary


def _scaled_config(rotary: Any, method: str, factor: float, window: int) -> Any:
    """Returns the configuration of a rotary embedding for texts of `factor` times the window."""
    config = copy.deepcopy(rotary.config)
    parameters = dict(config.rope_parameters)
    if method == "ntk":
        width = 2 * rotary.inv_freq.numel()
        parameters["rope_theta"] *= factor ** (width / (width - 2))
    else:
        parameters |= {"rope_type": method, "factor": factor}
    if method == "yarn":
        parameters["original_max_position_embeddings"] = window
        if hasattr(config, "original_max_position_embeddings"):  # Phi-3: it would take precedence
            config.original_max_position_embeddings = window
    config.rope_parameters = parameters
    return config
