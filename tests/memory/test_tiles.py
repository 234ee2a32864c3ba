"""Tests MLPs that compute tile by tile: gradients, memory, and the models that are refused."""

from contextlib import nullcontext
from functools import partial

import pytest
import torch

import lctrain
from lctrain.memory import plan, tiles, use_policy
from lctrain.memory.layers import checkpointed_layers
from lctrain.memory.tiled_function import tiled
from lctrain.memory.tiles import TiledMLPs, _forward
from lctrain.module import LongContextModule
from tests.float64 import float64_throughout
from tests.models.families import make_documents, make_model
from tests.numerics import assert_equal_in_float64
from tests.training import loader, make_batch, make_trainer

FAMILIES = ("llama", "gemma2", "phi3")


@pytest.fixture
def arguments():
    """A pack in transformers' format."""
    return lctrain.PackedBatch.from_documents(make_documents()).arguments()


def gradients(model, arguments):
    model.zero_grad()
    model(**arguments).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("policy", ["checkpoint", "offload"])
def test_gradients_are_those_without_tiles(family, policy, arguments):
    with float64_throughout():
        model = make_model(family).double().train()
        with lctrain.patch_model(model, fused=True, loss=True):
            model(**arguments)
            use_policy(model, policy)
            expected = gradients(model, arguments)
            handle = use_policy(model, policy, mlp_tokens=7)
            found = gradients(model, arguments)
            handle.remove()
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert_equal_in_float64(found[name], value)
        assert not any("forward" in vars(module) for module in model.modules())


@pytest.fixture
def seen(monkeypatch):
    """The number of tokens of every run of an MLP on a tile."""
    found, run = [], tiles._uncached

    def record(mlp, x):
        found.append(x.shape[-2])
        return run(mlp, x)

    monkeypatch.setattr(tiles, "_uncached", record)
    return found


def test_an_mlp_sees_one_tile_at_a_time_and_each_gradient_arrives_once(arguments, seen):
    model = make_model("llama").train()
    arrived = []
    with lctrain.patch_model(model, fused=True, loss=True):
        model(**arguments)
        use_policy(model, "checkpoint", mlp_tokens=7)
        projection = model.model.layers[0].mlp.down_proj
        other = projection.weight.register_hook(lambda gradient: arrived.append(gradient.dtype))
        gradients(model, arguments)
        assert max(seen) == 7
        assert arrived == [torch.float32]
        seen.clear()
        with torch.no_grad():
            model.eval()(**arguments)
        assert seen == []
        other.remove()


def test_ranks_with_different_numbers_of_tiles_gather_a_layer_equally_often(arguments):
    """Sharding gathers the weights of a layer in hooks of the layer, and averages whole gradients.

    A rank with a longer pack has more tiles. A hook that ran per tile would make ranks wait for
    each other forever.
    """
    model = make_model("llama").train()
    counts, seen = [], []
    with lctrain.patch_model(model, fused=True, loss=True):
        model(**arguments)
        for tokens in (3, 7, 1000):
            handle = use_policy(model, "checkpoint", mlp_tokens=tokens)
            seen.clear()
            layer = model.model.layers[0]
            hooks = [
                layer.register_forward_pre_hook(lambda *_: seen.append("layer")),
                layer.mlp.register_forward_pre_hook(lambda *_: seen.append("mlp")),
                layer.mlp.up_proj.weight.register_post_accumulate_grad_hook(
                    lambda _: seen.append("gradient")
                ),
            ]
            gradients(model, arguments)
            counts.append({name: seen.count(name) for name in ("layer", "mlp", "gradient")})
            for hook in hooks:
                hook.remove()
            handle.remove()
    assert counts[0] == counts[1] == counts[2]
    assert counts[0]["gradient"] == 1


@pytest.mark.parametrize("cached", [True, False], ids=["cached", "uncached"])
def test_under_autocast_the_sum_over_tiles_is_as_exact_as_without_tiles(cached):
    """The bound is twice the error of the MLP at once, which rounds each gradient once."""
    mlp = make_model("llama").model.layers[0].mlp.train()
    torch.manual_seed(0)
    x = torch.randn(1, 4096, mlp.gate_proj.in_features)

    def gradient(autocast):
        mlp.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast, cache_enabled=cached):
            found = mlp(x)
        found.backward(torch.ones_like(found))  # of one sign, so that roundings add up
        return torch.cat([p.grad.double().flatten() for p in mlp.parameters()])

    exact, whole = gradient(False), gradient(True)
    mlp.forward = partial(_forward, mlp, 16)
    tiled = gradient(True)
    assert (tiled - exact).norm() < 2 * (whole - exact).norm()


@pytest.mark.parametrize("precision", ["true", "bf16-mixed"])
def test_the_plan_knows_the_tiles(precision):
    model = make_model("llama", intermediate_size=512).train()
    with lctrain.patch_model(model, fused=True):
        whole = plan(model, 512, "checkpoint", precision=precision)
        tiled = plan(model, 512, "checkpoint", mlp_tokens=64, precision=precision)
    assert tiled.device_bytes < whole.device_bytes
    assert tiled.rows[0].backward < 0.5 * whole.rows[0].backward


def test_trained_weights_in_half_precision_are_refused():
    model = make_model("llama").bfloat16()
    layers = checkpointed_layers(model)
    with pytest.raises(ValueError, match=r"mlp_tokens needs trained weights in float32, got .*16"):
        TiledMLPs(layers, 4)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    TiledMLPs(layers, 4).remove()


