"""Tests on two GPUs, with NCCL and the kernels of the device, that they compute what one does.

One command runs everything, on a machine with two GPUs or more, in minutes:

    python -m pytest -q tests/distributed/test_two_gpus.py

Attention is in bfloat16, training in bf16-mixed and float32. Each part has a pair of processes and
a single one. All parts run at the same time, and a test waits for its results only. Environment
variables: TWO_GPUS_PARTS names the parts to run, as "copies,float32"; TWO_GPUS_SECONDS is the time
after which results that are missing fail.
"""

import os
import time
from functools import partial

import pytest
import torch

from lctrain.distributed.context import ContextShard
from lctrain.distributed.shared_pack import SharedPack
from tests.distributed.checkpoint_ranks import SAVED
from tests.distributed.context_cases import (
    CASES,
    FUNCTIONS,
    Settings,
    make_inputs,
    put_together,
    run,
)
from tests.distributed.gpu_ranks import (
    ATTENTION,
    ATTENTIONS,
    CHECKPOINTS,
    EXACT,
    LENGTHS,
    PARTS,
    RANKS,
    TRAININGS,
    path_of,
)
from tests.distributed.ranks import StartedRanks
from tests.numerics import assert_error_at_most_twice, near_roundings

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < RANKS, reason="needs two GPUs"),
]
LOSS_ROUNDINGS = 16  # of float32 in a loss: sums over ranks run in another order
MIXED_ROUNDINGS = 2  # of bfloat16: sharded parameters of norms are rounded, too


class Runs:
    """The processes of the parts, and their results.

    Args:
        root: Folder of all parts.
        parts: Names of the parts to run.
        show: Function that shows a text, even if the test does not end.
    """

    def __init__(self, root, parts, show):
        self.root, self.parts, self.show = root, parts, show
        self.last = time.monotonic() + float(os.environ.get("TWO_GPUS_SECONDS", 600))
        self.ranks, self.results = {}, {}
        for part in parts:
            (root / part).mkdir()
            for size in (RANKS, 1):
                folder = self.folder(part, size)
                folder.mkdir()
                ranks = StartedRanks("tests.distributed.gpu_ranks", size, folder, part)
                self.ranks[part, size] = ranks

    def folder(self, part, size):
        """Returns the folder of a number of ranks of a part."""
        return self.root / part / f"ranks_{size}"

    def found(self, size, item):
        """Returns a result of a number of ranks, after a wait for it."""
        if (size, item) not in self.results:
            self.results[size, item] = self.wait(size, item)
        return self.results[size, item]

    def wait(self, size, item):
        """Waits for a result, and returns it."""
        part = next(part for part, items in PARTS.items() if item in items)
        if part not in self.parts:
            pytest.skip(f"TWO_GPUS_PARTS does not name {part}")
        ranks, path = self.ranks[part, size], path_of(item, self.folder(part, size))
        try:
            while not path.exists() and ranks.are_running() and time.monotonic() < self.last:
                time.sleep(0.1)
        except KeyboardInterrupt:
            self.show_running()
            raise
        if not path.exists():
            pytest.fail(f"{item} of {size} ranks is missing.\n{ranks.tails(60)}", pytrace=False)
        return torch.load(path, weights_only=False)

    def show_running(self):
        """Shows what the processes that run have printed last."""
        for (part, size), ranks in self.ranks.items():
            if ranks.are_running():
                self.show(f"{part}, {size} ranks, {ranks.tails()}")

    def end(self):
        """Ends all processes."""
        for ranks in self.ranks.values():
            ranks.end()


@pytest.fixture(scope="module")
def found(tmp_path_factory, pytestconfig):
    """Function that returns the result `item` of `size` ranks."""
    capture = pytestconfig.pluginmanager.getplugin("capturemanager")

    def show(text):
        with capture.global_and_fixture_disabled():
            print(f"\n{text}", flush=True)

    chosen = os.environ.get("TWO_GPUS_PARTS")
    runs = Runs(tmp_path_factory.mktemp("gpus"), chosen.split(",") if chosen else PARTS, show)
    yield runs.found
    runs.end()


