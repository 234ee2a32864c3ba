"""Tests that training under every memory policy gives the same weights, bit by bit."""

import pytest
import torch

import lctrain
from lctrain.config import AdapterConfig
from lctrain.host_optimizer import HostAdamW
from lctrain.memory import use_policy
from lctrain.memory.store import HostStore
from lctrain.models.low_rank import add_adapter
from tests.memory.test_policy import POLICIES
from tests.models.families import make_documents, make_model

STEPS = 2
OPTIMIZERS = {
    "adamw": lambda weights: torch.optim.AdamW(weights, lr=0.01),
    "adamw_host": lambda weights: HostAdamW(weights, lr=0.01),
}
ALL = {
    "none": ("none", {}),
    "checkpoint": ("checkpoint", {}),
    **POLICIES,
    "auto": ("auto", {"host_gib": 1.0}),
}


def trained(policy, options, optimizer, has_adapter, packs):
    """Returns the weights after some steps, each of which accumulates over two packs."""
    model = make_model("llama").train()
    lctrain.patch_model(model, fused=True, loss=True, dropout=0.2)
    if has_adapter:
        torch.manual_seed(1)
        model = add_adapter(model, AdapterConfig(rank=2, dropout=0.3)).train()
    use_policy(model, policy, tokens=packs[0]["input_ids"].numel(), **options)
    weights = [p for p in model.parameters() if p.requires_grad]
    stepper = OPTIMIZERS[optimizer](weights)
    torch.manual_seed(2)
    for _ in range(STEPS):
        for arguments in packs:
            model(**arguments).loss.backward()
        stepper.step()
        stepper.zero_grad()
    return [p.detach().clone() for p in weights]


@pytest.mark.parametrize(
    ("optimizer", "has_adapter"),
    [("adamw_host", False), ("adamw", True)],
    ids=["full-adamw_host", "adapter-adamw"],
)
def test_weights_are_bit_equal_under_every_policy(optimizer, has_adapter):
    if has_adapter:
        pytest.importorskip("peft")
    documents = make_documents()
    parts = (documents, documents[2:])
    packs = [lctrain.PackedBatch.from_documents(part).arguments() for part in parts]
    found = {
        name: trained(policy, options, optimizer, has_adapter, packs)
        for name, (policy, options) in ALL.items()
    }
    expected = found["checkpoint"]
    for name, weights in found.items():
        assert len(weights) == len(expected) > 0
        assert all(map(torch.equal, weights, expected)), name


def test_the_arena_is_at_most_a_fiftieth_larger_than_what_it_holds():
    """torch's own pinned memory would round each of these tensors up to a power of two."""
    tensors = [torch.randn(1000, 37) for _ in range(9)]
    store = HostStore({"input": len(tensors)})
    kept = [store.put(x, "input", store.group(), 1000) for x in tensors]
    stored = sum(x.numel() * x.element_size() for x in tensors)
    assert store.capacity <= 1.02 * stored
    assert all(torch.equal(one.get(), x) for one, x in zip(kept, tensors, strict=True))
