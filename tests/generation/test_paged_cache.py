"""Tests PagedCache: beams and samples of generate() over pages, as with a DynamicCache."""

import copy

import pytest
import torch
from transformers import MistralConfig, MistralForCausalLM, OPTConfig, OPTForCausalLM

import lctrain
import lctrain_kernels
from lctrain import PagedCache, patch_model
from lctrain.generation import paged_rows
from lctrain.generation.pages import PAGE
from tests.models.attentions import ATTENTIONS, patched_model
from tests.numerics import assert_equal_in_float64

BEGIN = [(7 * i * i + 3 * i) % 90 + 3 for i in range(PAGE + 6)]
PROMPTS = [BEGIN, [*BEGIN[:PAGE], 5, 6], BEGIN[9:40], BEGIN]
DECODE = {"dual_chunk": "dual_chunk_attn_with_kvcache", "flash": "flash_attn_with_kvcache"}


def padded(prompts=PROMPTS):
    """Returns input_ids and attention_mask of prompts, padded on the left."""
    width = max(map(len, prompts))
    rows = [[1] * (width - len(prompt)) + prompt for prompt in prompts]
    mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return {"input_ids": torch.tensor(rows), "attention_mask": torch.tensor(mask)}


def generated(model, cache=None, inputs=None, **options):
    torch.manual_seed(0)
    options = {"max_new_tokens": 9, "eos_token_id": 11, "pad_token_id": 1} | options
    return model.generate(
        **(inputs or padded()),
        **options,
        past_key_values=cache,
        output_scores=True,
        output_logits=True,
        return_dict_in_generate=True,
    )


def assert_same(found, expected):
    """Asserts that two results of generate() have the same tokens and scores.

    Models compute in float64, and transformers rounds their logits to float32.
    """
    assert torch.equal(found.sequences, expected.sequences)
    assert_equal_in_float64(found.logits, expected.logits, "logits", torch.float32)
    assert found.scores[-1].isfinite().any()
    for one, other in zip(found.scores, expected.scores, strict=True):
        kept = other.isfinite()
        assert torch.equal(one.isfinite(), kept)
        assert_equal_in_float64(one[kept], other[kept], "scores", torch.float32)


def storage(cache):
    """Returns the memory of the pages, and a copy of its bits."""
    memory = cache._rows.pool._storage
    return memory, memory.view(torch.int64).clone()


@pytest.fixture
def llama(make_llama):
    with patched_model(make_llama(), "flash") as model, torch.no_grad():
        yield model


@pytest.fixture
def tables(monkeypatch):
    """Lists whether each call of a decode function had a block table, and shared prefixes."""
    seen = []

    def watch(name):
        decode = getattr(lctrain_kernels, name)

        def called(*arguments, **options):
            plan = options.get("plan")
            shared = plan is not None and plan.shared is not None
            seen.append((options.get("block_table") is not None, shared))
            return decode(*arguments, **options)

        monkeypatch.setattr(lctrain_kernels, name, called)

    for name in (*DECODE.values(), "diff_attn_with_kvcache"):
        watch(name)
    return seen


SEVERAL = {"num_beams": 4, "num_return_sequences": 3, "early_stopping": True}


@pytest.mark.parametrize(
    ("attention", "options"),
    [(attention, SEVERAL) for attention in ATTENTIONS]
    + [
        ("flash", {"num_beams": 4}),
        ("flash", {"num_beams": 3, "do_sample": True, "length_penalty": 0.0}),
        ("flash", {"do_sample": True, "num_return_sequences": 3}),
        ("dual_chunk", {"num_beams": 2, "prefill_chunk_size": 24}),
    ],
    ids=[*ATTENTIONS, "beams", "sampled-beams", "samples", "chunks"],
)
def test_tokens_and_scores_are_those_of_a_dynamic_cache(make_llama, tables, attention, options):
    """Prompts of different lengths, equal ones among them; some completions end early."""
    with patched_model(make_llama(), attention) as model:
        probe = generated(model, **options | {"eos_token_id": -1})
        end = int(probe.sequences[0, -5])  # a token that is generated
        expected = generated(model, eos_token_id=end, **options)
        tables.clear()
        cache = PagedCache(model, shared_prefixes="always")
        assert_same(generated(model, cache, eos_token_id=end, **options), expected)
    assert {given for given, _ in tables} == {True}
    assert any(shared for _, shared in tables)


def test_dual_chunk_attention_scales_logits_by_the_keys_of_a_row(make_llama):
    options = {"scale": "yarn", "window": 16}
    with patched_model(make_llama(), "dual_chunk", **options) as model:
        expected = generated(model, num_beams=3)
        assert_same(generated(model, PagedCache(model), num_beams=3), expected)
        found = generated(model, PagedCache(model), padded(PROMPTS[:1]), prompt_lookup_num_tokens=4)
        assert_same(found, generated(model, None, padded(PROMPTS[:1]), prompt_lookup_num_tokens=4))


