"""Tests transformers' continuous batching on patched models: the tokens of generate()."""

import dataclasses
from collections import Counter

import pytest
import torch
from transformers import (
    ContinuousBatchingConfig,
    MistralConfig,
    MistralForCausalLM,
    RobertaConfig,
    RobertaForCausalLM,
)
from transformers import GenerationConfig as Generation
from transformers.generation.continuous_batching import cache as caches
from transformers.generation.continuous_batching import initialization
from transformers.generation.continuous_batching.continuous_api import ContinuousBatchingManager
from transformers.generation.continuous_batching.model_runner import ModelRunner
from transformers.generation.continuous_batching.offloading_manager import OffloadingManager
from transformers.generation.continuous_batching.requests import RequestState

from lctrain import PackedBatch, patch_model
from lctrain.attention import paged
from lctrain.attention.forward import SPEC_ATTRIBUTE
from lctrain.attention.spec import ATTENTION_NAMES
from lctrain.models.architectures import attention_layers
from lctrain.models.batching import require_batching
from lctrain.models.registration import register
from tests.models.attentions import ATTENTIONS, patched_model

OPTIONS = {"max_new_tokens": 6, "eos_token_id": -1, "pad_token_id": 0}
BEGIN = [(7 * i * i + 3 * i) % 90 + 3 for i in range(46)]
PROMPTS = [BEGIN, BEGIN[:33] + BEGIN[:12], [3], BEGIN[5:28]]
PAGE = "page_size" if hasattr(ContinuousBatchingConfig(), "page_size") else "block_size"


def batching(tables=True, page=16, **options):
    return ContinuousBatchingConfig(
        max_blocks_per_request=4 if tables else 0,
        use_async_batching=False,
        **{PAGE: page, "num_blocks": 6, "max_batch_tokens": 32} | options,
    )


def generated(model, config, prompts=PROMPTS, **options):
    """Returns the new tokens of each prompt's completions; all of a prompt must be equal.

    generate_batch of transformers 5.17 leaves out the copies of a request.
    """
    found = model.generate_batch(
        prompts,
        generation_config=Generation(**OPTIONS | options),
        continuous_batching_config=config,
        warmup=False,
    )
    assert not [result.error for result in found.values() if result.error]
    tokens = {}
    for name, result in found.items():
        prompt = int(name.split("_")[1])
        assert tokens.setdefault(prompt, result.generated_tokens) == result.generated_tokens
    return [tokens[prompt] for prompt in sorted(tokens)]


def completions(model, prompts=PROMPTS):
    """Returns the greedy completion of each prompt alone, by generate()."""
    rows = (torch.tensor([prompt]) for prompt in prompts)
    return [
        model.generate(row, do_sample=False, **OPTIONS)[0, row.shape[1] :].tolist() for row in rows
    ]


def forward_tokens(model, found):
    """Returns the most probable next tokens in one packed forward over prompts and completions."""
    documents = [prompt + tokens for prompt, tokens in zip(PROMPTS, found, strict=True)]
    batch = PackedBatch.from_documents([torch.tensor(document) for document in documents])
    with torch.no_grad():
        logits = model(batch.input_ids, **batch.model_kwargs()).logits[0]
    ends = batch.cu_seqlens[1:].tolist()
    return [logits[end - 7 : end - 1].argmax(-1).tolist() for end in ends]


@pytest.fixture
def seen(monkeypatch):
    """Counts block tables, gathered batches, tokens of shared prefixes, copies, and evictions."""
    counted = Counter()
    attend = paged.PagedForward.attend

    def attended(step, module, states, attention, arguments):
        counted["gathered" if arguments.get("block_table") is None else "tables"] += 1
        return attend(step, module, states, attention, arguments)

    def count(owner, method, key, amount):
        original = getattr(owner, method)

        def called(*arguments, **options):
            found = original(*arguments, **options)
            counted[key] += amount(found)
            return found

        monkeypatch.setattr(owner, method, called)

    monkeypatch.setattr(paged.PagedForward, "attend", attended)
    count(caches.PagedAttentionCache, "search_prefix_match", "shared", int)
    count(RequestState, "fork", "copied", bool)
    count(OffloadingManager, "offload_requests", "evicted", int)
    return counted


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_block_tables_shared_prefixes_forks_and_evictions(make_llama, seen, attention):
    """Tokens are those of generate() alone and of one packed forward."""
    with patched_model(make_llama(), attention) as model:
        expected = completions(model)
        assert forward_tokens(model, expected) == expected
        found = generated(model, batching(), do_sample=True, top_k=1, num_return_sequences=2)
    assert found == expected
    assert min(seen[key] for key in ("tables", "gathered", "shared", "copied", "evicted")) > 0


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_gathered_keys_with_padding(make_llama, seen, monkeypatch, attention):
    """For CUDA graphs, transformers pads batches."""
    monkeypatch.setattr(ModelRunner, "pad_inputs", property(lambda _: True, lambda *_: None), False)
    config = batching(tables=False, num_blocks=16)
    config.q_padding_interval_size, config.kv_padding_interval_size = 24, 48
    with patched_model(make_llama(), attention) as model:
        assert generated(model, config) == completions(model)
    assert seen["gathered"]
    assert not seen["tables"]


def test_batch_invariant_models_take_each_query_alone(make_llama, seen, monkeypatch):
    """Steps by block tables, and gathered keys with padding."""
    with patched_model(make_llama(), "flash", batch_invariant=True) as model:
        expected = completions(model)
        assert generated(model, batching(num_blocks=16)) == expected
        pads = property(lambda _: True, lambda *_: None)
        monkeypatch.setattr(ModelRunner, "pad_inputs", pads, False)
        config = batching(tables=False, num_blocks=16)
        config.q_padding_interval_size, config.kv_padding_interval_size = 24, 8
        assert generated(model, config) == expected
    assert min(seen["tables"], seen["gathered"]) > 0


