"""Tests AdamW on the host and in 8 bits: updates, states, resuming, and bytes in the plan."""

import copy
import io

import pytest
import torch
from torch import nn

from lctrain.config import OptimConfig
from lctrain.host_optimizer import HostAdamW
from lctrain.memory import plan
from lctrain.memory.optimizer import optimizer_bytes
from lctrain.memory.profile import profile
from lctrain.models import patch_model
from lctrain.module import LongContextModule
from lctrain.optim import build_optimizer, build_scheduler, follow_schedule
from lctrain.optimizers import optimizer_class
from tests.models.families import make_model

OPTIONS = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


def parameters(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in (37, 5)]


def train(optimizer, weights, steps, seed=1):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for weight in weights:
            weight.grad = torch.randn(weight.shape, generator=generator).to(weight.dtype)
        optimizer.step()
        for group in optimizer.param_groups:
            group["lr"] *= 0.9


def test_updates_in_float32_are_those_of_torch_bit_by_bit():
    ours, theirs = parameters(), parameters()
    train(HostAdamW([{"params": ours[:1]}, {"params": ours[1:], "lr": 1e-3}], **OPTIONS), ours, 5)
    groups = [{"params": theirs[:1]}, {"params": theirs[1:], "lr": 1e-3}]
    train(torch.optim.AdamW(groups, **OPTIONS, fused=True), theirs, 5)
    assert all(map(torch.equal, ours, theirs))


def test_weights_in_bfloat16_are_the_rounded_float32_ones():
    """An update below the spacing of bfloat16 is not lost: it adds up in the copy."""
    weight = nn.Parameter(torch.ones(8, dtype=torch.bfloat16))
    optimizer = HostAdamW([weight], lr=1e-4, weight_decay=0.0)
    for _ in range(100):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    exact = nn.Parameter(torch.ones(8))
    other = torch.optim.AdamW([exact], lr=1e-4, weight_decay=0.0, fused=True)
    for _ in range(100):
        exact.grad = torch.ones_like(exact)
        other.step()
    assert torch.equal(weight, exact.to(torch.bfloat16))
    assert weight[0] < 1.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_restored_state_goes_on_bit_by_bit(dtype):
    whole = parameters(dtype)
    optimizer = HostAdamW(whole, **OPTIONS)
    train(optimizer, whole, 3)
    state = copy.deepcopy(optimizer.state_dict())
    train(optimizer, whole, 3, seed=2)
    again = parameters(dtype)
    resumed = HostAdamW(again, **OPTIONS)
    resumed.load_state_dict(state)
    train(resumed, again, 3, seed=2)
    assert all(map(torch.equal, again, whole))


def test_a_parameter_without_a_gradient_stays():
    weights = parameters()
    before = weights[1].detach().clone()
    optimizer = HostAdamW(weights, **OPTIONS)
    weights[0].grad = torch.ones_like(weights[0])
    optimizer.step()
    assert torch.equal(weights[1], before)
    HostAdamW(parameters(), **OPTIONS).load_state_dict(optimizer.state_dict())


def test_the_state_of_another_optimizer_is_refused():
    weights = parameters()
    other = torch.optim.AdamW(weights)
    with pytest.raises(ValueError, match=r"must hold the state of optim=adamw_host, got that of"):
        HostAdamW(weights).load_state_dict(other.state_dict())


def test_weights_that_changed_after_construction_or_a_step_are_kept():
    ours, theirs = parameters(), parameters()
    optimizer, other = HostAdamW(ours, **OPTIONS), torch.optim.AdamW(theirs, **OPTIONS, fused=True)
    for seed in (1, 2):
        for weight in (*ours, *theirs):
            weight.data = torch.arange(weight.numel()) / seed
        train(optimizer, ours, 2, seed)
        train(other, theirs, 2, seed)
        assert all(map(torch.equal, ours, theirs))
    ours[0].data.fill_(3.0)
    assert torch.equal(optimizer.state_dict()["state"][0]["weight"], torch.full((37,), 3.0))


