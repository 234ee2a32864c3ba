"""Tests StepBudget: it sets the number of steps from a time budget, and a resumed run keeps it."""

import json
import signal
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest

from lctrain.callbacks import StepBudget
from lctrain.callbacks.budget import steps_that_fit
from lctrain.config import OptimConfig, TrainerConfig
from lctrain.module import LongContextModule
from lctrain.optim import learning_rate_factor
from lctrain.train import run_callbacks, train
from tests.callbacks.own_module import OwnModule
from tests.numerics import as_float32
from tests.train.runs import assert_same_run, config, rows
from tests.training import loader, make_batch, make_trainer

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")

CLOCK = SimpleNamespace(now=0.0)
KEEP = "callbacks.checkpoint.keep=3"
RUN = [
    "trainer.max_steps=100",
    "trainer.budget_s=30",
    "optim.learning_rate=0.01",
    "callbacks.checkpoint.every_n_steps=10",
    "trainer.limit_val_batches=1",
    "evaluation.enabled=false",
    "export=false",
]


class Tick(pl.Callback):
    """Advances the fake clock by a fixed number of seconds at every batch."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        CLOCK.now += self.seconds


def tick(seconds):
    return f"+callbacks.tick={{_target_: tests.callbacks.test_budget.Tick, seconds: {seconds}}}"


@pytest.fixture(autouse=True)
def clock(monkeypatch):
    """Replaces the clock of StepBudget by one that only Tick advances."""
    CLOCK.now = 1000.0
    replace_clock(monkeypatch)
    return CLOCK


def replace_clock(monkeypatch):
    time = SimpleNamespace(monotonic=lambda: CLOCK.now)
    monkeypatch.setattr("lctrain.callbacks.budget.time", time)
    monkeypatch.setattr("lctrain.train.time", time)


@pytest.fixture(scope="module")
def whole(tiny, tmp_path_factory):
    """The folder of an uninterrupted run whose steps take one second each."""
    folder = tmp_path_factory.mktemp("budget") / "whole"
    CLOCK.now = 1000.0
    with pytest.MonkeyPatch.context() as monkeypatch:
        replace_clock(monkeypatch)
        assert train(config(*tiny, *RUN, tick(1.0), output_dir=folder)).steps == 30
    return folder


def learning_rates(folder):
    """Returns {step: learning rate} as the decimal strings of the file."""
    return {row["step"]: row["train/learning_rate"] for row in rows(folder) if row["train/loss"]}


def stop_at(step, number=signal.SIGTERM):
    return f"+callbacks.stop={{_target_: tests.training.KillAt, step: {step}, number: {number}}}"


@pytest.mark.parametrize(
    ("done", "spent", "step_seconds", "budget", "steps"),
    [(11, 11.0, 1.0, 30.0, 30), (11, 27.5, 2.5, 30.0, 12), (11, 99.0, 1.0, 30.0, 11)],
    ids=["on_time", "slow", "late"],
)
def test_steps_that_fit(done, spent, step_seconds, budget, steps):
    assert steps_that_fit(done, spent, step_seconds, budget) == steps


def test_the_run_ends_in_time_and_the_schedule_with_it(whole):
    """At a second per step the run takes 30 steps, and the learning rate ends as in a run of 30."""
    factor = learning_rate_factor(OptimConfig(), 30)
    rates = [float(row["train/learning_rate"]) for row in rows(whole) if row["train/loss"]]
    assert rates[11:] == [as_float32(0.01 * factor(step)) for step in range(11, 30)]
    assert json.loads((whole / "run.json").read_text())["budget_steps"] == 30


@pytest.mark.parametrize("checkpoint", ["step-00000010", "last"], ids=["before", "after"])
def test_a_resumed_run_repeats_every_step_on_any_machine(tiny, tmp_path, whole, checkpoint):
    """The run chooses at step 11, stops at step 15, and resumes at ten seconds per step.

    The checkpoint is that of step 10, as if the process had been killed before the next one, or the
    last one.
    """
    folder = tmp_path / "stopped"
    CLOCK.now = 5.0
    with pytest.raises(SystemExit):
        train(config(*tiny, *RUN, KEEP, tick(1.0), stop_at(15), output_dir=folder))
    if checkpoint != "last":
        (found,) = (folder / "checkpoints").glob(f"{checkpoint}*.ckpt")
        checkpoint = str(found)
    resume = f"ckpt_path='{checkpoint}'"
    report = train(config(*tiny, *RUN, KEEP, tick(10.0), resume, output_dir=folder))
    assert report.steps == 30
    assert learning_rates(folder) == learning_rates(whole)
    assert_same_run(whole, folder)
    record = json.loads((folder / "run.json").read_text())
    assert (record["budget_chosen_at"], record["budget_steps"]) == (11, 30)


def test_a_run_stopped_before_the_choice_chooses_once(tiny, tmp_path, whole):
    """Both processes take the learning rates of `trainer.max_steps` until the number is chosen."""
    folder = tmp_path / "early"
    with pytest.raises(SystemExit):
        train(config(*tiny, *RUN, tick(1.0), stop_at(5), output_dir=folder))
    assert "budget_steps" not in json.loads((folder / "run.json").read_text())
    report = train(config(*tiny, *RUN, tick(2.0), "ckpt_path=last", output_dir=folder))
    assert report.steps == 5 + 15  # thirty seconds from the start of the second process
    first = [list(learning_rates(of).values())[:11] for of in (folder, whole)]
    assert first[0] == first[1]


def fitted_steps(tmp_path, module, seconds, **settings):
    """Returns the number of steps that a run with a budget of 30 s takes, and its StepBudget."""
    budget = StepBudget(30.0, started=CLOCK.now)
    settings = {"max_steps": 100, "max_epochs": -1} | settings
    trainer = make_trainer(tmp_path, [Tick(seconds), budget], **settings)
    trainer.fit(module, loader([make_batch([9, 5])] * 100))
    return trainer.global_step, budget


@pytest.mark.parametrize(
    ("settings", "optim", "seconds", "steps"),
    [
        ({}, {}, 1.0, 30),
        ({"max_steps": 20}, {}, 0.5, 20),
        ({"max_steps": 7}, {}, 1.0, 7),
        ({}, {}, 100.0, 12),
        ({}, {"warmup_steps": 14}, 100.0, 14),
        ({"accumulate_grad_batches": 2}, {}, 0.5, 30),
    ],
    ids=["in_time", "max_steps", "too_short_to_time", "late", "warmup", "accumulated"],
)
def test_bounds_of_the_length(tmp_path, make_llama, settings, optim, seconds, steps):
    """The run takes at most max_steps, and at least the timed steps plus one and the warmup."""
    module = LongContextModule(make_llama(), OptimConfig(**optim))
    assert fitted_steps(tmp_path, module, seconds, **settings)[0] == steps


@pytest.mark.parametrize(("max_steps", "steps"), [(100, 30), (20, 20)])
def test_a_resumed_run_says_its_length_and_can_be_shortened(
    tmp_path, make_llama, caplog, max_steps, steps
):
    budget = StepBudget(30.0)
    budget.load_state_dict({"max_steps": 30})  # as a checkpoint without the step of the choice
    module = LongContextModule(make_llama())
    trainer = make_trainer(tmp_path, [budget], max_steps=max_steps, max_epochs=-1)
    with caplog.at_level("INFO", logger="lctrain"):
        trainer.fit(module, loader([make_batch([9, 5])] * 100))
    assert trainer.global_step == steps
    assert ("The run takes 30 steps" in caplog.text) == (steps == 30)


def test_without_a_budget_nothing_is_chosen(tmp_path):
    options = config(*RUN, "trainer.budget_s=null", output_dir=tmp_path)
    found = run_callbacks(options, None, {}, None, 0.0)
    assert not any(isinstance(callback, StepBudget) for callback in found)
    found = run_callbacks(
        config(*RUN, output_dir=tmp_path), SimpleNamespace(record={}), {}, None, 7.0
    )
    (budget,) = [callback for callback in found if isinstance(callback, StepBudget)]
    assert (budget.seconds, budget._started) == (30.0, 7.0)


def test_any_module_has_its_length_fitted(tmp_path, make_llama):
    """A user's module with its own optimizer also ends in time."""
    steps, budget = fitted_steps(tmp_path, OwnModule(make_llama()), 1.5)
    assert steps == budget.max_steps == 20


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"budget_s": 0.0}, r"trainer.budget_s must be above 0, got 0.0. It is .* seconds"),
        ({"budget_s": -1.0}, r"trainer.budget_s must be above 0, got -1.0"),
        (
            {"budget_s": 9.0, "max_steps": -1, "max_epochs": 2},
            r"trainer.max_steps must be at least 1 with trainer.budget_s, got -1",
        ),
    ],
)
def test_bad_budgets(values, message):
    with pytest.raises(ValueError, match=message):
        TrainerConfig(**{"max_steps": 5, **values})
    if values["budget_s"] <= 0:
        with pytest.raises(ValueError, match="seconds must be above 0"):
            StepBudget(values["budget_s"])
