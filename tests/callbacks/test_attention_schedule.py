"""Tests AttentionSchedule: it changes the attention at given steps, and resumes bit by bit."""

import logging

import pytest
import torch

from lctrain.attention import is_patched
from lctrain.callbacks import AttentionSchedule, BatchSeed, PatchAttention, StepCheckpoint
from lctrain.loss import causal_lm_loss
from lctrain.models import patch_model
from lctrain.models.rope import RopeSwap
from tests.callbacks.own_module import OwnModule
from tests.callbacks.test_patch_attention import Untouched
from tests.numerics import assert_equal_in_float64, assert_far_apart
from tests.training import loader, make_batch, make_trainer

PACKS = [make_batch([12, 25], seed) for seed in range(8)]
STAGES = {
    0: {"attention": "flash", "sliding_window": 4, "dropout": 0.2},
    2: {"attention": "flash", "rope": {"rope_type": "yarn", "factor": 4.0}},
    5: {"attention": "dual_chunk", "chunk_size": 8},
}


class Staged(OwnModule):
    """A module that records the attention of every micro-batch, and can kill the run."""

    def __init__(self, model, dies_at=None):
        super().__init__(model)
        self.dies_at, self.states = dies_at, []

    def training_step(self, batch, batch_idx):
        if len(self.seen) == self.dies_at:
            raise RuntimeError("died")
        spec = self.model.model.layers[0].self_attn.lctrain_attention_spec
        self.states.append((spec.kind, spec.dropout, self.model.model.rotary_emb.attention_scaling))
        return super().training_step(batch, batch_idx)


def fit(tmp_path, module, *callbacks, path=None, **settings):
    callbacks = [AttentionSchedule(STAGES), BatchSeed(7), *callbacks]
    trainer = make_trainer(tmp_path, callbacks, enable_checkpointing=True, **settings)
    trainer.fit(module, loader(PACKS), ckpt_path=path)
    return trainer


def test_stages_follow_the_step_and_the_model_comes_back(tmp_path, make_llama):
    model = make_llama()
    frequencies = model.model.rotary_emb.inv_freq.clone()
    module = Staged(model)
    trainer = fit(tmp_path, module)
    yarn = module.states[2][2]
    assert yarn > 1.0
    first, second, third = ("flash", 0.2, 1.0), ("flash", None, yarn), ("dual_chunk", None, 1.0)
    assert module.states == [first] * 2 + [second] * 3 + [third] * 3
    assert not is_patched(model)
    assert torch.equal(model.model.rotary_emb.inv_freq, frequencies)
    assert model.model.rotary_emb.attention_scaling == 1.0
    assert float(trainer.callback_metrics["attention/stage"]) == 5.0


def test_a_stage_lasts_for_whole_windows(tmp_path, make_llama):
    module = Staged(make_llama())
    fit(tmp_path, module, accumulate_grad_batches=2)
    assert [kind for kind, _, _ in module.states] == ["flash"] * 8
    assert [scaling > 1 for _, _, scaling in module.states] == [False] * 4 + [True] * 4


@pytest.mark.parametrize("dies_at", [1, 4, 6])
def test_a_resumed_run_is_bit_equal(tmp_path, make_llama, dies_at):
    whole = Staged(make_llama())
    fit(tmp_path, whole)
    dead = Staged(make_llama(), dies_at)
    with pytest.raises(RuntimeError, match="died"):
        fit(tmp_path, dead, StepCheckpoint(tmp_path / "c", every_n_steps=1))
    again = Staged(make_llama())
    trainer = make_trainer(tmp_path, [AttentionSchedule(STAGES), BatchSeed(7)])
    trainer.fit(
        again, loader(PACKS[dies_at:] + PACKS[:dies_at]), ckpt_path=tmp_path / "c/last.ckpt"
    )
    assert again.seen == whole.seen[dies_at:]
    assert again.states == whole.states[dies_at:]


def test_a_validation_of_a_checkpoint_has_its_stage(tmp_path, make_llama):
    module = Staged(make_llama())
    fit(tmp_path, module).save_checkpoint(tmp_path / "x.ckpt")
    for path, name in ((tmp_path / "x.ckpt", "lctrain_dual_chunk"), (None, "lctrain_flash")):
        other = OwnModule(make_llama())
        trainer = make_trainer(tmp_path, [AttentionSchedule(STAGES)])
        trainer.validate(other, loader(PACKS[:1]), ckpt_path=path, verbose=False)
        assert other.implementations == [name]


