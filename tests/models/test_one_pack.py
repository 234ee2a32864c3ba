"""Tests that a forward of a patched model validates its pack once, for all layers and passes."""

import importlib
from types import SimpleNamespace

import pytest
import torch

from lctrain.models import patch_model
from tests.models.differential_families import make_differential
from tests.models.families import make_documents, make_model, outputs, packed_outputs

LAYERS = 3
PATCHES = {
    "flash": ("varlen", {}),
    "dual_chunk": ("dual_chunk", {"chunk_size": 8, "local_size": 2}),
    "differential": ("differential", {}),
}


@pytest.fixture
def seen(monkeypatch):
    """Records the boundaries that are validated, and the packs that the operators get."""
    from lctrain_kernels import pack

    seen = SimpleNamespace(checked=[], packs=[])
    check = pack.check_cu_seqlens

    def record(name, *arguments):
        seen.checked.append(name)
        return check(name, *arguments)

    monkeypatch.setattr(pack, "check_cu_seqlens", record)
    for operation, _ in PATCHES.values():
        api = importlib.import_module(f"lctrain_kernels.{operation}.api")
        run = getattr(api, f"{operation}_attention")

        def keep(operands, given, options, run=run):
            seen.packs.append(given)
            return run(operands, given, options)

        monkeypatch.setattr(api, f"{operation}_attention", keep)
    return seen


def make(attention):
    if attention == "differential":
        return make_differential("diffllama", num_hidden_layers=LAYERS)
    return make_model("llama", num_hidden_layers=LAYERS)


@pytest.mark.parametrize("attention", PATCHES)
def test_a_pack_is_validated_once_per_forward(attention, seen):
    with patch_model(make(attention), attention=attention, **PATCHES[attention][1]) as handle:
        packed_outputs(handle.model, make_documents())
    assert len(seen.checked) == 1
    assert len(seen.packs) == LAYERS
    assert all(pack is seen.packs[0] for pack in seen.packs)


def test_activation_checkpointing_keeps_the_pack(seen):
    model = make("flash").train()
    with patch_model(model):
        model.gradient_checkpointing_enable({"use_reentrant": False})
        packed_outputs(model, make_documents()).sum().backward()
    assert len(seen.checked) == 1
    assert len(seen.packs) == 2 * LAYERS
    assert all(pack is seen.packs[0] for pack in seen.packs)


@pytest.mark.parametrize("padded", [False, True])
def test_rows_need_no_validation(padded, seen):
    """The boundaries of rows and of padded rows are computed, not given by a caller."""
    rows = torch.stack(make_documents([9, 9]))
    mask = torch.ones_like(rows)
    mask[0, 7:] = int(not padded)
    with patch_model(make("flash")) as handle:
        outputs(handle.model, input_ids=rows, attention_mask=mask, use_cache=False)
    assert seen.checked == []
    assert len(seen.packs) == LAYERS
    assert all(pack is seen.packs[0] for pack in seen.packs)
