"""Fixtures: tiny saved models over bytes, texts, and functions that run lctrain-eval on them."""

import itertools
import sys
from pathlib import Path

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from lctrain.config import AttentionConfig, PathsConfig, PretrainedModelConfig
from lctrain.evaluate import (
    EvalConfig,
    main,
)
from lctrain.schemas import TextData

TEXTS = ["It was the best of times. " * 8, "Call me Ishmael.", "In a hole in the ground. " * 3]


def save_model(folder: Path, config: transformers.PretrainedConfig) -> Path:
    """Saves a random float64 causal LM over bytes, together with its tokenizer."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*letters, "<end>"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<end>"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).double().save_pretrained(folder)
    return folder


def llama_config(**settings) -> transformers.LlamaConfig:
    """Returns the config of a Llama over bytes, with one layer of width 16."""
    sizes = {"vocab_size": 257, "hidden_size": 16, "intermediate_size": 24}
    layers = {"num_hidden_layers": 1, "num_attention_heads": 2}
    return transformers.LlamaConfig(**sizes | layers | settings)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory) -> Path:
    return save_model(tmp_path_factory.mktemp("llama"), llama_config())


@pytest.fixture(scope="module")
def mamba_folder(tmp_path_factory) -> Path:
    config = transformers.MambaConfig(
        vocab_size=257, hidden_size=16, state_size=4, num_hidden_layers=1
    )
    return save_model(tmp_path_factory.mktemp("mamba"), config)


@pytest.fixture(scope="module")
def small_window_folder(tmp_path_factory) -> Path:
    config = llama_config(max_position_embeddings=16)
    return save_model(tmp_path_factory.mktemp("llama"), config)


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    for index, text in enumerate(TEXTS):
        (folder / f"{index}.txt").write_text(text)
    return folder


@pytest.fixture
def make_config(model_folder, texts, tmp_path):
    """Returns make_config(**changes), which makes an EvalConfig of the Llama on all texts."""

    numbers = itertools.count()  # every evaluation has a folder of its own

    def make(folder: Path = model_folder, data: dict | None = None, **changes) -> EvalConfig:
        settings = {
            "files": (f"{texts}/*.txt",),
            "tokenizer": str(folder),
            "cache_dir": str(tmp_path / "cache"),
        }
        values = {
            "model": PretrainedModelConfig(name_or_path=str(folder)),
            "data": TextData(**{**settings, **(data or {})}),
            "attention": AttentionConfig(),
            "paths": PathsConfig(output_dir=str(tmp_path / f"out-{next(numbers)}")),
            "split": "all",
            "lengths": [8, 64],
            "device": "cpu",
        }
        return EvalConfig(**{**values, **changes})

    return make


@pytest.fixture
def run_main(model_folder, texts, tmp_path, monkeypatch):
    """Returns run_main(*overrides), which calls the entry point of lctrain-eval."""

    def run(*overrides: str) -> None:
        monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
        arguments = [
            "data=text",
            f"data.files=[{texts}/*.txt]",
            f"data.cache_dir={tmp_path}/cache",
            f"paths.root={tmp_path}/outputs",
            "device=cpu",
            *overrides,
        ]
        monkeypatch.setattr(sys, "argv", ["lctrain-eval", *arguments])
        main()

    return run
