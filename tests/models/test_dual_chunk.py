"""Compares dual chunk attention in models with its definition, and with plain attention.

Inside the window it must equal plain attention. A text must give the same logits whole, in pieces
on a cache, padded or packed.
"""

import copy
import math

import pytest
import torch

from lctrain.attention import DualChunkSpec, is_patched
from lctrain.callbacks import IsolationCheck
from lctrain.config import AttentionConfig, OptimConfig
from lctrain.models import patch_model
from lctrain.module import LongContextModule
from tests.float64 import float64_throughout
from tests.models.dual_chunk_definition import defined_outputs
from tests.models.families import (
    ROTARY,
    gradients,
    make_documents,
    make_rotary_model,
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
from tests.numerics import (
    assert_equal_in_float64,
    assert_error_at_most_twice,
    assert_far_apart,
)
from tests.training import loader, make_batch, make_trainer

S, L = 13, 4  # chunks of 9 tokens
SMALL = {"attention": "dual_chunk", "chunk_size": S, "local_size": L}
LENGTHS = (6, 1, 40, 14, 15, 18)  # 14 = S + 1 tokens are as before, 15 are not
ROPES = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    "llama3": {
        "rope_type": "llama3",
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
}


def with_rope(kind, **overrides):
    return make_rotary_model(
        "llama", rope_parameters=ROPES[kind] | {"rope_theta": 100.0}, **overrides
    )


@pytest.mark.parametrize("family", ROTARY)
@pytest.mark.usefixtures("float64_stays_float64")
def test_outputs_and_all_gradients_are_those_of_the_definition(family):
    model, documents = make_rotary_model(family), make_documents(LENGTHS)
    exact = copy.deepcopy(model).double()
    plain, plain_grads = gradients(model, lambda: defined_outputs(model, documents, S, L))
    reference, reference_grads = gradients(exact, lambda: defined_outputs(exact, documents, S, L))
    with patch_model(model, **SMALL):
        packed, grads = gradients(model, lambda: packed_outputs(model, documents))
    with torch.no_grad():
        assert (separate_outputs(exact, documents) - reference).abs().max() > 1e-3
    assert_error_at_most_twice(packed, plain, reference, "outputs")
    assert grads.keys() == reference_grads.keys() != set()
    every = [
        torch.cat([g[name].flatten() for name in sorted(g)])
        for g in (grads, plain_grads, reference_grads)
    ]
    assert_error_at_most_twice(*every, "gradients")


@pytest.mark.parametrize("kind", ROPES)
def test_rope_types(kind):
    model, documents = with_rope(kind), make_documents(LENGTHS)
    exact = copy.deepcopy(model).double()
    with torch.no_grad():
        plain, reference = (defined_outputs(m, documents, S, L) for m in (model, exact))
        with patch_model(model, **SMALL):
            packed = packed_outputs(model, documents)
    assert_error_at_most_twice(packed, plain, reference)


def test_frequencies_that_an_unpatched_text_has_changed():
    """NTK's dynamic scaling keeps a long text's frequencies until the next short text."""
    model, documents = with_rope("dynamic"), make_documents([40])
    with torch.no_grad():
        with patch_model(model, attention="dual_chunk"):
            expected = packed_outputs(model, documents)
        outputs(model, input_ids=make_documents([100])[0][None])
        with patch_model(model, attention="dual_chunk"):
            assert torch.equal(packed_outputs(model, documents), expected)


@pytest.mark.parametrize("make", [*(f for f in ROTARY), *(f"rope:{kind}" for kind in ROPES)])
def test_inside_the_window_nothing_changes(make):
    kind = make.removeprefix("rope:")
    model = with_rope(kind) if kind != make else make_rotary_model(make)
    documents = make_documents([64, 9])  # the window, max_position_embeddings
    exact = with_rope(kind) if kind != make else make_rotary_model(make)
    with torch.no_grad():
        plain = separate_outputs(model, documents)
        reference = separate_outputs(exact.double(), documents)
        with patch_model(model, attention="dual_chunk"):
            found = packed_outputs(model, documents)
    assert_error_at_most_twice(found, plain, reference)


def test_the_first_token_beyond_the_window_is_the_first_that_changes():
    model, documents = make_rotary_model("llama"), make_documents([80])
    with torch.no_grad():
        plain = separate_outputs(model, documents)
        with float64_throughout():
            exact = separate_outputs(copy.deepcopy(model).double(), documents)
        with patch_model(model, attention="dual_chunk"):
            found = packed_outputs(model, documents)
    assert_error_at_most_twice(found[:64], plain[:64], exact[:64])
    assert_far_apart(found[64], plain[64])


@pytest.mark.parametrize("family", ROTARY)
@pytest.mark.usefixtures("in_float64_but_frequencies")
def test_packed_equals_separate(family):
    model, documents = make_rotary_model(family).double(), make_documents(LENGTHS)
    positions = torch.cat([torch.arange(len(tokens)) for tokens in documents])[None]
    absent = dict.fromkeys(("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"))
    with patch_model(model, **SMALL):
        separate, grads = gradients(model, lambda: separate_outputs(model, documents))
        packed, packed_grads = gradients(model, lambda: packed_outputs(model, documents))
        assert_equal_in_float64(packed, separate)
        for name, grad in grads.items():
            assert_equal_in_float64(packed_grads[name], grad)
        with torch.no_grad():
            by_boundaries = packed_outputs(model, documents, position_ids=None)
            by_positions = packed_outputs(
                model, documents, **absent, position_ids=positions, use_cache=None
            )
    assert torch.equal(by_boundaries, packed)
    assert torch.equal(by_positions, packed)


def test_changing_one_document_keeps_every_bit_of_the_others():
    model, documents = make_rotary_model("llama"), make_documents(LENGTHS)
    assert_others_keep_every_bit(model, documents, **SMALL)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("positions", ["given", "absent"])
@pytest.mark.usefixtures("in_float64_but_frequencies")
def test_padding_is_never_seen(side, positions):
    model, documents = make_rotary_model("qwen2"), make_documents([30, 12, 1])
    input_ids, mask = padded(documents, side)
    given = {"position_ids": (mask.cumsum(-1) - 1).clamp(min=0)} if positions == "given" else {}
    with patch_model(model, **SMALL), torch.no_grad():
        out = outputs(model, input_ids=input_ids, attention_mask=mask, **given)
        assert_equal_in_float64(out[mask.bool()], packed_outputs(model, documents))


@pytest.mark.usefixtures("in_float64_but_frequencies")
def test_rows_and_positions_that_begin_elsewhere():
    model, documents = make_rotary_model("llama"), make_documents([20, 20])
    rows, positions = torch.stack(documents), torch.arange(7, 27)[None]
    with patch_model(model, **SMALL), torch.no_grad():
        expected = packed_outputs(model, documents)
        for extra in ({}, {"position_ids": positions}, {"attention_mask": torch.ones_like(rows)}):
            found = outputs(model, input_ids=rows, **extra).flatten(0, 1)
            assert_equal_in_float64(found, expected)


@pytest.mark.parametrize("family", ROTARY)
@pytest.mark.usefixtures("in_float64_but_frequencies")
def test_prefill_in_pieces_that_straddle_chunks(family):
    """Pieces have 1 to 19 tokens, chunks 9; one row is padded beyond the first piece."""
    model, documents = make_rotary_model(family), make_documents([40, 29])
    input_ids, mask = padded(documents, "left")
    with patch_model(model, **SMALL), torch.no_grad():
        expected = model(input_ids, attention_mask=mask, use_cache=False).logits
        found = logits_in_pieces(model, input_ids, mask, [7, 13, 1, 19])
    real = mask.bool()
    assert_equal_in_float64(found[real], expected[real])


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.usefixtures("in_float64_but_frequencies")
def test_the_mask_may_be_that_of_the_whole_text_from_the_second_piece_on(side):
    model, documents = make_rotary_model("llama"), make_documents([40, 29])
    input_ids, mask = padded(documents, side)
    with patch_model(model, **SMALL), torch.no_grad():
        expected = model(input_ids, attention_mask=mask, use_cache=False).logits
        first = {"input_ids": input_ids[:, :22], "attention_mask": mask[:, :22]}
        cache = model(**first, use_cache=True).past_key_values
        found = model(input_ids[:, 22:33], attention_mask=mask, past_key_values=cache).logits
    real = mask[:, 22:33].bool()
    assert_equal_in_float64(found[real], expected[:, 22:33][real])


@pytest.mark.usefixtures("in_float64_but_frequencies")
def test_pieces_without_a_mask_and_with_positions():
    model, rows = make_rotary_model("llama"), torch.stack(make_documents([40, 40]))
    with patch_model(model, **SMALL), torch.no_grad():
        expected = model(rows).logits
        for positions in (None, torch.arange(22, 40)[None]):
            cache = model(rows[:, :22], use_cache=True).past_key_values
            found = model(rows[:, 22:], past_key_values=cache, position_ids=positions).logits
            assert_equal_in_float64(found, expected[:, 22:])


@pytest.mark.parametrize("family", ROTARY)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.usefixtures("in_float64_but_frequencies")
def test_generate_gives_the_logits_of_one_full_pass(family, side):
    model = make_rotary_model(family)
    input_ids, mask = padded(make_documents([16, 5]), side)
    options = {"max_new_tokens": 24, "min_new_tokens": 24, "do_sample": False}
    with patch_model(model, **SMALL), torch.no_grad():
        result = model.generate(
            input_ids,
            attention_mask=mask,
            **options,
            output_logits=True,
            return_dict_in_generate=True,
        )
        whole = torch.cat([mask, torch.ones(2, 24, dtype=mask.dtype)], 1)
        expected = model(result.sequences, attention_mask=whole).logits
    steps = torch.stack(result.logits, 1)
    rows = [0, 1] if side == "left" else [0]  # a padded end of a prompt has no next token
    assert_equal_in_float64(steps[rows], expected[rows, 15:-1])


def test_generate_beyond_the_window_differs_from_the_plain_model():
    model, prompt = make_rotary_model("llama"), make_documents([60])[0][None]
    options = {"max_new_tokens": 30, "do_sample": False, "eos_token_id": None}
    plain = model.generate(prompt, **options)
    with patch_model(model, attention="dual_chunk"):
        found = model.generate(prompt, **options)
    assert torch.equal(found[:, :65], plain[:, :65])
    assert not torch.equal(found, plain)


def test_caches_that_the_mask_does_not_cover():
    model, rows = make_rotary_model("llama"), make_documents([9])[0][None]
    with patch_model(model, **SMALL), torch.no_grad():
        cache = model(rows[:, :4], use_cache=True).past_key_values
        with pytest.raises(ValueError, match=r"cover the 9 keys .* got \[1, 5\]. Pass one value"):
            model(rows[:, 4:], past_key_values=cache, attention_mask=torch.ones(1, 5))


@pytest.mark.parametrize("coefficient", [0.1, 0.5])
def test_yarn_scale(coefficient):
    model, documents = make_rotary_model("qwen3"), make_documents([40, 20, 16])
    exact = copy.deepcopy(model).double()
    scales = [(coefficient * math.log(max(1.0, n / 20)) + 1) ** 2 for n in (40, 20, 16)]
    options = {"scale": "yarn", "scale_coefficient": coefficient, "window": 20}
    with torch.no_grad():
        plain, reference = (defined_outputs(m, documents, S, L, scales) for m in (model, exact))
        with patch_model(model, **SMALL, **options):
            packed = packed_outputs(model, documents)
            separate = separate_outputs(model, documents)
    assert_error_at_most_twice(packed, plain, reference, "packed")
    assert_error_at_most_twice(separate, plain, reference, "separate")


@pytest.mark.usefixtures("in_float64_but_frequencies")
def test_yarn_scale_with_a_cache_takes_the_length_so_far():
    model, tokens = make_rotary_model("llama", num_hidden_layers=1), make_documents([40])[0]
    with patch_model(model, **SMALL, scale="yarn", window=20), torch.no_grad():
        cache = model(tokens[None, :30], use_cache=True).past_key_values
        step = model(tokens[None, 30:31], past_key_values=cache).logits[0, -1]
        assert_equal_in_float64(step, model(tokens[None, :31]).logits[0, -1])
        assert_far_apart(step, model(tokens[None]).logits[0, 30])


def test_dropout_in_training_only_and_replayed_by_checkpointing():
    model, documents = make_rotary_model("llama"), make_documents(LENGTHS)

    def step():
        torch.manual_seed(5)
        return gradients(model, lambda: packed_outputs(model, documents))

    with patch_model(model, **SMALL, dropout=0.3):
        evaluated = step()[0]
        model.train()
        dropped, grads = step()
        assert not torch.equal(dropped, evaluated)
        for use_reentrant in (True, False):
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
            again, again_grads = step()
            assert torch.equal(again, dropped)
            assert all(torch.equal(again_grads[name], grad) for name, grad in grads.items())


def test_deterministic_layers_name_the_portable_kernels_on_hopper(monkeypatch):
    from lctrain import kernels
    from lctrain_kernels.dual_chunk import api

    def attend(*_, backend, **__):
        raise InterruptedError(backend)

    monkeypatch.setattr(api, "dual_chunk_attn_pack_func", attend)
    monkeypatch.setattr(kernels, "select_backend", lambda *_, **__: "hopper")
    for deterministic, name in ((False, "auto"), (True, "triton")):
        handle = patch_model(make_rotary_model("llama"), **SMALL, deterministic=deterministic)
        with handle, pytest.raises(InterruptedError, match=name):
            packed_outputs(handle.model, make_documents(LENGTHS))


@pytest.mark.parametrize("family", ROTARY)
def test_autocast(family):
    model, documents = make_rotary_model(family), make_documents([40, 12])
    with torch.no_grad():
        exact = defined_outputs(copy.deepcopy(model).double(), documents, S, L)
        with torch.autocast("cpu", torch.bfloat16):
            plain = defined_outputs(model, documents, S, L)
    with patch_model(model, **SMALL), torch.autocast("cpu", torch.bfloat16):
        found, grads = gradients(model, lambda: packed_outputs(model, documents))
    assert found.dtype == torch.bfloat16
    assert_error_at_most_twice(found, plain, exact)
    assert all(grad.isfinite().all() for grad in grads.values())


@pytest.mark.slow
def test_compiled_without_breaks():
    model = make_rotary_model("llama").train()
    packings = [make_documents(lengths, n) for n, lengths in enumerate(((6, 20), (30, 5, 4)))]
    assert_compiles_without_breaks(model, packings, **SMALL, scale="yarn", window=14)


def test_boundaries_and_positions_are_found_without_reading_the_device():
    """Runs on meta tensors, where reading a value is an error."""
    from lctrain.attention.boundaries import Boundaries
    from lctrain.attention.dual_chunk import dual_chunk_logit_scale, dual_chunk_positions
    from lctrain_kernels.pack import Pack

    edges = torch.zeros(7, dtype=torch.int32, device="meta")
    boundaries = Boundaries(Pack(edges, edges, 94, 94, 40, 40), (1, 94), (1, 94))
    spec = DualChunkSpec(chunk_size=S, local_size=L, scale="yarn", window=20)
    assert dual_chunk_positions(spec, boundaries).shape == (1, 94)
    assert dual_chunk_logit_scale(spec, boundaries).shape == (6,)


def test_training_with_lightning(tmp_path, make_llama):
    """The isolation check passes, and packs of several documents train."""
    attention = AttentionConfig(name="dual_chunk", chunk_size=S, local_size=L, dropout=0.1)
    optim = OptimConfig(learning_rate=1e-2, warmup_steps=0, schedule="constant")
    module = LongContextModule(make_llama(), optim, attention)
    trainer = make_trainer(tmp_path, [IsolationCheck()], max_steps=10, max_epochs=-1)
    trainer.fit(module, loader([make_batch([40, 1, 30])]))
    assert module.patch_handle.spec.chunk_size == S
    assert is_patched(module.model)
    assert module.last_loss < 0.9 * module.first_loss
