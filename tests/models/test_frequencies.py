"""Tests RoPE types whose frequencies depend on a length: a document must use its own length."""

import copy
import pickle

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from lctrain.models import patch_model
from lctrain.models.frequencies import follows_length, length_dependent, row_frequencies
from tests.float64 import float64_throughout
from tests.models.families import (
    gradients,
    make_documents,
    make_model,
    outputs,
    packed_outputs,
    padded,
    separate_outputs,
)
from tests.models.tiny import tiny_config
from tests.numerics import assert_equal_in_float64, assert_error_at_most_twice

WINDOW = 16
THETA = {"rope_theta": 1e4}
LONGROPE = THETA | {
    "rope_type": "longrope",
    "original_max_position_embeddings": WINDOW,
    "short_factor": [1.0] * 4,
    "long_factor": [8.0, 4.0, 2.0, 16.0],
}
DYNAMIC = THETA | {"rope_type": "dynamic", "factor": 4.0}
FIXED = {
    "default": THETA | {"rope_type": "default"},
    "linear": THETA | {"rope_type": "linear", "factor": 4.0},
    "yarn": THETA
    | {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": WINDOW},
    "llama3": THETA
    | {
        "rope_type": "llama3",
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": WINDOW,
    },
    "proportional": THETA | {"rope_type": "proportional"},
}
LENGTHS = (9, 40, 1, 16, 17, 25)  # around WINDOW, and two that 'dynamic' scales differently
MODELS = {
    "longrope": ("llama", LONGROPE, 64),
    "dynamic": ("llama", DYNAMIC, WINDOW),
    "phi3": ("phi3", LONGROPE, 64),
    "qwen3": ("qwen3", DYNAMIC, WINDOW),
}


def scaled(family, rope, window, **options):
    if family == "phi3":
        options = {"original_max_position_embeddings": WINDOW, "sliding_window": None} | options
    return make_model(family, rope_parameters=dict(rope), max_position_embeddings=window, **options)


def alone(model, documents):
    """Returns each document's outputs from a fresh copy, since 'dynamic' keeps frequencies."""
    return torch.cat([separate_outputs(copy.deepcopy(model), [tokens]) for tokens in documents])


@pytest.fixture(params=MODELS, ids=str)
def model(request):
    return scaled(*MODELS[request.param])


def test_every_type_of_rope_is_known():
    """Fails when transformers adds a RoPE type, until it is listed as length-dependent or fixed."""
    known = {*FIXED, "longrope", "dynamic"} - {"default"}
    assert set(ROPE_INIT_FUNCTIONS) - {"axial"} <= known
    assert {name for name in known if follows_length(name)} == {"longrope", "dynamic"}


@pytest.mark.parametrize("name", FIXED)
@pytest.mark.usefixtures("in_float64")
def test_types_with_fixed_frequencies(name):
    model, documents = scaled("llama", FIXED[name], 64), make_documents(LENGTHS)
    assert length_dependent(model) == {}
    expected = alone(model, documents)
    patch_model(model)
    assert_equal_in_float64(packed_outputs(model, documents), expected)
    assert "forward" not in vars(model.model.rotary_emb)


def alone_with_gradients(model, documents):
    """Returns alone(...) and parameter gradients, for the random output gradient of `gradients`."""
    total = sum(map(len, documents))
    generator = torch.Generator().manual_seed(2)
    numbers = torch.randn(total, model.config.vocab_size, generator=generator, dtype=torch.float64)
    found, summed = [], {}
    for tokens, part in zip(documents, numbers.split([*map(len, documents)]), strict=True):
        fresh = copy.deepcopy(model)
        logits, got = gradients_of(fresh, tokens, part)
        found.append(logits)
        for name, gradient in got.items():
            summed[name] = summed.get(name, 0) + gradient
    return torch.cat(found), summed


def gradients_of(model, tokens, numbers):
    model.zero_grad()
    logits = outputs(model, input_ids=tokens[None])[0]
    (logits * numbers.to(logits)).sum().backward()
    return logits.detach(), {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.usefixtures("in_float64")
def test_packed_documents_and_their_gradients_are_those_alone(model):
    documents = make_documents(LENGTHS)
    expected, wanted = alone_with_gradients(model, documents)
    with patch_model(model):
        found, got = gradients(model, lambda: packed_outputs(model, documents))
        assert vars(model.model.rotary_emb)["forward"].lengths is not None
    assert_equal_in_float64(found, expected)
    for name, gradient in wanted.items():
        assert_equal_in_float64(got[name], gradient)
    assert "forward" not in vars(model.model.rotary_emb)
    with torch.no_grad():
        assert_equal_in_float64(alone(model, documents), expected)


@torch.no_grad()
def test_the_same_bits_beside_any_neighbour(model):
    patch_model(model)
    (document,) = make_documents([12])
    seen = set()
    for length in (3, 20, 60):
        beside = packed_outputs(model, [document, *make_documents([length, 80 - length], 5)])
        seen.add(beside[: len(document)].numpy().tobytes())
    assert len(seen) == 1


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("positions", ["none", "restarting"])
@pytest.mark.usefixtures("in_float64")
def test_padded_rows(model, side, positions):
    documents = make_documents(LENGTHS)
    expected = alone(model, documents)
    rows, mask = padded(documents, side)
    given = {} if positions == "none" else {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    with patch_model(model):
        found = outputs(model, input_ids=rows, attention_mask=mask, **given)[mask.bool()]
    assert_equal_in_float64(found, expected)


@torch.no_grad()
@pytest.mark.usefixtures("in_float64")
def test_rows_of_restarting_positions(model):
    """Two rows hold two documents each, marked by restarting position ids only."""
    documents = make_documents((30, 10, 8, 32))
    expected = alone(model, documents)
    rows = torch.cat(documents).view(2, 40)
    positions = torch.cat([torch.arange(len(tokens)) for tokens in documents]).view(2, 40)
    patch_model(model)
    found = outputs(model, input_ids=rows, position_ids=positions, use_cache=False)
    assert_equal_in_float64(found.flatten(0, 1), expected)


@torch.no_grad()
@pytest.mark.usefixtures("in_float64")
def test_positions_that_skip_count_as_in_transformers(model):
    """A document's length is its highest position plus one; its boundaries come with the pack."""
    documents = make_documents((9, 9))
    skipping = [torch.tensor([0, 1, 2, 3, 4, 30, 31, 32, 33]), torch.arange(9)]
    expected = [
        outputs(
            copy.deepcopy(model),
            input_ids=tokens[None],
            position_ids=positions[None],
            attention_mask=torch.ones(1, 9),
        )[0]
        for tokens, positions in zip(documents, skipping, strict=True)
    ]
    patch_model(model)
    found = packed_outputs(model, documents, position_ids=torch.cat(skipping)[None])
    assert_equal_in_float64(found, torch.cat(expected))


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.usefixtures("in_float64")
def test_generation_of_padded_rows_is_that_of_each_alone(name):
    """Rows outgrow the window one after another; one is beyond it from the start."""
    model = scaled(*MODELS[name])
    prompts = make_documents((12, 14, 20))
    arguments = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None}
    arguments |= {"output_logits": True, "return_dict_in_generate": True}
    # Phi-3 computes its cache anew beyond the window: as without one (5.17 fails to do so).
    cache = name != "phi3"
    wanted = [
        copy.deepcopy(model).generate(tokens[None], use_cache=cache, **arguments)
        for tokens in prompts
    ]
    rows, mask = padded(prompts, "left")
    patch_model(model)
    found = model.generate(rows, attention_mask=mask, **arguments)
    for row, (tokens, one) in enumerate(zip(prompts, wanted, strict=True)):
        generated = one.sequences[0, len(tokens) :]
        assert torch.equal(found.sequences[row, rows.shape[1] :], generated)
        assert_equal_in_float64(torch.stack(found.logits)[:, row], torch.cat(one.logits))


@torch.no_grad()
@pytest.mark.usefixtures("in_float64")
def test_by_name(model, tmp_path):
    documents = make_documents(LENGTHS)
    expected = alone(model, documents)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="lctrain_flash")
    assert_equal_in_float64(packed_outputs(loaded, documents), expected)
    with patch_model(loaded):
        assert_equal_in_float64(packed_outputs(loaded, documents), expected)
    assert_equal_in_float64(packed_outputs(loaded, documents), expected)
    loaded.set_attn_implementation("sdpa")
    assert_equal_in_float64(alone(loaded, documents), expected)
    separate_outputs(loaded, documents)
    assert "forward" not in vars(loaded.model.rotary_emb)


@torch.no_grad()
@pytest.mark.usefixtures("in_float64")
def test_rotary_embeddings_of_several_sorts_of_layers():
    documents = make_documents(LENGTHS)
    config = tiny_config("gemma3_text")
    config.rope_parameters = {
        "full_attention": dict(LONGROPE),
        "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
    }
    width = config.head_dim // 2
    config.rope_parameters["full_attention"] |= {
        "short_factor": [1.0] * width,
        "long_factor": [8.0] * width,
    }
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    expected = alone(model, documents)
    patch_model(model)
    assert_equal_in_float64(packed_outputs(model, documents), expected)


@torch.no_grad()
def test_dual_chunk_within_the_short_frequencies(model):
    documents = make_documents((9, 16, 1, 40))
    plain = alone(model, documents[:3])
    with float64_throughout():
        exact = alone(copy.deepcopy(model).double(), documents[:3])
    patch_model(model, attention="dual_chunk", window=WINDOW)
    found, (long,) = packed_outputs(model, documents), documents[3:]
    assert_error_at_most_twice(found[: len(plain)], plain, exact)
    with float64_throughout(float32_frequencies=True):
        exact = packed_outputs(copy.deepcopy(model).double(), [long])
    assert_error_at_most_twice(found[len(plain) :], packed_outputs(model, [long]), exact)


@torch.no_grad()
@pytest.mark.usefixtures("in_float64")
def test_copies_and_pickles(model):
    documents = make_documents(LENGTHS)
    expected = alone(model, documents)
    patch_model(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_equal_in_float64(packed_outputs(other, documents), expected)
        assert vars(other.model.rotary_emb)["forward"].rotary is other.model.rotary_emb


@torch.no_grad()
@pytest.mark.usefixtures("in_float64")
def test_a_model_that_remembers_a_long_text(model):
    documents = make_documents(LENGTHS)
    expected = alone(model, documents)
    outputs(model, input_ids=make_documents([50])[0][None])
    patch_model(model)
    assert_equal_in_float64(packed_outputs(model, documents), expected)


@pytest.mark.usefixtures("in_float64")
def test_activation_checkpointing():
    model = scaled(*MODELS["dynamic"])
    documents = make_documents(LENGTHS)
    patch_model(model)
    _, expected = gradients(model, lambda: packed_outputs(model, documents))
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    _, found = gradients(model, lambda: packed_outputs(model, documents))
    for name, gradient in expected.items():
        assert_equal_in_float64(found[name], gradient)


@torch.no_grad()
@pytest.mark.parametrize("name", ["longrope", "dynamic"])
def test_compiled_in_one_graph(name):
    model = scaled(*MODELS[name])
    documents = make_documents(LENGTHS)
    expected = alone(model, documents)
    with float64_throughout():
        exact = alone(copy.deepcopy(model).double(), documents)
    patch_model(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_error_at_most_twice(packed_outputs(compiled, documents), expected, exact)


def test_a_rotary_embedding_with_a_way_of_its_own_is_refused():
    class Own(nn.Module):
        def __init__(self, rotary):
            super().__init__()
            self.register_buffer("inv_freq", rotary.inv_freq, persistent=False)

        def forward(self, x, position_ids):
            inv_freq = self.inv_freq / (1 + position_ids.max() // WINDOW)
            angles = position_ids[..., None] * inv_freq
            angles = torch.cat([angles, angles], -1)
            return angles.cos(), angles.sin()

    model = make_model("llama")
    model.model.rotary_emb = Own(model.model.rotary_emb)
    with pytest.raises(ValueError, match=r"known per document, got Own .* Set the config's"):
        patch_model(model)
    assert model.config._attn_implementation != "lctrain_flash"


def test_a_scale_that_follows_the_longest_is_refused():
    """Phimoe also scales its RoPE by the length of the longest document in the batch."""
    config = tiny_config("phimoe")
    width = (
        config.head_dim // 2
        if getattr(config, "head_dim", None)
        else (config.hidden_size // config.num_attention_heads // 2)
    )
    config.rope_parameters = LONGROPE | {
        "short_factor": [1.0] * width,
        "long_factor": [8.0] * width,
        "short_mscale": 1.0,
        "long_mscale": 1.5,
    }
    config.sliding_window = None
    model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(ValueError, match=r"known per document, got PhimoeRotaryEmbedding"):
        patch_model(model)


@torch.no_grad()
@pytest.mark.usefixtures("in_float64")
def test_rows_of_an_unpatched_model(model):
    documents = make_documents(LENGTHS)
    expected = alone(model, documents)
    rows, mask = padded(documents, "right")
    with row_frequencies(model, mask.sum(1)):
        found = outputs(model, input_ids=rows)[mask.bool()]
    assert_equal_in_float64(found, expected)
    assert "forward" not in vars(model.model.rotary_emb)
