"""Tests swaps, which change a model: prepared first, applied all or none, undone in reverse."""

import pytest

from lctrain.attention import FlashSpec
from lctrain.loss.model_loss import LossSwap
from lctrain.models import patch_model
from lctrain.models.attention_swap import AttentionSwap
from lctrain.models.fused import FusedSwap
from lctrain.models.swap import Swap, apply_all, undo_all


def state(model):
    """Returns a model's state that swaps may change: classes, attribute names, hooks, configs."""
    return [
        (type(module), sorted(vars(module)), len(module._forward_pre_hooks), id(module.config))
        if hasattr(module, "config")
        else (type(module), sorted(vars(module)), len(module._forward_pre_hooks))
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
            raise AssertionError("was never applied")

        def describe(self):
            return "nothing"

    model = make_llama()
    before = state(model)
    with pytest.raises(RuntimeError, match="no"):
        apply_all([*swaps_of(model), Broken()])
    assert state(model) == before
