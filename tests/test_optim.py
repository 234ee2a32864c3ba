"""The schedules and their errors."""

import pytest
import torch
from torch import nn

from lctrain.config import OptimConfig
from lctrain.optim import SCHEDULES, build_optimizer, build_scheduler, learning_rate_factor


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
    ("config", "message"),
    [
        (OptimConfig(schedule="step"), r"optim.schedule must be one of cosine, .* got 'step'"),
        (OptimConfig(warmup_steps=30), r"optim.warmup_steps must be between 0 and the 20 steps"),
        (OptimConfig(warmup_steps=-1), r"optim.warmup_steps must be between 0"),
        (OptimConfig(warmup_fraction=1.0), r"optim.warmup_fraction must be in \[0, 1\), got 1.0"),
        (OptimConfig(decay_fraction=0.0), r"optim.decay_fraction must be in \(0, 1\], got 0.0"),
    ],
)
def test_errors(config, message):
    with pytest.raises(ValueError, match=message):
        learning_rate_factor(config, 20)


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
