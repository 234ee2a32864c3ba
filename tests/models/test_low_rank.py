"""Tests the adapters that lctrain adds to a pretrained model, and the models that take none."""

import importlib.util

import pytest
import torch

from lctrain import PackedBatch
from lctrain.build import build_model, check_model
from lctrain.config import AdapterConfig, AttentionConfig, PretrainedModelConfig
from lctrain.config.adapter import require_packages
from lctrain.models import patch_model
from lctrain.models.low_rank import (
    adapter_state,
    add_adapter,
    leave_casts_to_autocast,
    load_adapter_state,
    require_trainable_weights,
)
from lctrain.module import LongContextModule
from tests.configs.composed import load
from tests.training import loader, make_batch, make_trainer

peft = pytest.importorskip("peft")


@pytest.fixture
def base(make_llama, tmp_path):
    make_llama().save_pretrained(tmp_path)
    return PretrainedModelConfig(name_or_path=str(tmp_path))


def trained_dtypes(model):
    return {p.dtype for p in model.parameters() if p.requires_grad}


def frozen_dtypes(model):
    return {p.dtype for p in model.parameters() if not p.requires_grad}


def test_the_frozen_weights_are_bfloat16_and_the_adapters_float32(base):
    model = build_model(base, 97, AdapterConfig(rank=2, targets=["q_proj", "v_proj"]))
    assert frozen_dtypes(model) == {torch.bfloat16}
    assert trained_dtypes(model) == {torch.float32}
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    assert len(names) == 2 * 2 * 2  # layers, targets, matrices
    assert all(".q_proj.lora_" in name or ".v_proj.lora_" in name for name in names)


@pytest.mark.parametrize(("option", "dtype"), [(None, torch.float32), ("bfloat16", torch.bfloat16)])
def test_the_dtype_of_weights_without_adapters(base, option, dtype):
    config = PretrainedModelConfig(name_or_path=base.name_or_path, dtype=option)
    assert trained_dtypes(build_model(config, 97)) == {dtype}


def test_weights_of_random_models_have_the_dtype_too():
    config = load("model=tiny", "model.dtype=bfloat16")
    assert trained_dtypes(build_model(config.model, 300)) == {torch.bfloat16}


def test_weights_are_made_on_the_default_device():
    config = load("model=tiny")
    with torch.device("meta"):
        model = build_model(config.model, 300)
    assert {p.device.type for p in model.parameters()} == {"meta"}


def test_adapters_train_on_packs_with_the_fused_loss_in_bfloat16(base):
    model = build_model(base, 97, AdapterConfig(dora=True))
    documents = [torch.randint(3, 97, (length,)) for length in (5, 9, 3)]
    with patch_model(model.get_base_model(), fused=True, loss=True):
        output = model(**PackedBatch.from_documents(documents).arguments())
        output.loss.backward()
    assert output.logits is None
    found = [p.grad for name, p in model.named_parameters() if "lora_B" in name]
    assert found
    assert all(gradient is not None and gradient.abs().max() > 0 for gradient in found)


def test_the_state_is_that_of_the_adapters_and_comes_back(make_llama):
    config = AdapterConfig(rank=2, dora=True)
    torch.manual_seed(1)
    model = add_adapter(make_llama(), config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter)
    state = {name: value.clone() for name, value in adapter_state(model).items()}
    assert len(state) == 2 * 7 * 3  # layers, linear layers, two matrices and the norms
    again = add_adapter(make_llama(), config)
    load_adapter_state(again, state)
    tokens = torch.arange(3, 20)[None]
    with torch.no_grad():
        assert torch.equal(again.eval()(tokens).logits, model.eval()(tokens).logits)
    other = add_adapter(make_llama(), AdapterConfig(rank=3))
    with pytest.raises(ValueError, match=r"must hold adapters of this model's targets and rank"):
        load_adapter_state(other, state)


def test_adapters_cast_their_inputs_again_after_mixed_precision(base, tmp_path):
    model = build_model(base, 97, AdapterConfig(rank=2))
    module = LongContextModule(model)
    trainer = make_trainer(tmp_path, max_steps=1, precision="bf16-mixed")
    seen = []
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    hook = layer.register_forward_hook(lambda *given: seen.append(layer.cast_input_dtype_enabled))
    trainer.fit(module, loader([make_batch((5, 9))]))
    hook.remove()
    assert seen
    assert not any(seen)
    model.eval()(torch.arange(3, 9)[None])  # without autocast, dtypes would differ


