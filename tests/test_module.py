"""Tests LongContextModule: equal token weights for all packs, accumulation windows and clipping."""

import copy
import math
import warnings
from dataclasses import replace

import pytest
import torch

from lctrain.attention import is_patched
from lctrain.config import AttentionConfig, OptimConfig
from lctrain.module import LongContextModule
from lctrain.optim import build_optimizer
from tests.forked import run_forked
from tests.numerics import (
    as_float32,
    assert_equal_in_float64,
    assert_sum_error_at_most_twice,
    near,
    near_roundings,
)
from tests.training import loader, make_batch, make_trainer

SGD_LIKE = OptimConfig(learning_rate=1e-2, schedule="constant", warmup_fraction=0.0)
UNEVEN = [make_batch([5, 9], 0), make_batch([40], 1), make_batch([2, 3, 4], 2)]
MORE = [make_batch([17, 30], 3), make_batch([6], 4)]


class RecordingModule(LongContextModule):
    """Records the losses, and the gradients before each optimizer step.

    Its optimizer is plain SGD, because Adam's first step is the gradient's sign: rounding a
    gradient near zero could turn it around.
    """

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.5)

    def on_before_optimizer_step(self, optimizer):
        if not hasattr(self, "seen"):
            self.seen, self.losses = [], []
        self.seen.append([p.grad.clone() for p in self.parameters()])
        self.losses.append(float(self.last_loss))


def one_batch(batches):
    """Returns one batch that holds all documents of several packs."""
    from lctrain.batch import PackedBatch

    documents = [
        batch.input_ids[0, int(start) : int(end)]
        for batch in batches
        for start, end in zip(batch.cu_seqlens[:-1], batch.cu_seqlens[1:], strict=True)
    ]
    return PackedBatch.from_documents(documents)


def fit(tmp_path, model, batches, **settings):
    module = RecordingModule(copy.deepcopy(model), SGD_LIKE)
    make_trainer(tmp_path, **settings).fit(module, loader(batches))
    return module


@pytest.mark.usefixtures("in_float64")
def test_accumulated_gradients_equal_one_big_batch(tmp_path, make_llama):
    model = make_llama()
    accumulated = fit(tmp_path, model, UNEVEN, accumulate_grad_batches=3)
    whole = fit(tmp_path, model, [one_batch(UNEVEN)])
    assert_equal_in_float64(accumulated.seen, whole.seen)
    assert accumulated.losses == near(whole.losses)
    assert_equal_in_float64([*accumulated.parameters()], [*whole.parameters()])


@pytest.mark.usefixtures("in_float64")
def test_last_incomplete_window_of_an_epoch_is_exact(tmp_path, make_llama):
    model = make_llama()
    accumulated = fit(tmp_path, model, UNEVEN + MORE, accumulate_grad_batches=3)
    whole = fit(tmp_path, model, [one_batch(UNEVEN), one_batch(MORE)])
    assert accumulated.losses == near(whole.losses)
    assert_equal_in_float64(accumulated.seen, whole.seen)


