"""Trains kinds of sharded models on two ranks; tests/distributed/test_sharded_kinds.py starts it.

Usage: python -m tests.distributed.kinds_ranks RANK SIZE FOLDER
"""

import copy

import torch
from torch.distributed.tensor import DTensor

from lctrain.config import MemoryConfig, OptimConfig
from lctrain.data.masking import MaskTokens
from lctrain.distributed.sharding import whole_value
from lctrain.distributed.strategy import ShardedStrategy
from lctrain.module import LongContextModule
from tests.distributed.ranks import join
from tests.float64 import built_in_float64
from tests.train_two_ranks import CLIP, WINDOW, Recorder, batches, make_model
from tests.training import VOCABULARY, loader, make_trainer

LAYERS = 5
POLICIES = {
    "checkpoint": MemoryConfig(name="checkpoint"),
    "segments": MemoryConfig(name="checkpoint", segment_layers=3, keep_attention=2),
    "offload": MemoryConfig(name="offload", keep_inputs=1),
    "host": MemoryConfig(name="offload", keep_inputs=0, segment_layers=2, host_attention=3),
    "auto": MemoryConfig(name="auto", device_gib=1.0005, tokens=64),
    "tiles": MemoryConfig(name="offload", mlp_tokens=16),
}
MASKING = MaskTokens(mask_token_id=1, vocab_size=VOCABULARY, fraction=0.3)


class Kind(Recorder):
    """A module that records losses, norms and how often every layer's MLP runs in training."""

    def __init__(self, make, memory=None, task="causal"):
        LongContextModule.__init__(self, make, OptimConfig(), memory=memory, task=task)
        self.records = []
        self.mlp_calls = [0] * LAYERS

    def configure_model(self):
        super().configure_model()
        for index, layer in enumerate(getattr(self.model.base_model, "layers", ())):
            layer.mlp.register_forward_pre_hook(self.counter(index))

    def counter(self, index):
        def count(*given):
            self.mlp_calls[index] += 1

        return count

    def train_dataloader(self):
        made = batches(self.global_rank)
        return loader(made if self.task == "causal" else [MASKING(batch) for batch in made])


def layers(datamodule=None):
    """Returns a random llama of five layers, the same on every rank."""
    return make_model(LAYERS)


def encoder(datamodule=None):
    """Returns a random encoder for masked tokens, the same on every rank."""
    from transformers import ModernBertConfig, ModernBertForMaskedLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
    ends = {"pad_token_id": 0, "cls_token_id": 2, "sep_token_id": 2, "bos_token_id": 2}
    return ModernBertForMaskedLM(
        ModernBertConfig(
            **sizes,
            **ends,
            eos_token_id=2,
            vocab_size=VOCABULARY,
            num_attention_heads=4,
            local_attention=8,
        )
    )


def fit(folder, module):
    """Trains one epoch, and returns losses with norms, and the whole weights."""
    trainer = make_trainer(
        folder,
        strategy=ShardedStrategy(),
        devices=torch.distributed.get_world_size(),
        accumulate_grad_batches=WINDOW,
        gradient_clip_val=CLIP,
    )
    trainer.fit(module)
    assert all(isinstance(p.data, DTensor) for p in module.model.parameters())
    weights = {n: whole_value(p.data) for n, p in module.model.named_parameters()}
    return module.records, copy.deepcopy(weights)


def main() -> None:
    """Trains, and writes the results of rank 0."""
    rank, _, folder, _ = join()
    found = {}
    with built_in_float64():
        for name, memory in POLICIES.items():
            module = Kind(layers, memory)
            found[name] = fit(folder, module)
            found[name, "calls"] = module.mlp_calls
            found[name, "policies"] = module.memory_handle.policies
        found["mlm"] = fit(folder, Kind(encoder, task="mlm"))
    if rank == 0:
        torch.save(found, folder / "found.pt")


if __name__ == "__main__":
    main()
