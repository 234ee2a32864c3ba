"""Tests lm-evaluation-harness with lctrain's attention: the real package, or a small fake of it."""

import random
import sys
from importlib.util import find_spec
from types import ModuleType, SimpleNamespace

import pytest
import torch

from lctrain.attention import is_patched
from lctrain.eval import Run, Subject, computed, harness
from lctrain.eval.harness import harness_model
from lctrain.eval.reading import GivenReading
from lctrain.eval.tasks.harness import Harness
from tests.eval.word_tokenizer import WordTokenizer
from tests.evaluate.conftest import llama_config, save_model

TASK = """
task: capitals
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list:
  - metric: acc
"""


@pytest.fixture
def fake(monkeypatch):
    """Puts a fake of the harness's interface into sys.modules; it switches modes and seeds."""
    seen = {}

    class HFLM:
        def __init__(self, pretrained, tokenizer, max_length, batch_size):
            pretrained.eval()
            tokenizer.pad_token = "x"
            seen.update(model=pretrained, max_length=max_length, patched=is_patched(pretrained))

    def simple_evaluate(model, tasks, task_manager, limit, log_samples, bootstrap_iters):
        random.seed(0)
        torch.manual_seed(0)
        seen.update(tasks=tasks, limit=limit)
        samples = [
            {"doc_id": n, "metrics": ["acc", "words"], "acc": float(n % 2), "words": (1, 2)}
            for n in range(4)
        ]
        return {"samples": {"capitals": samples}}

    modules = {
        "lm_eval": {"simple_evaluate": simple_evaluate, "__spec__": SimpleNamespace()},
        "lm_eval.models": {},
        "lm_eval.models.huggingface": {"HFLM": HFLM},
        "lm_eval.tasks": {"TaskManager": lambda include_path: None},
    }
    for name, content in modules.items():
        module = ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    return seen


def test_mode_random_numbers_and_attention_are_as_before(fake, make_llama):
    import lm_eval

    model = make_llama().train()
    before = random.getstate(), torch.get_rng_state()
    tokenizer = WordTokenizer()
    with harness_model(model, tokenizer, max_length=64) as lm:
        lm_eval.simple_evaluate(lm, ["x"], None, None, True, 0)
        assert not model.training
    assert not hasattr(tokenizer, "pad_token")
    assert fake["patched"]
    assert fake["max_length"] == 64
    assert not is_patched(model)
    assert model.training
    assert random.getstate() == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])


def test_scores_of_documents_are_items(fake, make_llama):
    task = Harness(tasks=["capitals"], limit=4)
    subject = Subject(make_llama(), WordTokenizer())
    run = Run.prepared(task, subject, [GivenReading()], (32, 64), max_tokens=64)
    table = task.table(computed(run))
    assert (fake["tasks"], fake["limit"], fake["max_length"]) == (["capitals"], 4, 64)
    assert [dict(group) for group in table.groups] == [{"task": "capitals", "metric": "acc"}]
    assert table.means(table.measures[0], "").tolist() == [[0.5], [0.5]]


def test_without_the_package_the_message_says_what_to_install(monkeypatch, make_llama):
    monkeypatch.setattr(harness, "find_spec", lambda name: None)
    context = harness_model(make_llama(), WordTokenizer())
    with pytest.raises(ValueError, match=r"got none. Install it: pip install lm_eval"):
        context.__enter__()
    with pytest.raises(ValueError, match=r"harness.tasks must name at least one task"):
        Harness(tasks=[])


@pytest.mark.skipif(find_spec("lm_eval") is None, reason="needs lm_eval")
def test_a_local_task_of_the_real_package(tmp_path):
    """The harness gives the same scores to the plain model and to one with flash attention."""
    import transformers

    (tmp_path / "documents.jsonl").write_text(
        '{"question": "The capital of France is", "choices": ["Paris", "Rome"], "answer": 0}\n'
        '{"question": "The capital of Italy is", "choices": ["Paris", "Rome"], "answer": 1}\n'
    )
    (tmp_path / "capitals.yaml").write_text(TASK.format(file=tmp_path / "documents.jsonl"))
    folder = save_model(tmp_path / "model", llama_config())
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).train()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    scores = []
    for attention in (None, "flash"):
        task = Harness(tasks=["capitals"], include_path=str(tmp_path))
        with harness_model(model, tokenizer, attention, max_length=64) as lm:
            found = task._evaluate(lm)["samples"]["capitals"]
        scores.append([sample["filtered_resps"] for sample in found])
        assert len(found) == 2
        assert model.training
    for plain, ours in zip(*scores, strict=True):
        for (loss, _), (other, _) in zip(plain, ours, strict=True):
            assert round(float(loss), 3) == round(float(other), 3)
