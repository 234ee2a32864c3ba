"""Readings: how a model is patched while a task reads with it.

An `Extension` is a reading by one method of reading beyond the window. `ConfiguredReading` is the
model with the attention of the configuration, and `GivenReading` a model that its caller patched.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

from torch import nn

from lctrain import models
from lctrain.config import AttentionConfig
from lctrain.eval.extension import Extension
from lctrain.limits import DUAL_CHUNK_METHODS
from lctrain.warn import warn_once

log = logging.getLogger(__name__)


class Reading(Protocol):
    """Protocol of a way to read with a model."""

    @property
    def method(self) -> str:
        """Name of the method; empty for the model as it is."""

    @property
    def segment(self) -> int | None:
        """Length in tokens of the parts into which documents are cut; None for whole ones."""

    @property
    def scales(self) -> bool:
        """Whether the model depends on the length of the texts."""

    def patched(self, model: nn.Module) -> AbstractContextManager[None]:
        """Returns a context manager that patches the model."""

    def at(self, model: nn.Module, length: int) -> AbstractContextManager[None]:
        """Returns a context manager that scales the patched model for texts of `length` tokens."""


@dataclass(frozen=True)
class GivenReading:
    """Reading with a model that its caller has patched, or left as it is.

    Attributes:
        extension: Method with whose attention the model is patched; None scales nothing.
    """

    extension: Extension | None = None

    @property
    def method(self) -> str:
        """See Reading."""
        return "" if self.extension is None else self.extension.method

    @property
    def segment(self) -> int | None:
        """See Reading."""
        return None if self.extension is None else self.extension.segment

    @property
    def scales(self) -> bool:
        """See Reading."""
        return self.extension is not None and self.extension.scales

    def patched(self, model: nn.Module) -> AbstractContextManager[None]:
        """Changes nothing: see Reading."""
        return nullcontext()

    def at(self, model: nn.Module, length: int) -> AbstractContextManager[None]:
        """See Reading."""
        return nullcontext() if self.extension is None else self.extension.at(model, length)


@dataclass(frozen=True)
class ConfiguredReading:
    """Reading with the attention of the configuration.

    Attributes:
        attention: Settings of the attention; None leaves the model as it is.
        window: Window of dual chunk attention, in tokens, unless `attention` sets one.
    """

    attention: AttentionConfig | None
    window: int | None = None
    method: str = ""
    segment: None = None
    scales: bool = False

    @contextmanager
    def patched(self, model: Any) -> Iterator[None]:
        """Context manager that patches the model's attention, so that the model reads packs.

        If flash attention does not support the model, the model is not patched and a warning is
        logged: evaluation then uses padded rows, which changes its speed but not its results.

        Raises:
            ValueError: if dual chunk or differential attention does not support the model.
        """
        if self.attention is None:
            yield
            return
        options = self.attention.options()
        if self.attention.name == "dual_chunk" and self.window is not None:
            options = {"window": self.window, **options}
        try:
            handle = models.patch_model(model, attention=self.attention.name, **options)
        except ValueError as error:
            if self.attention.name != "flash":
                raise
            warn_once(
                log, "Evaluating the model as it is, on padded rows instead of packs: %s", error
            )
            yield
            return
        with handle:
            yield

    def at(self, model: nn.Module, length: int) -> AbstractContextManager[None]:
        """Changes nothing: see Reading."""
        return nullcontext()


def make_extensions(
    methods: Sequence[str], window: int, attention: AttentionConfig | None
) -> list[Extension]:
    """Returns an Extension per method, with the options of the method's attention.

    Options of dual chunk attention apply to the dual chunk methods only.

    Args:
        methods: Names of the methods.
        window: Length of the texts that the model was trained on, in tokens.
        attention: Settings of the attention; None for the defaults.
    """
    attention = attention or AttentionConfig()
    shared = AttentionConfig(
        dropout=attention.dropout, deterministic=attention.deterministic, backend=attention.backend
    ).options()
    return [
        Extension(method, window, attention.options() if method in DUAL_CHUNK_METHODS else shared)
        for method in methods
    ]
