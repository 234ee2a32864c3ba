"""Tests lctrain.generate: tokens, log-probabilities, seeds, stops, and what it leaves as it was."""

import pytest
import torch
from torch import nn

import lctrain
from lctrain.eval.untouched import untouched
from lctrain.generation import SamplingOptions
from lctrain.generation.sampler import Finish, Sampler
from lctrain.loss import policy_loss, token_log_probs
from tests.numerics import assert_error_at_most_twice

PROMPTS = [[5, 6, 7, 8], [9, 10, 11, 12, 13, 14, 15], [3], [4, 4, 9]]


@pytest.fixture(params=["padded", "continuous"])
def model(request, endless):
    """Returns a model that generates in padded batches, or patched and by continuous batching."""
    model = endless()
    if request.param == "continuous":
        lctrain.patch_model(model)
    return model


@pytest.fixture
def plain(endless):
    """Returns a model without a patch."""
    return endless()


def tokens(completions) -> list[list[int]]:
    return [completion.token_ids for completion in completions]


def test_greedy_is_transformers_greedy(model):
    found = lctrain.generate(model, PROMPTS, temperature=0, max_new_tokens=6)
    for prompt, completion in zip(PROMPTS, found, strict=True):
        row = model.generate(torch.tensor([prompt]), max_new_tokens=6, do_sample=False)
        assert completion.token_ids == row[0, len(prompt) :].tolist()
        assert completion.prompt_ids == prompt
        assert (completion.finish, completion.text) == ("length", None)


@pytest.mark.parametrize("batching", ["padded", "continuous"])
@pytest.mark.parametrize("temperature", [0, 1.0, 0.7])
def test_rollouts_have_the_log_probs_of_a_packed_training_forward(
    endless, make_llama, temperature, batching
):
    model = endless()
    options = {"temperature": temperature, "max_new_tokens": 6, "batching": batching}
    with lctrain.patch_model(model):
        found = lctrain.generate(model, PROMPTS, **options)
        documents = [torch.tensor([*c.prompt_ids, *c.token_ids]) for c in found]
        labels = [torch.tensor([-100] * len(c.prompt_ids) + c.token_ids) for c in found]
        batch = lctrain.PackedBatch.from_documents(documents, labels=labels)
        trained = token_log_probs(model, batch, temperature=temperature or 1.0)
    exact = make_llama().double()
    expected = []
    for document, label in zip(documents, labels, strict=True):
        logits = exact(document[None]).logits[0, :-1] / (temperature or 1.0)
        chosen = logits.log_softmax(-1).gather(-1, document[1:, None])[:, 0]
        expected.append(chosen[label[1:] >= 0])
    rollout = torch.tensor([x for completion in found for x in completion.log_probs])
    assert_error_at_most_twice(rollout, trained.log_probs, torch.cat(expected).detach())


def test_a_seed_gives_the_same_tokens_in_every_batch(model):
    seeds = [3, 1, 4, 1]
    together = lctrain.generate(model, PROMPTS, seeds=seeds, max_new_tokens=8)
    for size in (1, 3):
        found = lctrain.generate(model, PROMPTS, seeds=seeds, max_new_tokens=8, batch_size=size)
        assert tokens(found) == tokens(together)
    alone = lctrain.generate(model, PROMPTS[2:3], seeds=[4], max_new_tokens=8)
    assert tokens(alone) == tokens(together)[2:3]
    numbered = lctrain.generate(model, PROMPTS[:1] * 3, seeds=7, max_new_tokens=8)
    assert tokens(numbered) == tokens(
        lctrain.generate(model, PROMPTS[:1] * 3, seeds=[7, 8, 9], max_new_tokens=8)
    )
    assert tokens(numbered)[0] != tokens(numbered)[1]


