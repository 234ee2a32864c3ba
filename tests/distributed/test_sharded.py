"""Tests training with sharded parameters, its checkpoints and exports, on two CPU ranks.

All checks read the results of one pair of processes, since each of them imports torch for seconds.
"""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lctrain.run.seal import MANIFEST, damage_of
from lctrain.run.sharded_checkpoint import read_whole
from lctrain.train import train
from lctrain_kernels.bench.scale_report import scale_table
from tests.distributed.context_cases import Settings
from tests.distributed.ranks import run_ranks
from tests.distributed.sharded_ranks import MODELS
from tests.distributed.test_exchange import check
from tests.float64 import built_in_float64
from tests.numerics import assert_equal_in_float64, near, near_roundings
from tests.test_module import one_batch
from tests.train.conftest import corpus, tiny
from tests.train.runs import config, rows, train_losses
from tests.train_two_ranks import CLIP, Recorder, batches
from tests.training import loader, make_trainer

__all__ = ["corpus", "tiny"]

EXACT_ROUNDINGS = 16  # of float32 in a loss: sums over ranks run in another order


@pytest.fixture(scope="module")
def overrides(tiny):
    return [*tiny, "callbacks.checkpoint.every_n_steps=3", "callbacks.checkpoint.keep=9"]


@pytest.fixture(scope="module")
def one_rank(overrides):
    """Overrides of the same run on one rank: the same packs in every optimizer step."""
    return [*overrides, "trainer.accumulate_grad_batches=2"]


@pytest.fixture(scope="module")
def folder(overrides, one_rank, tmp_path_factory):
    """Folder with a run on one rank, `one`, and the runs of two ranks."""
    folder = tmp_path_factory.mktemp("ranks")
    train(config(*one_rank, output_dir=folder / "one"))
    run_ranks("tests.distributed.sharded_ranks", 2, folder, *overrides)
    return folder


@pytest.fixture(scope="module")
def found(folder):
    return torch.load(folder / "found.pt", weights_only=False)


def losses(folder):
    return [float(loss) for loss in train_losses(folder).values()]


@pytest.mark.parametrize(
    ("name", "replicas"), [("plain", 1), ("plain", 2), ("tied", 1), ("adapters", 1)]
)
def test_sharded_training_equals_one_big_batch(found, tmp_path, name, replicas):
    """Unequal packs, accumulation with an incomplete window, clipping, tied weights, adapters."""
    records, weights = found[name, replicas]
    windows = [
        one_batch([batch for rank in (0, 1) for batch in batches(rank)[begin:end]])
        for begin, end in ((0, 2), (2, 3))
    ]
    with built_in_float64():
        module = Recorder(MODELS[name](None))
        module.train_dataloader = lambda: loader(windows)
        make_trainer(tmp_path, gradient_clip_val=CLIP).fit(module)
    for mine, theirs in zip(records, module.records, strict=True):
        assert mine == near(theirs)
    assert_equal_in_float64(weights, {n: p.data for n, p in module.model.named_parameters()})


@pytest.mark.parametrize("heads", [1, 2])
def test_attention_on_a_shared_pack_equals_one_rank(found, heads):
    check(found["context", heads], Settings())


def test_buffers_of_all_ranks_are_those_of_the_first(found):
    first, *others = found["buffers"]
    assert len(others) == 1
    assert not any(first[name].any() for name in ("bias", "turned", "flag"))
    for other in others:
        assert other.keys() == first.keys()
        assert all(torch.equal(other[name], first[name]) for name in first)


def test_the_benchmark_measures_every_way(folder):
    record = json.loads((folder / "scale.json").read_text())
    parts = record["parts"]
    assert list(parts) == list(record["seconds"])
    alone, shared = parts["linear"]["rows"]
    assert [(row["strategy"], row["gpus"]) for row in (alone, shared)] == [
        ("alone", 1),
        ("fsdp2", 2),
    ]
    for row in (alone, shared):
        assert row["tokens_per_second"] * row["seconds"] == near(row["gpus"] * 256)
        assert row["seconds"] == max(row["rank_seconds"])
    for name in ("attention", "context"):
        assert [row["exchange"] for row in parts[name]["rows"]] == ["heads", "keys"]
        assert all(row["efficiency"] > 0 < row["predicted_seconds"] for row in parts[name]["rows"])
    speeds = {parts[name]["speed"] for name in ("context", "context-long")}
    assert len(speeds) == 1
    for row in parts["context"]["rows"]:
        assert row["tokens_per_second"] * row["seconds"] == near(512)
    assert [row["order"] for row in parts["spread"]["orders"]] == ["shuffled", "balanced"]
    assert all(1 <= row["flops_spread"] <= 2 for row in parts["spread"]["orders"])
    table = scale_table(record)
    for title in ("| on one GPU |", "| 1,024 | step, ", "| balanced |"):
        assert title in table