def test_dual_chunk_attention_scales_logits_by_the_keys_of_a_request(make_llama, seen):
    options = {"scale": "yarn", "window": 16}
    with patched_model(make_llama(), "dual_chunk", **options) as model:
        config = batching(num_blocks=16, max_batch_tokens=128)
        assert generated(model, config) == completions(model)
    assert seen["tables"]


def test_windows(seen):
    """The cache of a layer with a window keeps its last keys, and has no block table."""
    sizes = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": 8}
    plain = MistralForCausalLM(MistralConfig(**sizes, **heads)).eval()
    with patched_model(plain, "differential-2") as model:
        assert generated(model, batching(num_blocks=16)) == completions(model)
    assert seen["gathered"]
    assert not seen["tables"]


def test_values_of_another_width_are_refused(make_llama):
    key, value = torch.zeros(1, 2, 3, 8), torch.zeros(1, 2, 3, 4)
    with pytest.raises(ValueError, match="values of the keys' head dim, got 4 and 8"):
        paged.PagedForward().attend(make_llama(), (key, key, value), None, {})


@pytest.mark.parametrize(
    ("name", "page", "blocks"),
    [(name, 16, 4) for name in ATTENTION_NAMES.values()]
    + [("lctrain_flash", 8, 0), ("sdpa", 16, 0)],
)
def test_block_tables_are_for_our_attentions_and_the_pages_of_the_kernels(
    make_llama, name, page, blocks
):
    register()
    config = make_llama().config
    config._attn_implementation = name
    given = batching(page=page)
    initialization.ensure_decode_fast_path_is_available(config, given, False)
    assert given.max_blocks_per_request == blocks
    for module in (caches, initialization):
        asked = module.is_flash_attention_requested
        assert asked(config) == asked(requested_attention_implementation=name) == (name != "sdpa")
        assert not asked(config, version=[2, 3])


def change_backend(model):
    for layer in attention_layers(model).values():
        spec = dataclasses.replace(getattr(layer, SPEC_ATTRIBUTE), backend="hopper")
        setattr(layer, SPEC_ATTRIBUTE, spec)


def narrow_values(model):
    for layer in attention_layers(model).values():
        layer.v_head_dim = 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (change_backend, "backend must be 'auto', 'triton' or 'pytorch'.*backend='auto'"),
        (narrow_values, r"got values of 4 columns and keys of 8 .*Call generate\(\) instead"),
    ],
)
@pytest.mark.parametrize("attention", ATTENTIONS)
def test_what_cannot_be_served_is_refused_before_a_token(make_llama, attention, change, message):
    """An error in transformers' thread would end in empty completions."""
    with patched_model(make_llama(), attention) as model:
        change(model)
        with pytest.raises(ValueError, match=message):
            model.generate_batch(PROMPTS, continuous_batching_config=batching())


def test_frequencies_that_depend_on_the_length_need_dual_chunk_attention(make_llama):
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    make = {"rope_parameters": rope, "max_position_embeddings": 16}
    with (
        patched_model(make_llama(**make), "flash") as model,
        pytest.raises(ValueError, match="RoPE frequencies that depend on the length"),
    ):
        model.generate_batch(PROMPTS, continuous_batching_config=batching())
    with patched_model(make_llama(**make), "dual_chunk") as model:
        config = batching(num_blocks=16)
        assert generated(model, config, PROMPTS[:1]) == completions(model, PROMPTS[:1])


def test_positions_that_the_model_counts_are_refused():
    sizes = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    model = RobertaForCausalLM(RobertaConfig(**sizes, num_attention_heads=4, is_decoder=True))
    with patch_model(model), pytest.raises(ValueError, match="positions that the model counts its"):
        model.generate_batch(PROMPTS, continuous_batching_config=batching())


@pytest.mark.parametrize("name", ATTENTION_NAMES.values())
def test_a_name_without_a_patch_is_refused(make_llama, name):
    model = make_llama()
    register()
    model.config._attn_implementation = name
    with pytest.raises(ValueError, match=r"was not checked. Call lctrain.patch_model"):
        model.generate_batch(PROMPTS, continuous_batching_config=batching())


def test_single_precision_on_a_gpu_is_refused(make_llama, monkeypatch):
    with patched_model(make_llama(), "flash") as model:
        monkeypatch.setattr(type(model), "device", property(lambda _: torch.device("cuda")))
        with pytest.raises(
            ValueError, match=r"bfloat16 or float16 .* got torch.float64.*bfloat16()"
        ):
            require_batching(model)


def test_a_model_loaded_by_name_generates(make_llama):
    model = make_llama(attn_implementation="lctrain_dual_chunk").double()
    config = batching(num_blocks=16)
    assert generated(model, config, PROMPTS[2:]) == completions(model, PROMPTS[2:])


def test_a_kept_manager_is_for_one_patch(make_llama):
    """It may hold CUDA graphs of the attention before, and keys of it."""
    model, manager = make_llama(), ContinuousBatchingManager.__new__(ContinuousBatchingManager)
    with patch_model(model):
        manager.switch_to_cb_friendly_attn(model)
        manager.switch_to_cb_friendly_attn(model)
    match = r"a kept manager must .*destroy_cached_continuous_batching_manager\(\) first"
    with pytest.raises(ValueError, match=match):
        manager.switch_to_cb_friendly_attn(model)
    with patch_model(model, attention="dual_chunk"), pytest.raises(ValueError, match=match):
        manager.switch_to_cb_friendly_attn(model)
