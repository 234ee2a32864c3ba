"""Tests fused=True and loss=True: same numbers and names, reversible, no global change."""

import copy
import importlib
import warnings

import pytest
import torch
from torch import nn

import lctrain
from lctrain.batch import PackedBatch
from lctrain.models.fused import find_activation, require_own_modules
from tests.models.families import (
    SIZES,
    exact_gradients,
    gradients,
    make_documents,
    make_model,
    packed_outputs,
)
from tests.numerics import (
    assert_equal_in_float64,
    assert_error_at_most_twice,
    assert_far_apart,
)

# Classes that are swapped, and their number per model of two layers.
SWAPS = {
    "llama": {"RMSNorm": 5, "Attention": 2, "MLP": 2, "DecoderLayer": 2},
    "qwen2": {"RMSNorm": 5, "Attention": 2, "MLP": 2, "DecoderLayer": 2},
    "qwen3": {"RMSNorm": 13, "Attention": 2, "MLP": 2, "DecoderLayer": 2},
    "mistral": {"RMSNorm": 5, "Attention": 2, "MLP": 2, "DecoderLayer": 2},
    "gemma2": {"RMSNorm": 9, "Attention": 2, "MLP": 2},
    "gemma3": {"RMSNorm": 17, "Attention": 2, "MLP": 2},
    "phi3": {"RMSNorm": 5, "Attention": 2, "MLP": 2},
    "mixtral": {"RMSNorm": 5, "Attention": 2, "DecoderLayer": 2},
}
FAMILIES = tuple(SWAPS)


def make(family: str) -> nn.Module:
    """Returns a tiny float32 model of a family, including gemma3 and mixtral."""
    if family not in ("gemma3", "mixtral"):
        return make_model(family, attn_implementation="eager")
    common = {**SIZES, "attn_implementation": "eager"}
    import transformers

    torch.manual_seed(0)
    if family == "gemma3":
        config = transformers.Gemma3TextConfig(
            **common, head_dim=8, query_pre_attn_scalar=16, sliding_window=4
        )
        return transformers.Gemma3ForCausalLM(config).eval()
    config = transformers.MixtralConfig(
        **common, num_local_experts=2, num_experts_per_tok=2, experts_implementation="eager"
    )
    return transformers.MixtralForCausalLM(config).eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_outputs_and_gradients_are_equal_within_rounding(family) -> None:
    documents = make_documents()

    def run(precision: torch.dtype, fused: bool) -> list[torch.Tensor]:
        model = make(family).to(precision)
        with lctrain.patch_model(model, fused=fused):
            out, grads = gradients(model, lambda: packed_outputs(model, documents))
        return [out, *(grads[name] for name in sorted(grads))]

    triples = zip(
        run(torch.float32, True),
        run(torch.float32, False),
        run(torch.float64, False),
        strict=True,
    )
    # Errors of one parameter's gradient are few numbers: the sum over all of them is judged.
    fused, plain, exact = (
        torch.cat([t.flatten() for t in side]) for side in zip(*triples, strict=True)
    )
    assert_error_at_most_twice(fused, plain, exact)


@pytest.mark.parametrize("family", FAMILIES)
def test_swaps_what_it_knows_and_gives_it_back(family) -> None:
    model = make(family)
    documents = make_documents()
    classes = [type(module) for module in model.modules()]
    names = list(model.state_dict())
    with lctrain.patch_model(model):
        before = packed_outputs(model, documents)
    handle = lctrain.patch_model(model, fused=True)
    found: dict[str, int] = {}
    for _, own, _ in handle.fused.swapped:
        suffix = next(end for end in SWAPS["llama"] if own.__name__.endswith(end))
        found[suffix] = found.get(suffix, 0) + 1
    assert found == SWAPS[family]
    assert list(model.state_dict()) == names
    assert all(
        isinstance(module, own) for module, own in zip(model.modules(), classes, strict=True)
    )
    assert "RMSNorm" in repr(handle)
    packed_outputs(model, documents)
    handle.unpatch()
    assert [type(module) for module in model.modules()] == classes
    with lctrain.patch_model(model):
        assert torch.equal(packed_outputs(model, documents), before)


def test_another_model_of_the_family_is_left_alone() -> None:
    module = importlib.import_module("transformers.models.llama.modeling_llama")
    rotation, forward = module.apply_rotary_pos_emb, module.LlamaRMSNorm.forward
    other = make("llama")
    with lctrain.patch_model(make("llama"), fused=True):
        assert all(not type(m).__name__.startswith("Fused") for m in other.modules())
        assert module.apply_rotary_pos_emb is rotation
        assert module.LlamaRMSNorm.forward is forward


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "phi3"])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_runs_every_layer_twice(family, use_reentrant) -> None:
    """Since transformers 5.23, a patched layer forward would silently disable checkpointing."""
    model = make(family).train()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    with lctrain.patch_model(model, fused=True):
        calls = []
        for module in model.modules():
            if type(module).__name__.endswith("MLP"):
                module.down_proj.register_forward_pre_hook(lambda *_: calls.append(1))
        out = packed_outputs(model, make_documents())
        assert len(calls) == 2
        out.sum().backward()
        assert len(calls) == 4