@pytest.mark.parametrize(
    ("prompts", "attention"),
    [(PROMPTS[:2], None), (PROMPTS, None), (PROMPTS[:2], "flash"), (PROMPTS[:2], "dual_chunk")],
    ids=["plain", "with a prompt of one token", "flash", "dual_chunk"],
)
def test_samples_of_a_prompt_are_those_of_its_copies(plain, prompts, attention):
    if attention is not None:
        options = {"chunk_size": 8, "local_size": 2} if attention == "dual_chunk" else {}
        lctrain.patch_model(plain, attention=attention, **options)
    copies = [prompt for prompt in prompts for _ in range(3)]
    expected = lctrain.generate(plain, copies, seeds=5, max_new_tokens=6)
    read = []
    plain.model.embed_tokens.register_forward_hook(lambda module, ids, out: read.append(ids[0]))
    options = {"samples": 3, "seeds": 5, "max_new_tokens": 6, "batching": "padded"}
    for size in (64, 4, 1):  # the samples of a prompt stay together
        read.clear()
        found = lctrain.generate(plain, prompts, batch_size=size, **options)
        assert tokens(found) == tokens(expected)
        assert [c.prompt_ids for c in found] == copies
        if len(prompts) == 2:
            assert max(ids.shape[0] for ids in read if ids.shape[1] > 1) == min(
                2, max(1, size // 3)
            )


def test_samples_have_the_log_probs_of_the_trainer_in_a_pack_of_groups(plain, make_llama):
    """So they serve as the old policy's: no ratio is clipped, and all are 1 within rounding."""
    lctrain.patch_model(plain)
    prompts = PROMPTS[:2]
    found = lctrain.generate(plain, prompts, samples=4, max_new_tokens=5)
    completions = [torch.tensor(completion.token_ids) for completion in found]
    pack = lctrain.PackedBatch.from_groups(
        [(prompt, completions[4 * n : 4 * n + 4]) for n, prompt in enumerate(prompts)]
    )
    old = torch.tensor([x for completion in found for x in completion.log_probs])
    trained = token_log_probs(plain, pack)
    with lctrain.patch_model(make_llama().double()) as exact:
        expected = token_log_probs(exact.model, pack).log_probs.detach()
    assert_error_at_most_twice(old, trained.log_probs.detach(), expected)
    loss = policy_loss(trained, old, torch.ones(8), clip_low=1e-3)
    assert int(loss.clipped) == 0


@pytest.mark.parametrize("options", [{"top_k": 1}, {"min_p": 1.0}, {"top_p": 1e-6}])
def test_filters_that_leave_one_token_are_greedy(model, options):
    greedy = lctrain.generate(model, PROMPTS, temperature=0, max_new_tokens=4)
    found = lctrain.generate(model, PROMPTS, max_new_tokens=4, **options)
    assert tokens(found) == tokens(greedy)


def test_draws_follow_the_softmax():
    logits = torch.tensor([0.5, 1.5, -1.0, 0.0, -4.0])
    rows = 3000
    real = torch.ones(rows, 1, dtype=torch.bool)
    sampler = Sampler(SamplingOptions(temperature=0.8, top_k=4), real, range(rows))
    chosen = sampler(torch.zeros(rows, 1, dtype=torch.int64), logits.expand(rows, -1)).argmax(-1)
    shares = torch.softmax(logits / 0.8, -1)
    shares[4] = 0
    shares /= shares.sum()
    deviation = (shares * (1 - shares) / rows).sqrt()
    counts = torch.bincount(chosen, minlength=5) / rows
    assert ((counts - shares).abs() <= 4 * deviation).all()


def test_the_penalty_does_not_count_padding():
    """Rows are padded with token 1, which occurs in neither prompt."""
    real = torch.tensor([[False, True], [True, True]])
    sampler = Sampler(SamplingOptions(temperature=0, repetition_penalty=2.0), real, ())
    scores = torch.tensor([[0.0, 1.0, 0.9, 1.5]] * 2)
    chosen = sampler(torch.tensor([[1, 3], [2, 3]]), scores).argmax(-1)
    assert chosen.tolist() == [1, 1]
    assert sampler.log_probs[0].tolist() == scores.log_softmax(-1)[:, 1].tolist()


def test_end_tokens_end_a_completion(model):
    free = lctrain.generate(model, PROMPTS, temperature=0, max_new_tokens=6)
    end = free[0].token_ids[2]
    found = lctrain.generate(model, PROMPTS, temperature=0, max_new_tokens=6, eos_token_id=[end, 0])
    assert found[0].token_ids == free[0].token_ids[:3]
    assert len(found[0].log_probs) == 3
    for ended, whole in zip(found, free, strict=True):
        stopped = {end, 0} & set(whole.token_ids)
        assert ended.finish == ("stop" if stopped else "length")
        assert ended.token_ids == whole.token_ids[: len(ended.token_ids)]


def test_stop_strings_and_texts(model, letters):
    options = {"temperature": 0, "max_new_tokens": 6, "tokenizer": letters}
    free = lctrain.generate(model, ["&'()"], **options)[0]
    assert free.prompt_ids == PROMPTS[0]
    assert free.text == letters.decode(free.token_ids)
    stop = free.text[1:3]
    found = lctrain.generate(model, PROMPTS[:1], stop=[stop], **options)[0]
    assert (found.finish, free.finish) == ("stop", "length")
    assert found.text == free.text[: free.text.index(stop) + 2]
    assert len(found.log_probs) == len(found.token_ids) == len(found.text)
    across = ")" + free.text[0]  # it begins in the prompt
    assert lctrain.generate(model, PROMPTS[:1], stop=[across], **options)[0] == free


def test_the_training_is_as_before(model):
    module = nn.Module()
    module.model = model.train()
    model.model.layers[0].eval()
    model.generation_config.temperature = 0.1
    before = [part.training for part in model.modules()], torch.get_rng_state()
    config = model.generation_config
    found = lctrain.generate(module, PROMPTS, max_new_tokens=3)
    head, model.lm_head = model.lm_head, None
    with pytest.raises(TypeError):
        lctrain.generate(module, PROMPTS, max_new_tokens=3)
    model.lm_head = head
    assert [part.training for part in model.modules()] == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])
    assert model.generation_config is config
    config.temperature = 1.0
    assert tokens(found) == tokens(lctrain.generate(model, PROMPTS, max_new_tokens=3))