def test_a_changed_weight_in_bfloat16_leaves_the_other_copies_unrounded():
    weight = nn.Parameter(torch.ones(8, dtype=torch.bfloat16))
    optimizer = HostAdamW([weight], lr=1e-4, weight_decay=0.0)
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    before = optimizer.state_dict()["state"][0]["weight"].clone()
    assert not torch.equal(before, before.to(torch.bfloat16).float())
    weight.data[2] = 5.0
    before[2] = 5.0
    assert torch.equal(optimizer.state_dict()["state"][0]["weight"], before)


def test_a_group_that_is_added_later_is_updated():
    ours, theirs = parameters(), parameters()
    optimizer, other = HostAdamW(ours[:1], **OPTIONS), torch.optim.AdamW(theirs[:1], **OPTIONS)
    other.param_groups[0]["fused"] = True
    for steps, (one, weights) in ((2, (optimizer, ours)), (2, (other, theirs))):
        train(one, weights[:1], steps)
        one.add_param_group({"params": weights[1:], "lr": 3e-3})
        train(one, weights, steps)
    assert all(map(torch.equal, ours, theirs))


def by_pickle(value):
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, by_pickle], ids=["deepcopy", "pickle"])
def test_a_copy_of_the_optimizer_goes_on_bit_by_bit(copied):
    weights = parameters(torch.bfloat16)
    optimizer = HostAdamW(weights, **OPTIONS)
    train(optimizer, weights, 2)
    again, others = copied((optimizer, weights))
    train(optimizer, weights, 2)
    train(again, others, 2)
    assert all(map(torch.equal, weights, others))


@pytest.mark.parametrize(
    "wrong", [{"lr": -1.0}, {"betas": (1.5, 0.9)}, {"eps": -1.0}, {"weight_decay": -1.0}], ids=str
)
def test_options_out_of_range_are_refused(wrong):
    with pytest.raises(ValueError, match="Invalid"):
        HostAdamW(parameters(), **{**OPTIONS, **wrong})
    weights = parameters()
    optimizer = HostAdamW(weights[:1], **OPTIONS)
    with pytest.raises(ValueError, match="Invalid"):
        optimizer.add_param_group({"params": weights[1:], **wrong})
    assert len(optimizer.param_groups) == 1


def test_a_state_of_other_shapes_changes_nothing():
    weights = parameters()
    optimizer = HostAdamW(weights, **OPTIONS)
    train(optimizer, weights, 1)
    other = [nn.Parameter(torch.ones(37)), nn.Parameter(torch.ones(6))]
    elsewhere = HostAdamW(other, lr=5.0)
    train(elsewhere, other, 1)
    before = copy.deepcopy(optimizer.state_dict())
    message = r"must hold exp_avg of shape \(5,\) for .*parameter 1, got \(6,\)\. Use the model"
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(elsewhere.state_dict())
    after = optimizer.state_dict()
    assert after["param_groups"] == before["param_groups"]
    for index, state in before["state"].items():
        assert all(torch.equal(after["state"][index][name], x) for name, x in state.items())


def test_a_step_looks_at_each_parameter_once(monkeypatch):
    """With one inner optimizer for all, the work would grow with the square of their number."""
    weights = [nn.Parameter(torch.ones(2)) for _ in range(5)]
    optimizer = HostAdamW(weights)
    seen = []
    inner = torch.optim.AdamW._init_group

    def counted(self, group, *given):
        seen.extend(group["params"])
        return inner(self, group, *given)

    monkeypatch.setattr(torch.optim.AdamW, "_init_group", counted)
    train(optimizer, weights, 1)
    assert len(seen) == len(weights)


def test_a_class_with_a_state_of_its_own_is_not_joined_with_another():
    """The pair would save neither the float32 weights nor the moments."""
    config = OptimConfig(_target_="lctrain.host_optimizer.HostAdamW", matrices_only=True)
    with pytest.raises(ValueError, match=r"matrices_only must be false for lctrain\.host_optim"):
        build_optimizer(nn.Sequential(nn.Linear(2, 2)), config)
    LongContextModule(nn.Linear(2, 2), OptimConfig(_target_="torch.optim.Muon", matrices_only=True))
    with pytest.raises(ValueError, match=r"got true\. Set optim\.matrices_only=false\."):
        LongContextModule(nn.Linear(2, 2), config)


