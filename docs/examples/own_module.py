"""Your own LightningModule: lctrain comes in by callbacks."""

import lightning as L
import torch
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

from lctrain.callbacks import PatchAttention, ThroughputMonitor, TokenExactLoss
from lctrain.data import PackCollator
from lctrain.loss import causal_lm_loss


class Mine(L.LightningModule):
    def __init__(self):
        super().__init__()
        sizes = {"vocab_size": 256, "hidden_size": 32, "intermediate_size": 64}
        self.lm = LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=2, num_attention_heads=4))

    def training_step(self, batch, batch_idx):
        loss_sum, num_tokens = causal_lm_loss(self.lm, batch)
        return {"loss": loss_sum, "num_tokens": num_tokens}

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


documents = [{"input_ids": list(b"Some bytes. " * (i % 7 + 2))} for i in range(64)]
loader = DataLoader(documents, batch_size=4, collate_fn=PackCollator())
callbacks = [PatchAttention("flash"), TokenExactLoss(), ThroughputMonitor()]
L.Trainer(max_epochs=2, accumulate_grad_batches=2, callbacks=callbacks).fit(Mine(), loader)