def test_validation_inside_a_window_does_not_change_it(tmp_path, make_llama):
    """Validates after every pack of a window of three; gradients and losses keep every bit."""
    runs = []
    for interval in (1, None):
        module = RecordingModule(make_llama(attention_dropout=0.3), SGD_LIKE)
        trainer = make_trainer(
            tmp_path,
            accumulate_grad_batches=3,
            val_check_interval=interval,
            check_val_every_n_epoch=None if interval else 10,
        )
        trainer.fit(module, loader(UNEVEN + MORE), loader(MORE))
        runs.append(module)
    assert [step for step, _ in runs[0].held_out_losses] == [0, 0, 1, 1, 2]
    assert not runs[1].held_out_losses
    assert runs[0].losses == runs[1].losses
    for mine, theirs in zip(runs[0].seen, runs[1].seen, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


@pytest.mark.usefixtures("in_float64")
def test_loss_is_the_models_own_on_each_document(tmp_path, make_llama):
    model = make_llama()
    module = fit(tmp_path, model, UNEVEN, accumulate_grad_batches=3)
    total = tokens = 0
    for batch in UNEVEN:
        for start, end in zip(batch.cu_seqlens[:-1], batch.cu_seqlens[1:], strict=True):
            ids = batch.input_ids[:, int(start) : int(end)]
            total += model(input_ids=ids, labels=ids).loss.item() * (ids.shape[1] - 1)
            tokens += ids.shape[1] - 1
    assert module.losses[0] == near(total / tokens)


@pytest.mark.usefixtures("in_float64")
def test_clipping_sees_the_exact_gradients(tmp_path, make_llama):
    """The norm equals that of one big batch, so clipping scales by the same factor."""
    model = make_llama()
    limit = 0.05
    accumulated = fit(tmp_path, model, UNEVEN, accumulate_grad_batches=3, gradient_clip_val=limit)
    whole = fit(tmp_path, model, [one_batch(UNEVEN)], gradient_clip_val=limit)
    assert float(whole.gradient_norm) > limit
    assert float(accumulated.gradient_norm) == near(float(whole.gradient_norm))
    assert_equal_in_float64([*accumulated.parameters()], [*whole.parameters()])


def module_losses(model, batch, autocast):
    """Returns the token losses of a pack by plain PyTorch, one document at a time."""
    losses = []
    for start, end in zip(batch.cu_seqlens[:-1], batch.cu_seqlens[1:], strict=True):
        ids = batch.input_ids[:, int(start) : int(end)]
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            logits = model(input_ids=ids).logits[0, :-1]
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        losses.append(torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none"))
    return torch.cat(losses)


def test_clipping_works_under_bf16_mixed(tmp_path, make_llama):
    """Lightning refuses to clip for fused optimizers in mixed precision; the module does not."""
    module = fit(
        tmp_path,
        make_llama(),
        UNEVEN,
        precision="bf16-mixed",
        gradient_clip_val=0.05,
        accumulate_grad_batches=2,
    )
    window = one_batch(UNEVEN[:2])
    losses = [
        module_losses(make_llama().to(dtype), window, autocast=dtype == torch.float32)
        for dtype in (torch.float32, torch.float64)
    ]
    tokens = window.num_valid_tokens
    assert_sum_error_at_most_twice(module.losses[0], losses[0] / tokens, losses[1] / tokens)
    assert all(p.dtype == torch.float32 for p in module.parameters())


def test_a_window_without_targets_changes_nothing_but_decay(tmp_path, make_llama):
    module = fit(tmp_path, make_llama(), [make_batch([1, 1])])
    (loss,) = module.losses
    assert math.isnan(loss)
    assert all(torch.equal(g, torch.zeros_like(g)) for g in module.seen[0])


@pytest.mark.usefixtures("in_float64")
def test_validation_is_one_mean_over_tokens(tmp_path, make_llama):
    model = make_llama()
    module = LongContextModule(model, SGD_LIKE)
    trainer = make_trainer(tmp_path)
    trainer.validate(module, loader(UNEVEN), verbose=False)
    apart = float(trainer.callback_metrics["val/loss"])
    trainer.validate(module, loader([one_batch(UNEVEN)]), verbose=False)
    assert apart == near(float(trainer.callback_metrics["val/loss"]))
    assert [step for step, _ in module.held_out_losses] == [0, 0]


def test_model_is_built_from_the_data_module_once_the_data_are_ready(tmp_path, make_llama):
    import lightning.pytorch as pl

    class Data(pl.LightningDataModule):
        def setup(self, stage):
            self.vocab_size = 97

        def train_dataloader(self):
            return loader(UNEVEN)

    module = LongContextModule(lambda data: make_llama(vocab_size=data.vocab_size), SGD_LIKE)
    make_trainer(tmp_path, max_steps=1).fit(module, datamodule=Data())
    assert module.model.config.vocab_size == 97
    assert is_patched(module.model)


def test_attention_none_leaves_the_model_alone(tmp_path, make_llama):
    model = make_llama()
    module = LongContextModule(model, SGD_LIKE, attention=None)
    make_trainer(tmp_path, max_steps=1).fit(module, loader([make_batch([12])]))
    assert module.patch_handle is None
    assert not is_patched(model)


def test_a_patched_model_is_left_as_it_is(tmp_path, make_llama):
    from lctrain.models import patch_model

    model = make_llama()
    handle = patch_model(model)
    module = LongContextModule(model, SGD_LIKE)
    make_trainer(tmp_path, max_steps=1).fit(module, loader(UNEVEN))
    assert module.patch_handle is None
    assert handle.active


def test_float16_is_refused(tmp_path, make_llama):
    trainer = make_trainer(tmp_path)
    module = LongContextModule(make_llama(), SGD_LIKE)
    module._trainer = trainer
    trainer.strategy.precision_plugin.precision = "16-mixed"
    with pytest.raises(ValueError, match=r"precision must be 32-true.*use bf16-mixed"):
        trainer.fit(module, loader(UNEVEN))


def test_dropout_depends_on_seed_and_position_only(tmp_path, make_llama):
    """Random numbers drawn elsewhere, such as in a validation, must not change training."""

    class Disturbed(RecordingModule):
        def on_train_batch_end(self, outputs, batch, batch_idx):
            super().on_train_batch_end(outputs, batch, batch_idx)
            torch.rand(3)

    losses = []
    for kind in (RecordingModule, Disturbed):
        module = kind(make_llama(), SGD_LIKE, attention=AttentionConfig(dropout=0.5), seed=3)
        make_trainer(tmp_path).fit(module, loader(UNEVEN))
        losses.append(module.losses)
    assert losses[0] == losses[1]
    other = RecordingModule(make_llama(), SGD_LIKE, attention=AttentionConfig(dropout=0.5), seed=4)
    make_trainer(tmp_path).fit(other, loader(UNEVEN))
    assert other.losses != losses[0]


def test_a_changed_optimizer_is_an_error_at_resume_only(tmp_path, make_llama):
    """Restoring an optimizer would ignore the change, but a validation has no optimizer."""
    path = tmp_path / "x.ckpt"
    trainer = make_trainer(tmp_path, max_steps=1)
    trainer.fit(LongContextModule(make_llama(), SGD_LIKE), loader(UNEVEN))
    trainer.save_checkpoint(path)
    changed = LongContextModule(make_llama(), replace(SGD_LIKE, weight_decay=0.2, beta2=0.9))
    names = r"optim.beta2 was 0.95, is 0.9; optim.weight_decay was 0.1, is 0.2\. Restore them"
    with pytest.raises(ValueError, match=names):
        make_trainer(tmp_path).fit(changed, loader(UNEVEN), ckpt_path=path, weights_only=False)
    make_trainer(tmp_path).validate(
        changed, loader(UNEVEN), ckpt_path=path, verbose=False, weights_only=False
    )


def test_a_checkpoint_of_another_model_is_named(tmp_path, make_llama):
    path = tmp_path / "x.ckpt"
    trainer = make_trainer(tmp_path, max_steps=1)
    trainer.fit(LongContextModule(make_llama(), SGD_LIKE), loader(UNEVEN))
    trainer.save_checkpoint(path)
    wider = LongContextModule(make_llama(intermediate_size=64), SGD_LIKE)
    names = (
        r"of this model, got others: size mismatch for model.*; size mismatch .*; and 4 more\. Use"
    )
    with pytest.raises(ValueError, match=names) as error:
        make_trainer(tmp_path).validate(wider, loader(UNEVEN), ckpt_path=path, weights_only=True)
    assert len(str(error.value)) < 600
    deeper = LongContextModule(make_llama(num_hidden_layers=3), SGD_LIKE)
    with pytest.raises(
        ValueError, match=r"got others: Missing key\(s\) in state_dict: .* \.\.\.\. Use"
    ):
        make_trainer(tmp_path).fit(deeper, loader(UNEVEN), ckpt_path=path, weights_only=True)


def test_a_run_without_training_batches_validates(tmp_path, make_llama):
    module = LongContextModule(make_llama(), SGD_LIKE)
    trainer = make_trainer(tmp_path, limit_train_batches=0)
    trainer.fit(module, loader(UNEVEN), loader(MORE))
    trainer.validate(module, loader(MORE), verbose=False)
    assert trainer.global_step == 0
    assert len(module.held_out_losses) == 1


def test_a_run_that_has_no_steps_left(tmp_path, make_llama):
    """The warning names the caller's line of `fit`; a validation has no length."""
    path = tmp_path / "x.ckpt"
    trainer = make_trainer(tmp_path, max_steps=2, max_epochs=-1)
    trainer.fit(LongContextModule(make_llama(), SGD_LIKE), loader(UNEVEN))
    trainer.save_checkpoint(path)

    def resume(how, **settings):
        module = LongContextModule(make_llama(), SGD_LIKE)
        trainer = make_trainer(tmp_path, **settings)
        getattr(trainer, how)(module, loader(UNEVEN), ckpt_path=path, weights_only=True)
        return trainer.global_step

    with pytest.warns(UserWarning, match=r"the 2 steps of trainer\.max_steps\. Raise") as caught:
        assert resume("fit", max_steps=2, max_epochs=-1) == 2
    (warning,) = (one for one in caught if "Nothing is left to train" in str(one.message))
    assert warning.filename == __file__
    with pytest.raises(ValueError, match=r"max_steps must be at least 2, .* got 1\. Raise it"):
        resume("fit", max_steps=1)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Nothing is left")
        assert resume("fit", max_steps=3, max_epochs=-1) == 3
        resume("validate", max_steps=1)


def test_metrics_reach_the_trainer(tmp_path, make_llama):
    trainer = make_trainer(tmp_path, gradient_clip_val=1.0)
    module = LongContextModule(make_llama(), SGD_LIKE)
    trainer.fit(module, loader(UNEVEN))
    logged = trainer.callback_metrics
    assert float(logged["train/loss"]) == as_float32(float(module.last_loss))
    assert {"train/learning_rate", "train/gradient_norm"} <= set(logged)


def test_vectors_do_not_decay(make_llama):
    model = make_llama(tie_word_embeddings=True)
    optimizer = build_optimizer(model, OptimConfig(weight_decay=0.3))
    decays = {
        id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]
    }
    for parameter in model.parameters():
        assert decays[id(parameter)] == (0.3 if parameter.dim() >= 2 else 0.0)


@pytest.mark.usefixtures("in_float64")
def test_two_ranks_equal_one_big_batch(tmp_path):
    """With DDP, unequal packs, accumulation, clipping, and a group divided over both ranks."""
    from tests import train_two_ranks as ranks

    run_forked("tests.train_two_ranks", str(tmp_path), env={"NODE_RANK": "0"})
    result = torch.load(tmp_path / "found.pt")
    documents = one_batch([batch for rank in (0, 1) for batch in ranks.batches(rank)[:2]])
    windows = [documents, ranks.whole_groups()]
    module = ranks.Recorder(ranks.make_model())
    module.train_dataloader = lambda: loader(windows)
    make_trainer(tmp_path, gradient_clip_val=ranks.CLIP).fit(module)
    for mine, theirs in zip(result["records"], module.records, strict=True):
        assert mine == near(theirs)
    assert module.records[0][1] > ranks.CLIP
    assert_equal_in_float64(result["weights"], dict(module.model.state_dict()))


@pytest.mark.parametrize("given", [True, False], ids=["model", "nothing"])
def test_load_from_checkpoint(tmp_path, make_llama, given):
    """The checkpoint holds the module's arguments and its weights."""
    module = LongContextModule(
        make_llama(tie_word_embeddings=True),
        SGD_LIKE,
        AttentionConfig(dropout=0.25),
        seed=3,
        memory={"name": "checkpoint", "mlp_tokens": 4},
    )
    trainer = make_trainer(tmp_path, max_steps=1)
    trainer.fit(module, loader(UNEVEN))
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    own = {"model": make_llama(tie_word_embeddings=True, seed=9)} if given else {}
    loaded = LongContextModule.load_from_checkpoint(tmp_path / "x.ckpt", weights_only=True, **own)
    assert loaded.optim == SGD_LIKE
    assert loaded.attention == AttentionConfig(dropout=0.25)
    assert loaded.seed == 3
    assert loaded.memory == module.memory
    assert float(loaded.first_loss) == float(module.first_loss)
    mine, theirs = module.state_dict(), loaded.state_dict()
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    kwargs = UNEVEN[0].model_kwargs()
    module.eval(), loaded.eval()
    assert torch.equal(module.model(**kwargs).logits, loaded.model(**kwargs).logits)


def test_a_module_is_built_from_a_configuration(tmp_path, make_llama):
    model = make_llama()
    settings = {**model.config.to_dict(), "vocab_size": 97}
    module = LongContextModule(settings, {"learning_rate": 0.5}, {"name": "flash"}, seed=5)
    make_trainer(tmp_path, max_steps=1).fit(module, loader(UNEVEN))
    torch.manual_seed(5)
    same = type(model)(model.config)
    assert module.optim.learning_rate == 0.5
    assert is_patched(module.model)
    assert module.model.lm_head.weight.shape == same.lm_head.weight.shape


def test_a_module_is_built_from_a_folder(tmp_path, make_llama):
    model = make_llama()
    model.save_pretrained(tmp_path / "model")
    module = LongContextModule(str(tmp_path / "model"), SGD_LIKE)
    make_trainer(tmp_path).validate(module, loader(UNEVEN), verbose=False)
    assert torch.equal(module.model.lm_head.weight, model.lm_head.weight)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": 3}, "model must be a module, a name, a mapping with model_type or a function"),
        (
            {"model": "x", "optim": {"lr": 1}},
            r"optim must have fields of OptimConfig.*got lr\. Che",
        ),
        ({"model": "x", "attention": "flash"}, "attention must be a AttentionConfig or a mapping"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        LongContextModule(**arguments)


def test_wrong_configurations(tmp_path):
    for settings, message in (
        ({}, "must have the model_type of a family of transformers, got None"),
        ({"model_type": "llama", "hidden_size": "x"}, "model must fit LlamaConfig"),
    ):
        with pytest.raises(ValueError, match=message):
            make_trainer(tmp_path).fit(LongContextModule(settings), loader(UNEVEN))


def test_test_and_predict(tmp_path, make_llama):
    module = LongContextModule(make_llama(), SGD_LIKE)
    trainer = make_trainer(tmp_path)
    trainer.validate(module, loader(UNEVEN), verbose=False)
    held_out = float(trainer.callback_metrics["val/loss"])
    trainer.test(module, loader(UNEVEN), verbose=False)
    assert float(trainer.callback_metrics["test/loss"]) == held_out
    assert float(trainer.callback_metrics["test/perplexity"]) == near_roundings(
        math.exp(held_out), 8
    )  # the loss, about 4.6, has one; its exponential has 4.6 and its own
    scores = trainer.predict(module, loader(UNEVEN))
    assert [len(score) for score in scores] == [batch.num_tokens for batch in UNEVEN]
    total = sum(float(score.double().sum()) for score in scores)
    valid = sum(batch.num_valid_tokens for batch in UNEVEN)
    assert total / valid == near_roundings(held_out, valid)  # one in each addition
    for batch, score in zip(UNEVEN, scores, strict=True):
        assert not score[batch.labels[0] == -100].any()
