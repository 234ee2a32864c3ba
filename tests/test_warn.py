"""Warnings name the line of the user's code which led to them, however deep they are raised."""

from types import ModuleType

import pytest
import torch

from lctrain.loss import find_output_head
from lctrain.models import patch_model
from lctrain.warn import warn_caller
from tests.models.families import make_model


def test_the_innermost_line_outside_of_the_package():
    inside = ModuleType("lctrain.models.inside")
    vars(inside)["warn_caller"] = warn_caller
    exec("def outer(depth): outer(depth - 1) if depth else warn_caller('so')", vars(inside))
    for depth in (0, 1, 7):
        with pytest.warns(UserWarning, match="so") as caught:
            inside.outer(depth)
        assert caught[0].filename == __file__
    with pytest.warns(UserWarning, match="so") as caught:
        warn_caller("so")
    assert caught[0].filename == __file__


def test_undoing_fused_modules_whose_class_was_changed():
    model = make_model("llama")
    handle = patch_model(model, fused=True)
    model.model.norm.__class__ = torch.nn.Identity
    with pytest.warns(UserWarning, match="keeps its fused forward") as caught:
        handle.unpatch()
    assert caught[0].filename == __file__


def test_a_loss_that_leaves_the_router_s_out():
    model = make_model("llama")
    model.config.output_router_logits = True
    with pytest.warns(UserWarning, match="router's auxiliary loss is not added") as caught:
        find_output_head(model, lambda: {"input_ids": torch.arange(4)[None]})
    assert caught[0].filename == __file__