def test_a_module_refuses_tiles_in_bf16_true(tmp_path, make_llama):
    """The trainer casts the weights after the model is built in float32."""
    memory = {"name": "checkpoint", "mlp_tokens": 3}
    trainer = make_trainer(tmp_path, max_steps=1, precision="bf16-true")
    with pytest.raises(ValueError, match=r"mlp_tokens must be null with trainer\.precision=bf"):
        trainer.fit(LongContextModule(make_llama(), memory=memory), loader([make_batch((5, 9))]))


def test_a_model_of_experts_is_refused():
    with pytest.raises(ValueError, match=r"must be null for a model without dense MLPs, got 4"):
        TiledMLPs(checkpointed_layers(make_model("gpt_oss")), 4)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_a_tile_runs_once_in_the_backward_unless_its_output_is_read(family, arguments, seen):
    """Gemma 2 has a norm after the MLP, so the recomputation of its layers runs the MLP too."""
    model = make_model(family).train()
    with lctrain.patch_model(model, fused=True, loss=True):
        model(**arguments)
        use_policy(model, "checkpoint", mlp_tokens=7)
        gradients(model, arguments)
    layers = len(model.model.layers)
    runs = 2 if family == "llama" else 3
    assert sum(seen) == runs * layers * arguments["input_ids"].shape[-1]


def test_an_auxiliary_loss_on_activations_inside_an_mlp_has_gradients(arguments):
    """A forward hook passes the activations on, tile by tile; they keep their history."""
    with float64_throughout():
        model = make_model("llama").double().train()
        held = []
        for layer in model.model.layers:
            layer.mlp.act_fn.register_forward_hook(lambda module, given, out: held.append(out))

        def found(**options):
            use_policy(model, "checkpoint", **options)
            model.zero_grad()
            held.clear()
            loss = model(**arguments).loss
            (loss + sum(x.sum() for x in held)).backward()
            return [p.grad.clone() for p in model.parameters()]

        for one, other in zip(found(mlp_tokens=7), found(), strict=True):
            assert_equal_in_float64(one, other)


def test_an_mlp_whose_forward_was_replaced_is_refused():
    """Tiles run the forward of the class, so they would leave the other forward out."""
    model = make_model("llama").train()
    mlp = model.model.layers[1].mlp
    own = mlp.forward
    mlp.forward = lambda x: 2 * own(x)
    with pytest.raises(ValueError, match=r"must be null for an MLP whose forward was replaced"):
        use_policy(model, "checkpoint", mlp_tokens=7)


def test_weights_that_become_bfloat16_after_the_policy_are_refused(arguments):
    model = make_model("llama").train()
    use_policy(model, "checkpoint", mlp_tokens=7)
    model.bfloat16()
    with pytest.raises(ValueError, match=r"mlp_tokens needs trained weights in float32, got .*16"):
        model(**arguments)


class Shared(torch.nn.Module):
    """A module with dropout, a shared weight, a frozen one and one that is not read."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first = torch.nn.Linear(8, 8, bias=False)
        self.second = torch.nn.Linear(8, 8, bias=False)
        self.second.weight = self.first.weight
        self.frozen = torch.nn.Linear(8, 6).requires_grad_(False)
        self.unread = torch.nn.Parameter(torch.ones(3))

    def forward(self, x):
        hidden = torch.nn.functional.dropout(self.first(x), 0.5, self.training)
        return self.frozen(hidden + self.second(x))


def run_tiled(module, x, tokens=3):
    return tiled(module, type(module).forward.__get__(module), x, tokens, nullcontext)


@pytest.mark.parametrize("input_trained", [True, False], ids=["", "input-frozen"])
def test_tiles_draw_the_same_numbers_again_and_sum_a_shared_weight(input_trained):
    found = []
    for compute in (
        run_tiled,
        lambda m, x: torch.cat([m(tile) for tile in x.split(3, dim=-2)], -2),
    ):
        with float64_throughout():
            module = Shared().double()
            arrived = []
            module.first.weight.register_hook(arrived.append)
            x = torch.linspace(-1, 1, 80, dtype=torch.float64).reshape(1, 10, 8)
            x.requires_grad_(input_trained)
            torch.manual_seed(5)
            out = compute(module, x)
            after = torch.rand(1, dtype=torch.float64)
            torch.manual_seed(6)  # another state in the backward
            out.square().sum().backward()
            assert len(arrived) == 1
            assert module.unread.grad is None
            found.append([out.detach(), after, module.first.weight.grad])
            if input_trained:
                found[-1].append(x.grad)
    for one, other in zip(*found, strict=True):
        assert_equal_in_float64(one, other)


def test_tiles_of_what_is_frozen_have_no_history():
    with float64_throughout():
        module = Shared().double().requires_grad_(False).eval()
        x = torch.randn(1, 10, 8, dtype=torch.float64)
        assert not run_tiled(module, x).requires_grad
        run_tiled(module, x.requires_grad_()).sum().backward()
        found, x.grad = x.grad, None
        module(x).sum().backward()
    assert_equal_in_float64(found, x.grad)


def test_tiles_that_read_nothing_trained_give_no_gradient():
    module = Shared().requires_grad_(False)
    module.unread.requires_grad_(True)
    run_tiled(module, torch.randn(1, 10, 8)).sum().backward()
    assert module.unread.grad is None


def test_a_graph_of_tiles_can_be_read_twice():
    module = Shared()
    x = torch.randn(1, 10, 8, requires_grad=True)
    loss = run_tiled(module, x).square().sum()
    loss.backward(retain_graph=True)
    first, module.first.weight.grad = module.first.weight.grad, None
    loss.backward()
    assert torch.equal(module.first.weight.grad, first)