def test_each_of_two_schedules_keeps_its_stage(tmp_path, make_llama):
    class Two(OwnModule):
        def __init__(self):
            super().__init__(make_llama())
            self.other = make_llama()

        def training_step(self, batch, batch_idx):
            return causal_lm_loss(self.model, batch)[0] + causal_lm_loss(self.other, batch)[0]

        def validation_step(self, batch, batch_idx):
            pass

    def schedules():
        return [
            AttentionSchedule({0: {}, 1: {"sliding_window": 4}}, models="model"),
            AttentionSchedule({0: {}, 2: {"sliding_window": 4}}, models=["other"]),
        ]

    trainer = make_trainer(tmp_path, schedules(), max_steps=2)
    trainer.fit(Two(), loader(PACKS[:2]))
    assert float(trainer.callback_metrics["attention/stage/model"]) == 1
    assert float(trainer.callback_metrics["attention/stage/other"]) == 0
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    again = schedules()
    trainer = make_trainer(tmp_path, again)
    trainer.validate(Two(), loader(PACKS[:1]), ckpt_path=tmp_path / "x.ckpt", verbose=False)
    assert [schedule.stage.step for schedule in again] == [1, 0]


def test_a_change_is_said(tmp_path, make_llama, caplog):
    with caplog.at_level(logging.INFO, logger="lctrain"):
        fit(tmp_path, Staged(make_llama()))
    said = [r.message.splitlines()[0] for r in caplog.records if "from step" in r.message]
    assert said == [
        "Attention from step 2 on: flash, rope={'rope_type': 'yarn', 'factor': 4.0}",
        "Attention from step 5 on: dual_chunk, chunk_size=8",
    ]


def test_final_rope_is_what_an_export_needs(make_llama):
    assert AttentionSchedule(STAGES).final_rope is None
    rope = {"rope_type": "linear", "factor": 2.0}
    schedule = AttentionSchedule({0: {"rope": rope}})
    assert schedule.final_rope == rope
    swapped, configured = make_llama(), make_llama()
    parameters = configured.config.rope_parameters | schedule.final_rope
    configured = make_llama(rope_parameters=parameters)
    RopeSwap(swapped, rope)
    tokens = torch.arange(3, 40)[None]
    assert torch.equal(swapped(tokens).logits, configured(tokens).logits)


@pytest.mark.usefixtures("in_float64")
def test_a_window_is_that_of_a_model_with_windows(make_llama):
    """`sliding_window` gives the logits of a transformers model with sliding-window attention."""
    from transformers import MistralConfig, MistralForCausalLM

    sizes = make_llama().config.to_dict() | {"sliding_window": 4}
    del sizes["model_type"]
    torch.manual_seed(0)
    windowed = MistralForCausalLM(MistralConfig(**sizes, attn_implementation="eager")).eval()
    full = MistralForCausalLM(MistralConfig(**sizes | {"sliding_window": None})).eval()
    full.load_state_dict(windowed.state_dict())
    tokens = torch.arange(3, 40)[None]
    with patch_model(full, sliding_window=4):
        assert_equal_in_float64(full(tokens).logits, windowed(tokens).logits)
    assert_far_apart(full(tokens).logits, windowed(tokens).logits)


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ({1: {}}, r"must be a mapping with a stage at step 0, got \[1\]\. Add"),
        ([{}], "must be a mapping with a stage at step 0, got list"),
        ({0: {}, -1: {}}, "optimizer steps of at least 0, got -1"),
        ({0: "flash"}, "the stage at step 0 must be a mapping, got 'flash'"),
        ({0: {}, 3: {"attention": "none"}}, "the stage at step 3 does not fit: attention must"),
        ({0: {"chunk_size": 3}}, "the stage at step 0 does not fit: .*belongs to"),
        ({0: {"rope": {"rope_type": "dynamic"}}}, "rope_type must be one of default, linear"),
        ({0: {"sliding_window": 0}}, "sliding_window must be an int of at least 1"),
    ],
)
def test_wrong_stages(stages, message):
    with pytest.raises(ValueError, match=message):
        AttentionSchedule(stages)


def test_every_stage_is_tried_before_data_are_read(tmp_path, make_llama):
    windowed = make_llama()
    trainer = make_trainer(tmp_path, [AttentionSchedule({0: {}, 9: {"attention": "differential"}})])
    with pytest.raises(ValueError, match="the stage at step 9 does not fit: "):
        trainer.fit(OwnModule(windowed), datamodule=Untouched())
    assert not is_patched(windowed)
    wrong = AttentionSchedule({0: {}, 9: {"rope": {"rope_type": "yarn", "factor": "x"}}})
    with pytest.raises(ValueError, match="the stage at step 9 does not fit: rope must be"):
        make_trainer(tmp_path, [wrong]).fit(OwnModule(windowed), datamodule=Untouched())
    assert not is_patched(windowed)


def test_beside_another_patch(tmp_path, make_llama):
    both = [AttentionSchedule({0: {}}), PatchAttention()]
    with pytest.raises(ValueError, match="AttentionSchedule and PatchAttention for 'model'"):
        make_trainer(tmp_path, both).fit(OwnModule(make_llama()), datamodule=Untouched())
