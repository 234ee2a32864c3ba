"""Tests which prompts are answered together, and that their answers do not depend on it."""

import sys

import numpy as np
import pytest
import torch

import lctrain
from lctrain import peak_memory
from lctrain.callbacks import LongContextEval
from lctrain.data import TokenizedDocument
from lctrain.eval import Run, Subject, answers, computed
from lctrain.eval.generate import generate_answers
from lctrain.eval.reading import GivenReading
from lctrain.eval.tasks.needle import Needle
from lctrain.eval.tasks.ruler import Ruler
from lctrain.generation.pages import CacheMemoryError
from lctrain.generation.pool_size import HOST_BYTES, bytes_beside, cache_tokens
from tests.eval.word_tokenizer import WordTokenizer


@pytest.fixture
def subject(make_llama) -> Subject:
    tokenizer = WordTokenizer()
    text = " ".join(f"Sentence {n} tells of a calm river and its old mill." for n in range(60))
    ids = np.array(tokenizer(text)["input_ids"])
    model = make_llama(vocab_size=30_000, max_position_embeddings=4096)
    return Subject(model, tokenizer, [TokenizedDocument("book", ids, 0)], name="m")


@pytest.fixture
def answer(monkeypatch, subject):
    """Returns answer(task, length, max_tokens): the answers' tokens, and the sizes of batches."""

    def run(task, length, max_tokens):
        tokens, sizes = [], []

        def noted(model, prompts, max_new_tokens, cache_gib):
            found = generate_answers(model, prompts, max_new_tokens, cache_gib)
            tokens.extend(ids.tolist() for ids in found)
            sizes.append(len(prompts))
            return found

        monkeypatch.setattr(answers, "generate_answers", noted)
        cell = Run.prepared(task, subject, [GivenReading()], (length,), max_tokens=max_tokens)
        assert len(computed(cell)[""][length].items) == len(tokens)
        return tokens, sizes

    return run


def test_a_prompt_whose_keys_do_not_fit_names_the_lengths(make_llama, monkeypatch):
    """It names no argument of lctrain.generate, which the user has not called."""
    message = r"lengths must leave memory .* got 204 tokens with the answer. Leave out the longest "
    prompts = [np.arange(200) % 90]
    with lctrain.patch_model(make_llama()) as handle:
        with pytest.raises(ValueError, match=f"{message}lengths, raise the callback's cache_gib"):
            generate_answers(handle.model, prompts, 4, cache_gib=1e-7)

        def fail(*_, **__):
            raise CacheMemoryError

        monkeypatch.setattr(lctrain.eval.generate, "generate", fail)
        with pytest.raises(ValueError, match=f"{message}lengths, take a GPU"):
            generate_answers(handle.model, prompts, 4)


def test_padded_batches_hold_the_tokens_of_a_forward_pass(answer):
    task = Needle(needles=3, depths=[0.0, 0.5])
    alone, single = answer(task, 150, max_tokens=150)
    tokens, sizes = answer(task, 150, max_tokens=400)
    assert (single, sizes) == ([1] * 6, [2] * 3)
    assert tokens == alone