def test_checkpoint_stops_before_the_last_product() -> None:
    """Recomputation stops before the down projection, because the backward needs only its input."""
    model = make("llama").train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    with lctrain.patch_model(model, fused=True):
        out = packed_outputs(model, make_documents())
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            out.sum().backward()
    names = [event.name for event in profile.events()]
    assert "lctrain::gated" in names
    assert "lctrain::gated_linear" not in names


def test_gradient_checkpointing_changes_no_bit() -> None:
    model = make("llama").train()
    documents = make_documents()
    with lctrain.patch_model(model, fused=True):
        _, plain = gradients(model, lambda: packed_outputs(model, documents))
        model.gradient_checkpointing_enable({"use_reentrant": False})
        _, checkpointed = gradients(model, lambda: packed_outputs(model, documents))
    for name, gradient in plain.items():
        assert torch.equal(gradient, checkpointed[name]), name


def test_autocast_gives_float32_gradients() -> None:
    model = make("qwen3").train()
    with lctrain.patch_model(model, fused=True), torch.autocast("cpu", dtype=torch.bfloat16):
        out = packed_outputs(model, make_documents())
    out.float().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())


def test_adapters_of_peft_are_trained() -> None:
    peft = pytest.importorskip("peft")
    model = make("llama")
    lctrain.patch_model(model, fused=True)
    targets = ["q_proj", "up_proj", "down_proj"]
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=targets)).train()
    packed_outputs(adapted, make_documents()).sum().backward()
    trained = {n: p for n, p in adapted.named_parameters() if p.requires_grad}
    assert len(trained) == 12
    assert all(p.grad is not None for p in trained.values())


def test_compiled_model_gives_the_same() -> None:
    model = make("qwen3")
    documents = make_documents()
    with lctrain.patch_model(model, fused=True):
        expected = packed_outputs(model, documents)
        ((exact, _),) = exact_gradients(model, [documents])
        compiled = torch.compile(model, backend="eager")
        assert_error_at_most_twice(packed_outputs(compiled, documents), expected, exact)


def test_copy_of_a_patched_model_works() -> None:
    model = make("llama")
    documents = make_documents()
    with lctrain.patch_model(model, fused=True):
        expected = packed_outputs(model, documents)
        assert torch.equal(packed_outputs(copy.deepcopy(model), documents), expected)


def test_activations_are_known_by_what_they_compute() -> None:
    from transformers.activations import ACT2FN

    names = {"silu": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "relu": None}
    assert {name: find_activation(ACT2FN[name]) for name in names} == names


@pytest.mark.parametrize(("family", "name"), [("llama", "act_fn"), ("phi3", "activation_fn")])
@pytest.mark.usefixtures("in_float64")
def test_an_activation_replaced_after_the_patch_is_used(family, name) -> None:
    model, documents = make_model(family), make_documents()
    with lctrain.patch_model(model, fused=True):
        fused = packed_outputs(model, documents)
        for module in model.modules():
            if hasattr(module, name):
                setattr(module, name, nn.ReLU())
        found = packed_outputs(copy.deepcopy(model), documents)
    with lctrain.patch_model(model):
        expected = packed_outputs(model, documents)
    assert_equal_in_float64(found, expected)
    assert_far_apart(fused, expected)


def test_kernels_of_the_hub_are_refused() -> None:
    model = make("llama")
    model._use_kernels = True
    with pytest.raises(ValueError, match="model must not use kernels from the hub"):
        lctrain.patch_model(model, fused=True)


@pytest.mark.parametrize(
    ("module", "name"),
    [("llama", "LlamaRMSNorm"), ("llama", "apply_rotary_pos_emb"), ("phi3", "Phi3MLP")],
)
def test_modules_that_another_library_replaced_are_refused(module, name, monkeypatch) -> None:
    """Liger-Kernel replaces them for the whole process."""
    home = importlib.import_module(f"transformers.models.{module}.modeling_{module}")
    model = make("llama")
    theirs = type("Theirs", (), {"__module__": "liger_kernel.transformers"})
    monkeypatch.setattr(home, name, theirs)
    message = rf"its own {name} for fused=True, got one of liger_kernel.transformers. Do not"
    with pytest.raises(ValueError, match=message):
        lctrain.patch_model(model, fused=True)


