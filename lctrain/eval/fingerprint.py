"""Hashes of what an evaluation reads: the weights of a model, its config, and documents."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from lctrain.data import TokenizedDocument

_SIZE = 8  # bytes of a hash
_NO_SETTINGS = ("_name_or_path", "transformers_version")


def weights_hash(model: Any) -> str:
    """Returns a hash of a model's config and of all its parameters.

    Args:
        model: A model of transformers.
    """
    settings = {k: v for k, v in model.config.to_dict().items() if k not in _NO_SETTINGS}
    found = hashlib.blake2b(
        json.dumps(settings, sort_keys=True, default=str).encode(), digest_size=_SIZE
    )
    for name, parameter in model.named_parameters():
        found.update(f"{name} {parameter.dtype} {list(parameter.shape)}".encode())
        values = parameter.detach().cpu().contiguous().reshape(-1)
        found.update(values.view(torch.uint8).numpy())
    return found.hexdigest()


def documents_hash(documents: Iterable[TokenizedDocument]) -> str:
    """Returns a hash of the names and tokens of documents, in their order."""
    found = hashlib.blake2b(digest_size=_SIZE)
    for document in documents:
        ids = np.ascontiguousarray(document.input_ids, dtype=np.int64)
        found.update(f"{document.name} {len(ids)}".encode())
        found.update(ids.tobytes())
    return found.hexdigest()
