"""Compares patched differential models with transformers' forwards: packs, caches and dropout."""

import copy
import io

import pytest
import torch
from transformers import AutoModelForCausalLM

from lctrain.attention import is_patched
from lctrain.models import patch_model
from tests.models.differential_families import DIFFERENTIAL, FEW, V1, V2, make_differential
from tests.models.families import (
    gradients,
    make_documents,
    make_model,
    outputs,
    packed_outputs,
    padded,
    separate_outputs,
)
from tests.models.properties import (
    assert_compiles_without_breaks,
    assert_others_keep_every_bit,
    logits_in_pieces,
)
from tests.numerics import assert_equal_in_float64, assert_error_at_most_twice

DIFFERENTIALLY = {"attention": "differential"}


def flattened(grads):
    return torch.cat([grads[name].flatten() for name in sorted(grads)])


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("family", DIFFERENTIAL)
@pytest.mark.usefixtures("float64_stays_float64")
def test_outputs_and_every_gradient_equal_the_unpatched_model_s(family, implementation):
    model = make_differential(family, attn_implementation=implementation)
    exact, rows = copy.deepcopy(model).double(), torch.stack(make_documents([13, 13]))
    plain, plain_grads = gradients(model, lambda: outputs(model, input_ids=rows))
    reference, reference_grads = gradients(exact, lambda: outputs(exact, input_ids=rows))
    with patch_model(model, **DIFFERENTIALLY), patch_model(exact, **DIFFERENTIALLY):
        found, grads = gradients(model, lambda: outputs(model, input_ids=rows))
        exactly, exact_grads = gradients(exact, lambda: outputs(exact, input_ids=rows))

    assert_error_at_most_twice(found, plain, reference, "outputs")
    assert_equal_in_float64(exactly, reference)
    names = {name for name, _ in model.named_parameters()}
    assert grads.keys() == plain_grads.keys() == names
    for name, grad in reference_grads.items():
        assert grad.norm() > 0, name
        assert_equal_in_float64(exact_grads[name], grad, name)
    assert_error_at_most_twice(
        flattened(grads), flattened(plain_grads), flattened(reference_grads), "gradients"
    )


@pytest.mark.parametrize("family", DIFFERENTIAL)
@pytest.mark.usefixtures("float64_stays_float64")
def test_a_pack_gives_what_its_documents_give_one_by_one(family):
    model, documents = make_differential(family).double(), make_documents()
    plain, plain_grads = gradients(model, lambda: separate_outputs(model, documents))
    with patch_model(model, **DIFFERENTIALLY):
        found, grads = gradients(model, lambda: packed_outputs(model, documents))
    assert_equal_in_float64(found, plain)
    for name, grad in plain_grads.items():
        assert_equal_in_float64(grads[name], grad)


@pytest.mark.parametrize("family", FEW)
def test_changing_one_document_keeps_every_bit_of_the_others(family):
    model, documents = make_differential(family), make_documents()
    assert_others_keep_every_bit(model, documents, **DIFFERENTIALLY)


@pytest.mark.parametrize("family", DIFFERENTIAL)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.usefixtures("in_float64")
def test_padding_is_never_seen(family, side):
    model, documents = make_differential(family), make_documents([9, 5, 1])
    input_ids, mask = padded(documents, side)
    expected = separate_outputs(model, documents)
    with patch_model(model, **DIFFERENTIALLY):
        found = outputs(model, input_ids=input_ids, attention_mask=mask)[mask.bool()]
    assert_equal_in_float64(found, expected)


