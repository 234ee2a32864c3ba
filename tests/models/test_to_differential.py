"""Tests to_differential: an unchanged function, gradients of all new weights, and checkpoints."""

import copy
import subprocess
import sys
import textwrap

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AutoConfig, AutoModelForCausalLM

from lctrain.models import patch_model
from lctrain.models.differential import to_differential
from lctrain.models.differential_configs import differential_config
from tests.forked import run_forked
from tests.models.differential_families import V2, make_differential
from tests.models.families import (
    gradients,
    make_documents,
    make_model,
    outputs,
    packed_outputs,
    separate_outputs,
)
from tests.numerics import assert_equal_in_float64, assert_error_at_most_twice, assert_far_apart


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", V2)
@pytest.mark.usefixtures("float64_stays_float64")
def test_the_function_is_the_old_one(family, dtype):
    plain = make_model(family).to(dtype)
    rows = torch.stack(make_documents([13, 13]))
    expected = outputs(plain, input_ids=rows)
    model = to_differential(plain)
    assert model.dtype == dtype
    assert not model.training
    assert torch.equal(outputs(plain, input_ids=rows), expected)
    exact = outputs(copy.deepcopy(plain).double(), input_ids=rows)
    converted = outputs(model, input_ids=rows)
    with patch_model(model, attention="differential"), patch_model(plain):
        found, flash = (outputs(m, input_ids=rows) for m in (model, plain))
    if dtype == torch.float64:
        assert_equal_in_float64([converted, found], [exact, exact])
    else:
        assert_error_at_most_twice(converted, expected, exact, "transformers' forward")
        assert_error_at_most_twice(found, flash, exact, "outputs")


@pytest.mark.parametrize("family", V2)
@pytest.mark.usefixtures("float64_stays_float64")
def test_gradients_reach_every_weight_and_part_the_branches(family):
    plain, documents = make_model(family).double(), make_documents()
    model = to_differential(plain).train()
    with patch_model(model, attention="differential"):
        _, grads = gradients(model, lambda: packed_outputs(model, documents))
    _, plain_grads = gradients(plain, lambda: separate_outputs(plain, documents))
    assert grads.keys() == {name for name, _ in model.named_parameters()}
    for index in range(2):
        layer = f"model.layers.{index}.self_attn"
        assert grads[f"{layer}.lambda_proj.weight"].norm() > 0
        first, second = grads[f"{layer}.q_proj.weight"].unflatten(0, (4, 2, -1)).unbind(1)
        assert_equal_in_float64(second, -first / 2)
        old = plain_grads[f"{layer}.q_proj.weight"].unflatten(0, (4, -1))
        assert_equal_in_float64(first + second, old)
        old = plain_grads[f"{layer}.v_proj.weight"]
        assert_equal_in_float64(grads[f"{layer}.v_proj.weight"], old)


def test_a_converted_model_trains_away_from_what_it_was():
    model, documents = to_differential(make_model("llama")).train(), make_documents()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    with patch_model(model, attention="differential"):
        for _ in range(10):
            logits = packed_outputs(model, documents)
            losses.append(torch.nn.functional.cross_entropy(logits, torch.cat(documents)))
            losses[-1].backward()
            optimizer.step()
            optimizer.zero_grad()
    assert losses[-1] < 0.9 * losses[0]
    first, second = model.model.layers[0].self_attn.q_proj.weight.unflatten(0, (4, 2, -1)).unbind(1)
    assert_far_apart(first, second)
    assert model.model.layers[0].self_attn.lambda_proj.weight.abs().min() > 0


