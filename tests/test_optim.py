"""Tests the optimizers, the learning-rate schedules and their errors."""

import copy

import pytest
import torch
from torch import nn

from lctrain.config import SCHEDULES, OptimConfig
from lctrain.module import LongContextModule
from lctrain.optim import (
    build_optimizer,
    build_scheduler,
    follow_schedule,
    learning_rate_factor,
)
from tests.numerics import near


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
    assert factor(20) == near(last)
    assert factor(500) == near(last)


def test_shapes_between():
    assert learning_rate_factor(OptimConfig(warmup_steps=0), 20)(10) == near(0.55)
    stable = OptimConfig(schedule="warmup_stable_decay", warmup_steps=0, decay_fraction=0.2)
    assert learning_rate_factor(stable, 20)(16) == near(1.0)
    assert learning_rate_factor(stable, 20)(18) == near(0.55)


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


TARGETS = [
    ("torch.optim.AdamW", {}),
    ("torch.optim.Adam", {"amsgrad": True}),
    ("torch.optim.NAdam", {}),
    ("torch.optim.SGD", {"momentum": 0.9}),
    ("torch.optim.RMSprop", {}),
    ("torch.optim.Adafactor", {}),
    ("tests.test_optim.SignDescent", {"power": 0.5}),
    ("torch.optim.AdamW", {"foreach": True}),
    ("torch.optim.SGD", {"foreach": True, "momentum": 0.9}),
    ("tests.test_optim.PassesOn", {"amsgrad": True}),
]