@pytest.mark.parametrize("family", DIFFERENTIAL)
@pytest.mark.usefixtures("in_float64")
def test_generate_gives_the_unpatched_model_s_tokens_and_logits(family):
    model = make_differential(family)
    input_ids, mask = padded(make_documents([9, 5]), "left")
    options = {
        "attention_mask": mask,
        "max_new_tokens": 8,
        "min_new_tokens": 8,
        "do_sample": False,
        "output_logits": True,
        "return_dict_in_generate": True,
    }
    expected = model.generate(input_ids, **options)
    with patch_model(model, **DIFFERENTIALLY):
        found = model.generate(input_ids, **options)
    assert torch.equal(found.sequences, expected.sequences)
    assert_equal_in_float64(torch.stack(found.logits), torch.stack(expected.logits))


@pytest.mark.parametrize("family", [name for name in DIFFERENTIAL if name != "mistral"])
@pytest.mark.usefixtures("in_float64")
def test_prefill_in_pieces(family):
    model = make_differential(family)
    input_ids, mask = padded(make_documents([20, 12]), "left")
    with patch_model(model, **DIFFERENTIALLY), torch.no_grad():
        expected = model(input_ids, attention_mask=mask, use_cache=False).logits
        found = logits_in_pieces(model, input_ids, mask, [7, 1, 12])
    real = mask.bool()
    assert_equal_in_float64(found[real], expected[real])


@pytest.mark.parametrize("family", FEW)
def test_dropout_in_training_only_and_replayed_by_checkpointing(family):
    model, documents = make_differential(family), make_documents()

    def step(seed=5):
        torch.manual_seed(seed)
        return gradients(model, lambda: packed_outputs(model, documents))

    plain = packed_outputs_of_patched(model, documents)
    with patch_model(model, **DIFFERENTIALLY, dropout=0.3):
        assert torch.equal(step()[0], plain)
        model.train()
        dropped, grads = step()
        assert not torch.equal(dropped, plain)
        assert not torch.equal(dropped, step(seed=6)[0])
        for use_reentrant in (True, False):
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
            again, again_grads = step()
            assert torch.equal(again, dropped)
            assert all(torch.equal(again_grads[name], grad) for name, grad in grads.items())


def packed_outputs_of_patched(model, documents):
    with patch_model(model, **DIFFERENTIALLY):
        return packed_outputs(model, documents).detach()


def test_dropout_of_the_config_and_the_option_that_wins():
    documents = make_documents()
    model = make_differential("llama", attention_dropout=0.3).train()
    found = []
    for options in ({}, {"dropout": 0.3}, {"dropout": 0.0}):
        torch.manual_seed(5)
        with patch_model(model, **DIFFERENTIALLY, **options):
            found.append(packed_outputs(model, documents))
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


@pytest.mark.usefixtures("in_float64")
def test_dropout_is_that_of_one_attention_over_all_heads_of_version_2():
    """Branch b of pair h draws the dropout mask of query head 2 h + b."""
    model, documents, found = make_differential("llama").train(), make_documents(), []
    for attention in ("differential", "flash"):
        torch.manual_seed(5)
        with patch_model(model, attention=attention, dropout=0.3):
            found.append(packed_outputs(model, documents))
    assert_equal_in_float64(*found)


@pytest.mark.parametrize("family", FEW)
def test_branches_draw_their_own_masks(family, monkeypatch):
    """Equal branches with lambda 1 cancel, unless their dropout masks differ."""
    from lctrain_kernels.differential import api

    attend, seen = api.diff_attn_pack_func, []

    def record(q1, q2, k1, k2, v, lam, *args, **kwargs):
        out, _, _ = attend(q1, q1, k1, k1, v, torch.ones(()), *args, **kwargs)
        seen.append(out.abs().amax())
        return attend(q1, q2, k1, k2, v, lam, *args, **kwargs)

    monkeypatch.setattr(api, "diff_attn_pack_func", record)
    model = make_differential(family).train()
    for dropout, cancels in ((0.0, True), (0.3, False)):
        seen.clear()
        with patch_model(model, **DIFFERENTIALLY, dropout=dropout):
            packed_outputs(model, make_documents())
        assert len(seen) == 2
        assert all((found == 0) == cancels for found in seen)


