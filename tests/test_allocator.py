"""Tests the setting of torch's allocator, which runs before torch is loaded."""

import os
from contextlib import nullcontext
from types import SimpleNamespace

import pytest

from lctrain import train
from lctrain.allocator import EXPANDABLE, VARIABLES, expand_segments, has_expandable_segments
from lctrain.config import MemoryConfig
from lctrain.memory.plan import FRAGMENTS, plan_of
from lctrain.memory.profile import profile
from lctrain.models import patch_model
from tests.models.families import make_model


def test_expandable_segments_are_asked_for_on_linux():
    environment = {}
    assert expand_segments(environment, "linux")
    assert environment == {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
    assert not expand_segments({}, "win32")


@pytest.mark.parametrize("name", VARIABLES)
def test_the_user_s_own_setting_stays(name):
    environment = {name: "max_split_size_mb:512"}
    assert not expand_segments(environment, "linux")
    assert environment == {name: "max_split_size_mb:512"}


@pytest.mark.parametrize(
    ("value", "expected"), [("", False), ("expandable_segments:True,roundup_power2:4", True)]
)
def test_the_plan_says_what_the_allocator_adds(value, expected, monkeypatch):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(VARIABLES[0], value)
    assert has_expandable_segments() == expected
    model = make_model("llama")
    patch_model(model, fused=True)
    measured = profile(model, 64)
    text = str(plan_of(measured, MemoryConfig(name="checkpoint"), None, None))
    assert (FRAGMENTS in text) != expected
    assert FRAGMENTS not in str(plan_of(measured, MemoryConfig(name="none"), None, None))


@pytest.mark.parametrize("plans", [True, False], ids=["plan", "run"])
@pytest.mark.parametrize(("policy", "expected"), [("none", None), ("checkpoint", EXPANDABLE)])
def test_the_command_sets_it_with_a_memory_policy(policy, expected, plans, monkeypatch):
    """A plan counts what the allocator of the run will lose."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    memory = SimpleNamespace(plan=plans, name=policy)
    runtime = SimpleNamespace(runtime=SimpleNamespace(output_dir="unused"))
    monkeypatch.setattr("hydra.core.hydra_config.HydraConfig.get", lambda: runtime)
    monkeypatch.setattr("lctrain.process_group.leave_at_exit", lambda: None)
    monkeypatch.setattr(train, "without_empty_folder", lambda folder: nullcontext())
    monkeypatch.setattr(train, "in_its_folder", lambda config: config)
    monkeypatch.setattr(train, "quiet_lightning", lambda: None)
    seen = []
    for name in ("train", "print_plan"):
        monkeypatch.setattr(train, name, lambda config: seen.append(os.environ.get(VARIABLES[0])))
    monkeypatch.setattr(train, "to_dataclass", lambda config, kind: config)
    train.run(SimpleNamespace(show=0, memory=memory))
    assert seen == [expected]
