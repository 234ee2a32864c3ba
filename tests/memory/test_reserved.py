"""Tests the estimate of what the allocator reserves, beside the records of an H200."""

from types import SimpleNamespace

import pytest

import lctrain
from lctrain.allocator import EXPANDABLE, VARIABLES
from lctrain.memory.layers import LayerPolicy
from lctrain.memory.plan import ALLOCATOR, CUDA, FRAGMENTS, plan
from lctrain.memory.profile import LayerBytes
from lctrain.memory.reserved import FIXED_LOSS, PAGE, SEGMENT, allocator_bytes, held_bytes
from lctrain_kernels.bench.memory_report import memory_records
from tests.models.families import make_model

GIB = 2**30
WIDTH = 4096 * 2  # bytes of a token's hidden states in the 8B shape
RECORDS = {"2026-11-30T07:27:59+00:00", "2026-11-30T12:48:56+00:00"}  # of 32k and 512k tokens
RUNS = [
    (bool(record.get("expandable_segments")), run)
    for record in memory_records()
    if record["date"] in RECORDS
    for run in record["runs"]
]


def set_segments(monkeypatch, expandable):
    """Sets the environment of torch's allocator."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    if expandable:
        monkeypatch.setenv(VARIABLES[0], EXPANDABLE)


@pytest.mark.parametrize(
    ("expandable", "run"), RUNS, ids=[f"{run['policy']}-{run['tokens']}" for _, run in RUNS]
)
def test_the_reserve_is_within_5_percent_of_the_measured_one(expandable, run):
    policies = [LayerPolicy(*layer.split("/")) for layer in run["layers"]]
    size = run["tokens"] * WIDTH
    layer = LayerBytes(
        inputs=size, attention=size, saved=0, forward=0, backward=0, by_head=0, beside=0
    )
    given = [layer] * len(policies), policies, expandable
    reserved = run["planned_gib"] + (allocator_bytes(*given) + held_bytes(*given)) / GIB
    assert 20 * abs(reserved - run["reserved_gib"]) <= run["reserved_gib"]


def test_a_process_takes_tensors_what_the_allocator_loses_and_cuda(monkeypatch):
    set_segments(monkeypatch, expandable=False)
    model = make_model("llama").train()
    lctrain.patch_model(model, fused=True)
    found = plan(model, 2**20, "checkpoint")
    assert found.reserved_bytes == found.tensor_bytes + found.parts[ALLOCATOR]
    assert found.device_bytes == found.reserved_bytes + found.parts[CUDA]
    assert FRAGMENTS in str(found)
    assert f"allocator reserves {found.reserved_bytes / GIB:.2f} GiB" in str(found)
    set_segments(monkeypatch, expandable=True)
    better = plan(model, 2**20, "checkpoint")
    assert better.tensor_bytes == found.tensor_bytes
    assert better.parts[ALLOCATOR] == 3 * PAGE < found.parts[ALLOCATOR]  # one is the output
    assert FRAGMENTS not in str(better)
    assert better.held_bytes == 2 * better.rows[0].inputs
    assert better.reserved_bytes == better.device_bytes - better.parts[CUDA] + better.held_bytes


def test_auto_leaves_room_for_the_allocator(monkeypatch):
    """With fixed segments fewer tensors stay on the GPU."""
    model = make_model("llama", num_hidden_layers=6).train()
    lctrain.patch_model(model, fused=True)
    set_segments(monkeypatch, expandable=True)
    limits = {"device_gib": plan(model, 2**20, "checkpoint").device_bytes / GIB, "host_gib": 4.0}
    roomy = plan(model, 2**20, "auto", **limits)
    set_segments(monkeypatch, expandable=False)
    found = plan(model, 2**20, "auto", **limits)
    assert roomy.fits
    assert found.fits
    assert found.tensor_bytes < roomy.tensor_bytes


def test_the_share_of_each_place():
    layer = SimpleNamespace(inputs=2 * PAGE, attention=PAGE, saved=5 * PAGE)
    kept, away = LayerPolicy("device", "device"), LayerPolicy("host", "recompute")
    assert allocator_bytes([layer], [kept], True) == 3 * PAGE  # input, attention and output
    assert allocator_bytes([layer], [kept], False) == int(FIXED_LOSS * 5 * PAGE)
    assert allocator_bytes([layer] * 3, [away] * 3, True) == 4 * PAGE  # on their way
    assert allocator_bytes([layer] * 9, [away] * 9, True) == 5 * PAGE
    rebuilt = [kept, LayerPolicy("recompute", "recompute")]
    assert allocator_bytes([layer] * 2, rebuilt, True) == 5 * PAGE
    assert allocator_bytes([layer], [kept], True, scale=0.6) == 2 * PAGE  # attention shares pages
    assert allocator_bytes([layer], [], True) == 3 * SEGMENT  # everything is kept
