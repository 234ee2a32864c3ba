"""Tests continuous batching of all attentions against transformers' generate() on one prompt.

Chunks of dual chunk attention have 8 tokens, so prompts and completions cross their borders.
"""

import pytest
import torch

import lctrain
from lctrain.generation import continuous, decode
from lctrain.generation.continuous import ContinuousBatch
from lctrain.generation.options import SamplingOptions
from lctrain.generation.pages import PAGE
from lctrain.generation.pool_size import cache_tokens
from lctrain.generation.road import find_cache
from lctrain.generation.task import GenerationTask
from lctrain.loss import token_log_probs
from tests.generation.test_decode_step import Recording
from tests.models.attentions import ATTENTIONS, patched_model
from tests.numerics import near_roundings

ROUNDINGS = 32
"""Logits of float64 are rounded to float32; their log-softmax adds up 97 terms in float32."""

BEGIN = [(7 * i * i + 3 * i) % 89 + 3 for i in range(90)]
# The first two share a page. The third fills one exactly; the fourth begins one while it decodes.
PROMPTS = [BEGIN, BEGIN[:70] + BEGIN[:9], BEGIN[5:69], BEGIN[3:63], [3], BEGIN[:7], BEGIN]
TOKENS = 10
OTHERS = ATTENTIONS[1:]

pytestmark = pytest.mark.usefixtures("in_float64")


def tokens(completions) -> list[list[int]]:
    return [completion.token_ids for completion in completions]


def log_probs(completions) -> list[float]:
    return [value for completion in completions for value in completion.log_probs]


def one_by_one(model, prompts, count=TOKENS):
    """Returns greedy tokens and their log-probabilities by generate() on one prompt at a time."""
    found, values = [], []
    options = {"max_new_tokens": count, "do_sample": False, "pad_token_id": 0}
    for prompt in prompts:
        made = model.generate(
            torch.tensor([prompt]), output_logits=True, return_dict_in_generate=True, **options
        )
        chosen = made.sequences[0, len(prompt) :]
        found.append(chosen.tolist())
        rows = torch.cat(made.logits).log_softmax(-1)
        values += rows.gather(-1, chosen[:, None])[:, 0].tolist()
    return found, values


def check_one_by_one(model, completions, prompts=PROMPTS):
    expected, values = one_by_one(model, prompts, len(completions[0].token_ids))
    assert tokens(completions) == expected
    assert log_probs(completions) == near_roundings(values, ROUNDINGS)


@pytest.fixture(params=OTHERS)
def model(request, endless):
    """Returns a tiny model of another attention than flash, patched, in float64."""
    with patched_model(endless(), request.param) as model:
        model.generation_config.eos_token_id = model.config.eos_token_id = None
        yield model


@pytest.fixture
def make():
    """Returns a factory of ContinuousBatch: make(model, prompts, pages=None, ...), greedy."""

    def make(model, prompts=PROMPTS, pages=None, capture=None, sharing="auto", **sizes):
        sizes = {"batch_size": 64, "samples": 1, "options": {"temperature": 0}} | sizes
        options = SamplingOptions(**sizes.pop("options"))
        count = len(prompts) * sizes["samples"]
        asked = GenerationTask(
            prompts, range(count), options, sizes.pop("max_new_tokens", TOKENS), **sizes
        )
        shape = find_cache(model)
        gib = None if pages is None else pages * shape.page_bytes / 2**30
        return ContinuousBatch(model, asked, shape, gib, capture, sharing)

    with torch.no_grad():
        yield make


@pytest.mark.parametrize("batch_size", [64, 3, 1])
def test_tokens_and_log_probs_are_those_of_one_prompt_alone(model, batch_size):
    options = {"temperature": 0, "max_new_tokens": TOKENS, "batching": "continuous"}
    found = lctrain.generate(model, PROMPTS, batch_size=batch_size, **options)
    check_one_by_one(model, found)


def test_draws_are_those_of_padded_batches(model):
    options = {"max_new_tokens": 6, "temperature": 0.8, "seeds": 3, "samples": 2}
    options |= {"top_k": 40, "top_p": 0.95, "repetition_penalty": 1.2}
    padded = lctrain.generate(model, PROMPTS, batching="padded", **options)
    for size in (64, 3):
        found = lctrain.generate(model, PROMPTS, batching="continuous", batch_size=size, **options)
        assert tokens(found) == tokens(padded)
        assert log_probs(found) == near_roundings(log_probs(padded), ROUNDINGS)


def test_a_full_cache_preempts_and_loses_no_token(model, make):
    batch = make(model, pages=3)
    check_one_by_one(model, batch.run())
    assert batch.schedule.preempted > 0
    assert batch._pool.free == 3


def test_equal_prompts_and_equal_beginnings_share_pages(model, make):
    batch = make(model, [*PROMPTS[:2], *PROMPTS[2:3] * 3])
    check_one_by_one(model, batch.run(), [*PROMPTS[:2], *PROMPTS[2:3] * 3])
    assert (batch.schedule.forked, batch.schedule.shared) == (2, 1)
    drawn = make(model, PROMPTS[:1], samples=3, options={"temperature": 1})
    alone = make(model, PROMPTS[:1], samples=3, options={"temperature": 1}, batch_size=1)
    found = drawn.run()
    assert tokens(found) == tokens(alone.run())
    assert (drawn.schedule.forked, alone.schedule.forked) == (2, 0)
    assert len({tuple(one.token_ids) for one in found}) == 3


