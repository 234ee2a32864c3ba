"""Tests RULER's tasks and needles: lengths, seeds, and models whose scores are known."""

import contextlib
import json
import random
import re
from pathlib import Path

import numpy as np
import pytest

from lctrain.data import TokenizedDocument
from lctrain.eval import Run, Subject, ahead, answers, computed
from lctrain.eval.prompt import Prompt, fitting_units, tokenized
from lctrain.eval.reading import GivenReading
from lctrain.eval.tasks.needle import Needle
from lctrain.eval.tasks.ruler import Ruler
from lctrain.limits import RULER_TASKS
from tests.eval.word_tokenizer import WordTokenizer, solve

LENGTHS = (1500, 2500)


@pytest.fixture
def questions(tmp_path):
    file = tmp_path / "questions.jsonl"
    entries = [
        {
            "question": f"Who wrote book{n}?",
            "answers": [f"author{n}", f"writer{n}"],
            "context": f"The book book{n} was written by author{n}. " + "It is long. " * 20,
        }
        for n in range(6)
    ]
    file.write_text("\n".join(map(json.dumps, entries)))
    return str(file)


@pytest.fixture
def subject(make_llama) -> Subject:
    tokenizer = WordTokenizer()
    text = " ".join(f"Sentence {n} tells of a calm river and its old mill." for n in range(60))
    ids = np.array(tokenizer(text)["input_ids"])
    model = make_llama(vocab_size=30_000, hidden_size=8, head_dim=2, max_position_embeddings=4096)
    return Subject(model, tokenizer, [TokenizedDocument("book", ids, 0)], name="m")


@pytest.fixture
def answering(monkeypatch, subject):
    """Returns answering(read): generation answers `read(text)` to every prompt."""

    def use(read):
        def generate(model, prompts, max_new_tokens, cache_gib):
            for prompt in prompts:
                text = " " + read(subject.tokenizer.decode(prompt))
                yield np.array(subject.tokenizer(text)["input_ids"])

        monkeypatch.setattr(answers, "generate_answers", generate)

    return use


def table_of(task, subject, lengths=LENGTHS):
    run = Run.prepared(task, subject, [GivenReading()], lengths, max_tokens=8192)
    return task.table(computed(run)), run


def test_a_model_that_reads_gets_every_prompt_right(subject, answering, questions):
    answering(solve)
    table, run = table_of(Ruler(items=2, questions=questions), subject)
    assert [dict(group)["task"] for group in table.groups] == list(RULER_TASKS)
    for measure in table.measures:
        assert (table.means(measure, "") == 1.0).all()
        assert table.effective_length(measure, "", None) == LENGTHS[-1]
    assert run.size({}) == 2 * 2 * 12


def test_a_model_that_guesses_gets_chance(subject, answering, questions):
    numbers = random.Random(0)
    answering(lambda text: f"{numbers.randint(1_000_000, 9_999_999)} is a guess")
    table, _ = table_of(Ruler(items=2, questions=questions), subject)
    for measure in table.measures:
        assert (table.means(measure, "") == 0.0).all()
        assert table.effective_length(measure, "", None) == 0


def test_a_number_inside_another_counts_for_ruler_only(subject, answering):
    answering(lambda text: f"9{solve(text)}9")
    table, _ = table_of(Ruler(tasks=["niah_single_1"], items=3), subject)
    score, strict = table.measures
    assert (table.means(score, "") == 1.0).all()
    assert (table.means(strict, "") == 0.0).all()


@pytest.mark.parametrize("name", RULER_TASKS)
def test_prompts_fill_their_length_and_depend_on_the_seed(subject, questions, name):
    task, again, other = (Ruler(tasks=[name], questions=questions, seed=s) for s in (0, 0, 1))
    for one in (task, again, other):
        one.prepare(subject, LENGTHS)
    for length in LENGTHS:
        made = task.prompt(name, length, 3)
        size = len(made.input_ids) + made.prompt.new_tokens
        unit = 60 if name == "qa" else 40  # tokens of one more unit of context
        assert length - length // 50 - unit <= size <= length
        assert again.prompt(name, length, 3).prompt == made.prompt
        assert other.prompt(name, length, 3).prompt != made.prompt
        assert task.prompt(name, length, 4).prompt != made.prompt


def test_prompts_that_several_threads_make_are_those_of_one(subject, monkeypatch):
    made = []
    monkeypatch.setattr(
        "lctrain.eval.tasks.ruler.score_prompts",
        lambda reader, tokenizer, prompts, by: made.append([*prompts]) or (),
    )
    for cores in (1, 64):
        monkeypatch.setattr(ahead, "usable_cores", lambda cores=cores: cores)
        task = Ruler(tasks=["niah_single_2", "niah_multikey_1", "vt"], items=3)
        task.prepare(subject, (1000,))
        with contextlib.suppress(ValueError):  # there are no answers
            list(task.score(None, 1000, task.make(1000)))
    one, several = ([prompt.input_ids.tolist() for prompt in prompts] for prompts in made)
    assert one == several
    assert len({*map(tuple, one)}) == 9