def test_the_optimizer_of_torchao_that_reads_gradients_too_early_is_refused():
    message = r"read gradients in its step, got 'torchao.*before they are divided.*optim=adamw_host"
    with pytest.raises(ValueError, match=message):
        optimizer_class("torchao.optim.CPUOffloadOptimizer")


def test_a_package_that_is_missing_is_named_with_its_command():
    with pytest.raises(ValueError, match=r"install the package: pip install no_such\."):
        optimizer_class("no_such.optim.AdamW8bit")


def test_learning_rates_in_tensors_follow_the_schedule_in_place():
    """torchao's optimizers refuse a learning rate that is no tensor any more."""
    rate = torch.tensor(1.0)
    optimizer = torch.optim.AdamW(parameters(), lr=rate, foreach=False)
    config = OptimConfig(learning_rate=1.0, warmup_steps=4)
    scheduler = build_scheduler(optimizer, config, 10)
    held = optimizer.param_groups[0]["lr"]
    scheduler.last_epoch = 2
    follow_schedule(scheduler)
    assert optimizer.param_groups[0]["lr"] is held
    assert float(held) == 0.75


def test_the_plan_counts_the_states_of_each_optimizer():
    large, small = torch.empty(256, 64, device="meta"), torch.empty(10, device="meta")
    count = large.numel()
    assert optimizer_bytes([large, small]) == (2 * 4 * (count + 10), 0)
    device, host = optimizer_bytes([large, small], "torchao.optim.AdamW8bit")
    assert (device, host) == (2 * (count + 4 * count // 256 + 1024) + 2 * 40, 0)
    assert optimizer_bytes([large], "lctrain.host_optimizer.HostAdamW") == (0, 16 * count)
    expected = 12 * (count + 10) + 4 * count  # and one gradient
    assert optimizer_bytes([large, small], "lctrain.host_optimizer.HostAdamW") == (0, expected)
    model = make_model("llama").train()
    with patch_model(model, fused=True):
        found = profile(model, 64, optimizer="lctrain.host_optimizer.HostAdamW")
        assert found.optimizer == 0
        assert 3 * found.gradients < found.host < 4 * found.gradients
        assert plan(model, 64, "checkpoint").host_bytes == 0
        public = plan(model, 64, "checkpoint", optimizer="lctrain.host_optimizer.HostAdamW")
        assert public.host_bytes == found.host
        assert public.parts["optimizer"] == 0


def test_moments_in_eight_bits_resume_bit_by_bit_and_take_what_is_planned(tmp_path):
    torchao = pytest.importorskip("torchao.optim")

    def make():
        weight = nn.Parameter(torch.randn(64, 256, generator=torch.Generator().manual_seed(0)))
        return weight, torchao.AdamW8bit([weight], lr=1e-2)

    def run(weight, optimizer, seed):
        generator = torch.Generator().manual_seed(seed)
        weight.grad = torch.randn(weight.shape, generator=generator)
        optimizer.step()

    weight, optimizer = make()
    run(weight, optimizer, 1)
    torch.save({"weight": weight.detach(), "state": optimizer.state_dict()}, tmp_path / "x")
    saved = torch.load(tmp_path / "x", weights_only=True)
    again, resumed = make()
    again.data.copy_(saved["weight"])
    resumed.load_state_dict(saved["state"])
    run(weight, optimizer, 2)
    run(again, resumed, 2)
    assert torch.equal(again, weight)
    moments = [optimizer.state[weight][name] for name in ("exp_avg", "exp_avg_sq")]
    stored = sum(x.codes.nbytes + x.scale.nbytes + x.qmap.nbytes for x in moments)
    assert optimizer_bytes([weight], "torchao.optim.AdamW8bit") == (stored, 0)