class SignDescent(torch.optim.Optimizer):
    """An optimizer of a user: descends along the signs of the gradients."""

    def __init__(self, params, lr=1.0, power=1.0, weight_decay=0.0):
        super().__init__(params, {"lr": lr, "power": power, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None):
        if closure is not None:
            with torch.enable_grad():
                closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                gradient = parameter.grad.sign() * parameter.grad.abs() ** group["power"]
                parameter.mul_(1 - group["lr"] * group["weight_decay"]).sub_(group["lr"] * gradient)


class PassesOn(torch.optim.AdamW):
    """An optimizer of a user that passes its arguments on."""

    def __init__(self, params, **kwargs):
        super().__init__(params, **kwargs)


def test_arguments_that_a_constructor_passes_on_are_known():
    config = OptimConfig(_target_="tests.test_optim.PassesOn", beta1=0.8, eps=1e-5)
    (group, _) = build_optimizer(Two(), config).param_groups
    assert (group["betas"], group["eps"]) == ((0.8, config.beta2), 1e-5)


class Two(nn.Module):
    """A model with an embedding, an inner matrix, a norm and an output projection."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(12, 8)
        self.inner = nn.Linear(8, 8)
        self.norm = nn.LayerNorm(8)
        self.output = nn.Linear(8, 12, bias=False)

    def get_output_embeddings(self):
        return self.output

    def forward(self, tokens):
        return self.output(self.norm(self.inner(self.embedding(tokens)))).square().mean()


def trained(config, steps, state=None):
    """Trains a model and returns its parameters and the state to resume from."""
    model = Two()
    optimizer = build_optimizer(model, config)
    if state is not None:
        model.load_state_dict(state[0])
        optimizer.load_state_dict(copy.deepcopy(state[1]))
    for _ in range(steps):
        optimizer.zero_grad()
        optimizer.step(lambda: model(torch.arange(12)).backward())
    return [p.detach().clone() for p in model.parameters()], (
        copy.deepcopy(model.state_dict()),
        copy.deepcopy(optimizer.state_dict()),
    )


@pytest.mark.parametrize(("target", "arguments"), TARGETS, ids=[name for name, _ in TARGETS])
def test_any_class_trains_decays_matrices_only_and_resumes(target, arguments):
    config = OptimConfig(_target_=target, arguments=arguments, weight_decay=0.3)
    optimizer = build_optimizer(Two(), config)
    assert type(optimizer).__name__ == target.rpartition(".")[2]
    decays = [group["weight_decay"] for group in optimizer.param_groups]
    assert decays == [0.3, 0.0]
    for group in optimizer.param_groups:
        assert arguments.items() <= group.items()
    begin, _ = trained(config, 0)
    whole, _ = trained(config, 4)
    _, state = trained(config, 2)
    resumed, _ = trained(config, 2, state)
    assert all(torch.equal(one, two) for one, two in zip(whole, resumed, strict=True))
    assert not any(torch.equal(one, two) for one, two in zip(begin[:2], whole[:2], strict=True))


MUON = {
    "_target_": "torch.optim.Muon",
    "arguments": {"adjust_lr_fn": "match_rms_adamw"},
    "matrices_only": True,
}


def test_muon_gets_the_inner_matrices_and_adamw_the_rest():
    model = Two()
    optimizer = build_optimizer(model, OptimConfig(**MUON, weight_decay=0.3))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = [{names[id(p)] for p in group["params"]} for group in optimizer.param_groups]
    assert groups == [
        {"inner.weight"},
        {"embedding.weight", "output.weight"},
        {"inner.bias", "norm.weight", "norm.bias"},
    ]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.3, 0.3, 0.0]


def test_muon_resumes_bit_exact_and_follows_the_schedule():
    config = OptimConfig(**MUON, learning_rate=0.01, warmup_steps=1)
    whole, _ = trained(config, 4)
    _, state = trained(config, 2)
    resumed, _ = trained(config, 2, state)
    assert all(torch.equal(one, two) for one, two in zip(whole, resumed, strict=True))
    optimizer = build_optimizer(Two(), config)
    optimizer.load_state_dict(copy.deepcopy(state[1]))
    scheduler = build_scheduler(optimizer, config, 10)
    optimizer.step()
    scheduler.step()
    rates = {group["lr"] for one in optimizer.optimizers for group in one.param_groups}
    assert rates == {group["lr"] for group in optimizer.param_groups}
    assert len(rates) == 1


def test_a_pair_does_what_its_parts_do():
    config = OptimConfig(**MUON, weight_decay=0.3)
    joined, _ = trained(config, 3)
    model = Two()
    pair = build_optimizer(model, config)
    muon, adamw = copy.deepcopy(pair.optimizers)
    own = Two()
    parameters = dict(own.named_parameters())
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for mine, theirs in zip((muon, adamw), pair.optimizers, strict=True):
        for group, source in zip(mine.param_groups, theirs.param_groups, strict=True):
            group["params"] = [parameters[names[id(p)]] for p in source["params"]]
    for _ in range(3):
        own.zero_grad()
        own(torch.arange(12)).backward()
        muon.step()
        adamw.step()
    assert all(torch.equal(p, q) for p, q in zip(own.parameters(), joined, strict=True))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"_target_": "AdamW"}, r"_target_ must be a class with its module, got 'AdamW'. Write"),
        (
            {"_target_": "torch.optim.AdamX"},
            r"got 'torch.optim.AdamX'. Did you mean torch.optim.Ad",
        ),
        ({"_target_": "no_such.Adam"}, r"must be a class that can be imported, got 'no_such.Adam'"),
        (
            {"_target_": "torch.nn.Linear"},
            r"must be a torch.optim.Optimizer, got 'torch.nn.Linear'",
        ),
        ({"_target_": "torch.optim.Optimizer"}, r"must be a torch.optim.Optimizer, got"),
        ({"_target_": "torch.optim.LBFGS"}, r"reads each gradient once, got 'torch.optim.LBFGS'"),
        (
            {"_target_": "torch.optim.SGD", "arguments": {"momentun": 0.9}},
            r"arguments must be arguments of torch.optim.SGD \(lr, .*'momentun'. Did you mean",
        ),
        (
            {"_target_": "torch.optim.SGD", "arguments": {"zzz": 1}},
            r"arguments must be arguments of .*, got 'zzz'. Remove it",
        ),
        ({"arguments": {"lr": 1.0}}, r"arguments must not hold lr, got 1.0. Set optim.learning_ra"),
        (
            {"arguments": {"betas": (0.9, 0.9)}},
            r"not hold betas, .* Set optim.beta1 and optim.beta2",
        ),
        ({"arguments": {"eps": 1e-3}}, r"arguments must not hold eps .*got 0.001. Set optim.eps"),
        (
            {"_target_": "torch.optim.SGD", "beta1": 0.8},
            r"beta1 must be left out for torch.optim.SGD, .* got 0.8. Use optim.arguments",
        ),
        ({"_target_": "torch.optim.Rprop"}, r"weight_decay must be 0 for torch.optim.Rprop, .*0.1"),
        (
            {"_target_": "torch.optim.Muon"},
            r"optim must fit torch.optim.Muon, .*optim.matrices_only",
        ),
        (
            {"_target_": "torch.optim.SGD", "arguments": {"momentum": -1.0}},
            r"optim must fit torch.optim.SGD, got: Invalid momentum.*Correct optim.arguments",
        ),
    ],
    ids=lambda value: "" if isinstance(value, str) else str(next(iter(value.values()))),
)
def test_classes_and_arguments_that_do_not_fit(options, message):
    with pytest.raises(ValueError, match=rf"optim\.?\w* ?{message}|{message}"):
        build_optimizer(Two(), OptimConfig(**options))


def test_matrices_that_are_not_there():
    with pytest.raises(ValueError, match="matrices_only needs trainable matrices"):
        build_optimizer(nn.Embedding(3, 4), OptimConfig(**MUON))


def test_the_module_refuses_a_class_before_data_are_read():
    with pytest.raises(ValueError, match=r"Did you mean torch.optim.Adam"):
        LongContextModule("some/model", {"_target_": "torch.optim.AdamV"})


def test_scheduler_scales_the_learning_rate():
    config = OptimConfig(learning_rate=0.5, warmup_steps=2)
    optimizer = build_optimizer(nn.Linear(2, 2), config)
    scheduler = build_scheduler(optimizer, config, 10)
    assert [group["lr"] for group in optimizer.param_groups] == [0.25, 0.25]
    nn.Linear(2, 2)(torch.zeros(1, 2)).sum().backward()
    optimizer.step()
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == 0.5


def family(name, **sizes):
    """A tiny causal LM of transformers with random weights."""
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    small = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    return AutoModelForCausalLM.from_config(CONFIG_MAPPING[name](**(small | sizes)))


@pytest.mark.parametrize(
    ("make", "without"),
    [
        (
            lambda: family("gpt_oss", num_local_experts=4, num_experts_per_tok=2, head_dim=8),
            {"gate_up_proj_bias", "down_proj_bias", "bias", "sinks", "layernorm", "norm"},
        ),
        (lambda: family("cohere", use_qk_norm=True), {"q_norm", "k_norm", "layernorm", "norm"}),
        (lambda: family("gemma2", head_dim=8), {"layernorm", "norm"}),
        (
            lambda: family("qwen3_moe", num_experts=4, num_experts_per_tok=2, head_dim=8),
            {"q_norm", "k_norm", "layernorm", "norm"},
        ),
        (
            lambda: family("mamba", state_size=4),
            {"A_log", "D", "bias", "norm", "norm_f"},
        ),
    ],
    ids=["biases-of-experts", "norms-by-head", "gemma", "stacked-experts", "state-space"],
)
def test_biases_and_norms_do_not_decay_whatever_their_shape(make, without):
    model = make()
    optimizer = build_optimizer(model, OptimConfig(weight_decay=0.3))
    decay = {
        id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]
    }
    shapes = set()
    for name, parameter in model.named_parameters():
        kept_out = any(name.endswith((w, f"{w}.weight")) for w in without)
        assert decay[id(parameter)] == (0.0 if kept_out else 0.3), name
        shapes.add((kept_out, parameter.dim()))
    assert decay[id(model.get_input_embeddings().weight)] == 0.3
    assert len(decay) == len(list(model.parameters()))
    assert {(False, 2), (True, 1)} <= shapes


class Odd(nn.Module):
    """A module with parameters that a rule by shape would classify wrongly."""

    def __init__(self):
        super().__init__()
        self.score = nn.Linear(8, 1)
        self.scale = nn.Parameter(torch.ones(1, 1, 8))
        self.relative_attention_bias = nn.Embedding(4, 2)
        self.norm_weight = nn.Parameter(torch.ones(2, 4))
        self.input_norm = nn.Linear(8, 8)
        self.rates = nn.Parameter(torch.ones(4, 4))
        self.rates._no_weight_decay = True
        self.experts = nn.Parameter(torch.ones(2, 4, 4))
        self.head_scale = nn.Parameter(torch.ones(4, 8))
        self.convolution = nn.Conv1d(4, 4, 3, groups=4)


def test_names_and_modules_decide():
    model = Odd()
    groups = build_optimizer(model, OptimConfig(weight_decay=0.3)).param_groups
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decaying = {names[id(p)] for group in groups if group["weight_decay"] for p in group["params"]}
    assert decaying == {"score.weight", "input_norm.weight", "experts", "convolution.weight"}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_restored_scheduler_follows_the_new_length(schedule):
    """Three steps of a run of three are extended by three: rates are those of a run of six."""
    config = OptimConfig(learning_rate=2e-3, schedule=schedule, warmup_steps=1)

    def stepped(total, steps, state=None):
        optimizer = build_optimizer(nn.Linear(2, 2), config)
        scheduler = build_scheduler(optimizer, config, total)
        if state is not None:
            optimizer.load_state_dict(state[0])
            scheduler.load_state_dict(state[1])
            follow_schedule(scheduler)
        rates = []
        for _ in range(steps):
            rates.append([group["lr"] for group in optimizer.param_groups])
            assert scheduler.get_last_lr() == rates[-1]
            optimizer.step()
            scheduler.step()
        return rates, (optimizer.state_dict(), scheduler.state_dict())

    _, state = stepped(3, 3)
    longer, _ = stepped(6, 6)
    assert stepped(6, 3, state)[0] == longer[3:]
    if schedule == "cosine":
        rates = [rate for rate, *_ in longer[3:]]
        assert [round(rate, 6) for rate in rates] == [0.001378, 0.000822, 0.000372]
