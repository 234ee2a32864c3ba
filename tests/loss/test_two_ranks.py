"""Tests that losses on completions over ranks and accumulated packs equal those of one pack."""

import os
import subprocess
import sys

import pytest
import torch

from tests.distributed.ranks import ROOT
from tests.loss.train_two_ranks import KINDS, PAIRS, trained, whole_pack
from tests.numerics import assert_equal_in_float64, assert_far_apart


@pytest.fixture(scope="module")
def on_two_ranks(tmp_path_factory):
    """Gradients and loss of a step by kind: two ranks of three unequal packs each."""
    folder = tmp_path_factory.mktemp("ranks")
    subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.loss.train_two_ranks", str(folder)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "NODE_RANK": "0"},
        check=True,
        capture_output=True,
    )
    return torch.load(folder / "found.pt")


@pytest.mark.usefixtures("in_float64")
@pytest.mark.parametrize("kind", KINDS)
def test_two_ranks_and_accumulated_packs_equal_one_pack(on_two_ranks, kind, tmp_path):
    """A prompt is on both ranks, and one pack has no token to train on."""
    expected = trained(kind, tmp_path, lambda rank: [whole_pack()])
    assert_equal_in_float64(on_two_ranks[kind], expected)
    # Another loss has other gradients.
    embedding = "model.embed_tokens.weight"
    other = PAIRS[0] if kind != PAIRS[0] else PAIRS[2]
    assert_far_apart(expected[embedding], on_two_ranks[other][embedding])