def test_a_length_that_nothing_fits_is_an_error_and_no_endless_search(subject):
    with pytest.raises(ValueError, match=r"lengths must be at least \d+ for cwe .*, got 300"):
        Ruler(tasks=["cwe"]).prepare(subject, (300, 5000))
    with pytest.raises(ValueError, match=r"needle lengths must be at least \d+, .* got 30"):
        Needle().prepare(subject, (30,))
    with pytest.raises(ValueError, match=r"at least 25 for x .*, got 15\. Leave it out"):
        fitting_units(lambda units: 15 + units, 10, 5, "x", 5)


def test_a_length_that_is_too_short_names_one_at_which_all_tasks_fit(subject):
    task = Ruler(tasks=["niah_single_1", "niah_multikey_3", "cwe"], items=5)
    match = r"at least (\d+) for niah_single_1, niah_multikey_3, cwe with"
    with pytest.raises(ValueError, match=match) as raised:
        task.prepare(subject, (20,))
    task.prepare(subject, (int(re.search(match, str(raised.value))[1]),))


def test_fitting_units_are_the_most_that_fit():
    assert fitting_units(lambda units: 10 + 3 * units, 100, 1, "x", 5) == 30
    assert fitting_units(lambda units: min(10 + 3 * units, 60), 100, 1, "x", 5) >= 16


