"""Tests what the store on the host gives back: values, layout, reuse and limits."""

import pytest
import torch

from lctrain.memory.store import MOST_WAITING, HostStore, OnDevice, OnHost


def strange_tensors():
    base = torch.randn(12, 10)
    return {
        "plain": base,
        "offset": base[3:, 2:],
        "transposed": base.t(),
        "strided": base[::2, ::3],
        "expanded": base[:1].expand(5, 10),
        "empty": base[:0],
        "scalar": base[0, 0],
    }


@pytest.mark.parametrize("name", list(strange_tensors()))
def test_values_come_back_whatever_the_layout(name):
    x = strange_tensors()[name]
    store = HostStore({"input": 1})
    kept = store.put(x, "input", store.group(), tokens=10)
    found = kept.get()
    assert isinstance(kept, OnHost)
    assert torch.equal(found, x)
    if name in ("plain", "transposed"):
        assert found.stride() == x.stride()
    assert found.data_ptr() != x.data_ptr() or x.numel() == 0


def test_views_of_one_storage_are_apart():
    x = torch.arange(8.0)
    store = HostStore({"input": 2})
    group = store.group()
    kept = [store.put(part, "input", group, tokens=4) for part in (x[:4], x[4:])]
    x.zero_()
    assert [one.get().tolist() for one in kept] == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_a_tensor_can_be_read_twice():
    store = HostStore({"input": 1})
    kept = store.put(torch.arange(3.0), "input", store.group(), tokens=3)
    assert torch.equal(kept.get(), kept.get())


def test_few_tensors_wait_for_their_copy():
    store = HostStore({"input": 5})
    kept = [store.put(torch.ones(4), "input", store.group(), tokens=4) for _ in range(5)]
    assert len(store._waiting) == MOST_WAITING
    kept[-1].get()
    assert len(store._waiting) == 0


def test_the_layer_before_is_fetched_while_a_layer_computes():
    store = HostStore({"input": 3})
    kept = [store.put(torch.ones(4), "input", store.group(), tokens=4) for _ in range(3)]
    kept[2].get()
    assert [one._fetched is not None for one in kept] == [False, False, False]
    kept[2].prefetch()
    assert [one._fetched is not None for one in kept] == [False, True, False]


def test_a_tensor_that_is_still_on_the_device_is_not_fetched():
    """The input of a segment's first layer is in use while later layers prefetch their groups."""
    store = HostStore({"input": 1, "attention": 2})
    group = store.group()
    first = store.put(torch.ones(4), "input", group, tokens=4)
    outputs = store.put(torch.ones(4), "attention", group, tokens=4)
    last = store.put(torch.ones(4), "attention", store.group(), tokens=4)
    x = first.get()
    outputs.get()
    part = x[2:]  # it keeps the storage of x
    del x
    last.prefetch()
    assert [one._fetched is not None for one in (first, outputs)] == [False, True]
    assert torch.equal(first.get(), torch.ones(4))  # who asks gets it in any case
    del part
    last.prefetch()
    assert first._fetched is not None


def test_layers_without_tensors_on_the_host_are_passed_over_by_the_prefetch():
    """In a segment only the first layer has its input on the host."""
    store = HostStore({"input": 2})
    first = store.put(torch.ones(4), "input", store.group(), tokens=4)
    for _ in range(2):
        store.group()
    last = store.put(torch.ones(4), "input", store.group(), tokens=4)
    last.prefetch()
    assert first._fetched is not None


def test_a_layer_s_tensors_are_copied_once():
    store = HostStore({"input": 1, "attention": 1})
    group = store.group()
    kept = [store.put(torch.ones(4), kind, group, tokens=4) for kind in ("input", "attention")]
    kept[0].get()
    kept[1].get()
    assert [one._fetched for one in kept] == [None, None]


def test_slots_are_used_again_and_sized_for_the_longest_pack():
    store = HostStore({"input": 3}, tokens=64)
    sizes = set()
    for tokens in (16, 64, 34):
        x = torch.randn(1, tokens, 8)
        kept = [store.put(x, "input", store.group(), tokens) for _ in range(3)]
        assert store.stored_bytes == 3 * x.nbytes
        sizes.add(store.capacity)
        del kept
        store.finish()
        assert store.stored_bytes == 0
    assert sizes == {3 * 64 * 8 * 4}
    assert store.left_on_device == 0


def test_without_the_longest_pack_the_arena_grows():
    store = HostStore({"input": 2})
    for tokens in (8, 64):
        x = torch.randn(1, tokens, 8)
        kept = [store.put(x, "input", store.group(), tokens) for _ in range(2)]
        assert store.stored_bytes == 2 * x.nbytes
        del kept
    assert store.capacity == 2 * 64 * 8 * 4  # the small arena is gone


def test_an_arena_is_dropped_after_its_copies(monkeypatch):
    store = HostStore({"input": 1})
    capacities = []

    class Stream:
        def synchronize(self):
            capacities.append(store.capacity)

    store._stream = Stream()
    for tokens in (8, 64):
        store.put(torch.randn(1, tokens, 8), "input", store.group(), tokens)
    assert capacities == [8 * 8 * 4]


def test_a_full_host_leaves_tensors_on_the_device_with_one_warning():
    store = HostStore({"input": 4}, host_bytes=1000)
    x = torch.randn(100)
    with pytest.warns(UserWarning, match=r"the host has no room .* memory\.host_gib") as caught:
        kept = [store.put(x, "input", store.group(), tokens=100) for _ in range(4)]
    assert len(caught) == 1
    assert [type(one) for one in kept] == [OnHost, OnHost, OnDevice, OnDevice]
    assert store.left_on_device == 2
    assert store.capacity <= 1000
    assert all(torch.equal(one.get(), x) for one in kept)
