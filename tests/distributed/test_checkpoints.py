"""Tests that a run goes on with other ranks, strategies, after killed saves, and from pretrained.

All checks read the results of one process and its forks, since each import of torch takes seconds.
"""

import pytest
import torch
from transformers import AutoModelForCausalLM

from lctrain.run.seal import damage_of
from tests.distributed.checkpoint_ranks import PACKS, RUNS, SAVED, STEPS
from tests.distributed.unread_models import MODELS
from tests.forked import run_forked
from tests.numerics import near_roundings

LOSS_ROUNDINGS = 16  # of float32: 1e-6 of a loss


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    ranks = "tests.distributed.checkpoint_ranks"
    run_forked(ranks, str(folder), env={"NODE_RANK": "0"}, ignored=True)
    return folder


def read(folder, name):
    return torch.load(folder / f"{name}.pt", weights_only=False)


@pytest.mark.parametrize("name", [name for name, run in RUNS.items() if run.resumes])
def test_a_run_goes_on_with_other_ranks(folder, name):
    """Unequal packs, accumulation, an epoch that ends between two steps of the resumed part."""
    whole = read(folder, RUNS[name].resumes)["steps"]
    again = read(folder, name)["steps"]
    assert len(whole) == STEPS
    assert len(again) == STEPS - SAVED
    for (packs, loss), (then_packs, then_loss) in zip(again, whole[SAVED:], strict=True):
        assert len(packs) == PACKS
        assert packs == then_packs
        assert loss == near_roundings(then_loss, LOSS_ROUNDINGS)


def test_the_same_ranks_have_the_same_bits(folder):
    whole, again = (read(folder, name) for name in ("four", "four-again"))
    assert again["steps"] == whole["steps"][SAVED:]
    assert len({loss for _, loss in whole["steps"]}) == STEPS
    for name, weight in whole["weights"].items():
        assert torch.equal(again["weights"][name], weight), name


@pytest.mark.parametrize("name", ["four", "ddp"])
def test_checkpoints_are_intact(folder, name):
    found = sorted(path for path in (folder / name).iterdir() if not path.is_symlink())
    assert [path.name for path in found] == [f"step-{n:08d}.ckpt" for n in (SAVED, STEPS)]
    assert (folder / name / "last.ckpt").resolve() == found[-1]
    for path in found:
        assert path.is_dir() == (RUNS[name].strategy == "fsdp2")
        assert damage_of(path) is None


def test_the_newest_checkpoint_is_kept(folder):
    """With keep=1."""
    names = [one["names"] for one in read(folder, "killed")["before"]]
    assert names == [["last.ckpt", f"step-{step:08d}.ckpt"] for step in (1, 2)]


def test_a_killed_save_leaves_the_last_checkpoint(folder):
    """SIGKILL in shards, metadata, manifest, before renames, and while older ones are deleted."""
    found = read(folder, "killed")
    kills = found["kills"]
    assert all(one["died"] for one in kills)
    assert not any(one["died"] for one in (*found["before"], found["after"]))
    for one in (*found["before"], *kills, found["after"]):
        assert one["found"] in (one["step"] - one["died"], one["step"])
        assert one["is_intact"]
    assert sum(one["found"] < one["step"] for one in kills) >= 10
    assert sum(one["found"] == one["step"] for one in kills) >= 2


def test_leftovers_of_killed_saves_are_deleted(folder):
    """The next run deletes them, so that one checkpoint and its link are left, with keep=1."""
    found = read(folder, "killed")
    assert any(name.endswith(".writing") for one in found["kills"] for name in one["names"])
    last = f"step-{found['after']['step']:08d}.ckpt"
    assert found["after"]["names"] == ["last.ckpt", last]


@pytest.mark.parametrize("name", MODELS)
def test_a_sharded_pretrained_model_has_the_bits_of_the_whole_one(folder, name):
    files = folder / "pretrained" / name
    found = torch.load(folder / "pretrained" / "ranks" / "found.pt", weights_only=False)[name]
    dtype = MODELS[name][1]
    whole = AutoModelForCausalLM.from_pretrained(files, dtype=dtype)
    for kind, expected in (
        ("weights", whole.named_parameters()),
        ("buffers", whole.named_buffers()),
    ):
        expected = dict(expected)
        assert found[kind].keys() == expected.keys()
        for key, value in expected.items():
            assert found[kind][key].dtype == value.dtype, key
            assert torch.equal(found[kind][key], value), key
    assert found["configs"] == (whole.config.to_dict(), whole.generation_config.to_dict())


@pytest.mark.parametrize("name", MODELS)
def test_every_rank_reads_its_own_slices_only(folder, name):
    """No rank reads or allocates a whole weight of more rows than ranks, and none is read twice."""
    found = torch.load(folder / "pretrained" / "ranks" / "found.pt", weights_only=False)[name]
    total = sum(value.numel() for value in found["weights"].values())
    for rank in found["ranks"]:
        assert rank["is_meta"]
        assert sorted(rank["reads"]) == sorted(count for count in rank["shards"] if count)
    assert sum(sum(rank["reads"]) for rank in found["ranks"]) == total
