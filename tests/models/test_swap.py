"""Tests swaps, which change a model: prepared first, applied all or none, undone in reverse."""

import pkgutil

import pytest

from lctrain.attention import FlashSpec
from lctrain.loss.model_loss import LossSwap
from lctrain.models import patch_model
from lctrain.models.attention_swap import AttentionSwap
from lctrain.models.fused import FusedSwap
from lctrain.models.swap import Swap, apply_all, undo_all


def hooks(module):
    return len(module._forward_pre_hooks), len(module._forward_hooks)


def state(model):
    """Returns a model's state that swaps may change: classes, attribute names, hooks, configs."""
    return [
        (type(module), sorted(vars(module)), hooks(module), id(module.config))
        if hasattr(module, "config")
        else (type(module), sorted(vars(module)), hooks(module))
        for module in model.modules()
    ]


def swaps_of(model):
    return [AttentionSwap(model, FlashSpec()), FusedSwap(model), LossSwap(model)]


def test_patch_model_is_a_list_of_swaps(make_llama):
    with patch_model(make_llama(), fused=True, loss=True) as handle:
        assert [swap.name for swap in handle.swaps] == ["attention", "fused", "loss"]
        assert all(isinstance(swap, Swap) for swap in handle.swaps)
        for swap in handle.swaps:
            assert f"  {swap.name}: {swap.describe()}\n" in repr(handle)


def test_fitting_changes_nothing_and_undoing_leaves_nothing(make_llama):
    model = make_llama()
    before = state(model)
    swaps = swaps_of(model)
    assert state(model) == before
    apply_all(swaps)
    assert state(model) != before
    undo_all(swaps)
    assert state(model) == before


def test_an_error_undoes_the_swaps_before(make_llama):
    class Broken:
        name = "broken"

        def apply(self):
            raise RuntimeError("no")

        def undo(self):
            pass

        def describe(self):
            return "nothing"

    model = make_llama()
    before = state(model)
    with pytest.raises(RuntimeError, match="no"):
        apply_all([*swaps_of(model), Broken()])
    assert state(model) == before


@pytest.mark.parametrize(
    ("step", "calls"),
    [
        ("lctrain.models.inputs.InputHook.__init__", 1),
        ("lctrain.models.configs.ConfigSwap.apply", 0),
        ("lctrain.models.attention_swap._set_spec", 1),
        ("torch.nn.Module.register_forward_pre_hook", 1),
        ("torch.nn.Module.register_forward_hook", 0),
        ("torch.nn.Module.register_forward_hook", 1),
        ("lctrain.models.fused.fused_class", 3),
        ("lctrain.loss.model_loss.loss_class", 0),
    ],
)
def test_an_error_in_the_middle_of_a_swap_undoes_that_one_too(make_llama, step, calls):
    model = make_llama()
    before, swaps = state(model), swaps_of(model)
    place, _, name = step.rpartition(".")
    own, seen = getattr(pkgutil.resolve_name(place), name), []

    def broken(*args, **kwargs):
        seen.append(args)
        if len(seen) == calls + 1:
            raise RuntimeError("in the middle")
        return own(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pkgutil.resolve_name(place), name, broken)
        with pytest.raises(RuntimeError, match="in the middle"):
            apply_all(swaps)
    assert state(model) == before
    with patch_model(model, fused=True, loss=True):
        assert state(model) != before
    assert state(model) == before