@pytest.mark.parametrize("family", DIFFERENTIAL)
def test_the_kernel_is_given_views(family, monkeypatch):
    """Both branches are views of one tensor; in version 2 they share a key."""
    from lctrain_kernels.differential import api

    attend, calls = api.diff_attn_pack_func, []

    def record(*args, **kwargs):
        calls.append(args)
        return attend(*args, **kwargs)

    monkeypatch.setattr(api, "diff_attn_pack_func", record)
    with patch_model(make_differential(family), **DIFFERENTIALLY) as handle:
        packed_outputs(handle.model, make_documents())
    assert len(calls) == 2
    for q1, q2, k1, k2, v, lam, *_ in calls:
        assert q1.untyped_storage().data_ptr() == q2.untyped_storage().data_ptr()
        assert k1.untyped_storage().data_ptr() == k2.untyped_storage().data_ptr()
        assert (k1 is k2) == (family in V2)
        assert v.shape[2] == (16 if family in V1 else 8)
        assert lam.shape == (() if family in V1 else (25, q1.shape[1]))


def test_deterministic_layers_name_the_portable_kernels_on_hopper(monkeypatch):
    from lctrain import kernels
    from lctrain_kernels.differential import api

    def attend(*_, backend, **__):
        raise InterruptedError(backend)

    monkeypatch.setattr(api, "diff_attn_pack_func", attend)
    monkeypatch.setattr(kernels, "select_backend", lambda *_, **__: "hopper")
    for deterministic, name in ((False, "auto"), (True, "triton")):
        handle = patch_model(
            make_differential(FEW[0]), **DIFFERENTIALLY, deterministic=deterministic
        )
        with handle, pytest.raises(InterruptedError, match=name):
            packed_outputs(handle.model, make_documents())


@pytest.mark.parametrize("family", FEW)
@pytest.mark.parametrize("attention", ["differential", "flash"])
@pytest.mark.usefixtures("in_float64")
def test_unpatch_gives_back_every_bit(family, attention):
    model, rows = make_differential(family), make_documents([20])[0][None]
    before, names = outputs(model, input_ids=rows), list(model.state_dict())
    classes = [type(module) for module in model.modules()]
    with patch_model(model, attention=attention) as handle:
        assert is_patched(model)
        assert f"sdpa -> lctrain_{attention}" in repr(handle)
        assert_equal_in_float64(outputs(model, input_ids=rows), before)
        assert list(model.state_dict()) == names
    assert not is_patched(model)
    assert torch.equal(outputs(model, input_ids=rows), before)
    assert [type(module) for module in model.modules()] == classes


@pytest.mark.parametrize("family", FEW)
@pytest.mark.usefixtures("in_float64")
def test_checkpoints_of_a_patched_model(family, tmp_path):
    model, documents = make_differential(family), make_documents()
    with patch_model(model, **DIFFERENTIALLY):
        expected = packed_outputs(model, documents)
        model.save_pretrained(tmp_path)
        assert_equal_in_float64(packed_outputs(copy.deepcopy(model), documents), expected)
        buffer = io.BytesIO()
        torch.save(model.model.layers[0].self_attn, buffer)
    found = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(found) is type(model)
    assert found.config._attn_implementation == "sdpa"
    for name, weight in model.state_dict().items():
        assert torch.equal(found.state_dict()[name], weight), name
    with patch_model(found, **DIFFERENTIALLY):
        assert torch.equal(packed_outputs(found, documents), expected)


@pytest.mark.parametrize("family", FEW)
@pytest.mark.usefixtures("in_float64")
def test_loaded_by_name(family, tmp_path):
    model, documents = make_differential(family), make_documents()
    model.save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    named = AutoModelForCausalLM.from_pretrained(
        tmp_path, attn_implementation="lctrain_differential"
    )
    expected = separate_outputs(model, documents)
    assert_equal_in_float64(packed_outputs(named, documents), expected)
    prompt = documents[2][None]
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    generated = model.generate(prompt, **options)
    assert torch.equal(named.generate(prompt, **options), generated)
    with patch_model(named, **DIFFERENTIALLY):
        assert_equal_in_float64(packed_outputs(named, documents), expected)
    named.set_attn_implementation("sdpa")
    assert torch.equal(separate_outputs(named, documents), expected)


