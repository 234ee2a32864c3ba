"""Tests what a resumed run says if its checkpoint has trained as long as the run may."""

import re

import pytest
from lightning.pytorch.callbacks import Timer

from lctrain.callbacks import StepCheckpoint
from lctrain.callbacks.budget import StepBudget
from lctrain.config import OptimConfig, TrainerConfig
from lctrain.module import LongContextModule
from lctrain.run.length import nothing_left
from tests.training import loader, make_batch, make_trainer

PACKS = [make_batch([9, 5], i) for i in range(5)]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Checkpoints of a run of two epochs of five steps, by step."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("run")
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 1, "num_key_value_heads": 1, "vocab_size": 97}
    module = LongContextModule(LlamaForCausalLM(LlamaConfig(**sizes, **heads)), OptimConfig())
    budget = StepBudget(1000.0)
    budget.max_steps, budget.chosen_at = 10, 3
    callbacks = [StepCheckpoint(folder, every_n_steps=1, keep=99), Timer(), budget]
    trainer = make_trainer(folder, callbacks, max_epochs=2, enable_checkpointing=True)
    trainer.fit(module, loader(PACKS))
    found = {int(path.stem.partition("-")[2]): path for path in folder.glob("step-*.ckpt")}
    assert set(found) == set(range(1, 11))
    return found


@pytest.mark.parametrize(
    ("step", "settings", "limit"),
    [
        (10, {"max_steps": 10}, r"the 10 steps of trainer.max_steps\. .* Raise it to train on"),
        (7, {"max_steps": 7}, "the 7 steps"),
        (7, {"max_steps": 8}, None),
        (10, {"max_steps": -1, "max_epochs": 2}, r"2 epochs, and trainer.max_epochs is 2\."),
        (7, {"max_epochs": 1}, r"1 epoch, and trainer.max_epochs is 1\."),
        (5, {"max_epochs": 1}, r"1 epoch, and trainer.max_epochs is 1\."),
        (4, {"max_epochs": 1}, None),
        (9, {"max_epochs": 2}, None),
        (10, {"max_epochs": 3}, None),
        (
            10,
            {"budget_s": 9.0, "max_steps": 99},
            r"the run chose for trainer.budget_s\. .*=null",
        ),
        (9, {"budget_s": 9.0, "max_steps": 99}, None),
        (10, {"max_steps": 99}, None),
        (9, {"max_time": "00:00:00:00", "max_steps": 99}, r"whole trainer.max_time=00:00:00:00"),
        (9, {"max_time": "01:00:00:00", "max_steps": 99}, None),
    ],
)
def test_nothing_left(checkpoints, step, settings, limit):
    warning = nothing_left(TrainerConfig(**settings), checkpoints[step])
    if limit is None:
        assert warning is None
    else:
        assert str(checkpoints[step]) in warning
        assert re.search(limit, warning)


def test_fewer_steps_than_the_checkpoint_s(checkpoints):
    message = r"max_steps must be at least 7, the steps that .*7.ckpt has taken, got 3\. Raise it"
    with pytest.raises(ValueError, match=message):
        nothing_left(TrainerConfig(max_steps=3), checkpoints[7])
