"""Tiny patched models of each attention, in float64."""

from contextlib import contextmanager

import torch
from transformers import DiffLlamaConfig, DiffLlamaForCausalLM

from lctrain import patch_model
from lctrain.models.differential import to_differential

ATTENTIONS = ["flash", "dual_chunk", "differential-1", "differential-2"]


@contextmanager
def patched_model(model, attention, **options):
    """Makes a plain model one of an attention, in float64, and patches it inside the context.

    Chunks have 8 tokens, so that short texts hold keys of all three ranges. The two branches of
    version 2 are made different: to_differential makes them equal.

    Args:
        model: A tiny causal LM; a Llama for "differential-1", which takes its config only.
        attention: One of ATTENTIONS.
        **options: Options of the attention.
    """
    if attention == "differential-1":
        model = DiffLlamaForCausalLM(DiffLlamaConfig(**model.config.to_diff_dict())).eval()
    if attention == "differential-2":
        model = to_differential(model).eval()
        for name, weight in model.named_parameters():
            if "lambda_proj" in name or "q_proj" in name:
                torch.nn.init.normal_(weight, std=0.3)
    if attention == "dual_chunk":
        options = {"chunk_size": 12, "local_size": 4} | options
    with patch_model(model.double(), attention=attention.partition("-")[0], **options):
        yield model
