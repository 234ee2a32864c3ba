"""Tests on a GPU that copies on the side stream are complete before anything reads or reuses."""

import gc

import pytest
import torch

import lctrain
from lctrain.memory import use_policy
from lctrain.memory.store import HostStore, OnHost
from tests.models.families import make_model

pytestmark = pytest.mark.gpu

DELAY = 50_000_000  # cycles that a stream waits: far more than a copy takes
TOKENS = 512


def busy(stream=None):
    """Keeps a stream busy, so that work that does not wait for it comes too early."""
    with torch.cuda.stream(stream or torch.cuda.current_stream()):
        torch.cuda._sleep(DELAY)


def test_a_copy_waits_for_the_values_and_their_memory_for_the_copy():
    """A tensor that is freed too early would be overwritten before it is copied (NaN)."""
    store = HostStore({"input": 8})
    kept = []
    for index in range(8):
        busy()
        x = torch.full((1 << 20,), float(index), device="cuda")
        store.side_stream(x.device)
        busy(store._stream)
        kept.append(store.put(x, "input", store.group(), tokens=1))
        del x
        torch.full((1 << 20,), float("nan"), device="cuda")  # takes the memory that is free
    assert all(isinstance(one, OnHost) for one in kept)
    for index in reversed(range(8)):
        found = kept[index].get()
        assert found.device.type == "cuda"
        assert bool((found == index).all())


def test_a_tensor_that_comes_back_is_complete_when_it_is_read():
    store = HostStore({"input": 2})
    kept = [
        store.put(torch.full((1 << 20,), 7.0, device="cuda"), "input", store.group(), tokens=1)
        for _ in range(2)
    ]
    busy(store._stream)
    assert bool((kept[1].get() == 7).all())
    kept[1].prefetch()  # starts the copy of the one before
    assert bool((kept[0].get() == 7).all())


def test_a_slot_is_not_written_while_its_tensor_comes_back():
    store = HostStore({"input": 1})
    one = store.put(torch.full((1 << 20,), 1.0, device="cuda"), "input", store.group(), tokens=1)
    store.finish()
    busy(store._stream)
    found = one.get()
    del one  # gives the slot back while the copy waits
    gc.collect()
    two = store.put(torch.full((1 << 20,), 2.0, device="cuda"), "input", store.group(), tokens=1)
    assert bool((found == 1).all())
    assert bool((two.get() == 2).all())
    assert store.capacity == 4 << 20


def test_the_arena_is_pinned():
    store = HostStore({"input": 1})
    store.put(torch.ones(1000, device="cuda"), "input", store.group(), tokens=1)
    (arena,) = store._arenas["input"]
    assert arena.pinned  # Tensor.is_pinned knows memory of torch's own allocator only


@pytest.mark.parametrize(
    "options",
    [
        {"keep_inputs": 0},
        {"keep_inputs": 0, "host_attention": 2},
        {"keep_inputs": 1},
        {"keep_inputs": 0, "segment_layers": 2, "keep_attention": 1, "host_attention": 1},
    ],
    ids=["inputs", "attention", "last-kept", "segment"],
)
def test_gradients_are_those_of_plain_checkpointing(options):
    model = make_model("llama", hidden_size=256, head_dim=64).to("cuda", torch.bfloat16).train()
    tokens = torch.randint(61, (TOKENS,), generator=torch.Generator().manual_seed(0))
    pack = lctrain.PackedBatch.from_documents([tokens[:100], tokens[100:]]).to("cuda").arguments()

    def gradients():
        model.zero_grad()
        for _ in range(3):
            model(**pack).loss.backward()
        return [p.grad.clone() for p in model.parameters()]

    with lctrain.patch_model(model, fused=True, loss=True, deterministic=True):
        model(**pack)
        model.gradient_checkpointing_enable({"use_reentrant": False})  # transformers' own
        expected = gradients()
        use_policy(model, "checkpoint")
        assert all(map(torch.equal, gradients(), expected))
        handle = use_policy(model, "offload", tokens=TOKENS, **options)
        found = gradients()
    assert all(map(torch.equal, found, expected))
    assert handle.store.left_on_device == 0


def test_a_step_does_not_wait_for_the_device():
    model = make_model("llama", hidden_size=256, head_dim=64).to("cuda", torch.bfloat16).train()
    tokens = torch.randint(61, (TOKENS,), generator=torch.Generator().manual_seed(0))
    pack = lctrain.PackedBatch.from_documents([tokens]).to("cuda").arguments()
    with lctrain.patch_model(model, fused=True, loss=True):
        use_policy(model, "offload", tokens=TOKENS, keep_inputs=0, host_attention=2)
        for _ in range(2):  # kernels compile, and the arenas are pinned
            model(**pack).loss.backward()
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            model(**pack).loss.backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
