"""Tests continuous batching: the tokens of padded batches, a full cache, forks, and isolation."""

from dataclasses import replace

import pytest
import torch

import lctrain
from lctrain.generation import continuous, prefill
from lctrain.generation.continuous import ContinuousBatch
from lctrain.generation.forward import CachedForward
from lctrain.generation.options import SamplingOptions
from lctrain.generation.pages import PAGE, CacheShape, PagePool, pages_of
from lctrain.generation.pool_size import longest_pages, pool_pages
from lctrain.generation.prefixes import PrefixPages
from lctrain.generation.road import find_cache
from lctrain.generation.schedule import Schedule
from lctrain.generation.task import GenerationTask

# The second one fills a page exactly, the third one begins a page while it is completed.
PROMPTS = [[5, 6, 7, 8], list(range(64)), list(range(30)) * 2, [3], [4, 4, 9], [5, 6, 7, 8]]
CPU = torch.device("cpu")


def tokens(completions) -> list[list[int]]:
    return [completion.token_ids for completion in completions]


@pytest.mark.parametrize("batch_size", [64, 2])
@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0},
        {"temperature": 0, "repetition_penalty": 1.5},
        {"temperature": 0.7, "top_k": 20, "seeds": 3},
        {"top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.3, "seeds": [1, 1, 2, 2, 3, 1]},
    ],
    ids=["greedy", "penalty", "top_k", "top_p"],
)
def test_the_tokens_of_padded_batches(patched, options, batch_size):
    expected = lctrain.generate(patched, PROMPTS, max_new_tokens=7, batching="padded", **options)
    options["batch_size"] = batch_size
    found = lctrain.generate(patched, PROMPTS, max_new_tokens=7, batching="continuous", **options)
    assert tokens(found) == tokens(expected)
    assert [one.prompt_ids for one in found] == PROMPTS
    assert {(one.finish, len(one.log_probs)) for one in found} == {("length", 7)}


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "mistral", "sliding_window": 4},
        {"model_type": "qwen3", "max_window_layers": 1, "use_sliding_window": True},
        {"model_type": "gemma2", "sliding_window": 8, "attn_logit_softcapping": 5.0},
        {"model_type": "gpt_oss", "num_local_experts": 2, "num_experts_per_tok": 1},
        {"model_type": "mixtral", "num_local_experts": 2, "output_router_logits": True},
        {"model_type": "gpt2", "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 80},
    ],
    ids=lambda config: config["model_type"],
)
def test_families(config):
    """Windows, soft caps, sinks, experts and learned positions fit the paged cache."""
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {
        "vocab_size": 97,
        "hidden_size": 32,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
    }
    if config["model_type"] == "gpt2":
        sizes = {"vocab_size": 97}
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(**sizes, **config), attn_implementation="eager"
    ).eval()
    options = {"temperature": 0, "max_new_tokens": 6, "eos_token_id": []}
    expected = lctrain.generate(model, PROMPTS[:4], **options)
    with lctrain.patch_model(model):
        found = lctrain.generate(model, PROMPTS[:4], batching="continuous", **options)
    assert tokens(found) == tokens(expected)


def test_end_tokens_and_stop_strings(patched, letters):
    options = {"max_new_tokens": 6, "seeds": 2, "tokenizer": letters}
    free = lctrain.generate(patched, PROMPTS, **options)
    options["stop"] = [free[0].text[1:3], free[1].text[:1], free[2].text[3:6] + free[3].text]
    options["eos_token_id"] = [free[2].token_ids[1], free[3].token_ids[4]]
    found = lctrain.generate(patched, PROMPTS, batching="continuous", batch_size=3, **options)
    padded = lctrain.generate(patched, PROMPTS, batching="padded", **options)
    assert tokens(found) == tokens(padded)
    assert [(one.finish, one.text) for one in found] == [(one.finish, one.text) for one in padded]
    assert {one.finish for one in found[:4]} == {"stop"}
    assert len({len(one.token_ids) for one in found}) > 2


