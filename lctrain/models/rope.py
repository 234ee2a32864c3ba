"""RopeSwap: changes a model's RoPE parameters without changing its config, reversibly."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from lctrain.models.rotary import find_rotary

STATIC_TYPES = ("default", "linear", "yarn", "llama3")


class RopeSwap:
    """Gives a model the rotary frequencies of other `rope_parameters`, until `restore`.

    transformers' own class computes the frequencies. Rope types whose frequencies depend on the
    length of the input ("dynamic", "longrope") are refused, since a document's output would depend
    on the other documents in its pack.

    Args:
        model: A transformers model with one rotary embedding.
        parameters: Entries to change in the config's `rope_parameters`, such as {"rope_type":
            "yarn", "factor": 4.0}.

    Raises:
        ValueError: if the model does not have exactly one rotary embedding, or the rope type is
            refused or unknown.
    """

    def __init__(self, model: Any, parameters: Mapping[str, Any]) -> None:
        check_rope(parameters)
        rotary: Any = find_rotary(model)
        self._rotary = rotary
        self._before = (rotary.inv_freq, getattr(rotary, "attention_scaling", None))
        kind = getattr(rotary, "rope_type", None)
        if self._before[1] is None or kind not in STATIC_TYPES:
            raise ValueError(
                "rope must be given for a model with fixed rotary frequencies, got "
                f"{type(model).__name__}, whose type is {kind!r}. Leave rope out, or use "
                "attention='dual_chunk'."
            )
        config = copy.deepcopy(rotary.config)
        config.rope_parameters = {**config.rope_parameters, **parameters}
        try:
            scaled = type(rotary)(config=config)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"rope must be rope_parameters of transformers, got {dict(parameters)}, which "
                f"fail: {error!r}. See the model's configuration."
            ) from error
        rotary.inv_freq = scaled.inv_freq.to(self._before[0].device, self._before[0].dtype)
        rotary.attention_scaling = scaled.attention_scaling

    def restore(self) -> None:
        """Restores the model's frequencies, bit for bit. A second call changes nothing."""
        self._rotary.inv_freq, self._rotary.attention_scaling = self._before


def check_rope(parameters: Mapping[str, Any]) -> None:
    """Raises a ValueError for a rope type that is unknown or depends on the length of the input.

    Args:
        parameters: Entries of `rope_parameters`.
    """
    kind = parameters.get("rope_type")
    if kind is not None and kind not in STATIC_TYPES:
        raise ValueError(
            f"rope_type must be one of {', '.join(STATIC_TYPES)}, got {kind!r}. Frequencies that "
            "follow the longest document of a pack would mix documents."
        )
