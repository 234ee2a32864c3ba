"""Tests what the plan counts of weight gradients, and that no old ones outlive their step."""

import re

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler

import lctrain
from lctrain.build import plan_memory
from lctrain.loss import causal_lm_loss
from lctrain.memory import plan, use_policy
from lctrain.memory.tracker import Tracker
from lctrain.module import LongContextModule
from tests.configs.composed import load
from tests.training import loader, make_batch, make_trainer

TOKENS = 256


@pytest.fixture
def whole(make_llama):
    """Returns a patched Llama whose weights are all trained, and are larger than activations."""
    model = make_llama(hidden_size=128, intermediate_size=384, num_hidden_layers=5).train()
    lctrain.patch_model(model, fused=True)
    return model


def taken(model, batch, accumulates):
    """Returns the most bytes of a step beyond weights; gradients that exist before count, too."""
    causal_lm_loss(model, batch)[0].backward()  # verifies the head
    before = [p.grad for p in model.parameters()]
    if not accumulates:
        model.zero_grad()
        before = []
    tracker = Tracker()
    tracker.ignore([*model.parameters(), *model.buffers(), *before])
    with tracker:
        causal_lm_loss(model, batch)[0].backward()
    model.zero_grad()
    return tracker.peak + sum(gradient.nbytes for gradient in before)


