"""Trains sharded models on two ranks; tests/distributed/test_sharded.py runs `main` on each.

Its arguments are RANK SIZE FOLDER OVERRIDES...
"""

import copy
import os
import shutil

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor

from lctrain.bench import scale
from lctrain.distributed import context
from lctrain.distributed.sharding import shard_model, whole_value
from lctrain.distributed.strategy import ShardedStrategy
from lctrain.train import train
from tests.distributed.context_cases import all_shared
from tests.distributed.ranks import join
from tests.float64 import built_in_float64
from tests.train.runs import config, train_losses
from tests.train_two_ranks import CLIP, WINDOW, Recorder, make_model
from tests.training import make_trainer


class Sharded(Recorder):
    """A module that records its gradients' dtype, besides losses and norms."""

    def on_before_optimizer_step(self, optimizer):
        self.dtypes = {(p.dtype, p.grad.dtype) for p in self.parameters() if p.grad is not None}


def with_adapters(datamodule):
    """Returns the model with LoRA adapters, whose weights are not zero."""
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(make_model(), LoraConfig(target_modules=["q_proj", "v_proj"]))
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.25)
    return model


def tied(datamodule):
    """Returns the model with one weight for embeddings and logits."""
    model = make_model()
    model.config.tie_word_embeddings = True
    model.tie_weights()
    return model


MODELS = {"plain": lambda datamodule: make_model(), "tied": tied, "adapters": with_adapters}


def fit(folder, make, replicas, precision="32-true"):
    """Trains one epoch, and returns the module."""
    module = Sharded(make)
    trainer = make_trainer(
        folder,
        strategy=ShardedStrategy(replicas),
        devices=torch.distributed.get_world_size(),
        accumulate_grad_batches=WINDOW,
        gradient_clip_val=CLIP,
        precision=precision,
    )
    trainer.fit(module)
    assert all(isinstance(p.data, DTensor) for p in module.model.parameters())
    assert vars(module.model)["_lctrain_output_head"].head is not None, "the loss is not fused"
    return module


def buffers_of_ranks(rank, size):
    """Returns the buffers of every rank after sharding; before it, they hold the rank."""
    model = make_model()
    model.register_buffer("bias", torch.full((4,), float(rank)))
    model.register_buffer("turned", torch.full((3, 2), rank).T, persistent=False)
    model.register_buffer("flag", torch.tensor(bool(rank)))
    mesh = init_device_mesh("cpu", (size,))
    shard_model(model, mesh, torch.device("cpu"), MixedPrecisionPolicy())
    found = [None] * size
    torch.distributed.all_gather_object(found, dict(model.named_buffers()))
    return found


def main() -> None:
    """Trains, and writes the results of rank 0."""
    rank, size, folder, overrides = join()
    found = {("context", heads): all_shared(heads) for heads in (1, 2)}
    found["buffers"] = buffers_of_ranks(rank, size)
    with built_in_float64():
        for name, make in MODELS.items():
            for replicas in (1, size) if name == "plain" else (1,):
                module = fit(folder, make, replicas)
                weights = {n: whole_value(p.data) for n, p in module.model.named_parameters()}
                found[name, replicas] = (module.records, copy.deepcopy(weights))
    mixed = fit(folder, MODELS["plain"], 1, "bf16-mixed")
    found["mixed"] = (mixed.records, mixed.dtypes)
    sharded = [*overrides, "trainer.strategy=fsdp2", f"trainer.devices={size}"]
    kept = f"ckpt_path={folder}/one/checkpoints/step-00000003.ckpt"
    os.environ["LOCAL_WORLD_SIZE"] = str(size)
    parts = "--parts=attention,linear,context,spread,context-long"
    assert scale.main(["--tiny", parts, "--steps=1", f"--output={folder}/scale.json"]) == 0
    quick = ("export=false", "evaluation.enabled=false")
    train(config(*sharded, output_dir=folder / "whole"))
    copied = ("trainer.strategy=ddp", f"trainer.devices={size}")
    train(config(*overrides, *copied, output_dir=folder / "copied"))
    train(config(*sharded, *quick, kept, "memory=checkpoint", output_dir=folder / "other"))
    context.BORDER = 16
    shared = ("trainer.context_parallel=2", "trainer.accumulate_grad_batches=2", "export=false")
    train(config(*sharded, *shared, output_dir=folder / "shared"))
    last = folder / "whole" / "checkpoints" / "step-00000006.ckpt"
    half = folder / "whole" / "checkpoints" / "step-00000003.ckpt"
    if rank == 0:
        shutil.copytree(folder / "whole" / "model", folder / "start")
    torch.distributed.barrier()
    train(config(*sharded, *quick, f"ckpt_path={half}", output_dir=folder / "again"))
    pretrained = [
        *("model=hf", f"model.name_or_path={folder}/start", f"data.tokenizer={folder}/start"),
        "trainer.max_steps=1",
    ]
    train(config(*sharded, *quick, *pretrained, output_dir=folder / "pretrained"))
    if rank == 0:
        assert last.is_dir()
        names = ("whole", "copied", "other", "again", "pretrained", "shared")
        found["losses"] = {name: train_losses(folder / name) for name in names}
        torch.save(found, folder / "found.pt")