def test_layers_with_windows_keep_all_keys(make_llama):
    sizes = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": 8}
    plain = MistralForCausalLM(MistralConfig(**sizes, **heads)).eval()
    with patched_model(plain, "flash") as model:
        cache = PagedCache(model, shared_prefixes="always")
        assert_same(generated(model, cache, num_beams=3), generated(model, num_beams=3))


def test_batch_invariant_models(make_llama):
    prompts = padded([BEGIN[:7], BEGIN[:4]])
    with patched_model(make_llama(), "flash", batch_invariant=True) as model:
        found = generated(model, PagedCache(model), prompts, num_beams=2, max_new_tokens=4)
        assert_same(found, generated(model, None, prompts, num_beams=2, max_new_tokens=4))


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_proposed_tokens_are_taken_back(make_llama, attention):
    """Assisted generation reads several new tokens at once, and crops the cache."""
    inputs = padded([BEGIN[:30] * 2])
    with patched_model(make_llama(), attention) as model:
        expected = generated(model, None, inputs, prompt_lookup_num_tokens=5, max_new_tokens=20)
        cache = PagedCache(model)
        found = generated(model, cache, inputs, prompt_lookup_num_tokens=5, max_new_tokens=20)
    assert_same(found, expected)
    assert cache.get_seq_length() == found.sequences.shape[1] - 1


def test_reordering_moves_no_keys(llama):
    cache = PagedCache(llama, pages=16)
    inputs = padded()
    places = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    llama(**inputs, position_ids=places, past_key_values=cache)
    used = cache.used_pages
    memory, bits = storage(cache)
    cache.reorder_cache(torch.tensor([1, 1, 0, 3]))
    after, bits_after = storage(cache)
    assert after.data_ptr() == memory.data_ptr()
    assert torch.equal(bits, bits_after)
    assert used == 4  # three prompts begin with one page, two of them are equal
    assert cache.used_pages == 3  # the page of the third prompt is free


def test_only_partial_pages_are_copied(llama):
    """Four rows share a full and a partial page; three rows copy the partial one to append."""
    cache = PagedCache(llama)
    prompt = torch.tensor([BEGIN])
    llama(prompt, past_key_values=cache)
    cache.batch_repeat_interleave(4)
    assert cache.used_pages == 2
    _, before = storage(cache)
    mask = torch.ones(4, len(BEGIN) + 1, dtype=torch.int64)
    llama(torch.tensor([[3], [4], [5], [6]]), attention_mask=mask, past_key_values=cache)
    assert cache.used_pages == 5
    tables = cache._rows.table()
    assert len(set(tables[:, 0].tolist())) == 1
    assert len(set(tables[:, 1].tolist())) == 4
    _, after = storage(cache)
    full = int(tables[0, 0])
    assert torch.equal(before[:, :, full], after[:, :, full])
    cache.reorder_cache(torch.tensor([2, 2, 2, 2]))
    assert cache.used_pages == 2
    cache.batch_select_indices(torch.tensor([-1]))
    assert cache.batch_size == 1
    cache.crop(-len(BEGIN))
    assert cache.used_pages == 1
    cache.reset()
    assert cache.used_pages == cache.get_seq_length() == 0


def test_a_cropped_page_that_rows_share_is_copied(llama):
    """Behind a crop, a row appends in the middle of a page that was full."""
    cache = PagedCache(llama)
    llama(torch.tensor([BEGIN]), past_key_values=cache)
    cache.batch_repeat_interleave(2)
    cache.crop(-20)
    kept = copy.deepcopy(cache)
    mask = torch.ones(2, len(BEGIN) - 19, dtype=torch.int64)
    both = llama(torch.tensor([[3], [4]]), attention_mask=mask, past_key_values=cache).logits
    assert cache.used_pages == 2
    for row, token in enumerate((3, 4)):
        one = copy.deepcopy(kept)
        one.batch_select_indices(torch.tensor([row]))
        alone = llama(torch.tensor([[token]]), past_key_values=one).logits
        assert_equal_in_float64(both[row : row + 1], alone)


def test_a_conversation_goes_on(llama):
    """A second call of generate() computes only what is new."""
    cache = PagedCache(llama)
    first = generated(llama, cache, padded(PROMPTS[:1]), eos_token_id=-1).sequences
    inputs = {"input_ids": torch.cat((first, torch.tensor([BEGIN[:20]])), 1)}
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    found = generated(llama, cache, inputs, num_beams=1)
    assert_same(found, generated(llama, None, inputs, num_beams=1))


