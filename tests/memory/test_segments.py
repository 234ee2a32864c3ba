"""Tests segments of layers: gradients are those of plain checkpointing, bit by bit."""

import gc
import warnings
import weakref
from functools import partial

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import lctrain
from lctrain.memory import LayerCheckpoints, use_policy
from lctrain.memory.layers import LayerPolicy
from tests.memory.test_policy import same, step
from tests.models.families import make_model

LAYERS = 5


class counted(TorchDispatchMode):
    """Context manager that returns weak references to the results of every attention call."""

    def __enter__(self):
        super().__enter__()
        self.calls = []
        return self.calls

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        if func.name().startswith("lctrain::varlen_forward"):
            self.calls.append([weakref.ref(x) for x in found])
        return found


POLICIES = {
    "checkpoint": ("checkpoint", {"keep_attention": 2}),
    "offload": ("offload", {"keep_inputs": 0}),
    "reused": ("checkpoint", {"keep_attention": 1, "reuse_attention": LAYERS}),
    "mixed": ("offload", {"keep_inputs": 1, "keep_attention": 1, "host_attention": 3}),
}


@pytest.mark.parametrize("segment", [2, 3, 5])
def test_rebuilt_inputs_are_those_of_the_forward(segment, packs):
    """A layer runs three times, and the last one of a segment twice."""
    model = make_model("gemma2", num_hidden_layers=LAYERS).train()
    calls = []
    for index, layer in enumerate(model.model.layers):
        layer.mlp.register_forward_pre_hook(
            partial(lambda number, *given: calls.append(number), index)
        )
    with lctrain.patch_model(model, fused=True, loss=True, dropout=0.3):
        model(**packs[0])
        use_policy(model, "checkpoint")
        expected = step(model, packs)
        last = {index for index in range(LAYERS) if index % segment == segment - 1} | {LAYERS - 1}
        for name, (policy, options) in POLICIES.items():
            handle = use_policy(model, policy, segment_layers=segment, **options)
            calls.clear()
            assert same(step(model, packs), expected), name
            runs = [calls.count(index) / len(packs) for index in range(LAYERS)]
            assert runs == [2 if index in last else 3 for index in range(LAYERS)]
            if handle.store is not None:
                assert handle.store.stored_bytes == 0


@pytest.mark.parametrize("policy", ["checkpoint", "offload"])
def test_reused_attention_is_computed_once_in_the_backward(policy, packs):
    """It is freed with its layer: the first segment has nothing of the last one's."""
    model = make_model("llama", num_hidden_layers=6).train()
    with lctrain.patch_model(model, fused=True, loss=True):
        model(**packs[0])
        use_policy(model, "checkpoint")
        expected = step(model, packs[:1])
        counts = {}
        for reused in (0, 1, 6):
            use_policy(model, policy, segment_layers=3, reuse_attention=reused)
            with counted() as calls:
                assert same(step(model, packs[:1]), expected)
            counts[reused] = len(calls)
            held = [x for call in calls for x in call if x() is not None]
            assert held == []
        assert counts == {0: 6 + 10, 1: 6 + 9, 6: 6 + 6}


def test_hidden_dropout_is_that_of_the_forward():
    """GPT-2 draws from torch's generator, whose state a rebuilt layer needs."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=61, n_embd=32, n_layer=4, n_head=4, n_positions=64, resid_pdrop=0.5
    )
    model = GPT2LMHeadModel(config).train()
    arguments = {"input_ids": torch.arange(20)[None], "labels": torch.arange(20)[None]}
    expected = step(model, [arguments])
    for policy, segment in (("checkpoint", 2), ("offload", 4)):
        handle = use_policy(model, policy, segment_layers=segment)
        assert same(step(model, [arguments]), expected)
        handle.remove()


def test_an_aborted_step_lets_go_of_a_segment(packs):
    model = make_model("llama", num_hidden_layers=4).train()
    with lctrain.patch_model(model, fused=True, loss=True):
        model(**packs[0])
        use_policy(model, "checkpoint")
        expected = step(model, packs)
        handle = use_policy(model, "offload", segment_layers=2, keep_inputs=0, host_attention=4)

        def fail(*given):
            raise KeyboardInterrupt

        hook = model.model.layers[2].mlp.register_forward_hook(fail)
        with pytest.raises(KeyboardInterrupt):
            model(**packs[0])
        hook.remove()
        gc.collect()
        handle.store.finish()
        assert handle.store.stored_bytes == 0
        assert same(step(model, packs), expected)


def test_a_graph_of_segments_can_be_read_twice(packs):
    model = make_model("llama", num_hidden_layers=4).train()
    with lctrain.patch_model(model, fused=True, loss=True):
        model(**packs[0])
        use_policy(model, "offload", segment_layers=3, keep_inputs=0, reuse_attention=1)
        expected = step(model, packs[:1])
        model.zero_grad()
        loss = model(**packs[0]).loss
        loss.backward(retain_graph=True)
        model.zero_grad()
        loss.backward()
    assert same([p.grad for p in model.parameters()], expected)


def test_frozen_layers_in_a_segment_need_no_warning(packs):
    """No graph holds the call of a frozen layer, so the layer after it keeps its input."""
    model = make_model("llama", num_hidden_layers=4).train()
    model.requires_grad_(False)
    model.model.layers[2:].requires_grad_(True)
    with lctrain.patch_model(model, fused=True, loss=True):
        model(**packs[0])
        use_policy(model, "checkpoint")
        expected = step(model, packs)
        use_policy(model, "checkpoint", segment_layers=4)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert same(step(model, packs), expected)


def test_an_input_that_changed_after_the_layer_before_is_kept():
    model = make_model("llama", num_hidden_layers=2)
    first, second = (layer.mlp for layer in model.model.layers)
    rebuild = [LayerPolicy(), LayerPolicy("recompute")]
    handle = LayerCheckpoints(model, rebuild)
    width = first.gate_proj.in_features
    x = torch.randn(1, 7, width, requires_grad=True)

    def gradient(between):
        x.grad = None
        hidden = between(handle.run(0, first, x))
        handle.run(1, second, hidden).sum().backward()
        return x.grad.clone()

    model.train()
    gradient(lambda hidden: hidden)  # no warning: it is the output
    for between in (lambda hidden: hidden * 2, lambda hidden: hidden.mul_(2)):
        with pytest.warns(UserWarning, match=r"is not the output of the layer before"):
            found = gradient(between)
        handle._warned = False
        x.grad = None
        second(first(x) * 2).sum().backward()
        assert torch.equal(found, x.grad)