def test_a_full_cache_preempts_and_loses_no_token(make_batch):
    prompts = [[index + 1] * 60 for index in range(4)]
    free = make_batch(prompts, max_new_tokens=12)
    expected = free.run()
    assert free.schedule.preempted == 0
    for pages in (3, 5):  # a request begins with 1 and ends with 2
        full = make_batch(prompts, pages=pages, max_new_tokens=12)
        assert tokens(full.run()) == tokens(expected)
        assert full.schedule.preempted > 0
        assert full._pool.free == pages


def test_a_request_that_has_ended_makes_room_before_one_is_preempted(patched):
    """Its end is read one step late: its next step would need the page that another one needs."""
    prompts = [[5] * 62, [6] * 63]
    shape = find_cache(patched)
    with torch.no_grad():
        free = GenerationTask(prompts, [0, 1], SamplingOptions(), 4)
        expected = continuous.ContinuousBatch(patched, free, shape).run()
        end = expected[0].token_ids[2]
        assert end not in expected[0].token_ids[:2] + expected[1].token_ids
        task = replace(free, end=[end])
        gib = 3 * shape.page_bytes / 2**30
        batch = continuous.ContinuousBatch(patched, task, shape, gib)
        found = batch.run()
    assert tokens(found) == [expected[0].token_ids[:3], expected[1].token_ids]
    assert (found[0].finish, batch.schedule.preempted) == ("stop", 0)


def test_equal_prompts_share_pages_until_they_write(make_batch, monkeypatch):
    prompts = [[5] * 70, [6] * 64, [5] * 70, [6] * 64, [5] * 70]
    expected = [make_batch([prompt], temperature=0).run()[0].token_ids for prompt in prompts]
    read = []
    original = prefill.prefill
    monkeypatch.setattr(
        prefill, "prefill", lambda f, p, rows, n: read.extend(rows) or original(f, p, rows, n)
    )
    greedy = make_batch(prompts, temperature=0)
    assert tokens(greedy.run()) == expected
    assert greedy.schedule.forked == 3
    assert [row[0] for row in read] == [[5] * 70, [6] * 64]
    drawn = make_batch(prompts)
    alone = make_batch(prompts, batch_size=1)
    assert tokens(drawn.run()) == tokens(alone.run())
    assert (drawn.schedule.forked, alone.schedule.forked) == (3, 0)
    assert len({tuple(one) for one in tokens(drawn._completions)}) == 5


