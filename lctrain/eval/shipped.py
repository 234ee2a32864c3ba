"""Loads the small model in lctrain's wheel, which finds passkeys.

`recipes/passkey_model/` trains it. The model of a first run, which a CPU trains in minutes, does
not find passkeys. So the first run shows the passkey test on the shipped model.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lctrain.config import PretrainedModelConfig
from lctrain.data.tokenizer import load_tokenizer
from lctrain.models.pretrained import load_pretrained

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SHIPPED = "shipped"
FOLDER = Path(__file__).parent / "shipped_model"


@dataclass(frozen=True, eq=False)
class PasskeyModel:
    """A stored model for the passkey test.

    Attributes:
        model: The causal LM, in float32.
        tokenizer: Its tokenizer.
        name: Name for pictures and reports.
    """

    model: Any
    tokenizer: PreTrainedTokenizerBase
    name: str


def passkey_folder(name_or_path: str) -> str:
    """Returns the folder of the shipped model for "shipped", and any other name unchanged."""
    return str(FOLDER) if name_or_path == SHIPPED else name_or_path


def passkey_tokenizer(name_or_path: str) -> PreTrainedTokenizerBase:
    """Loads the tokenizer of a passkey model.

    Args:
        name_or_path: "shipped", a folder, or a name on the Hugging Face hub.
    """
    return load_tokenizer(passkey_folder(name_or_path))


def load_passkey_model(name_or_path: str) -> PasskeyModel:
    """Loads a model for the passkey test.

    Args:
        name_or_path: "shipped" for the model in lctrain's wheel, a folder, or a name on the Hugging
            Face hub.

    Raises:
        ValueError: if the model or its tokenizer cannot be loaded.
    """
    config = PretrainedModelConfig(name_or_path=passkey_folder(name_or_path))
    shipped = name_or_path == SHIPPED
    return PasskeyModel(
        load_pretrained(config, "float32"),
        passkey_tokenizer(name_or_path),
        "lctrain's shipped model, trained on passkeys only" if shipped else Path(name_or_path).name,
    )