def test_a_pool_grows(llama, monkeypatch):
    monkeypatch.setattr(paged_rows, "FIRST_PAGES", 1)
    expected = generated(llama, num_beams=4)
    assert_same(generated(llama, PagedCache(llama), num_beams=4), expected)


def test_a_full_pool_of_fixed_size_is_an_error_that_keeps_the_rows(llama):
    cache = PagedCache(llama, pages=2)
    with pytest.raises(ValueError, match=r"pages must be enough .* got 2 pages of 64 tokens"):
        llama(**padded(), past_key_values=cache)
    cache.reset()
    llama(torch.tensor([BEGIN]), past_key_values=cache)
    kept = copy.deepcopy(cache)
    cache.batch_repeat_interleave(2)
    mask = torch.ones(2, len(BEGIN) + 1, dtype=torch.int64)
    with pytest.raises(ValueError, match="of which 0 are free and 1 are needed"):
        llama(torch.tensor([[3], [4]]), attention_mask=mask, past_key_values=cache)
    cache.batch_select_indices(torch.tensor([0]))
    found, expected = (
        llama(torch.tensor([[3]]), past_key_values=one).logits for one in (cache, kept)
    )
    assert torch.equal(found, expected)


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_nan_of_another_row_never_shows(make_llama, attention):
    """Nor does what was in the memory of a page."""
    with patched_model(make_llama(), attention) as model, torch.no_grad():
        inputs = padded([BEGIN[:40], [*BEGIN[:9], 96, *BEGIN[:9]], BEGIN[:30]])
        steps = [torch.tensor([[3], [4], [5]]), torch.tensor([[6], [7], [8]])]

        def run():
            cache = PagedCache(model, shared_prefixes="always")
            cache._rows.pool._storage.fill_(float("nan"))
            logits = [model(**inputs, past_key_values=cache).logits[:, -1]]
            mask = inputs["attention_mask"]
            for tokens in steps:
                mask = torch.nn.functional.pad(mask, (0, 1), value=1)
                logits.append(
                    model(tokens, attention_mask=mask, past_key_values=cache).logits[:, -1]
                )
            return torch.stack(logits)

        expected = run()
        model.get_input_embeddings().weight[96] = float("nan")
        found = run()
    assert expected.isfinite().all()
    assert found[:, 1].isnan().all()
    assert torch.equal(found[:, ::2], expected[:, ::2])


def test_rows_share_only_what_determines_keys(llama):
    """Positions and further inputs, such as images, count beside token ids."""
    rows = torch.tensor([BEGIN] * 2)
    places = torch.arange(len(BEGIN)).expand(2, -1)
    for options, used in (
        ({}, 2),
        ({"position_ids": places}, 2),
        ({"position_ids": places + torch.tensor([[0], [3]])}, 4),
        ({"images": torch.zeros(2, 3, dtype=torch.int64)}, 4),
    ):
        cache = PagedCache(llama)
        llama(rows, attention_mask=torch.ones_like(rows), past_key_values=cache, **options)
        assert cache.used_pages == used
    cache = PagedCache(llama)
    llama(inputs_embeds=llama.get_input_embeddings()(rows), past_key_values=cache)
    assert cache.used_pages == 4