@pytest.mark.parametrize(
    ("task", "length", "count"),
    [
        (Needle(needles=3, depths=[0.0, 0.5]), 150, 6),
        (Ruler(tasks=["niah_single_1", "niah_multiquery"], items=2), 400, 4),
    ],
    ids=["needle", "ruler"],
)
def test_a_paged_cache_answers_prompts_together_as_alone(
    subject, answer, monkeypatch, task, length, count
):
    alone, single = answer(task, length, max_tokens=length)  # by the loop of transformers
    with lctrain.patch_model(subject.model):
        tokens, sizes = answer(task, length, max_tokens=length)
        monkeypatch.setattr(answers, "cache_tokens", lambda model, cache_gib: 2 * length)
        pairs, halves = answer(task, length, max_tokens=length)
    assert (single, sizes, halves) == ([1] * count, [count], [2] * (count // 2))
    assert alone == tokens == pairs
    assert len({*map(tuple, tokens)}) > 2


@pytest.mark.parametrize(
    ("task", "length"),
    [(Needle(needles=2, depths=[0.5]), 150), (Ruler(tasks=["niah_single_1"], items=2), 400)],
    ids=["needle", "ruler"],
)
def test_dual_chunk_attention_answers_beyond_the_window(subject, answer, monkeypatch, task, length):
    """Prompts of several windows: the tokens of transformers' loop on one prompt at a time."""
    chunks = {"window": 64, "chunk_size": 48, "local_size": 16}
    with lctrain.patch_model(subject.model, "dual_chunk", **chunks):
        tokens, sizes = answer(task, length, max_tokens=length)
        monkeypatch.setattr(answers, "cache_tokens", lambda *_: None)
        module = sys.modules["lctrain.generation.generate"]
        monkeypatch.setattr(module, "find_cache", lambda model: "transformers' loop is asked for")
        alone, single = answer(task, length, max_tokens=length)
    assert (sizes, single) == ([2], [1, 1])
    assert tokens == alone


def test_a_prompt_that_the_memory_does_not_hold_is_alone(subject, answer, monkeypatch):
    task = Needle(needles=2, depths=[0.0])
    monkeypatch.setattr(answers, "cache_tokens", lambda model, cache_gib: 1)
    assert answer(task, 150, max_tokens=300)[1] == [1, 1]


def test_a_large_memory_still_moves_the_progress_bar(subject, answer, monkeypatch):
    monkeypatch.setattr(answers, "MOST_PROMPTS", 4)
    with lctrain.patch_model(subject.model):
        assert answer(Needle(needles=5, depths=[0.0]), 150, max_tokens=150)[1] == [4, 1]


def test_likelihood_reads_the_tokens_of_a_forward_pass(subject, monkeypatch):
    sizes = []

    def decide(reader, tokenizer, batch):
        sizes.append(len(batch))
        return [None] * len(batch)

    monkeypatch.setattr(answers, "_decided", decide)
    monkeypatch.setattr(answers, "cache_tokens", None)  # not called
    task = Needle(needles=3, depths=[0.0], by="likelihood")
    task.prepare(subject, (150,))
    prompts = [task.prompt(150, 0.0, number) for number in range(3)]
    reader = answers.Reader(subject.model, subject.model.device, 300)
    assert [*answers.score_prompts(reader, subject.tokenizer, prompts, "likelihood")] == [None] * 3
    assert sizes == [2, 1]


def test_an_unknown_way_to_score_is_an_error_before_the_first_prompt(subject):
    reader = answers.Reader(subject.model, subject.model.device, 300)
    with pytest.raises(ValueError, match=r"by must be one of .*, got 'likelyhood'"):
        answers.score_prompts(reader, subject.tokenizer, [], "likelyhood")


def test_the_default_cache_is_a_share_of_the_memory(make_llama):
    model = make_llama().train()
    assert cache_tokens(model) is None
    with lctrain.patch_model(model):
        found = cache_tokens(model)
    token = 2 * 2 * 2 * 8 * 4  # keys and values of 2 layers and 2 heads of 8 float32 numbers
    assert found == HOST_BYTES // (64 * token) * 64
    assert model.training


@pytest.mark.parametrize("cache_gib", [None, 0.25])
def test_the_size_of_the_cache_reaches_the_generation(subject, monkeypatch, cache_gib):
    seen = []

    def generate(model, prompts, most, size):
        seen.append((len(prompts), size))
        return [np.array([7])] * len(prompts)

    monkeypatch.setattr(answers, "generate_answers", generate)
    task = Needle(needles=3, depths=[0.0])
    task.prepare(subject, (150,))
    prompts = [task.prompt(150, 0.0, number) for number in range(3)]
    reader = answers.Reader(subject.model, subject.model.device, 150, cache_gib=cache_gib)
    assert len([*answers.score_prompts(reader, subject.tokenizer, prompts, "generation")]) == 3
    assert seen == [(1, None)] * 3  # the loop of transformers has no cache of pages
    seen.clear()
    with lctrain.patch_model(subject.model):
        assert len([*answers.score_prompts(reader, subject.tokenizer, prompts, "generation")]) == 3
    assert seen == [(3, cache_gib)]


@pytest.fixture
def gpu(monkeypatch):
    """Returns the memory of a GPU that is pretended, by name, which a test changes."""
    memory = {"free": 10, "reserved": 60, "allocated": 50, "peak": 70}
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (memory["free"], 100))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: memory["reserved"])
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: memory["allocated"])
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: memory["peak"])
    monkeypatch.setattr(
        torch.cuda,
        "reset_peak_memory_stats",
        lambda device: memory.update(peak=memory["allocated"]),
    )
    return memory


@pytest.mark.parametrize(
    ("free", "peak", "room"),
    [
        (90, 50, 80),  # a share of 100 bytes
        (90, 60, 80),
        (90, 75, 75),  # beside which the training grows by 25 bytes
        (10, 70, 0),
        (10, 90, 0),
        (10, 40, 16),
    ],
)
def test_a_cache_leaves_the_training_its_peak(gpu, free, peak, room):
    gpu["free"] = free
    assert bytes_beside(torch.device("cuda", 0), peak) == room


def test_the_peak_of_a_run_outlives_that_of_an_evaluation(gpu, monkeypatch):
    device = torch.device("cuda", 0)
    monkeypatch.setattr(peak_memory, "_before", {})
    gpu["peak"] = 80
    peak_memory.split_peak(device)
    assert (gpu["peak"], peak_memory.peak_bytes(device)) == (50, 80)
    gpu["peak"] = 90
    assert peak_memory.peak_bytes(device) == 90
    peak_memory.restart_peak(device)
    assert peak_memory.peak_bytes(device) == 50


def test_an_evaluation_in_training_is_bounded_by_the_peak_of_the_training(gpu, monkeypatch):
    device = torch.device("cuda", 0)
    monkeypatch.setattr(peak_memory, "_before", {})
    gpu["free"] = 2**30 - 10
    callback = LongContextEval([8], every_n_steps=1)
    callback._runs = [Run(None, None, [], (8,), 8, device)]
    gpu["peak"] = 2**29 + 50
    callback._bound_cache(device)
    assert callback._runs[0].cache_gib == 0.5
    gpu["peak"] = 2**30  # of the evaluation
    peak_memory.split_peak(device)
    callback._bound_cache(device)
    assert callback._runs[0].cache_gib == 0.5
    gpu["peak"] = 2**31  # of the training, which leaves nothing
    callback._bound_cache(device)
    assert 0 < callback._runs[0].cache_gib <= 2**-30
    callback.cache_gib = 0.125
    callback._bound_cache(device)
    assert callback._runs[0].cache_gib == 0.125
