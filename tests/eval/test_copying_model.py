"""Tests a whole task on a model that copies, which finds every needle, and on a random one."""

import numpy as np
import pytest
import torch
from transformers import GenerationMixin, LlamaConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from lctrain.data import TokenizedDocument
from lctrain.data.passkey import KEY_WORDS
from lctrain.eval import Run, Subject, answers, computed
from lctrain.eval.reading import GivenReading
from lctrain.eval.tasks.needle import Needle
from lctrain.eval.tasks.passkey import PasskeyRetrieval
from tests.eval.word_tokenizer import WordTokenizer

VOCABULARY = 3000
LENGTHS = (120, 200)


class Copier(PreTrainedModel, GenerationMixin):
    """Predicts the token that followed the longest earlier match of the text so far."""

    config_class = LlamaConfig
    copies = True

    def __init__(self, config):
        super().__init__(config)
        self.embed_tokens = torch.nn.Embedding(VOCABULARY, 1)

    def forward(self, input_ids, attention_mask=None, **kwargs):
        """Returns logits [B, S, V]: 1 for the copied token, or for a random one."""
        logits = torch.zeros(*input_ids.shape, VOCABULARY)
        for row, ids in enumerate(input_ids):
            matched = torch.zeros_like(ids)  # [S], length of the match that ends at each position
            for place, token in enumerate(ids.tolist()):
                before = torch.cat([matched.new_zeros(1), matched[:-1]])
                matched = torch.where(ids == token, before + 1, 0)
                matched[place:] = 0
                copied = int(ids[min(int(matched.argmax()) + 1, place)])
                found = copied if self.copies else int(torch.randint(VOCABULARY, ()))
                logits[row, place, found] = 1
        return CausalLMOutputWithPast(logits=logits)


@pytest.fixture
def subject() -> Subject:
    tokenizer = WordTokenizer()
    text = " ".join(f"Sentence {n} tells of a calm river and its old mill." for n in range(60))
    ids = np.array(tokenizer(text)["input_ids"])
    model = Copier(LlamaConfig(vocab_size=VOCABULARY, num_hidden_layers=1, use_cache=False))
    return Subject(model, tokenizer, [TokenizedDocument("book", ids, 0)], name="m")


@pytest.mark.parametrize("by", ["generation", "likelihood"])
@pytest.mark.parametrize(("copies", "share"), [(True, 1.0), (False, 0.0)], ids=["copies", "random"])
def test_a_model_that_copies_finds_every_needle_and_a_random_one_none(subject, by, copies, share):
    subject.model.copies = copies
    task = Needle(needles=2, depths=[0.0, 0.5, 1.0], by=by)
    run = Run.prepared(task, subject, [GivenReading()], LENGTHS, max_tokens=1200)
    table = task.table(computed(run))
    for measure in table.measures:
        assert (table.means(measure, "") == share).all()
        expected = LENGTHS[-1] if copies else 0
        assert table.effective_length(measure, "", None) == expected


@pytest.mark.parametrize("by", ["generation", "likelihood"])
@pytest.mark.parametrize(("copies", "found"), [(True, 2), (False, 0)], ids=["copies", "random"])
def test_passkeys_are_found_by_both_ways(subject, monkeypatch, by, copies, found):
    """The copying model has no cache, so every token is generated from the whole text."""

    def generate(model, prompts, max_new_tokens, cache_gib):
        assert max_new_tokens == KEY_WORDS
        for ids in map(torch.from_numpy, prompts):
            for _ in range(max_new_tokens):
                ids = torch.cat([ids, model(ids[None]).logits[0, -1:].argmax(-1)])
            yield ids[-max_new_tokens:].numpy()

    monkeypatch.setattr(answers, "generate_answers", generate)
    subject.model.copies = copies
    task = PasskeyRetrieval(keys_per_cell=2, depths=[0.0, 0.5, 1.0], by=by)
    run = Run.prepared(task, subject, [GivenReading()], LENGTHS, max_tokens=1200)
    results = computed(run)
    assert (task.table(results).found["plain"] == found).all()
    texts = {item.answer for result in results[""].values() for item in result.items}
    assert ("" in texts) == (by == "likelihood")


def test_a_key_is_found_only_with_all_of_its_words(subject, monkeypatch):
    task = PasskeyRetrieval(keys_per_cell=1, depths=[0.5], by="generation")
    run = Run.prepared(task, subject, [GivenReading()], LENGTHS[:1], max_tokens=1200)
    expected = task._prompt(subject.tokenizer, task.make(LENGTHS[0])[0]).answer_ids

    def share(answer):
        monkeypatch.setattr(answers, "generate_answers", lambda *_: [np.array(answer)])
        (item,) = computed(run)[""][LENGTHS[0]].items
        return item.totals["accuracy"]

    assert share(expected) == 1.0
    assert share([*expected[:-1], 0]) == share(expected[1:]) == share(expected[::-1]) == 0.0