def test_a_step_looks_for_pages_only_where_one_is_full(make_batch, monkeypatch):
    """Prompts that fill a page and forks, which write to copies, look for one at once."""
    looked = []
    extend = Schedule._extend

    def note(schedule, request):
        looked.append((request.index, request.stored // PAGE))
        return extend(schedule, request)

    monkeypatch.setattr(Schedule, "_extend", note)
    make_batch([*PROMPTS, PROMPTS[0]], max_new_tokens=2 * PAGE).run()
    assert len(looked) == len(set(looked))
    assert {index for index, _ in looked} == set(range(len(PROMPTS) + 1))


def test_prompts_that_begin_alike_share_pages(make_batch, monkeypatch):
    """Some are admitted together, others while the first one runs, others when it has ended."""
    start = [index % 90 for index in range(150)]
    prompts = [[*start, 5], [*start[:128], 7], [8, *start], start[:128], [*start[:70], 9] * 2]
    expected = [make_batch([prompt], temperature=0).run()[0].token_ids for prompt in prompts]
    read = []
    original = prefill.prefill
    monkeypatch.setattr(
        prefill, "prefill", lambda f, p, rows, n: read.extend(rows) or original(f, p, rows, n)
    )
    together = make_batch(prompts, temperature=0)
    assert tokens(together.run()) == expected
    assert [known for _, _, known in read] == [0, 128, 0, 64, 64]
    assert together.schedule.shared == 4
    for batch_size, pages in ((2, None), (1, None), (64, 5)):
        found = make_batch(prompts, batch_size=batch_size, pages=pages, temperature=0)
        assert tokens(found.run()) == expected
        assert found._pool.free == found._pool.pages
        assert found.schedule.shared > 0


@pytest.mark.parametrize("pages", [None, 7, 4])
def test_requests_that_end_together_leave_their_beginning_to_the_next(make_batch, pages):
    """A small cache has room for the next one only when the pages of the others are free."""
    start = [index % 90 for index in range(150)]
    prompts = [[*start, token] for token in range(6)]
    expected = [make_batch([prompt], temperature=0).run()[0].token_ids for prompt in prompts]
    found = make_batch(prompts, batch_size=2, pages=pages, temperature=0)
    assert tokens(found.run()) == expected
    assert found.schedule.shared == 2 * 5  # of two full pages; one prompt is read whole
    assert found._pool.free == found._pool.pages
    other = make_batch([[*start, 5], [7, *start]], batch_size=1, pages=3, temperature=0)
    assert tokens(other.run())[0] == expected[5]
    assert (other.schedule.shared, other._pool.free) == (0, 3)


def test_a_prompt_without_room_is_compared_only_when_requests_come_or_go(make_batch, monkeypatch):
    """Its pages are not looked for in each of the steps in which it waits."""
    looked = []
    find = PrefixPages.find
    monkeypatch.setattr(
        PrefixPages, "find", lambda known, row: looked.append(len(row)) or find(known, row)
    )
    start = [index % 90 for index in range(150)]
    prompts = [[*start, *[token] * 30] for token in range(3)]
    batch = make_batch(prompts, pages=4, max_new_tokens=40, temperature=0)
    assert len(batch.run()) == 3
    assert batch.steps > 100
    assert len(looked) < 20
    assert batch.schedule.shared == 2 * 2


def test_pages_are_known_by_all_tokens_before_them():
    known = PrefixPages()
    first, second = [1] * 64, [2] * 64
    known.add([*first, *second, 3], [4, 5, 6])
    assert known.find([*first, *second]) == [4]  # a token is left for the logits
    assert known.find([*first, *second, 9]) == [4, 5]
    assert known.find([*second, *second, 9]) == []
    known.add([*first, *second, 9], [7, 8, 9])  # the pages of the first one stay
    assert known.find([*first, *second, 9]) == [4, 5]
    known.forget([5, 8])
    assert known.find([*first, *second, 9]) == [4]


@pytest.mark.parametrize("batch_size", [64, 4, 1])
def test_samples_are_those_of_copies(patched, batch_size):
    copies = [prompt for prompt in PROMPTS[:3] for _ in range(3)]
    options = {"max_new_tokens": 5, "seeds": 4, "batching": "continuous"}
    expected = lctrain.generate(patched, copies, **options)
    found = lctrain.generate(patched, PROMPTS[:3], samples=3, batch_size=batch_size, **options)
    assert tokens(found) == tokens(expected)
    assert [one.prompt_ids for one in found] == copies


def test_a_prompt_is_compared_once_for_its_samples(patched):
    """Before the first prefill: 512 prompts of 8,192 tokens with 16 samples took 0.6 s."""
    read = []

    class Prompt(list):
        def __iter__(self):
            read.append(len(self))
            return super().__iter__()

    prompts = [Prompt([5, 6, 7]), Prompt([8]), Prompt([5, 6, 7])]
    task = GenerationTask(prompts, range(12), SamplingOptions(), 2, samples=4)
    with torch.no_grad():
        batch = ContinuousBatch(patched, task, find_cache(patched))
    assert read == [3, 1, 3]
    order = [request.index for request in batch.schedule.waiting]
    assert order == [0, 1, 2, 3, 8, 9, 10, 11, 4, 5, 6, 7]
    assert [request.prompt for request in batch.schedule.waiting][8:] == [[8]] * 4


def test_logits_without_a_distribution_name_prompt_and_token(patched):
    options = {"samples": 2, "max_new_tokens": 4, "batching": "continuous"}
    prompts = [[3], [4], [4, 4, 9]]
    free = tokens(lctrain.generate(patched, prompts, **options))
    every = [token for row in prompts + free for token in row]
    row, step = next(
        (row, step)
        for row, found in enumerate(free)
        for step, token in enumerate(found[:-1])
        if row > 1 and every.count(token) == 1
    )
    with torch.no_grad():
        patched.model.embed_tokens.weight[free[row][step]] = float("nan")
    match = f"logits of prompt {row // 2} at generated token {step + 1} must give a distribution"
    with pytest.raises(ValueError, match=match):
        lctrain.generate(patched, prompts, **options)


def test_forks_of_a_full_cache(make_batch):
    prompts = [[5] * 60] * 6
    expected = make_batch(prompts, max_new_tokens=10).run()
    full = make_batch(prompts, pages=3, max_new_tokens=10)
    assert tokens(full.run()) == tokens(expected)
    assert full.schedule.forked > 0
    assert full._pool.free == 3


def test_nothing_of_another_request_shows(make_batch, patched, request):
    """Token 96 gives NaN, and every page holds NaN before it is used."""
    prompts = [[5] * 70, [6, 7], [8] * 64]
    expected = make_batch(prompts, temperature=0).run()
    patched.model.embed_tokens.weight[96] = float("nan")
    patched.lm_head.weight[96] = 0.0
    request.getfixturevalue("nan_memory")
    bad = [[96] * 70, [96], [96] * 3]
    mixed = [prompt for pair in zip(bad, prompts, strict=True) for prompt in pair]
    for batch_size in (6, 3, 1):
        found = make_batch(mixed, temperature=0, batch_size=batch_size).run()
        assert tokens(found[1::2]) == tokens(expected)
        assert torch.tensor([one.log_probs for one in found[::2]]).isnan().all()


def test_long_prompts_are_cut(patched):
    """Pieces attend to the pieces before them, and lie in packs of their own."""
    forward, rows = CachedForward(patched), [[3] * 5, list(range(70)), [9] * 6, [8] * 6]
    shape = CacheShape(2, 2, 8, torch.float32)
    found = []
    with torch.no_grad():
        for most in (100, 16):
            pool = PagePool(shape, 8, CPU)
            requests = [(row, pool.take(pages_of(len(row))), 0) for row in rows]
            found.append(prefill.prefill(forward, pool, requests, most).argmax(-1).tolist())
        expected = [patched(torch.tensor([row])).logits[0, -1].argmax().item() for row in rows]
    assert found == [expected, expected]
    pieces = [[(piece.begin, piece.end) for piece in pack] for pack in prefill.packs(requests, 16)]
    cuts = [[(0, 16)], [(16, 32)], [(32, 48)], [(48, 64)]]
    assert pieces == [[(0, 5)], *cuts, [(64, 70), (0, 6)], [(0, 6)]]


def test_pages_have_users():
    pool = PagePool(CacheShape(1, 1, 2, torch.float32), 3, CPU)
    first = pool.take(2)
    keys, _ = pool.layer(0)
    keys[first[1]] = 7.0
    assert pool.share(first) == first
    assert pool.is_shared(first[1])
    copy = pool.own(first[1])
    assert copy not in first
    assert (keys[copy] == 7.0).all()
    assert not pool.is_shared(first[1])
    assert pool.release([first[0], copy]) == [copy]
    assert pool.release(first) == first
    assert pool.free == 3


def test_the_size_of_the_cache():
    shape = CacheShape(2, 2, 8, torch.float32)
    asked = GenerationTask([[1] * 64, [1] * 65, [1]], [0] * 3, SamplingOptions(), 1, batch_size=2)
    assert longest_pages(asked) == [1, 2, 1]  # the last token is not read
    gib = shape.page_bytes / 2**30
    assert pool_pages(asked, shape, CPU, None) == 3
    assert pool_pages(replace(asked, samples=2), shape, CPU, None) == 4
    assert pool_pages(replace(asked, samples=9, batch_size=4), shape, CPU, None) == 8
    assert pool_pages(asked, shape, CPU, 2.5 * gib) == 2
    large = CacheShape(2**20, 8, 128, torch.float32)  # a page has more than 4 GiB
    assert pool_pages(asked, large, CPU, None) == 2
    with pytest.raises(ValueError, match=rf"cache_gib must be at least .* of {2 * PAGE} tokens"):
        pool_pages(asked, shape, CPU, 1.5 * gib)
