"""Trains kinds of sharded models on two ranks; test_sharded_kinds.py runs `main` on each.

Its arguments are RANK SIZE FOLDER.
"""

import copy
import math
from dataclasses import asdict
from types import SimpleNamespace

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers.logger import DummyLogger
from torch.distributed.tensor import DTensor

from lctrain.callbacks import LengthPerplexity
from lctrain.config import AdapterConfig, MemoryConfig, OptimConfig
from lctrain.data.documents import TokenizedDocument
from lctrain.data.masking import MaskTokens
from lctrain.distributed import ONE_RANK, Topology
from lctrain.distributed.sharding import through_root, whole_value
from lctrain.distributed.strategy import ShardedStrategy
from lctrain.eval import masked_perplexity_by_length
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
    "auto": MemoryConfig(name="auto", device_gib=0.0005, tokens=64),
    "tiles": MemoryConfig(name="offload", mlp_tokens=16),
}
HELD_OUT = [torch.arange(size) % 89 + 3 for size in (9, 60, 14, 40, 3, 31)]
"""Documents to measure, of unequal lengths."""
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


class Kept(DummyLogger):
    """A logger that keeps what it logs."""

    def __init__(self):
        super().__init__()
        self.metrics = []

    def log_metrics(self, metrics, step=None):
        self.metrics.append((step, metrics))


def measured(folder, strategy):
    """Trains with LengthPerplexity, and returns what rank 0 logs."""
    logger = Kept()
    callback = LengthPerplexity([8, 16], every_n_steps=2, max_tokens=48, held_out=HELD_OUT)
    trainer = make_trainer(
        folder,
        [callback],
        strategy=strategy,
        devices=torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1,
        accumulate_grad_batches=WINDOW,
        gradient_clip_val=CLIP,
        logger=logger,
    )
    trainer.fit(Kind(layers))
    return [(step, kept) for step, kept in logger.metrics if "val/perplexity_8" in kept]


def masked_perplexity(model, ranks=ONE_RANK):
    """Returns the rows of the perplexity of masked tokens by length."""
    documents = [TokenizedDocument(str(i), ids.numpy(), i) for i, ids in enumerate(HELD_OUT)]
    table = masked_perplexity_by_length(
        model, documents, [8, 16], MASKING, max_tokens=32, ranks=ranks
    )
    # Fields that are not measured for masked tokens are NaN.
    return [{k: v for k, v in asdict(row).items() if not math.isnan(v)} for row in table.rows]


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
        module = Kind(encoder, task="mlm")
        found["mlm"] = fit(folder, module)
        found["masked"] = through_root(
            module.trainer, masked_perplexity, module.model, Topology.of(module.trainer)
        )
        for name, strategy in (("ddp", "ddp"), ("fsdp2", ShardedStrategy())):
            found["measured", name] = measured(folder, strategy)
        found |= adapters(folder)
    if rank == 0:
        torch.save(found, folder / "found.pt")
