"""Tests that prompts are tokenized once for all methods, and within a bound of memory."""

import copy
import pickle
import threading
import time
from dataclasses import dataclass

import numpy as np
import pytest

from lctrain.data import TokenizedDocument
from lctrain.eval import Run, Subject, answers, computed
from lctrain.eval.kept_prompts import KeptPrompts
from lctrain.eval.prompt import Prompt, TokenPrompt
from lctrain.eval.reading import GivenReading
from lctrain.eval.tasks.ruler import Ruler
from tests.eval.word_tokenizer import WordTokenizer

LENGTHS = (700, 900)
TASKS = ("niah_single_2", "niah_multikey_2")


class Counting(WordTokenizer):
    """Counts the texts that are tokenized."""

    calls = 0

    def __call__(self, text, **options):
        self.calls += 1
        return super().__call__(text, **options)


@dataclass(frozen=True)
class Method(GivenReading):
    """Reads as the model is, under another name."""

    name: str = ""

    @property
    def method(self):
        return self.name


@pytest.fixture
def subject(make_llama) -> Subject:
    tokenizer = Counting()
    text = " ".join(f"Sentence {n} tells of a calm river and its old mill." for n in range(90))
    ids = np.array(tokenizer(text)["input_ids"])
    model = make_llama(vocab_size=30_000, hidden_size=8, head_dim=2, max_position_embeddings=4096)
    return Subject(model, tokenizer, [TokenizedDocument("book", ids, 0)], name="m")


@pytest.fixture
def read(monkeypatch):
    """Returns the prompts that a model is asked, in their order."""
    asked = []

    def generate(model, prompts, max_new_tokens, cache_gib):
        asked.extend(prompt.tolist() for prompt in prompts)
        yield from (np.zeros(1, dtype=np.int64) for _ in prompts)

    monkeypatch.setattr(answers, "generate_answers", generate)
    return asked


def run_of(task, subject, methods=("a", "b", "c")):
    return Run.prepared(
        task, subject, list(map(Method, [None] * 3, methods)), LENGTHS, max_tokens=4096
    )


def test_further_methods_tokenize_no_prompt_again(subject, read):
    one, several = (Ruler(tasks=TASKS, items=3) for _ in range(2))
    calls = []
    for task, methods in ((one, ("a",)), (several, ("a", "b", "c"))):
        before = subject.tokenizer.calls
        computed(run_of(task, subject, methods))
        calls.append(subject.tokenizer.calls - before)
    assert calls[0] == calls[1] > 0
    count = len(TASKS) * 3 * len(LENGTHS)
    assert read[:count] == read[count : 2 * count] == read[3 * count :]


def test_further_evaluations_tokenize_the_shortest_prompts_only(subject, read):
    task = Ruler(tasks=TASKS, items=3)
    computed(run_of(task, subject, ("a",)))
    before = subject.tokenizer.calls
    run = run_of(task, Subject(subject.model, subject.tokenizer, subject.documents), ("a",))
    checked = subject.tokenizer.calls - before
    computed(run)
    assert subject.tokenizer.calls - before == checked
    half = len(read) // 2
    assert read[:half] == read[half:]


def test_prompts_of_the_next_length_are_made_while_the_model_answers(subject, monkeypatch):
    task = Ruler(tasks=TASKS, items=3)
    keys = [(name, LENGTHS[1], number) for name in TASKS for number in range(3)]
    end = time.monotonic() + 60

    def generate(model, prompts, max_new_tokens, cache_gib):
        while not all(map(task._kept.get, keys)):
            assert time.monotonic() < end
            time.sleep(0.01)
        yield from (np.zeros(1, dtype=np.int64) for _ in prompts)

    monkeypatch.setattr(answers, "generate_answers", generate)
    results = computed(run_of(task, subject, ("a",)))
    assert len(results["a"][LENGTHS[1]].items) == len(keys)


def test_an_error_of_the_model_ends_the_prompts_of_the_next_length(subject, monkeypatch):
    task, filled = Ruler(tasks=TASKS, items=1), []
    fill = KeptPrompts.fill

    def fail(*_):
        assert filled == [True]
        raise RuntimeError("no answer")

    monkeypatch.setattr(KeptPrompts, "fill", lambda *given: filled.append(True) or fill(*given))
    monkeypatch.setattr(answers, "generate_answers", fail)
    with pytest.raises(RuntimeError, match="no answer"):
        computed(run_of(task, subject, ("a",)))
    assert not [one for one in threading.enumerate() if one.name.startswith("called_aside")]
    assert task._kept._settle is None


def test_prompts_of_a_stopped_run_end_before_the_next_one_is_prepared(subject, read):
    task = Ruler(tasks=TASKS, items=1)
    run_of(task, subject, ("a",))
    begun, read_from = threading.Event(), []

    def make():
        begun.set()
        time.sleep(0.1)
        read_from.append(task.subject)

    task._kept.fill([make])
    assert begun.wait(60)
    run_of(task, Subject(subject.model, subject.tokenizer, list(subject.documents)), ("a",))
    assert read_from == [subject]


@pytest.mark.parametrize("changed", ["tokenizer", "documents"])
def test_prompts_of_another_tokenizer_or_text_are_made_anew(subject, read, changed):
    task = Ruler(tasks=TASKS, items=1)
    computed(run_of(task, subject, ("a",)))
    ids = subject.documents[0].input_ids
    tokenizer, documents = subject.tokenizer, [TokenizedDocument("other", ids[::-1].copy(), 0)]
    if changed == "tokenizer":
        tokenizer, documents = Counting(), subject.documents
        tokenizer("These words come first, and get the lowest numbers.")
        tokenizer(subject.tokenizer.decode(ids))
    other = Subject(subject.model, tokenizer, documents)
    computed(run_of(task, other, ("a",)))
    fresh = Ruler(tasks=TASKS, items=1)
    computed(run_of(fresh, other, ("a",)))
    first, again, expected = (read[n * len(read) // 3 : (n + 1) * len(read) // 3] for n in range(3))
    assert first != again == expected


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda task: pickle.loads(pickle.dumps(task))], ids=["copy", "pickle"]
)
def test_a_task_that_has_run_can_be_copied(subject, read, copied):
    """Ranks that are spawned get the callbacks of a trainer, and so their tasks, by pickle."""
    task = Ruler(tasks=TASKS, items=1)
    computed(run_of(task, subject, ("a",)))
    again = copied(task)
    assert again._kept.get((TASKS[0], LENGTHS[0], 0)) is None
    computed(run_of(again, subject, ("a",)))
    half = len(read) // 2
    assert read[:half] == read[half:]


def test_prompts_beyond_the_bound_are_not_kept():
    kept = KeptPrompts(most_tokens=25)
    prompts = [TokenPrompt(np.arange(n), np.arange(1), Prompt("a", ("b",))) for n in (9, 14, 9)]
    for key, prompt in enumerate(prompts):
        kept.add(key, prompt)
        kept.add(key, prompt)  # counted once
    assert [kept.get(key) for key in range(3)] == [prompts[0], prompts[1], None]
    kept.clear()
    kept.add(2, prompts[2])
    assert kept.get(0) is None
    assert kept.get(2) is prompts[2]