def in_float64(name):
    """Returns the result of one rank from bfloat16 inputs, computed in float64 on the CPU."""
    case = CASES[name]
    inputs = make_inputs(case, LENGTHS, Settings(ATTENTION.heads, ATTENTION.dim, ATTENTION.dtype))
    inputs.rows = [x.double() for x in inputs.rows]
    inputs.trained = {key: x.double() for key, x in inputs.trained.items()}
    inputs.dout = inputs.dout.double()
    pack = SharedPack.of(ContextShard.of(LENGTHS, 1), 0, "cpu").pack
    return run(case, partial(FUNCTIONS[case.function], pack=pack), inputs)


def gradients_of_queries(name):
    """Returns the places of dq among the results: Hopper kernels add it in no fixed order."""
    return range(1, 3 if CASES[name].function == "diff" else 2)


@pytest.mark.parametrize("name", ATTENTIONS)
def test_exchanged_heads_compute_what_one_gpu_does(found, name):
    """With windows, softcap, dropout 0.1, sinks and slopes in the case with options."""
    mine = put_together(*found(RANKS, f"attention/{name}")[RANKS]).rows
    theirs = found(1, f"attention/{name}").rows
    queries = gradients_of_queries(name)
    for index, (one, other) in enumerate(zip(mine, theirs, strict=True)):
        if index not in queries:
            assert torch.equal(one, other), index
    exact = in_float64(name).rows
    for index in queries:
        assert_error_at_most_twice(mine[index], theirs[index], exact[index], f"result {index}")


@pytest.mark.parametrize("name", ATTENTIONS)
def test_gathered_keys_compute_what_one_gpu_does(found, name):
    """Outputs are equal in all bits, and gradients as exact as those of one GPU."""
    mine = put_together(*found(RANKS, f"attention/{name}")[1])
    theirs = found(1, f"attention/{name}")
    assert torch.equal(mine.rows[0], theirs.rows[0])
    exact = in_float64(name)
    results = [x.rows[1:] + x.trained for x in (mine, theirs, exact)]
    for index, (one, other, reference) in enumerate(zip(*results, strict=True), start=1):
        if index < len(mine.rows) or one.dtype == torch.float32:  # lambda, not sinks:
            # ranks round their sums of a sink's gradient to bfloat16 before they are added here
            assert_error_at_most_twice(one, other, reference, f"result {index}")


@pytest.mark.parametrize("name", TRAININGS)
def test_two_gpus_train_like_one(found, name):
    """Unequal packs, accumulation with an incomplete window, clipping."""
    (mine, weights), (theirs, reference) = (found(size, f"training/{name}") for size in (RANKS, 1))
    assert len(mine) == len(theirs) == 3
    exact = TRAININGS[name].precision == EXACT
    dtype = torch.float32 if exact else torch.bfloat16
    roundings = LOSS_ROUNDINGS if exact else MIXED_ROUNDINGS
    for one, other in zip(mine, theirs, strict=True):
        assert one == near_roundings(other, roundings, dtype)
    assert weights.keys() == reference.keys()
    print(name, mine, theirs)


def test_checkpoints_go_on_with_two_gpus_and_with_one(found):
    whole = found(RANKS, "checkpoint/two")
    again = found(RANKS, "checkpoint/two-again")
    one = found(1, "checkpoint/one")
    assert set(CHECKPOINTS) == {"two", "two-again", "one"}
    assert again["steps"] == whole["steps"][SAVED:]
    for name, weight in whole["weights"].items():
        assert torch.equal(again["weights"][name], weight), name
    for (packs, loss), (then_packs, then_loss) in zip(
        one["steps"], whole["steps"][SAVED:], strict=True
    ):
        assert packs == then_packs
        assert loss == near_roundings(then_loss, MIXED_ROUNDINGS, torch.bfloat16)


def test_an_export_from_shards_has_their_bits(found):
    before, after = (found(RANKS, "export")[name] for name in ("before", "after"))
    assert before.keys() == after.keys()
    assert len(before) > 0
    for name, value in before.items():
        assert torch.equal(value, after[name]), name