def test_a_model_that_counts_positions_along_the_mask():
    """OPT finds positions in the mask, which the patch replaces, if none are given."""
    config = OPTConfig(
        **{"vocab_size": 97, "hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 48},
        **{"num_hidden_layers": 2, "num_attention_heads": 4, "init_std": 0.5},
    )
    model = OPTForCausalLM(config).eval().double()
    inputs, last = padded(), torch.tensor([[5], [6], [7], [8]])
    mask = torch.cat((inputs["attention_mask"], torch.ones_like(last)), 1)
    with torch.no_grad():
        rows = torch.cat((inputs["input_ids"], last), 1)
        expected = model(rows, attention_mask=mask).logits[:, -2:]
        with patch_model(model):
            cache = PagedCache(model)
            before = model(**inputs, past_key_values=cache).logits[:, -1:]
            after = model(last, attention_mask=mask, past_key_values=cache).logits
    assert_equal_in_float64(torch.cat((before, after), 1), expected, "logits")


def test_a_plain_model_is_refused(make_llama):
    model = make_llama()
    with pytest.raises(ValueError, match=r"it is not patched. Call lctrain.patch_model\(model\)"):
        PagedCache(model)
    with patch_model(model):
        cache = PagedCache(model)
    with pytest.raises(ValueError, match=r"read by a patched model.*Call lctrain.patch_model"):
        model.generate(torch.tensor([BEGIN]), num_beams=2, past_key_values=cache)


@pytest.mark.parametrize("layers", [1, 2])
def test_a_plain_model_is_refused_after_a_pass_that_failed(make_llama, layers):
    model, more = make_llama(num_hidden_layers=layers), torch.tensor([[3]])
    with patch_model(model), torch.no_grad():
        cache = PagedCache(model)
        model(torch.tensor([BEGIN]), past_key_values=cache)
        kept = copy.deepcopy(cache)
        with pytest.raises(IndexError):
            model(torch.tensor([[10**6]]), past_key_values=cache)
    with torch.no_grad(), pytest.raises(ValueError, match=r"read by a patched model"):
        model(more, past_key_values=cache)
    with patch_model(model), torch.no_grad():
        found = model(more, past_key_values=cache).logits
        assert torch.equal(found, model(more, past_key_values=kept).logits)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pages": 0}, "pages must be an int of at least 1, or None, got 0"),
        ({"shared_prefixes": "yes"}, "shared_prefixes must be one of auto, always, never"),
    ],
)
def test_bad_options(llama, options, message):
    with pytest.raises(ValueError, match=message):
        PagedCache(llama, **options)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda model: model.train(), r"eval mode for a PagedCache, got training.*model.eval\(\)"),
        (
            lambda model: setattr(model.config, "is_encoder_decoder", True),
            "it has an encoder and a decoder. Leave past_key_values out",
        ),
        (
            lambda model: setattr(model.config, "attention_chunk_size", 8),
            "its layers attend within chunks. Leave past_key_values out",
        ),
        (lambda model: model.compile(), "it is compiled. Leave past_key_values out"),
    ],
    ids=["training", "encoder-decoder", "chunks", "compiled"],
)
def test_models_that_a_paged_cache_cannot_serve(llama, change, message):
    change(llama)
    with pytest.raises(ValueError, match=message):
        PagedCache(llama)


def test_a_module_is_no_model():
    with pytest.raises(ValueError, match=r"got Linear. Pass module.model of a LongContextModule"):
        PagedCache(torch.nn.Linear(1, 1))


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        ([[1, 1, 0], [1, 1, 1]], "padding must be on the left of a row with a PagedCache"),
        ([[1, 0, 1], [1, 1, 1]], "padding must be on the left of a row with a PagedCache"),
        ([[1, 1], [1, 1]], r"attention_mask must be \[batch, tokens\] and cover the 3 keys"),
        ([[1, 1, 2], [1, 1, 1]], "attention_mask must be 0 or 1 on top of a filled"),
    ],
)
def test_masks(llama, mask, message):
    cache = PagedCache(llama)
    with pytest.raises(ValueError, match=message):
        llama(
            torch.ones(2, 3, dtype=torch.int64),
            attention_mask=torch.tensor(mask),
            past_key_values=cache,
        )
    assert cache.used_pages == 0


def test_calls_that_do_not_continue_the_rows(llama):
    cache = PagedCache(llama)
    llama(**padded(), past_key_values=cache)
    token = torch.ones(4, 1, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"got a PagedCache with 4 rows. Call its reset\(\)"):
        llama(token[:2], past_key_values=cache)
    with pytest.raises(ValueError, match=r"attention_mask must be .* got NoneType"):
        llama(token, past_key_values=cache)
    whole = torch.ones(4, len(BEGIN) + 1, dtype=torch.int64)
    with pytest.raises(ValueError, match="and stay the same for the tokens in it"):
        llama(token, attention_mask=whole, past_key_values=cache)
    with torch.enable_grad(), pytest.raises(ValueError, match=r"under torch.no_grad\(\)"):
        llama(token, past_key_values=cache)
    llama.train()
    with pytest.raises(ValueError, match=r"got training mode. Call model.eval\(\)"):
        llama(token, past_key_values=cache)
    for indices in ([4], [-5]):
        with pytest.raises(ValueError, match="indices must name rows from 0 to 3"):
            cache.batch_select_indices(torch.tensor(indices))
    for tokens in (1, -len(BEGIN) - 1):
        with pytest.raises(ValueError, match="tokens_to_remove must be from -70 to 0"):
            cache.crop(tokens)
    with pytest.raises(ValueError, match="a PagedCache must be updated as a whole"):
        cache.layers[0].update(token, token)


def test_a_cache_is_for_one_model_and_precision(llama, make_llama):
    cache = PagedCache(llama)
    llama.float()
    with pytest.raises(ValueError, match=r"for the model and the precision .* in torch.float32"):
        llama(**padded(), past_key_values=cache)


def test_packs_are_refused(llama):
    batch = lctrain.PackedBatch.from_documents([torch.tensor(BEGIN[:5]), torch.tensor(BEGIN[:4])])
    with pytest.raises(ValueError, match="use_cache must be False for packed inputs"):
        llama(batch.input_ids, past_key_values=PagedCache(llama), **batch.model_kwargs())