def test_functions_that_hugging_face_s_kernels_wraps_are_transformers_own(monkeypatch) -> None:
    home = importlib.import_module("transformers.models.llama.modeling_llama")
    wrapped = type("Func", (), {"__module__": "kernels.layer.layer"})
    monkeypatch.setattr(home, "apply_rotary_pos_emb", wrapped)
    require_own_modules()


def test_a_forward_replaced_on_the_module_is_kept_with_a_warning() -> None:
    """Liger-Kernel patches a built model so."""
    model = make("llama")
    norm = model.model.norm
    calls = []

    def forward(states):
        calls.append(states.shape)
        return type(norm).forward(norm, states)

    norm.forward = forward
    with pytest.warns(UserWarning, match="1 modules keep their forward.*LlamaRMSNorm. Patch"):
        handle = lctrain.patch_model(model, fused=True)
    with handle:
        packed_outputs(model, make_documents())
        assert len(calls) == 1
        assert norm not in [module for module, *_ in handle.fused.swapped]
    assert norm.forward is forward


@pytest.mark.parametrize("name", ["fused", "loss"])
def test_flags_must_be_bools(name) -> None:
    with pytest.raises(ValueError, match=f"{name} must be True or False"):
        lctrain.patch_model(make("llama"), **{name: "yes"})


def packed_labels() -> dict:
    """Returns a pack in transformers' format; labels are unshifted, -100 at document starts."""
    documents = make_documents()
    batch = PackedBatch.from_documents(documents)
    labels = batch.input_ids.clone()
    labels[0, batch.cu_seqlens[:-1].long()] = -100
    return batch.model_kwargs() | {"labels": labels}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.usefixtures("in_float64")
def test_loss_without_logits_is_the_models_own(family) -> None:
    arguments = packed_labels()
    losses, grads = [], []
    for loss in (False, True):
        model = make(family).double().train()
        with lctrain.patch_model(model, loss=loss):
            output = model(**arguments)
        assert (output.logits is None) == loss
        output.loss.backward()
        losses.append(output.loss.detach())
        grads.append([p.grad for p in model.parameters()])
    assert_equal_in_float64(losses[1].double(), losses[0].double())
    for ours, theirs in zip(*reversed(grads), strict=True):
        # transformers computes its loss in float32, also of float64 logits
        assert_equal_in_float64(ours, theirs)


@pytest.mark.parametrize("items", [7, torch.tensor(7)], ids=["int", "tensor"])
@pytest.mark.usefixtures("in_float64")
def test_loss_divides_by_the_items_of_the_batch(items) -> None:
    arguments = packed_labels() | {"num_items_in_batch": items}
    model = make("llama").train()
    with lctrain.patch_model(model):
        expected = model(**arguments).loss
    with lctrain.patch_model(model, loss=True):
        assert_equal_in_float64(model(**arguments).loss, expected)


def test_a_loss_function_of_the_user_is_followed() -> None:
    model = make("llama").train()
    model.loss_function = lambda logits, labels, vocab_size, **_: logits.sum() * 0 + 42
    with lctrain.patch_model(model, loss=True):
        assert model(**packed_labels()).loss.item() == 42


def test_evaluation_and_calls_without_labels_have_logits() -> None:
    arguments = packed_labels()
    model = make("llama").eval()
    own = type(model)
    handle = lctrain.patch_model(model, loss=True)
    assert model(**arguments).logits is not None
    model.train()
    del arguments["labels"]
    assert model(**arguments).logits is not None
    assert isinstance(model, own)
    handle.unpatch()
    assert type(model) is own


def test_signature_still_names_the_labels() -> None:
    """transformers' Trainer drops columns that the signature of forward does not name."""
    import inspect

    model = make("llama")
    with lctrain.patch_model(model, loss=True):
        assert {"input_ids", "labels"} <= set(inspect.signature(model.forward).parameters)


def test_loss_of_an_encoder_is_refused() -> None:
    with pytest.raises(ValueError, match="loss=True needs a causal language model"):
        lctrain.patch_model(make_model("bert"), loss=True)


def test_a_class_changed_since_is_left_with_a_warning() -> None:
    model = make("llama")
    handle = lctrain.patch_model(model, fused=True)
    norm = model.model.norm
    norm.__class__ = type("Sharded", (type(norm),), {})
    with pytest.warns(UserWarning, match="keeps its fused forward"):
        handle.unpatch()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        handle.unpatch()


def test_training_runs_swap_unless_told_not_to() -> None:
    from lctrain.config import AttentionConfig
    from lctrain.module import LongContextModule

    for fused in (True, False):
        module = LongContextModule(make("llama"), attention=AttentionConfig(fused=fused))
        module.configure_model()
        assert (module.patch_handle.fused is not None) == fused
