"""Tests LengthPerplexity: it measures during training and leaves the training unchanged."""

import lightning.pytorch as pl
import numpy as np
import pytest
from tokenizers import Tokenizer, models, processors
from transformers import PreTrainedTokenizerFast

from lctrain.callbacks import LengthPerplexity
from lctrain.config import OptimConfig
from lctrain.data import PackedDataModule, TokenizedDocument
from lctrain.eval import perplexity_by_length
from lctrain.loggers import MetricsCSV
from lctrain.loss import causal_lm
from lctrain.module import LongContextModule
from tests.callbacks.own_module import OwnModule
from tests.training import loader, make_batch, make_trainer

PACKS = [make_batch([12, 5], i) for i in range(4)]


class Data(pl.LightningDataModule):
    def __init__(self, lengths=(40, 41, 42)):
        super().__init__()
        self.lengths = lengths

    def train_dataloader(self):
        return loader(PACKS)

    def held_out_documents(self):
        rng = np.random.default_rng(0)
        return [
            TokenizedDocument(str(i), rng.integers(3, 97, length), i)
            for i, length in enumerate(self.lengths)
        ]


def test_logs_perplexities_and_leaves_training_alone(tmp_path, make_llama):
    losses, loggers = [], []
    for callbacks in ([], [LengthPerplexity([8, 32], every_n_steps=2)]):
        logger = MetricsCSV(str(tmp_path / str(len(callbacks))))
        module = LongContextModule(make_llama(attention_dropout=0.2), OptimConfig())
        make_trainer(tmp_path, callbacks, logger=logger).fit(module, datamodule=Data())
        losses.append(float(module.last_loss))
        loggers.append(logger)
        assert all(part.training for part in module.model.modules())
    assert losses[0] == losses[1]
    rows = loggers[1].path.read_text().splitlines()
    column = rows[0].split(",").index("val/perplexity_8")
    measured = [row.split(",") for row in rows[1:] if row.split(",")[column]]
    assert [row[0] for row in measured] == ["1", "3"]


def test_manual_optimization_measures_at_optimizer_steps(tmp_path, make_llama):
    class Manual(OwnModule):
        automatic_optimization = False

        def training_step(self, batch, batch_idx):
            self.manual_backward(self.loss_of(batch)["loss"] / 50)
            for _ in range({1: 1, 3: 2}.get(batch_idx, 0)):  # steps 1, then 2 and 3
                self.optimizers().step()

    for every, measured in ((1, [0, 2]), (2, [2])):
        logger = MetricsCSV(str(tmp_path / str(every)))
        steps = []
        logger.log_metrics = lambda metrics, step, steps=steps: (
            steps.append(step) if "val/perplexity_8" in metrics else None
        )
        callback = LengthPerplexity([8], every_n_steps=every, documents=1)
        make_trainer(tmp_path, [callback], logger=logger).fit(
            Manual(make_llama()), datamodule=Data()
        )
        assert steps == measured


def test_lengths_are_checked_before_training():
    with pytest.raises(ValueError, match="lengths must be at most max_tokens = 8, got 16"):
        LengthPerplexity([16], every_n_steps=1, max_tokens=8)


@pytest.mark.parametrize("lengths", [(), (1, 1)], ids=["no-document", "one-token-each"])
def test_nothing_held_out_is_an_error_before_training(tmp_path, make_llama, lengths):
    trainer = make_trainer(tmp_path, [LengthPerplexity([8], every_n_steps=2)])
    module = LongContextModule(make_llama(), OptimConfig())
    with pytest.raises(ValueError, match=r"data must hold out .* Raise data.held_out_fraction"):
        trainer.fit(module, datamodule=Data(lengths))
    assert trainer.global_step == 0


def test_an_error_leaves_every_module_in_its_mode(tmp_path, make_llama, monkeypatch):
    """A caller that catches the error may go on training."""
    model = make_llama()
    losses = causal_lm.linear_cross_entropy

    def fail(*args, **kwargs):
        if not model.training:
            raise RuntimeError("out of memory")
        return losses(*args, **kwargs)

    monkeypatch.setattr(causal_lm, "linear_cross_entropy", fail)
    trainer = make_trainer(tmp_path, [LengthPerplexity([8], every_n_steps=2)])
    with pytest.raises(RuntimeError, match="out of memory"):
        trainer.fit(LongContextModule(model, OptimConfig()), datamodule=Data())
    assert all(part.training for part in model.modules())


def test_documents_below_one():
    with pytest.raises(ValueError, match="documents must be at least 1, got 0"):
        LengthPerplexity([8], every_n_steps=1, documents=0)


def test_interval_below_one():
    with pytest.raises(ValueError, match="every_n_steps must be at least 1, got 0"):
        LengthPerplexity([8], every_n_steps=0, max_tokens=8)


def make_tokenizer():
    """Returns a tokenizer that puts token 1 in front of every text."""
    words = Tokenizer(models.WordLevel({"a": 0, "<s>": 1, "b": 2}, unk_token="a"))
    words.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>")


@pytest.mark.parametrize("by_name", [False, True], ids=["object", "name"])
@pytest.mark.parametrize("given", [False, True], ids=["data-module", "held_out"])
def test_windows_begin_as_the_tokenizer_of_the_data_says(
    tmp_path, make_llama, monkeypatch, by_name, given
):
    tokenizer = make_tokenizer()
    if by_name:
        tokenizer.save_pretrained(tmp_path / "words")
        tokenizer = str(tmp_path / "words")
    seen = []

    def measure(model, documents, lengths, **options):
        seen.append(options["begin"].tokens)
        return perplexity_by_length(model, documents, lengths, **options)

    monkeypatch.setattr("lctrain.callbacks.length_perplexity.perplexity_by_length", measure)
    documents = [list(range(3, 40))] * 4
    data = PackedDataModule(documents, tokenizer, held_out=documents, max_tokens=64)
    held_out = documents if given else None
    callback = LengthPerplexity([8], every_n_steps=1, held_out=held_out)
    trainer = make_trainer(tmp_path, [callback], max_steps=1, limit_val_batches=0)
    trainer.fit(LongContextModule(make_llama(), OptimConfig()), datamodule=data)
    assert seen == [(1,)]


def test_a_tokenizer_that_is_not_transformers_leaves_held_out_ids_alone(tmp_path, make_llama):
    class Foreign(Data):
        tokenizer = object()

    callback = LengthPerplexity([8], every_n_steps=1, held_out=[list(range(3, 40))] * 4)
    trainer = make_trainer(tmp_path, [callback], max_steps=1, limit_val_batches=0)
    trainer.fit(LongContextModule(make_llama(), OptimConfig()), datamodule=Foreign())
    assert callback._begin.tokens == ()


def test_a_begin_token_that_nothing_tells_is_an_error_before_training(tmp_path, make_llama):
    callback = LengthPerplexity([8], every_n_steps=2, begin_token=True)
    trainer = make_trainer(tmp_path, [callback])
    with pytest.raises(ValueError, match="begin_token must be null or false without a tokenizer"):
        trainer.fit(LongContextModule(make_llama(), OptimConfig()), datamodule=Data())
    assert trainer.global_step == 0