def test_a_plain_model_loaded_by_name():
    model = make_model("llama", attn_implementation="lctrain_differential")
    with pytest.raises(ValueError, match=r"LlamaForCausalLM with LlamaAttention.*to_differential"):
        packed_outputs(model, make_documents())


@pytest.mark.parametrize("family", FEW)
def test_autocast(family):
    model, documents = make_differential(family), make_documents()
    reference = separate_outputs(copy.deepcopy(model).double(), documents)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        plain = separate_outputs(model, documents)
    with patch_model(model, **DIFFERENTIALLY), torch.autocast("cpu", torch.bfloat16):
        found, grads = gradients(model, lambda: packed_outputs(model, documents))
    assert found.dtype == torch.bfloat16
    assert_error_at_most_twice(found, plain, reference, "outputs")
    assert all(grad.isfinite().all() for grad in grads.values())


@pytest.mark.slow
@pytest.mark.parametrize("family", FEW)
def test_compiled_without_breaks(family):
    model = make_differential(family).train()
    packings = [make_documents(lengths, n) for n, lengths in enumerate(((6, 20), (30, 5, 4)))]
    assert_compiles_without_breaks(model, packings, **DIFFERENTIALLY)


@pytest.mark.parametrize("family", [*FEW, "mistral"])
def test_not_together_with_dual_chunk_attention(family):
    model = make_differential(family)
    with pytest.raises(ValueError, match=r"must not be differential for attention='dual_chunk'"):
        patch_model(model, attention="dual_chunk")
    with pytest.raises(ValueError, match=r"got chunk_size. It belongs to attention='dual_chunk'"):
        patch_model(model, **DIFFERENTIALLY, chunk_size=16)
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("family", ["llama", "gemma2", "bert"])
def test_models_that_are_not_differential(family):
    model = make_model(family)
    implementation = model.config._attn_implementation
    with pytest.raises(ValueError, match=r"must have differential attention.*to_differential\(mod"):
        patch_model(model, **DIFFERENTIALLY)
    assert model.config._attn_implementation == implementation


def test_heads_that_the_kernels_cannot_hold():
    model = make_differential("diffllama", head_dim=136)
    with pytest.raises(ValueError, match=r"head_dim must be at most 128 .* got 136. Patch .*flash"):
        patch_model(model, **DIFFERENTIALLY)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"softcap": 2.0}, "must attend by plain softmax .* got softcapped logits in Linear"),
        ({"s_aux": torch.zeros(2)}, "must attend by plain softmax .* got attention sinks in Line"),
        ({"lctrain_lambda": None}, "must be differential .* got Linear, which gives no lambda"),
        ({"output_attentions": True}, "output_attentions must be False"),
    ],
)
def test_what_a_layer_may_not_ask_for(arguments, message):
    from lctrain.attention.differential import differential_attention_forward

    arguments = {"lctrain_lambda": torch.ones(())} | arguments
    states = torch.zeros(1, 2, 3, 8)
    with pytest.raises(ValueError, match=message):
        differential_attention_forward(
            torch.nn.Linear(1, 1), states, states, states, None, **arguments
        )


def test_layers_reached_without_the_model():
    model = make_differential("llama")
    states = torch.zeros(1, 3, 32)
    angles = model.model.rotary_emb(states, torch.arange(3)[None])
    with patch_model(model, **DIFFERENTIALLY), pytest.raises(ValueError, match="must be reached"):
        model.model.layers[0](states, position_embeddings=angles)
