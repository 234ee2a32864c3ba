"""Tests the config schemas alone; tests/configs tests them together with Hydra."""

import pytest
from omegaconf import OmegaConf

from lctrain.config import AttentionConfig, OptimConfig, TrainConfig, TrainerConfig, to_dataclass


def test_attention_options_are_those_of_patch_model():
    options = AttentionConfig(dropout=0.0, backend="triton", deterministic=True).options()
    assert options == {"dropout": 0.0, "backend": "triton", "deterministic": True}
    assert "dropout" not in AttentionConfig().options()
    options = AttentionConfig(name="dual_chunk", chunk_size=8, scale="yarn").options()
    assert options == {
        "backend": "auto",
        "deterministic": False,
        "chunk_size": 8,
        "scale": "yarn",
    }


def test_root_must_be_the_schema():
    with pytest.raises(ValueError, match="config must be built on TrainConfig, got OptimConfig"):
        to_dataclass(OmegaConf.structured(OptimConfig), TrainConfig)


@pytest.mark.parametrize(
    "name",
    ["accumulate_grad_batches", "log_every_n_steps", "validate_every_n_steps", "num_nodes"],
)
def test_trainer_numbers_below_one(name):
    with pytest.raises(ValueError, match=rf"trainer.{name} must be at least 1, got 0\. \w+"):
        TrainerConfig(**{name: 0})


def test_negative_gradient_clip_val():
    with pytest.raises(ValueError, match=r"gradient_clip_val must be at least 0, got -1.0. Use"):
        TrainerConfig(gradient_clip_val=-1.0)
    config = TrainerConfig(max_steps=1, gradient_clip_val=None, validate_every_n_steps=None)
    assert config.num_nodes == 1


def test_numbers_from_the_command_line_are_checked_too():
    node = OmegaConf.structured(OptimConfig)
    node._set_flag("readonly", False)
    node.learning_rate = -1
    with pytest.raises(ValueError, match=r"optim.learning_rate must be above 0, got -1"):
        to_dataclass(node, OptimConfig)


def test_dataclasses_are_frozen():
    config = to_dataclass(OmegaConf.structured(OptimConfig), OptimConfig)
    with pytest.raises(AttributeError):
        config.learning_rate = 1.0