@pytest.mark.parametrize("smallest", [1, 60])
@pytest.mark.parametrize("bend", [0.0, 1e-5], ids=["line", "curve"])
def test_few_prompts_are_counted_to_fit_a_length(smallest, bend):
    """Prompts that are as long as the result or longer take most of the time."""
    for room in range(400, 40_000, 1777):
        for per_unit in (1, 2.3, 45):
            counted = []

            def tokens(units, per_unit=per_unit, counted=counted):
                counted.append(int(10 + per_unit * units * (1 + bend * units)))
                return counted[-1]

            if 8 * tokens(smallest) > room:
                continue
            found = fitting_units(tokens, room, smallest, "x", 5)
            work = sum(size for size in counted if size > room / 4) / room
            assert tokens(found) <= room < tokens(found + max(1, found // 32))
            assert work < 7


def test_text_that_is_repeated_is_counted(subject, answering, caplog):
    answering(solve)
    table_of(Ruler(tasks=["niah_single_2"], items=1), subject, (700, 1500))
    assert "repeats its text at length 1,500: the documents hold 660 words" in caplog.text
    assert "length 700" not in caplog.text


def test_needles_lie_at_their_depth_in_texts_of_the_exact_length(subject):
    task = Needle()
    task.prepare(subject, (300,))
    needle = subject.tokenizer(" The special magic number")["input_ids"]
    places = []
    for depth in (0.0, 0.5, 1.0):
        made = task.prompt(300, depth, 0)
        assert len(made.input_ids) + made.prompt.new_tokens == 300
        ids = made.input_ids.tolist()
        places.append(next(i for i in range(len(ids)) if ids[i : i + 4] == needle))
    last = places[-1]
    assert places == [0, round(last / 2), last]
    assert task.prompt(300, 0.0, 0).prompt == task.prompt(300, 1.0, 0).prompt


def test_a_model_that_reads_finds_every_needle_and_one_that_does_not_none(subject, answering):
    answering(solve)
    table, _ = table_of(Needle(needles=2, depths=[0.0, 0.5, 1.0]), subject, (200, 400))
    assert [dict(group) for group in table.groups] == [{"depth": d} for d in (0.0, 0.5, 1.0)]
    assert (table.means(table.measures[1], "") == 1.0).all()
    answering(lambda text: "none")
    table, _ = table_of(Needle(needles=2), subject, (200,))
    assert (table.means(table.measures[0], "") == 0.0).all()


@pytest.mark.parametrize(
    "task", [Ruler(tasks=["niah_single_1"], by="likelihood", items=5), Needle(by="likelihood")]
)
def test_a_random_model_has_no_likely_answer(subject, task):
    table, _ = table_of(task, subject, (400,))
    assert (table.means(table.measures[0], "") == 0.0).all()


def test_likelihood_is_right_where_the_likeliest_tokens_are_the_answer(subject, monkeypatch):
    seen = []

    def answered(model, documents, segment, device):
        seen.extend(documents)
        return [True] * len(documents)

    monkeypatch.setattr(answers, "answered", answered)
    table, _ = table_of(Ruler(tasks=["niah_multivalue"], by="likelihood", items=3), subject, (900,))
    assert (table.means(table.measures[0], "") == 1.0).all()
    for document in seen:
        text = subject.tokenizer.decode(document.input_ids)
        answer = subject.tokenizer.decode(document.input_ids[document.answer_start :])
        assert answer.strip().split(", ") == solve(text).split(", ")[:4]


@pytest.mark.parametrize("name", ["vt", "cwe"])
def test_the_likely_answer_has_the_form_of_the_solved_example(subject, name):
    task = Ruler(tasks=[name])
    task.prepare(subject, (1500,))
    prompt = task.prompt(name, 1500, 0).prompt
    form = prompt.text.partition("they are:" if name == "vt" else "in the list are:")[2]
    example = form.partition("\n")[0].split()
    answer = prompt.answer.split()
    assert [word for word in answer if word not in prompt.references] == [
        word for word in example if word.endswith(".")
    ]
    assert len(answer) == len(example)
    listed = [word for word in prompt.text.rpartition("\n")[0].split() if word in answer]
    assert [word for word in dict.fromkeys(listed) if word[-1] != "."] == list(prompt.references)


class Letters:
    """A tokenizer with a token per character, so that answers are long."""

    eos_token_id = bos_token_id = unk_token_id = None

    def __call__(self, text, add_special_tokens=True, verbose=True):
        return {"input_ids": [ord(letter) for letter in text]}

    def decode(self, ids, skip_special_tokens=False):
        return "".join(map(chr, ids))


def test_a_length_holds_an_answer_of_more_tokens_than_ruler_reads(subject, questions):
    long = Path(questions).read_text().replace('"author', f'"{"long" * 20}')
    Path(questions).write_text(long)
    task = Ruler(tasks=["qa"], questions=questions)
    task.prepare(Subject(subject.model, Letters(), subject.documents), (3000,))
    made = task.prompt("qa", 3000, 1)
    assert made.new_tokens == len(made.answer_ids) == 82
    assert made.prompt.new_tokens == 32
    assert 2500 < len(made.input_ids) + len(made.answer_ids) <= 3000


def test_every_prompt_is_checked_before_the_first_is_scored(subject, tmp_path):
    entries = [
        {"question": f"Q{n}?", "answers": ["a"], "context": f"a is {n}. " + "So. " * size}
        for n, size in enumerate([1] * 5 + [200])
    ]
    file = tmp_path / "questions.jsonl"
    file.write_text("\n".join(map(json.dumps, entries)))
    with pytest.raises(ValueError, match=r"lengths must be at least \d+ for qa"):
        Ruler(tasks=["qa"], questions=str(file), items=40).prepare(subject, (200,))
    Ruler(tasks=["qa"], questions=str(file), items=40).prepare(subject, (800,))


def test_an_answer_that_the_tokenizer_cannot_represent_is_an_error(subject):
    class Deaf(WordTokenizer):
        def decode(self, ids, skip_special_tokens=False):
            return super().decode(ids).replace("7", "?")

    with pytest.raises(ValueError, match=r"tokenizer must represent the answer '27', got ' 2\?'"):
        tokenized(Deaf(), Prompt("The number is", ("27",)))


def test_an_answer_that_merges_with_the_end_of_the_prompt():
    class Merging(WordTokenizer):
        def __call__(self, text, **options):
            return super().__call__(text.replace("is 4", "is4"))

    tokenizer = Merging()
    made = tokenized(tokenizer, Prompt("It is", ("42",)))
    whole = tokenizer("It is 42")["input_ids"]
    assert [*made.input_ids, *made.answer_ids] == whole
    assert tokenizer.decode(made.answer_ids) == " is42"


def test_parts_of_documents_are_no_prompts_to_generate_from(subject):
    class Parts(GivenReading):
        segment = 64

    run = Run.prepared(Needle(), subject, [Parts()], (200,), max_tokens=512)
    with pytest.raises(ValueError, match="methods must not name intra_chunk for a task by gen"):
        computed(run)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "must hold a question, got none"),
        ('{"question": "a"}', r"got line 1 of .* \('answers'\)"),
        ('{"question": "a", "answers": [""], "context": "b"}', "No text may be empty"),
        ("no json", "got line 1 of"),
        ('{"question": "a", "answers": ["b"], "context": "c"}', "at least two contexts, got one"),
    ],
)
def test_a_bad_file_of_questions_is_an_error(tmp_path, content, message):
    file = tmp_path / "questions.jsonl"
    file.write_text(content)
    with pytest.raises(ValueError, match=message):
        Ruler(questions=str(file))
    with pytest.raises(ValueError, match=r"must be a file of JSON lines, got .*none"):
        Ruler(questions=str(tmp_path / "none"))
