"""Tests that attention specs are frozen, have options of their own, and refuse wrong values."""

import dataclasses
import pickle

import pytest
import torch
from torch import nn

from lctrain.attention import (
    ATTENTION_NAMES,
    DifferentialSpec,
    DualChunkSpec,
    FlashSpec,
    is_patched,
    make_spec,
)
from lctrain.attention.forward import backend_of
from lctrain.models import patch_model
from lctrain_kernels import backend


def test_defaults_and_names():
    assert make_spec() == FlashSpec(dropout=None, deterministic=False, backend="auto")
    assert make_spec("dual_chunk") == DualChunkSpec(
        chunk_size=None, local_size=None, scale="none", scale_coefficient=0.1, window=None
    )
    assert make_spec("differential") == DifferentialSpec()
    assert ATTENTION_NAMES == {
        "flash": "lctrain_flash",
        "dual_chunk": "lctrain_dual_chunk",
        "differential": "lctrain_differential",
    }


@pytest.mark.parametrize("kind", ATTENTION_NAMES)
def test_every_kind(kind):
    spec = make_spec(kind, dropout=0.25)
    assert spec.kind == kind
    assert spec.implementation == ATTENTION_NAMES[kind]
    assert make_spec(kind, **spec.options()) == spec
    assert pickle.loads(pickle.dumps(spec)) == spec
    with pytest.raises(dataclasses.FrozenInstanceError):
        spec.dropout = 0.5


@pytest.mark.parametrize("kind", ["flash", "dual_chunk"])
def test_is_patched_asks_the_model(make_llama, kind):
    model = make_llama()
    assert not is_patched(model)
    with patch_model(model, attention=kind):
        assert is_patched(model)
    assert not is_patched(model)
    assert not is_patched(nn.Linear(1, 1))


@pytest.mark.parametrize("kind", ATTENTION_NAMES)
@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"dropout": -0.1}, r"dropout must be in \[0, 1\).*got -0.1. Pass 0.0"),
        ({"dropout": True}, r"dropout must be in \[0, 1\).*got True"),
        ({"dropout": "0.1"}, r"dropout must be in \[0, 1\).*got '0.1'"),
        ({"deterministic": None}, "deterministic must be True or False, got None"),
        ({"backend": None}, "backend must be the name of a backend, got None"),
        ({"dropuot": 0.1}, "options of attention='KIND' must be among .*, got dropuot. Check the"),
    ],
)
def test_wrong_values(kind, values, message):
    with pytest.raises(ValueError, match=message.replace("KIND", kind)):
        make_spec(kind, **values)


def test_hopper_kernels_that_are_named_and_cannot_be_deterministic():
    for kind in ("dual_chunk", "differential"):
        with pytest.raises(ValueError, match=f"deterministic for attention='{kind}'.*'triton'"):
            make_spec(kind, deterministic=True, backend="hopper")
        assert make_spec(kind, deterministic=True).deterministic
    assert make_spec("flash", deterministic=True, backend="hopper").deterministic


@pytest.mark.parametrize("kind", ["dual_chunk", "differential"])
def test_deterministic_attention_takes_no_hopper_kernels_that_are_not(kind, monkeypatch):
    monkeypatch.setattr(backend, "TRITON_INSTALLED", True)
    where = torch.device("cuda"), torch.bfloat16
    for serves in (True, False):
        monkeypatch.setattr(backend, "hopper_serves", lambda device, serves=serves: serves)
        assert backend_of(make_spec(kind), *where) == "auto"
        assert backend_of(make_spec("flash", deterministic=True), *where) == "auto"
        found = backend_of(make_spec(kind, deterministic=True), *where)
        assert found == ("triton" if serves else "auto")
    named = make_spec(kind, deterministic=True, backend="pytorch")
    assert backend_of(named, *where) == "pytorch"
    assert backend_of(make_spec(kind, deterministic=True), torch.device("cpu"), where[1]) == "auto"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"chunk_size": 0}, "chunk_size must be an int of at least 1, got 0. Pass a number of tok"),
        ({"chunk_size": 64.0}, "chunk_size must be an int of at least 1, got 64.0"),
        ({"chunk_size": True}, "chunk_size must be an int of at least 1, got True"),
        ({"local_size": -1}, "local_size must be an int of at least 0, got -1"),
        ({"window": 1}, "window must be an int of at least 2, got 1"),
        (
            {"chunk_size": 8, "local_size": 8},
            r"local_size must be below chunk_size \(8\), got 8. Chunks hold chunk_size - local",
        ),
        ({"scale": "linear"}, "scale must be one of 'none', 'yarn', got 'linear'. 'none' leaves"),
        ({"scale": None}, "scale must be one of 'none', 'yarn', got None"),
        ({"scale_coefficient": -0.1}, "scale_coefficient must be a number of at least 0, got -0.1"),
        ({"scale_coefficient": float("nan")}, "scale_coefficient must be a number .*got nan"),
        ({"scale_coefficient": "0.1"}, "scale_coefficient must be a number .*got '0.1'"),
    ],
)
def test_wrong_values_of_dual_chunk(values, message):
    with pytest.raises(ValueError, match=message):
        make_spec("dual_chunk", **values)


def test_unknown_kind():
    message = "one of 'flash', 'dual_chunk', 'differential', got 'ring'. Name one that"
    with pytest.raises(ValueError, match=message):
        make_spec("ring")


@pytest.mark.parametrize(
    "name", ["chunk_size", "local_size", "scale", "scale_coefficient", "window"]
)
def test_options_of_another_kind(name):
    message = f"must be among dropout, .*, got {name}. It belongs to attention='dual_chunk'."
    with pytest.raises(ValueError, match=message):
        make_spec("flash", **{name: None})