@pytest.mark.parametrize("family", [name for name in V2 if name != "qwen3"])
@pytest.mark.usefixtures("in_float64")
def test_layers_compute_the_published_definition(family):
    """Layers compute A1 v - sigmoid(x W) A2 v; heads (2 h, 2 h + 1) share a key and a value."""
    model = make_differential(family).double()
    layer = model.model.layers[0].self_attn
    states = torch.randn(1, 11, 32, generator=torch.Generator().manual_seed(0)).double()
    cos, sin = torch.ones(1, 11, 8).double(), torch.zeros(1, 11, 8).double()  # no rotation
    pairs, key_heads, window = 4, 2, V2[family].get("sliding_window", 11)

    query = (layer.q_proj(states)[0]).view(11, pairs, 2, 8)
    key = layer.k_proj(states)[0].view(11, key_heads, 8).repeat_interleave(pairs // key_heads, 1)
    value = layer.v_proj(states)[0].view(11, key_heads, 8).repeat_interleave(pairs // key_heads, 1)
    lam = 1 / (1 + torch.exp(-states[0] @ layer.lambda_proj.weight.T))
    distance = torch.arange(11)[:, None] - torch.arange(11)
    visible = (distance >= 0) & (distance < window)
    heads = [
        scaled_dot_product_attention(query[:, h, b], key[:, h], value[:, h], attn_mask=visible)
        for h in range(pairs)
        for b in range(2)
    ]
    combined = [heads[2 * h] - lam[:, h, None] * heads[2 * h + 1] for h in range(pairs)]
    expected = torch.cat(combined, -1) @ layer.o_proj.weight.T

    with patch_model(model, attention="flash"), patch_out_of_the_way(model):
        found = layer(states, position_embeddings=(cos, sin), attention_mask=None)[0][0]
    assert_equal_in_float64(found, expected)


class patch_out_of_the_way:
    """A context that removes the spec from patched layers, so that they can be called alone."""

    def __init__(self, model):
        self.layers = [layer.self_attn for layer in model.model.layers]

    def __enter__(self):
        self.specs = [vars(layer).pop("lctrain_attention_spec") for layer in self.layers]

    def __exit__(self, *_):
        for layer, spec in zip(self.layers, self.specs, strict=True):
            layer.lctrain_attention_spec = spec


@pytest.mark.parametrize("family", V2)
def test_config_and_weights(family):
    plain = make_model(family)
    plain.generation_config.max_new_tokens = 7
    model = to_differential(plain.train())
    assert model.training
    assert model.generation_config.max_new_tokens == 7
    assert model.config.model_type == f"lctrain_{family}_diff"
    assert model.config.num_attention_heads == 2 * plain.config.num_attention_heads
    assert model.config.num_key_value_heads == plain.config.num_key_value_heads
    assert plain.config.model_type == family
    old, new = dict(plain.named_parameters()), dict(model.named_parameters())
    assert new.keys() - old.keys() == {
        f"model.layers.{i}.self_attn.lambda_proj.weight" for i in (0, 1)
    }
    assert old.keys() < new.keys()
    assert not {p.data_ptr() for p in old.values()} & {p.data_ptr() for p in new.values()}


def test_frequencies_and_weights_keep_their_dtypes(tmp_path):
    """Loaded in bfloat16, RoPE frequencies stay float32, and so may norms."""
    make_model("llama").save_pretrained(tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    plain.model.norm.float()
    assert plain.model.rotary_emb.inv_freq.dtype == torch.float32
    model = to_differential(plain)
    for kind in ("named_buffers", "named_parameters"):
        old, new = dict(getattr(plain, kind)()), dict(getattr(model, kind)())
        assert all(new[name].dtype == tensor.dtype for name, tensor in old.items())
        assert not any(tensor.is_meta for tensor in new.values())
    assert torch.equal(model.model.rotary_emb.inv_freq, plain.model.rotary_emb.inv_freq)


def test_tied_embeddings_stay_tied():
    plain, rows = make_model("llama", tie_word_embeddings=True), make_documents([9])[0][None]
    model = to_differential(plain)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(outputs(model, input_ids=rows), outputs(plain, input_ids=rows))


def test_round_trip_in_a_fresh_process(tmp_path):
    rows, exact, expected = torch.stack(make_documents([9, 9])), {}, {}
    for family in V2:
        model = to_differential(make_model(family))
        model.save_pretrained(tmp_path / family)
        with patch_model(model, attention="differential"), torch.no_grad():
            expected[family] = outputs(model, input_ids=rows)
            exact[family] = outputs(copy.deepcopy(model).double(), input_ids=rows)
    torch.save(rows, tmp_path / "rows.pt")
    code = f"""
        import lctrain
        from transformers import AutoConfig, AutoModelForCausalLM
        import torch
        found, rows = {{}}, torch.load("rows.pt")
        for family in {tuple(V2)}:
            config = AutoConfig.from_pretrained(family)
            assert config.model_type == f"lctrain_{{family}}_diff", config
            model = AutoModelForCausalLM.from_pretrained(family)
            with lctrain.patch_model(model, attention="differential"), torch.no_grad():
                found[family] = model(rows).logits
                model.generate(rows[:1], max_new_tokens=2, do_sample=False)
            model = AutoModelForCausalLM.from_config(config)
            assert model.model.layers[0].self_attn.lambda_proj.weight.std() > 0.01
        torch.save(found, "found.pt")
    """
    (tmp_path / "load.py").write_text(textwrap.dedent(code))
    run_forked(str(tmp_path / "load.py"), cwd=tmp_path)
    for family, found in torch.load(tmp_path / "found.pt").items():
        assert_error_at_most_twice(found, expected[family], exact[family], family)


@pytest.mark.parametrize(
    "first",
    [
        "from transformers import AutoModelForCausalLM; import lctrain",
        "import lctrain; from transformers.models.llama.configuration_llama import LlamaConfig",
        "import lctrain; from transformers import AutoTokenizer",
    ],
    ids=["transformers_first", "a_config_first", "a_tokenizer_first"],
)
def test_registered_whatever_is_imported_first(first, tmp_path):
    make_differential("llama").config.save_pretrained(tmp_path)
    code = f"""
        {first}
        from transformers import AutoConfig, AutoModelForCausalLM
        config = AutoConfig.from_pretrained({str(tmp_path)!r})
        assert type(AutoModelForCausalLM.from_config(config)).__name__.startswith("LlamaDiff")
        assert not hasattr(AutoConfig.from_pretrained, "__wrapped__") or (
            "lctrain" not in AutoConfig.from_pretrained.__func__.__code__.co_filename
        )
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_other_families_are_registered_as_before(tmp_path):
    make_model("llama").save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).model_type == "llama"
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path)).__name__ == "LlamaForCausalLM"


@pytest.mark.parametrize("version", [1, 3, "2"])
def test_other_versions(version):
    with pytest.raises(ValueError, match=f"version must be 2, got {version!r}. .*model=diff_llama"):
        to_differential(make_model("llama"), version=version)


@pytest.mark.parametrize("family", ["gemma2", "phi3", "bert"])
def test_other_models(family):
    with pytest.raises(ValueError, match=r"model must be one of LlamaForCausalLM, .*, got "):
        to_differential(make_model(family))


def test_models_that_are_not_plain():
    with pytest.raises(ValueError, match=r"got LlamaDifferentialForCausalLM.*differential already"):
        to_differential(make_differential("llama"))
    model = make_model("llama")
    with patch_model(model), pytest.raises(ValueError, match=r"must not be patched.*unpatch\(\)"):
        to_differential(model)
    model.model.norm.weight = torch.nn.Parameter(
        torch.ones(32, dtype=torch.int8), requires_grad=False
    )
    with pytest.raises(
        ValueError, match=r"floating-point weights, got a quantized one. Convert it"
    ):
        to_differential(model)
    with pytest.raises(
        ValueError, match=r"weights in memory, got weights on the meta device. Load"
    ):
        to_differential(make_model("llama").to("meta"))


def test_heads_that_do_not_pair():
    with pytest.raises(ValueError, match=r"multiple of twice num_key_value_heads, got 6 and 2"):
        make_differential("llama", num_attention_heads=6)
    with pytest.raises(ValueError, match=r"families llama, mistral, .*got gemma2.*diff_llama"):
        differential_config(make_model("gemma2").config)
