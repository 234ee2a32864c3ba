"""Tests which options identify a run, so that a resumed run may not change them."""

from dataclasses import fields

import pytest

from lctrain.config.memory import MemoryConfig
from lctrain.run.identity import MAY_CHANGE, differences, identity_of, may_change, plain_values
from tests.configs.composed import load


def changes(*overrides):
    return differences(identity_of(load(*overrides)), identity_of(load()))


@pytest.mark.parametrize(
    "override",
    [
        "name=other",
        "paths.root=/elsewhere",
        "logger=wandb",
        "trainer.max_steps=7",
        "trainer.max_epochs=2",
        "trainer.log_every_n_steps=3",
        "trainer.devices=2",
        "callbacks.checkpoint.every_n_steps=3",
        "callbacks.checkpoint=null",
        "evaluation.lengths=[8]",
        "export=false",
        "data.num_workers=2",
        "data.cache_dir=/elsewhere",
        "memory=checkpoint",
        "attention.backend=pytorch",
    ],
)
def test_may_change(override):
    assert changes(override) == []


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("seed=3", "seed was 0, is 3"),
        (
            ("memory=checkpoint", "memory.mlp_tokens=64"),
            "memory.mlp_tokens was None, is 64",
        ),
        ("attention=dual_chunk", "attention.name was 'flash', is 'dual_chunk'"),
        ("attention=none", "attention was 'AttentionConfig', is None"),
        ("attention.dropout=0.1", "attention.dropout was None, is 0.1"),
        ("optim.weight_decay=0.2", "optim.weight_decay was 0.1, is 0.2"),
        ("optim.warmup_steps=3", "optim.warmup_steps was None, is 3"),
        ("optim=wsd", "optim.schedule was 'cosine', is 'warmup_stable_decay'"),
        ("trainer.gradient_clip_val=null", "trainer.gradient_clip_val was 1.0, is None"),
        ("trainer.precision=bf16-mixed", "trainer.precision was 'auto', is 'bf16-mixed'"),
        ("data.max_tokens=99", "data.max_tokens was 2048, is 99"),
        ("data.passkey_fraction=0.1", "data.passkey_fraction was 0.0, is 0.1"),
        ("data=packages", "data was 'StdlibData', is 'PackagesData'"),
        ("model.config.hidden_size=64", "model.config.hidden_size was 256, is 64"),
        ("+model.config.head_dim=64", "model.config.head_dim was 'not set', is 64"),
        ("model=tiny", "model.config.num_hidden_layers was 4, is 2"),
        ("model.differential=2", "model.differential was None, is 2"),
    ],
)
def test_must_stay(override, named):
    assert named in changes(*([override] if isinstance(override, str) else override))


def test_unknown_options_are_not_compared():
    assert differences({"new": 1, "seed": 0}, {"old": 2, "seed": 0}) == []


def test_all_of_memory_but_the_tiles_of_mlps_is_free():
    names = {f"memory.{field.name}" for field in fields(MemoryConfig)}
    assert {name for name in names if not may_change(name)} == {"memory.mlp_tokens"}


def test_every_free_option_is_one():
    """Each option that a resumed run may change exists; a misspelt one would have no effect."""
    model = ("model=hf", "model.name_or_path=x", "adapter=lora")
    names = set(_flat(plain_values(load("data=text", "data.files=[x]", *model)))) | {"attention"}
    assert set(MAY_CHANGE) <= names


def _flat(values, prefix=""):
    for key, value in values.items():
        yield f"{prefix}{key}"
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
