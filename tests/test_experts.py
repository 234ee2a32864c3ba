"""Tests the number of experts of a token against the sources and the models of transformers."""

import re
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn

from lctrain.experts import experts_per_token, token_shares
from lctrain.flops import FlopCounter
from tests.models.tiny import tiny_config

MODELS = Path(transformers.__file__).parent / "models"
_READ = re.compile(r"config\.((?:ffn_config\.)?\w*(?:top_?k|per_tok|moe_k)\w*)")
_OTHERS = re.compile(r"norm_|group|method|index_|skip_|centroid|samples|audio_config")


def names_in_sources():
    """Returns the names by which models of transformers read their number of experts."""
    names = {}
    for path in sorted(MODELS.glob("*/modeling_*.py")):
        text = path.read_text(encoding="utf-8")
        if re.search(r"^class \w*Experts\(", text, re.MULTILINE):
            read = {name for name in _READ.findall(text) if not _OTHERS.search(name)}
            names |= dict.fromkeys(read, path.parent.name)
    return names


def test_every_name_that_transformers_reads_is_known():
    names = names_in_sources()
    assert {"num_experts_per_tok", "moe_topk", "ffn_config.moe_top_k", "top_k_experts"} <= set(
        names
    )
    for name, family in names.items():
        config = value = type("Config", (), {})()
        for part in name.split(".")[:-1]:
            setattr(value, part, type("Part", (), {})())
            value = getattr(value, part)
        setattr(value, name.rpartition(".")[2], 3)
        assert experts_per_token(config) == 3, (name, family)


def test_layers_may_differ_and_dense_models_have_one():
    config = transformers.HunYuanMoEV1Config(moe_topk=[2, 4])
    assert [experts_per_token(config, layer) for layer in (0, 1, 2)] == [2, 4, 1]
    assert experts_per_token(transformers.LlamaConfig()) == 1
    if hasattr(transformers.PreTrainedConfig, "per_layer_config"):
        given = {1: {"num_experts_per_tok": 5}}
        config = transformers.MixtralConfig(num_hidden_layers=3, per_layer_config=given)
        assert [experts_per_token(config, layer) for layer in range(4)] == [2, 5, 2, 1]
    assert experts_per_token(None) == 1


@pytest.mark.parametrize(
    "family", ["mixtral", "gpt_oss", "hunyuan_v1_moe", "ernie4_5_moe", "granitemoeshared"]
)
def test_shares_are_those_of_the_tokens_that_reach_an_expert(family):
    config = tiny_config(family)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    routed = []

    def record(module, given, named):
        choice = named.get("top_k_index", given[1] if len(given) > 1 else None)
        routed.append((module, choice))

    experts = [m for m in model.modules() if type(m).__name__.endswith("Experts")]
    hooks = [m.register_forward_pre_hook(record, with_kwargs=True) for m in experts]
    with torch.no_grad():
        model(input_ids=torch.arange(3, 10)[None])
    for hook in hooks:
        hook.remove()
    assert routed
    for module, choice in routed:
        tokens, chosen = choice.shape
        assert tokens == 7
        shares = token_shares(module, experts_per_token(config))
        assert set(shares.values()) == {chosen / module.num_experts}
        assert set(shares) == set(map(id, module.parameters()))
    weights = [p for m in experts for p in m.parameters() if p.dim() == 3]  # no biases
    whole = sum(weight.numel() for weight in weights)
    counted = FlopCounter.of(model).matrix_parameters
    for module in experts:
        for weight in module.parameters():
            weight.data = torch.empty(0)
    rest = FlopCounter.of(model).matrix_parameters
    assert counted - rest == whole * chosen / routed[0][0].num_experts


def test_a_list_of_experts_is_shared_too_and_shared_experts_are_not():
    class SharedExperts(nn.Linear):
        pass

    block = nn.ModuleDict(
        {
            "experts": nn.ModuleList(nn.Linear(2, 3, bias=False) for _ in range(8)),
            "shared_experts": SharedExperts(2, 3),
            "gate": nn.Linear(2, 8),
        }
    )
    shares = token_shares(block, 2)
    assert shares == {id(expert.weight): 0.25 for expert in block["experts"]}
