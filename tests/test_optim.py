"""The schedules and their errors."""

import pytest
import torch
from torch import nn

from lctrain.config import SCHEDULES, OptimConfig
from lctrain.optim import build_optimizer, build_scheduler, learning_rate_factor


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_warms_up_to_the_peak(schedule):
    factor = learning_rate_factor(OptimConfig(schedule=schedule, warmup_steps=4), 20)
    assert [factor(step) for step in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]


@pytest.mark.parametrize(
    ("schedule", "last"),
    [("cosine", 0.1), ("linear", 0.1), ("constant", 1.0), ("warmup_stable_decay", 0.1)],
)
def test_ends_at_the_floor(schedule, last):
    factor = learning_rate_factor(OptimConfig(schedule=schedule, warmup_steps=0), 20)
    assert factor(20) == pytest.approx(last)
    assert factor(500) == pytest.approx(last)


def test_shapes_between():
    assert learning_rate_factor(OptimConfig(warmup_steps=0), 20)(10) == pytest.approx(0.55)
    stable = OptimConfig(schedule="warmup_stable_decay", warmup_steps=0, decay_fraction=0.2)
    assert learning_rate_factor(stable, 20)(16) == pytest.approx(1.0)
    assert learning_rate_factor(stable, 20)(18) == pytest.approx(0.55)


def test_fraction_of_the_run_warms_up():
    assert learning_rate_factor(OptimConfig(warmup_fraction=0.5), 20)(4) == 0.5


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"schedule": "step"}, r"schedule must be one of cosine, .* got 'step'. Check"),
        ({"warmup_steps": -1}, r"warmup_steps must be at least 0, got -1. Use null"),
        ({"warmup_fraction": 1.0}, r"warmup_fraction must be in \[0, 1\), got 1.0. It is"),
        ({"decay_fraction": 0.0}, r"decay_fraction must be in \(0, 1\], got 0.0. It is"),
        ({"learning_rate": 0.0}, r"learning_rate must be above 0, got 0.0. Try"),
        ({"learning_rate": float("nan")}, r"learning_rate must be above 0, got nan. Try"),
        ({"min_learning_rate_ratio": 1.5}, r"ratio must be in \[0, 1\], got 1.5. It is"),
        ({"min_learning_rate_ratio": -0.1}, r"ratio must be in \[0, 1\], got -0.1. It is"),
        ({"beta1": 1.0}, r"beta1 must be in \[0, 1\), got 1.0. It is"),
        ({"beta2": -0.5}, r"beta2 must be in \[0, 1\), got -0.5. It is"),
        ({"eps": -1e-8}, r"eps must be at least 0, got -1e-08. Leave"),
        ({"weight_decay": -1.0}, r"weight_decay must be at least 0, got -1.0. Leave"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_errors(setting, message):
    with pytest.raises(ValueError, match=rf"optim\.\w*{message}"):
        OptimConfig(**setting)


def test_warmup_longer_than_the_run():
    message = "optim.warmup_steps must be at most the 20 steps of the run, got 30. Shorten"
    with pytest.raises(ValueError, match=message):
        learning_rate_factor(OptimConfig(warmup_steps=30), 20)


def test_nothing_to_train():
    model = nn.Linear(2, 2).requires_grad_(False)
    with pytest.raises(ValueError, match="model must have a trainable parameter, got none"):
        build_optimizer(model, OptimConfig())


def test_scheduler_scales_the_learning_rate():
    config = OptimConfig(learning_rate=0.5, warmup_steps=2)
    optimizer = build_optimizer(nn.Linear(2, 2), config)
    scheduler = build_scheduler(optimizer, config, 10)
    assert [group["lr"] for group in optimizer.param_groups] == [0.25, 0.25]
    nn.Linear(2, 2)(torch.zeros(1, 2)).sum().backward()
    optimizer.step()
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == 0.5
