"""Warnings name the line of the user's code which led to them, however deep they are raised."""

import logging
import subprocess
import sys
from types import ModuleType

import pytest
import torch

from lctrain.loss import find_output_head
from lctrain.models import patch_model
from lctrain.warn import begin_warnings, warn_caller, warn_once
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


def test_a_message_is_logged_once_and_again_by_the_next_command(caplog):
    log, other = logging.getLogger("lctrain.a"), logging.getLogger("lctrain.b")
    for _ in range(3):
        for length in (8, 16):
            warn_once(log, "100 %s is too short for %d.", "%s", length)
        warn_once(other, "100 %s is too short for %d.", "%s", 8)
    assert caplog.messages == [f"100 %s is too short for {length}." for length in (8, 16, 8)]
    caplog.clear()
    begin_warnings()
    warn_once(log, "100 % is too short.")
    warn_once(log, "100 % is too short.")
    assert caplog.messages == ["100 % is too short."]


def test_a_command_shows_a_warning_of_python_once_whatever_line_it_comes_from():
    code = """
import warnings
from lctrain.warn import begin_warnings
begin_warnings()
begin_warnings()  # of the next command
warnings.warn("the same text")
with warnings.catch_warnings():  # makes Python forget what it has shown
    warnings.simplefilter("ignore")
warnings.warn("the same text")
warnings.warn("another text")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stderr.count("UserWarning: the same text") == 1, done.stderr
    assert done.stderr.count("UserWarning: another text") == 1, done.stderr