def test_adapters_keep_no_float32_copy_of_their_inputs(make_llama):
    """peft casts the input to float32, and autocast casts it back: the same values, kept twice."""
    model = make_llama().to(torch.bfloat16)
    adapted = add_adapter(model, AdapterConfig(rank=2, dropout=0.5)).train()
    layer = adapted.get_base_model().model.layers[0].self_attn.q_proj
    torch.nn.init.normal_(layer.lora_B["default"].weight)
    x = torch.randn(1, 64, layer.in_features, dtype=torch.bfloat16, requires_grad=True)

    def step():
        kept = []
        hooks = torch.autograd.graph.saved_tensors_hooks(
            lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor
        )
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16), hooks:
            loss = layer(x).float().sum()
        weights = [x, *(p for p in layer.parameters() if p.requires_grad)]
        large = [one for one in kept if one.dtype == torch.float32 and one.shape == x.shape]
        return torch.autograd.grad(loss, weights), large

    expected, copies = step()
    assert copies
    leave_casts_to_autocast(adapted)
    found, copies = step()
    assert not copies
    assert all(map(torch.equal, found, expected))


def test_unknown_targets_are_named_before_the_weights_are_loaded(base):
    adapter = AdapterConfig(targets=["query"])
    with pytest.raises(ValueError, match=r"adapter\.targets must name .*down_proj, .* got query"):
        check_model(base, AttentionConfig(), adapter=adapter)


@pytest.mark.parametrize(
    ("method", "reason"),
    [
        ("gptq", "peft cannot merge adapters into GPTQ"),
        ("awq", "peft cannot merge adapters into AWQ"),
        ("fp8", "round activations to float8"),
        ("compressed-tensors", "bitsandbytes and torchao only"),
    ],
)
@pytest.mark.parametrize("adapter", [None, AdapterConfig()], ids=["weights", "adapter"])
def test_quantized_weights_that_are_refused(make_llama, tmp_path, method, reason, adapter):
    make_llama().save_pretrained(tmp_path)
    from transformers import AutoConfig

    architecture = AutoConfig.from_pretrained(tmp_path)
    architecture.quantization_config = {"quant_method": method, "bits": 4}
    architecture.save_pretrained(tmp_path)
    config = PretrainedModelConfig(name_or_path=str(tmp_path))
    with pytest.raises(ValueError, match=rf"in {method}: .*{reason}.* bfloat16"):
        check_model(config, None, adapter=adapter)


def test_a_base_in_four_bits_needs_adapters(make_llama):
    architecture = make_llama().config
    architecture.quantization_config = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    with pytest.raises(ValueError, match=r"weights that an optimizer can change.*adapter=lora"):
        require_trainable_weights(architecture, has_adapter=False)
    require_trainable_weights(architecture, has_adapter=True)


@pytest.mark.parametrize(
    ("quantize", "package"), [(None, "peft"), ("nf4", "bitsandbytes"), ("int8", "torchao")]
)
def test_a_missing_package_is_named(monkeypatch, quantize, package):
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == package else object()
    )
    with pytest.raises(ValueError, match=rf"needs the package {package}, .*pip install {package}"):
        require_packages(AdapterConfig(quantize=quantize))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("model=tiny", "adapter=lora"), r"adapter must be none for a model with random weights"),
        (("adapter=lora", "adapter.rank=0"), r"adapter\.rank must be at least 1, got 0"),
        (("adapter=lora", "adapter.alpha=0"), r"adapter\.alpha must be at least 1, got 0"),
        (("adapter=lora", "adapter.dropout=1"), r"adapter\.dropout must be in \[0, 1\), got 1.0"),
        (("adapter=lora", "adapter.targets=[]"), r"adapter\.targets must name at least one"),
        (
            ("adapter=lora", "adapter.targets=[all-linear,q_proj]"),
            r"adapter\.targets must not list all-linear with other names",
        ),
        (("adapter=lora", "adapter.quantize=fp4"), r"adapter\.quantize must be null, nf4 or int8"),
        (
            ("adapter=lora", "adapter.quantize=nf4", "adapter.merge=true"),
            r"adapter\.merge must be false with adapter\.quantize=nf4",
        ),
        (
            ("model.dtype=float16",),
            r"model\.dtype must be null, float32 or bfloat16, got 'float16'",
        ),
    ],
)
def test_settings_that_are_refused(overrides, message):
    with pytest.raises(ValueError, match=message):
        load(*overrides)


def test_adapters_load_beside_the_extra_keys_of_quantized_weights(make_llama):
    """bitsandbytes adds keys to the state dict, which torch's strict loading refuses."""
    model = add_adapter(make_llama(), AdapterConfig(rank=2))

    def add_key(module, state, prefix, metadata):
        state[f"{prefix}absmax"] = torch.ones(1)

    model.model.model.layers[0].self_attn.q_proj.base_layer.register_state_dict_post_hook(add_key)
    module = LongContextModule(model)
    saved = {f"model.{name}": x + 1 for name, x in adapter_state(model).items()}
    checkpoint = {"state_dict": dict(saved)}
    module.on_load_checkpoint(checkpoint)
    module.load_state_dict(checkpoint["state_dict"], strict=True)
    assert all(torch.equal(x, saved[f"model.{name}"]) for name, x in adapter_state(model).items())