def test_steps_of_shared_pages_give_the_same_tokens(model, make, monkeypatch):
    """On a CPU, every step checks its groups against the page table."""
    monkeypatch.setattr(decode, "WARM_UP", 1)
    prompts = [PROMPTS[0], *PROMPTS]
    for batch_size, capture in ((64, None), (4, Recording())):
        batch = make(model, prompts, sharing="always", batch_size=batch_size, capture=capture)
        check_one_by_one(model, batch.run(), prompts)
        assert 0 < batch.shared_steps <= batch.steps


def test_prompts_are_prefilled_in_pieces(model, make, monkeypatch):
    """Pieces of 12 tokens begin and end within chunks, and attend to the pages before them."""
    monkeypatch.setattr(continuous, "pack_tokens", lambda *_: 12)
    check_one_by_one(model, make(model).run())


def test_captured_steps_give_the_same_tokens(model, make, monkeypatch):
    monkeypatch.setattr(decode, "WARM_UP", 1)
    capture = Recording()
    batch = make(model, capture=capture, batch_size=4)
    check_one_by_one(model, batch.run())
    assert capture.replays > capture.captures > 0


def test_log_probs_are_those_of_the_trainers_pack(model):
    options = {"max_new_tokens": TOKENS, "temperature": 0.7, "seeds": 1}
    found = lctrain.generate(model, PROMPTS, batching="continuous", **options)
    documents = [torch.tensor([*one.prompt_ids, *one.token_ids]) for one in found]
    labels = [torch.tensor([-100] * len(one.prompt_ids) + one.token_ids) for one in found]
    pack = lctrain.PackedBatch.from_documents(documents, labels=labels)
    trained = token_log_probs(model, pack, temperature=0.7).log_probs.tolist()
    assert log_probs(found) == near_roundings(trained, ROUNDINGS)


def test_nothing_of_another_request_shows(model, make, request):
    """Token 96 gives NaN, and every page holds NaN before it is used."""
    prompts = [PROMPTS[1], PROMPTS[2], PROMPTS[5]]
    model.lm_head.weight[96] = 0.0
    expected = make(model, prompts).run()
    assert not any(96 in row for row in tokens(expected))
    model.model.embed_tokens.weight[96] = float("nan")
    request.getfixturevalue("nan_memory")
    mixed = [row for one in prompts for row in ([96] * 70, one)]
    for batch_size in (6, 3):
        found = make(model, mixed, batch_size=batch_size).run()
        assert tokens(found[1::2]) == tokens(expected)
        assert torch.tensor(log_probs(found[::2])).isnan().all()


def test_windows_of_differential_attention():
    from transformers import MistralConfig, MistralForCausalLM

    sizes = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": 8}
    plain = MistralForCausalLM(MistralConfig(**sizes, **heads, eos_token_id=None)).eval()
    with patched_model(plain, "differential-2") as model:
        found = lctrain.generate(
            model, PROMPTS, temperature=0, max_new_tokens=6, batching="continuous"
        )
        check_one_by_one(model, found)


@pytest.fixture
def yarn(endless):
    """Returns a model whose logits grow with the length beyond a window of 66 tokens."""
    options = {"scale": "yarn", "window": 66, "scale_coefficient": 1.0}
    with patched_model(endless(), "dual_chunk", **options) as model:
        yield model


@pytest.mark.parametrize("pages", [None, 5])
def test_factors_of_the_length_are_those_of_one_prompt_alone(yarn, make, monkeypatch, pages):
    """No request is prefilled again, and only prompts of one length share pages."""
    monkeypatch.setattr(continuous, "pack_tokens", lambda *_: 12)
    prompts = [*PROMPTS, BEGIN[:64] + BEGIN[:26], [*BEGIN[:64], 3], BEGIN[:65]]
    batch = make(yarn, prompts, pages=pages)
    check_one_by_one(yarn, batch.run(), prompts)
    assert batch.schedule.preempted == 0
    if pages is None:  # two of 90 tokens, and two within the window
        assert (batch.schedule.forked, batch.schedule.shared) == (1, 2)


@pytest.mark.parametrize(("count", "preempts"), [(12, True), (13, False)])
def test_requests_within_the_window_reserve_nothing(yarn, make, count, preempts):
    """The last token is not stored, so requests of 55 + 12 tokens just fit the window."""
    prompts = [[token] * 55 for token in range(3, 7)]
    batch = make(yarn, prompts, pages=3, max_new_tokens=count)
    check_one_by_one(yarn, batch.run(), prompts)
    assert (batch.schedule.preempted > 0) is preempts


def test_frequencies_that_depend_on_the_length(endless):
    """Dual chunk attention takes those of short texts, whatever the length."""
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    options = {"temperature": 0, "max_new_tokens": 6, "batching": "continuous"}
    with patched_model(
        endless(rope_parameters=rope, max_position_embeddings=16), "dual_chunk"
    ) as model:
        check_one_by_one(model, lctrain.generate(model, PROMPTS, **options))


@pytest.mark.parametrize("kind", ["flash", "dual_chunk"])
def test_a_model_loaded_by_name(endless, kind):
    model = endless(attn_implementation=f"lctrain_{kind}")
    found = lctrain.generate(model, PROMPTS, temperature=0, max_new_tokens=4, batching="continuous")
    check_one_by_one(model, found)


def test_evaluation_reads_the_paged_cache(model):
    shape = find_cache(model)
    assert cache_tokens(model, 1.0) == 2**30 // shape.page_bytes * PAGE


def test_what_the_attention_cannot_do_is_an_error(model):
    with pytest.raises(ValueError, match=r"log_probs must be 'decode' unless .*attention='flash'"):
        lctrain.generate(model, PROMPTS, log_probs="trainer")
