"""Tests check_isolation on two ranks with packs of their own, which run their passes in step."""

import threading

import pytest

from lctrain.callbacks import IsolationError, isolation
from lctrain.callbacks.isolation import check_isolation
from lctrain.distributed import Topology
from lctrain.models import patch_model
from tests.callbacks.test_isolation import leak
from tests.training import make_batch

LIMIT_S = 300  # ranks that wait for each other for ever fail after it
PACKS = {"long": make_batch([9, 30, 21], 0), "short": make_batch([1], 1), "none": None}


@pytest.fixture
def check_two(make_llama, monkeypatch):
    """Returns check_two(packs, leaks), which checks as two ranks and returns what each found.

    Each rank is a thread with a model of its own. It returns its error, the last layers that its
    passes ran through, and its training mode.
    """
    values, barrier = [None, None], threading.Barrier(2, timeout=LIMIT_S)

    def gather(ranks, value):
        values[ranks.rank] = value
        barrier.wait()
        found = list(values)
        barrier.wait()
        return found

    def run(packs, leaks):
        found = [None, None]

        def rank(number):
            model = make_llama().train()
            if leaks[number]:
                leak(model)
            calls = []
            model.model.register_forward_hook(lambda *_: calls.append("hidden states"))
            model.lm_head.register_forward_hook(lambda *_: calls.append("logits"))
            error = None
            with patch_model(model):
                try:
                    check_isolation(model, PACKS[packs[number]], ranks=Topology(number, 2))
                except IsolationError as raised:
                    error = str(raised)
            found[number] = error, calls, model.training

        monkeypatch.setattr(Topology, "gather", gather)
        threads = [threading.Thread(target=rank, args=(number,)) for number in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert None not in found
        return found

    return run


@pytest.mark.parametrize("largest", [2**28, 1000], ids=["logits", "hidden-states"])
@pytest.mark.parametrize("other", PACKS)
def test_ranks_run_equally_many_passes_through_the_same_layers(
    check_two, monkeypatch, other, largest
):
    """The logits of one rank's pack may be too large, and those of the other's not."""
    monkeypatch.setattr(isolation, "LARGEST_LOGITS", largest)
    first, second = check_two(["long", other], [False, False])
    assert first[0] is second[0] is None
    assert first[1] == second[1]
    assert set(first[1]) == {"hidden states"} | ({"logits"} if largest > 1000 else set())
    assert len(first[1]) >= 3
    assert first[2] is second[2] is True


@pytest.mark.parametrize("leaking", [0, 1])
def test_a_leak_on_one_rank_is_raised_on_both(check_two, leaking):
    """Each rank checks its own pack, and all of them end with the same error."""
    errors = [error for error, *_ in check_two(["long", "long"], [leaking == 0, leaking == 1])]
    assert errors[0] == errors[1]
    assert "documents of a pack mix" in errors[0]
