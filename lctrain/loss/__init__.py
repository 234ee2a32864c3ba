"""Language-model losses that never hold the logits of all tokens: each is a sum and a count."""

from lctrain.loss.causal_lm import causal_lm_loss, token_losses
from lctrain.loss.evaluation_mode import evaluation_mode
from lctrain.loss.masked_lm import masked_lm_loss, masked_losses
from lctrain.loss.output_head import OutputHead, find_output_head

__all__ = [
    "OutputHead",
    "causal_lm_loss",
    "evaluation_mode",
    "find_output_head",
    "masked_lm_loss",
    "masked_losses",
    "token_losses",
]
