"""Fabric: the same kernels in a loop of your own."""

import torch
from lightning.fabric import Fabric
from transformers import LlamaConfig, LlamaForCausalLM

import lctrain
from lctrain.loss import causal_lm_loss

fabric = Fabric(devices=1)
config = LlamaConfig(vocab_size=256, hidden_size=32, intermediate_size=64, num_hidden_layers=2)
model = LlamaForCausalLM(config)
model, optimizer = fabric.setup(model, torch.optim.AdamW(model.parameters(), lr=1e-2))
rows = lctrain.data.pack([list(b"Some bytes. " * 9)] * 40, max_tokens=512)
print(lctrain.patch_models(model, "flash"))
for pack in rows:
    loss_sum, num_tokens = causal_lm_loss(model, pack.to(fabric.device))
    fabric.backward(loss_sum / num_tokens)
    optimizer.step()
    optimizer.zero_grad()
