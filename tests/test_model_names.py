"""Tests that names of families and arguments are checked without torch; valid ones pass."""

import pytest
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, CONFIG_MAPPING_NAMES

from lctrain.model_names import check_arguments, check_family, families

SAMPLE = ("llama", "qwen3", "gemma3_text", "deepseek_v3", "gpt_oss", "gpt2", "mixtral", "phi3")


def test_every_family_of_transformers_is_known():
    """CONFIG_MAPPING also holds what this process registered; CONFIG_MAPPING_NAMES does not."""
    assert set(CONFIG_MAPPING_NAMES) <= families()


@pytest.mark.parametrize("model_type", SAMPLE)
def test_every_argument_of_a_family_is_known(model_type):
    check_family(model_type)
    check_arguments(model_type, vars(CONFIG_MAPPING[model_type]()))


def test_unknown_names():
    with pytest.raises(ValueError, match=r"must be a family of transformers, got 'lama'. Did you"):
        check_family("lama")
    with pytest.raises(ValueError, match=r"model.config.num_hiden_layers must be an argument of"):
        check_arguments("llama", ["num_hiden_layers"])