@pytest.mark.parametrize("mlp_tokens", [None, TOKENS // 4], ids=["", "tiles"])
@pytest.mark.parametrize(
    ("policy", "options"),
    [("none", {}), ("checkpoint", {"keep_attention": 5}), ("offload", {"keep_inputs": 0})],
    ids=["none", "checkpoint", "offload"],
)
def test_the_plan_of_trained_weights_is_within_5_percent(whole, policy, options, mlp_tokens):
    if policy == "none" and mlp_tokens is not None:
        pytest.skip("tiles need checkpoints")
    if policy != "none":
        options = {**options, "mlp_tokens": mlp_tokens}
    tokens = torch.randint(29, (TOKENS,), generator=torch.Generator().manual_seed(0))
    batch = lctrain.PackedBatch.from_documents([tokens])
    handle = use_policy(whole, policy, tokens=TOKENS, **options)
    peak = taken(whole, batch, accumulates=False)
    if handle is not None:
        handle.remove()
    planned = {
        count: plan(whole, TOKENS, policy, micro_batches=count, **options) for count in (1, 2)
    }
    assert planned[1] == plan(whole, TOKENS, policy, **options)
    static = sum(planned[1].parts[part] for part in ("weights", "optimizer"))
    expected = planned[1].tensor_bytes - static
    if policy == "offload":
        peak -= planned[1].host_bytes  # on a CPU, the arena is counted too
    assert 20 * abs(expected - peak) <= peak, (expected, peak)
    more = planned[2].device_bytes - planned[1].device_bytes
    assert 0 < more <= planned[2].parts["gradients"]


def test_gradients_that_accumulate_are_counted_throughout(whole):
    tokens = torch.randint(29, (TOKENS,), generator=torch.Generator().manual_seed(0))
    batch = lctrain.PackedBatch.from_documents([tokens])
    handle = use_policy(whole, "checkpoint", mlp_tokens=TOKENS // 4)
    peak = taken(whole, batch, accumulates=True)
    handle.remove()
    planned = plan(whole, TOKENS, "checkpoint", micro_batches=3, mlp_tokens=TOKENS // 4)
    assert planned.parts["gradients"] == sum(p.nbytes for p in whole.parameters())
    expected = planned.tensor_bytes - planned.parts["weights"] - planned.parts["optimizer"]
    assert 20 * abs(expected - peak) <= peak, (expected, peak)


class Seen(pl.Callback):
    """Records, for every micro-batch, whether gradients exist when its forward runs."""

    def __init__(self):
        self.found = []

    def on_train_start(self, trainer, module):
        first = module.model.get_input_embeddings()
        first.register_forward_pre_hook(lambda *_: self.record(module))

    def record(self, module):
        if module.model.training:
            self.found.append(any(p.grad is not None for p in module.parameters()))


@pytest.mark.parametrize(
    ("micro_batches", "expected"), [(1, [False] * 4), (2, [False, True, False, True])]
)
def test_no_gradients_of_the_last_step_exist_in_the_forward(
    tmp_path, make_llama, micro_batches, expected
):
    """Lightning would free them after the first forward of the next step."""
    batches = [make_batch([9, 5], number) for number in range(4)]
    seen = Seen()
    trainer = make_trainer(tmp_path, accumulate_grad_batches=micro_batches, callbacks=[seen])
    trainer.fit(LongContextModule(make_llama()), loader(batches))
    assert seen.found == expected


class ByHand(LongContextModule):
    """A module with manual optimization, which takes one optimizer step per two batches."""

    automatic_optimization = False

    def backward(self, loss):
        loss.backward()

    def training_step(self, batch, batch_idx):
        self.manual_backward(causal_lm_loss(self.model, batch)[0])
        if batch_idx % 2 == 1:
            self.optimizers().step()
            self.optimizers().zero_grad()


def test_gradients_that_a_module_accumulates_by_hand_are_kept(tmp_path, make_llama):
    seen = Seen()
    trainer = make_trainer(tmp_path, callbacks=[seen], log_every_n_steps=9)
    module = ByHand(make_llama())
    trainer.fit(module, loader([make_batch([9, 5], number) for number in range(4)]))
    assert seen.found == [False, True, False, True]
    assert module._memory_facts()["micro_batches"] > 1


class KeepsOnce(LongContextModule):
    """A module that keeps the gradients of its first step for the second one."""

    def optimizer_zero_grad(self, epoch, batch_idx, optimizer):
        if batch_idx != 1:
            super().optimizer_zero_grad(epoch, batch_idx, optimizer)


def test_a_module_s_own_way_to_free_gradients_is_used(tmp_path, make_llama):
    seen = Seen()
    batches = [make_batch([9, 5], number) for number in range(3)]
    make_trainer(tmp_path, callbacks=[seen]).fit(KeepsOnce(make_llama()), loader(batches))
    assert seen.found == [False, True, False]


SCHEDULER = "lightning.pytorch.callbacks.GradientAccumulationScheduler"


def test_a_run_s_plan_follows_its_accumulation():
    options = ("model=llama_5m", "memory=checkpoint", "trainer.accelerator=cpu")
    one, two = (
        plan_memory(load(*options, f"trainer.accumulate_grad_batches={count}")).device_bytes
        for count in (1, 2)
    )
    assert one < two
    for scheduling, expected in (("{0: 1, 3: 4}", two), ("{0: 4, 3: 1}", two), ("{2: 1}", one)):
        scheduled = f"+callbacks.more={{_target_: {SCHEDULER}, scheduling: {scheduling}}}"
        assert plan_memory(load(*options, scheduled)).device_bytes == expected


@pytest.mark.parametrize("target", ["no_such_package.Callback", f"{SCHEDULER}s"])
def test_a_callback_that_cannot_be_imported_is_named(target):
    config = load("model=llama_5m", "memory=checkpoint", f"+callbacks.more={{_target_: {target}}}")
    message = f"callbacks.more._target_ must name a class that can be imported, got '{target}'"
    with pytest.raises(ValueError, match=re.escape(message)):
        plan_memory(config)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, 1),
        ({"accumulate_grad_batches": 2}, 2),
        ({"callbacks": [GradientAccumulationScheduler({0: 1, 3: 4, 5: 2})]}, 4),
        ({"callbacks": [GradientAccumulationScheduler({2: 1})]}, 1),
    ],
    ids=["one", "two", "scheduled", "scheduled-one"],
)
def test_a_module_knows_its_micro_batches(tmp_path, make_llama, settings, expected):
    module = LongContextModule(make_llama())
    module.trainer = make_trainer(tmp_path, **settings)
    assert module._memory_facts()["micro_batches"] == expected


def test_the_policy_of_a_loop_of_one_s_own_follows_its_micro_batches(whole):
    """The device has room for the policy none with one micro-batch per step, but not with two."""
    least, most = (
        plan(whole, TOKENS, "none", micro_batches=count).tensor_bytes for count in (1, 2)
    )
    gib = (least + most) / 2 / 2**30
    assert use_policy(whole, "auto", tokens=TOKENS, device_gib=gib) is None
    handle = use_policy(whole, "auto", tokens=TOKENS, micro_batches=2, device_gib=gib)
    assert handle is not None
    handle.remove()
    for run in (plan, use_policy):
        arguments = (TOKENS,) if run is plan else ()
        with pytest.raises(ValueError, match="micro_batches must be at least 1, got 0"):
            run(whole, *arguments, micro_batches=0)