def test_mixed_precision_keeps_float32_weights_and_gradients(found):
    records, dtypes = found["mixed"]
    assert dtypes == {(torch.float32, torch.float32)}
    assert torch.tensor(records).isfinite().all()
    rounding = torch.finfo(torch.bfloat16).eps / torch.finfo(torch.float32).eps
    in_float64 = [loss for loss, _ in found["plain", 1][0]]
    assert [loss for loss, _ in records] == near_roundings(in_float64, EXACT_ROUNDINGS * rounding)


def test_a_run_equals_the_one_on_one_rank(folder):
    """Sharded on two ranks, with one pack each, or one rank with two packs."""
    assert losses(folder / "whole") == near_roundings(losses(folder / "one"), EXACT_ROUNDINGS)


@pytest.mark.parametrize("name", ["whole", "copied", "shared"])
def test_ranks_share_the_closing_evaluation(folder, name):
    """Every strategy measures the same documents, and logs what one rank does."""
    (one,), (theirs,) = ((folder / run / "perplexity").glob("*.json") for run in ("one", name))
    mine, found = (json.loads(path.read_text())["rows"] for path in (one, theirs))
    assert [row["length"] for row in mine] == [16, 64]
    for row, other in zip(mine, found, strict=True):
        assert (row["tokens"], row["documents"]) == (other["tokens"], other["documents"])
        assert other["loss"] == near_roundings(row["loss"], EXACT_ROUNDINGS)


def test_a_resumed_run_has_the_same_bits(found):
    whole, again = found["losses"]["whole"], found["losses"]["again"]
    assert list(again) == list("012345")  # metrics of the run before are kept
    assert again == whole


def test_a_sharded_run_goes_on_from_a_single_file(folder):
    assert losses(folder / "other") == near_roundings(losses(folder / "one"), EXACT_ROUNDINGS)


def test_two_ranks_that_share_packs_train_like_one(folder):
    """And they log the same counts: tokens of packs, not of packs times ranks."""
    assert losses(folder / "shared") == near_roundings(losses(folder / "one"), EXACT_ROUNDINGS)
    one, shared = rows(folder / "one"), rows(folder / "shared")
    for name in ("throughput/tokens", "throughput/fill", "val/loss"):
        expected, found = ([float(r[name]) for r in x if r[name]] for x in (one, shared))
        assert found == near_roundings(expected, EXACT_ROUNDINGS), name
        assert found


def test_one_rank_goes_on_from_shards(folder, one_rank, tmp_path):
    half = folder / "shared" / "checkpoints" / "step-00000003.ckpt"
    train(config(*one_rank, f"ckpt_path={half}", output_dir=tmp_path / "run"))
    assert losses(tmp_path / "run") == near_roundings(losses(folder / "one"), EXACT_ROUNDINGS)


def test_the_export_has_the_bits_of_the_shards(folder):
    checkpoint = read_whole(folder / "whole" / "checkpoints" / "step-00000006.ckpt")
    exported = load_file(folder / "whole" / "model" / "model.safetensors")
    assert exported
    for name, value in exported.items():
        assert torch.equal(value, checkpoint["state_dict"][f"model.{name}"]), name
    loaded = AutoModelForCausalLM.from_pretrained(folder / "whole" / "model").state_dict()
    for name, value in loaded.items():
        assert torch.equal(value, checkpoint["state_dict"][f"model.{name}"]), name


def test_a_pretrained_model_begins_where_the_export_ended(found, folder):
    first = [float(loss) for loss in found["losses"]["pretrained"].values()]
    assert len(first) == 1
    assert first[0] < losses(folder / "whole")[0]


def test_damage_in_a_folder_is_found(folder, tmp_path):
    whole = folder / "whole" / "checkpoints" / "step-00000003.ckpt"
    assert damage_of(whole) is None
    names = [*json.loads((whole / MANIFEST).read_text()), MANIFEST]
    assert len(names) == 5  # two shards, metadata, the rest, and the manifest itself
    copy = tmp_path / "copy.ckpt"
    copy.mkdir()
    for name in names:
        for other in names:
            (copy / other).write_bytes((whole / other).read_bytes())
        content = bytearray((copy / name).read_bytes())
        content[len(content) // 2] ^= 1
        (copy / name).write_bytes(content)
        assert damage_of(copy) is not None
        (copy / name).unlink()
        assert name in damage_of(copy)
