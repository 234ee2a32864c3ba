"""Shards pretrained models that no rank loads whole; checkpoint_ranks.py starts its ranks."""

from pathlib import Path
from typing import ClassVar

import safetensors
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from lctrain.config import PretrainedModelConfig
from lctrain.distributed.sharding import built_to_be_sharded, shard_model, whole_value
from lctrain.models.pretrained import load_pretrained
from tests.training import VOCABULARY

SIZES = {"vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 20}
HEADS = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
RANKS = 3  # so that the shards are uneven
MODELS = {
    "files": ("bfloat16", "float32"),  # several files, and a conversion to float32
    "tied": ("float32", "bfloat16"),
    "base": ("float32", "auto"),  # names without the prefix of the model with a head
}
"""By name: dtype of the files, and of the loaded model."""


def save(folder: Path) -> None:
    """Writes the pretrained models."""
    for name, (dtype, _) in MODELS.items():
        torch.manual_seed(0)
        if name == "base":
            config = GPT2Config(
                vocab_size=VOCABULARY, n_embd=16, n_layer=1, n_head=2, eos_token_id=1
            )
            model = GPT2LMHeadModel(config).transformer
        else:
            tied = {"tie_word_embeddings": name == "tied"}
            model = LlamaForCausalLM(LlamaConfig(**SIZES, **HEADS, **tied))
            model.generation_config.max_length = 7
        size = "4KB" if name == "files" else "1GB"
        model.to(getattr(torch, dtype)).save_pretrained(folder / name, max_shard_size=size)


class CountingFile:
    """A safetensors file that counts the bytes that are read from it.

    Attributes:
        reads: Number of elements of every slice that was read.
    """

    reads: ClassVar[list[int]] = []
    open = staticmethod(safetensors.safe_open)

    def __init__(self, *args, **options):
        self.file = CountingFile.open(*args, **options)

    def __enter__(self):
        self.file.__enter__()
        return self

    def __exit__(self, *error):
        return self.file.__exit__(*error)

    def __getattr__(self, name):
        return getattr(self.file, name)

    def get_tensor(self, name):
        return self.get_slice(name)[...]

    def get_slice(self, name):
        return CountingSlice(self.file.get_slice(name))


class CountingSlice:
    """A tensor of a CountingFile."""

    def __init__(self, tensor):
        self.tensor = tensor

    def __getattr__(self, name):
        return getattr(self.tensor, name)

    def __getitem__(self, slices):
        found = self.tensor[slices]
        CountingFile.reads.append(found.numel())
        return found


def shard_all(rank: int, size: int, folder: Path) -> None:
    """Shards every model, and writes rank 0's results: weights, buffers, configs and reads."""
    found = {}
    safetensors.safe_open = CountingFile
    mesh = init_device_mesh("cpu", (size,))
    for name, (_, dtype) in MODELS.items():
        CountingFile.reads = []
        config = PretrainedModelConfig(name_or_path=str(folder.parent / name))
        with built_to_be_sharded(rank == 0):
            model = load_pretrained(config, dtype)
        is_meta = all(parameter.is_meta for parameter in model.parameters())
        shard_model(model, mesh, torch.device("cpu"), MixedPrecisionPolicy())
        shards = [p.data.to_local().numel() for p in model.parameters()]
        of_ranks = [None] * size
        mine = {"is_meta": is_meta, "reads": CountingFile.reads, "shards": shards}
        torch.distributed.all_gather_object(of_ranks, mine)
        found[name] = {
            "weights": {n: whole_value(p.data) for n, p in model.named_parameters()},
            "buffers": dict(model.named_buffers()),
            "configs": (model.config.to_dict(), model.generation_config.to_dict()),
            "ranks": of_ranks,
        }
    if rank == 0:
        torch.save(found, folder / "found.pt")
