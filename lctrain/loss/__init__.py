"""Language-model losses that never hold the logits of all tokens: each is a sum and a count."""

from lctrain.loss.causal_lm import causal_lm_loss, token_losses
from lctrain.loss.evaluation_mode import evaluation_mode
from lctrain.loss.log_probs import TokenLogProbs, token_log_probs
from lctrain.loss.masked_lm import masked_lm_loss, masked_losses
from lctrain.loss.output_head import OutputHead, find_output_head
from lctrain.loss.policy import PolicyLoss, group_advantages, policy_loss
from lctrain.loss.preference import PreferenceLoss, preference_loss

__all__ = [
    "OutputHead",
    "PolicyLoss",
    "PreferenceLoss",
    "TokenLogProbs",
    "causal_lm_loss",
    "evaluation_mode",
    "find_output_head",
    "group_advantages",
    "masked_lm_loss",
    "masked_losses",
    "policy_loss",
    "preference_loss",
    "token_log_probs",
    "token_losses",
]
