"""Reference: the model before training, as adapters switched off or as a frozen copy."""

from __future__ import annotations

import copy
from typing import Any

import torch

from lctrain.batch import PackedBatch
from lctrain.config import AttentionConfig
from lctrain.loss import TokenLogProbs, evaluation_mode, token_log_probs
from lctrain.models import patch_model
from lctrain.models.adapters import inside_adapters


class Reference:
    """The reference model of a policy.

    A policy with peft's adapters is its own reference, with the adapters off. Any other policy is
    copied, and the copy is frozen. A reference has no dropout.

    Args:
        policy: The model before training, not patched.
        attention: Options of the attention.
    """

    def __init__(self, policy: Any, attention: AttentionConfig) -> None:
        self._policy = policy
        self._copy: Any = None
        if inside_adapters(policy) is policy:
            self._copy = copy.deepcopy(policy).requires_grad_(False).eval()
            patch_model(self._copy, attention.name, fused=attention.fused, **attention.options())

    def log_probs(self, batch: PackedBatch) -> TokenLogProbs:
        """Returns the log-probabilities of a batch's trained tokens.

        Args:
            batch: A pack on the policy's device.
        """
        if self._copy is not None:
            with torch.no_grad():
                return token_log_probs(self._copy.to(batch.input_ids.device), batch)
        with evaluation_mode(self._policy), self._policy.disable_adapter():
            return token_log_probs(self._policy, batch)
