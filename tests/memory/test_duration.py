"""Tests the operations that a policy repeats, and the time of a step beside records of an H200."""

from dataclasses import replace
from statistics import median

import pytest
import torch

import lctrain
from lctrain.memory import plan
from lctrain.memory.duration import repeated, step_seconds
from lctrain.memory.layers import LayerPolicy
from lctrain.memory.profile import LayerBytes, Profile
from lctrain_kernels.bench.memory_report import memory_records
from tests.models.families import make_model

DATES = {"2026-11-30T07:27:59+00:00", "2026-11-30T12:48:56+00:00"}  # of 32k and 512k tokens
RUNS = [run for record in memory_records() if record["date"] in DATES for run in record["runs"]]
MLP = 3 * 4096 * 14_336
ATTENTION = 2 * 4096 * (4096 + 1024)


def profile_of(tokens):
    """Returns the operations of the 8B shape with adapters and MLP tiles."""
    none = LayerBytes(inputs=1, attention=1, saved=1, forward=1, backward=1, by_head=1, beside=1)
    return Profile(
        tokens=tokens,
        **dict.fromkeys(("weights", "gradients", "optimizer", "host", "around", "head", "loss"), 0),
        layers=(none,) * 32,
        attention_operations=2.0 * tokens**2 * 4096,
        other_operations=2.0 * tokens * (MLP + ATTENTION),
        tile_operations=2.0 * tokens * MLP,
        head_operations=2 * 2.0 * tokens * 4096 * 128_256,
        head_dim=128,
        in_bfloat16=True,
    )


@pytest.mark.parametrize("run", RUNS, ids=[f"{run['policy']}-{run['tokens']}" for run in RUNS])
def test_the_time_is_within_15_percent_of_the_measured_one(run):
    policies = [LayerPolicy(*layer.split("/")) for layer in run["layers"]]
    expected = step_seconds(profile_of(run["tokens"]), policies, "NVIDIA H200")
    measured = median(run["step_ms"]) / 1000
    assert abs(expected - measured) <= 0.15 * measured


def test_no_time_is_given_where_none_was_measured():
    measured = profile_of(1024)
    assert step_seconds(measured, [], "NVIDIA H200") > 0
    assert step_seconds(measured, [], "another GPU") is None
    assert step_seconds(replace(measured, head_dim=96), [], "NVIDIA H200") is None
    assert step_seconds(replace(measured, in_bfloat16=False), [], "NVIDIA H200") is None


def test_a_layer_that_rebuilds_an_input_computes_its_attention_once_more():
    measured = replace(profile_of(1024), attention_operations=1.0, other_operations=100.0)
    kept, again = LayerPolicy("device", "device"), LayerPolicy("device", "recompute")
    rebuilt = LayerPolicy("recompute", "recompute")
    assert repeated(measured, []) == (0, 0)
    assert repeated(measured, [kept, kept]) == (0, 200)
    assert repeated(measured, [again, kept]) == (1, 200)
    assert repeated(measured, [again, rebuilt, kept]) == (3, 400)
    assert repeated(measured, [kept, rebuilt, kept]) == (1, 400)
    reused, last = LayerPolicy("device", "rebuilt"), LayerPolicy("recompute", "recompute")
    assert repeated(measured, [reused, last]) == (2, 300)


def test_the_plan_says_the_time_of_a_model_that_it_knows():
    sizes = {"hidden_size": 512, "head_dim": 128, "num_key_value_heads": 2}
    model = make_model("llama", **sizes).to(torch.bfloat16).train()
    lctrain.patch_model(model, fused=True)
    found = plan(model, 4096, "checkpoint")
    assert f"expected on one NVIDIA H200: {found.seconds:,.1f} s a step" in str(found)
    longer = plan(model, 8192, "checkpoint")
    assert longer.seconds > 2 * found.seconds  # attention grows with the square
    whole = plan(model.float(), 4096, "checkpoint")
    assert whole.seconds is None
    assert "expected on" not in str(whole)
