"""Trains kinds of sharded models on two ranks; tests/distributed/test_sharded_kinds.py starts it.

Usage: python -m tests.distributed.kinds_ranks RANK SIZE FOLDER
"""

import copy
from types import SimpleNamespace

import lightning.pytorch as pl
import torch
from torch.distributed.tensor import DTensor

from lctrain.config import AdapterConfig, MemoryConfig, OptimConfig
from lctrain.data.masking import MaskTokens
from lctrain.distributed.sharding import whole_value
from lctrain.distributed.strategy import ShardedStrategy
from lctrain.export import export_model
from lctrain.models.low_rank import add_adapter
from lctrain.module import LongContextModule
from lctrain.run.sharded_checkpoint import AnyCheckpointIO
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

    def __init__(self, make, memory=None, task="causal", taken=0):
        LongContextModule.__init__(self, make, OptimConfig(), memory=memory, task=task)
        self.records = []
        self.mlp_calls = [0] * LAYERS
        self.taken = taken  # batches of the run before; Lightning goes on with the loader's first

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
        made = made[self.taken :] + made[: self.taken]
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


def adapted(dora=False, rank=4):
    """Returns a function that builds the model with lctrain's adapters, whose product is not 0."""

    def build(datamodule=None):
        targets = ["q_proj", "v_proj", "down_proj"]
        settings = AdapterConfig(targets=targets, rank=rank, alpha=8, dora=dora)
        model = add_adapter(make_model(), settings)
        torch.manual_seed(1)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.25)
        return model

    return build


class SaveFirst(pl.Callback):
    """Saves a checkpoint after the first optimizer step."""

    def __init__(self, path):
        self.path = path

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == 1 and not trainer.fit_loop._should_accumulate():
            trainer.save_checkpoint(self.path)


def fit(folder, module, resumed=None, saved=None):
    """Trains one epoch, and returns losses with norms, and the whole weights."""
    trainer = make_trainer(
        folder,
        [] if saved is None else [SaveFirst(saved)],
        strategy=ShardedStrategy(),
        devices=torch.distributed.get_world_size(),
        accumulate_grad_batches=WINDOW,
        gradient_clip_val=CLIP,
        plugins=[AnyCheckpointIO()],
    )
    trainer.fit(module, ckpt_path=resumed, weights_only=None if resumed is None else True)
    assert all(isinstance(p.data, DTensor) for p in module.model.parameters())
    weights = {n: whole_value(p.data) for n, p in module.model.named_parameters()}
    return module.records, copy.deepcopy(weights)


def refused(folder, module, checkpoint):
    """Returns the message of the error that resuming from a checkpoint raises."""
    try:
        fit(folder, module, checkpoint)
    except ValueError as error:
        return str(error)
    return None


def adapters(folder):
    """Trains, saves, resumes and exports models with adapters; returns the results by name."""
    found = {}
    tokenizer = SimpleNamespace(save_pretrained=lambda path: None)
    for name in ("lora", "dora"):
        build = adapted(name == "dora")
        whole = Kind(build)
        found[name] = fit(folder, whole, saved=folder / f"{name}.ckpt")
        found[name, "trained"] = [n for n, p in whole.model.named_parameters() if p.requires_grad]
        found[name, "resumed"] = fit(folder, Kind(build, taken=WINDOW), folder / f"{name}.ckpt")
        found[name, "from a file"] = fit(
            folder, Kind(build, taken=WINDOW), folder / f"{name}-file.ckpt"
        )
        export_model(whole, tokenizer, folder / name)
        export_model(whole, tokenizer, folder / f"{name}-merged", merge=True)
        found[name, "merged"] = {n: whole_value(p.data) for n, p in whole.model.named_parameters()}
    for kind in ("", "-file"):
        other = Kind(adapted(rank=2))
        found["refused" + kind] = refused(folder, other, folder / f"lora{kind}.ckpt")
    return found


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
        found |= adapters(folder)
    if rank == 0:
        torch.save(found, folder / "found.pt")


if __name__ == "__main__":
    main()