def test_frequencies_that_follow_the_length_are_as_before(make_llama):
    """With the rope type dynamic, transformers keeps the frequencies of the longest input."""
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    model = make_llama(max_position_embeddings=8, rope_parameters=rope)
    ids = torch.arange(12)[None]
    before = model(ids).logits
    lctrain.generate(model, [list(range(20))], max_new_tokens=2)
    assert torch.equal(model(ids).logits, before)
    with untouched(model):
        assert not torch.equal(model(torch.arange(30)[None]).logits[:, :12], before)
    assert torch.equal(model(ids).logits, before)


def spoil_logits(model, value, *, call: int, token: int | slice):
    """Sets logits of row 0 in one call of the head, which is called once per generated token."""

    def spoil(head, arguments, logits):
        calls.append(call)
        if len(calls) == call:
            logits = logits.clone()
            logits[0, -1, token] = value
        return logits

    calls: list[int] = []
    model.lm_head.register_forward_hook(spoil)


@pytest.mark.parametrize("temperature", [0, 1.0])
@pytest.mark.parametrize(
    ("value", "token"),
    [(float("nan"), 5), (float("inf"), 5), (float("-inf"), slice(None))],
    ids=["nan", "inf", "all-minus-inf"],
)
def test_logits_without_a_distribution_are_refused(plain, value, token, temperature):
    spoil_logits(plain, value, call=4, token=token)
    expected = r"logits of prompt 2 at generated token 1 must .*got NaN, \+inf"
    with pytest.raises(ValueError, match=expected):
        lctrain.generate(plain, PROMPTS, max_new_tokens=2, batch_size=2, temperature=temperature)


def test_logits_of_minus_infinity_are_allowed(plain):
    spoil_logits(plain, float("-inf"), call=1, token=slice(6, None))
    assert lctrain.generate(plain, PROMPTS, max_new_tokens=1)[0].token_ids[0] < 6


def test_logits_after_the_end_of_a_completion_do_not_count(plain):
    """A row that ended is padded until the last one ends."""
    free = lctrain.generate(plain, PROMPTS, max_new_tokens=3, temperature=0)
    end = free[0].token_ids[0]
    spoil_logits(plain, float("nan"), call=3, token=0)
    found = lctrain.generate(plain, PROMPTS, max_new_tokens=3, temperature=0, eos_token_id=end)
    assert found[0].token_ids == [end]
    assert max(len(completion.token_ids) for completion in found) == 3


def test_no_prompts(model):
    assert lctrain.generate(model, []) == []


def test_under_autocast_the_cache_is_read_in_its_dtype(plain, monkeypatch):
    """transformers' cache holds float32 then, which the kernels of a GPU do not take."""
    import lctrain_kernels

    seen = []
    decode = lctrain_kernels.flash_attn_with_kvcache

    def remembered(*tensors, **options):
        seen.append({tensor.dtype for tensor in tensors})
        return decode(*tensors, **options)

    monkeypatch.setattr(lctrain_kernels, "flash_attn_with_kvcache", remembered)
    lctrain.patch_model(plain)
    with torch.autocast("cpu", torch.bfloat16):
        lctrain.generate(plain, PROMPTS, max_new_tokens=3, batching="padded")
    assert seen
    assert all(dtypes == {torch.bfloat16} for dtypes in seen)
    seen.clear()
    lctrain.generate(plain, PROMPTS, max_new_tokens=3, batching="padded")
    assert all(dtypes == {torch.float32} for dtypes in seen)


def test_a_row_ends_once():
    finish = Finish(2, torch.tensor([7]), None)
    for step, ids in enumerate(([1, 1, 7], [1, 1, 7, 7]), 1):
        done = finish(torch.tensor([ids, [1, 1, *range(2, 2 + step)]]), None)
        assert done.tolist() == [True, False]
    assert finish.lengths.tolist() == [1, 0]
