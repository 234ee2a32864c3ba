"""Tests lctrain-eval under torchrun: two ranks share the work, and rank 0 writes what one does."""

import json
from contextlib import contextmanager, nullcontext

import pytest
import torch

from lctrain.distributed import ONE_RANK, Topology
from lctrain.eval.ranks import device_of, first_rank_first
from lctrain.evaluate import evaluate
from tests.distributed.ranks import run_ranks

TASKS = ["tasks=[perplexity,passkey]", "lengths=[8,64]", "split=all"]
PASSKEY = ["passkey.lengths=[128]", "passkey.depths=[0.0,1.0]", "passkey.keys_per_cell=3"]


def rows_in(folder):
    """Returns the rows of all tables, and the finished cells, of an evaluation."""
    tables = {
        path.name: json.loads(path.read_text())["rows"]
        for path in sorted(folder.glob("*.json"))
        if path.name not in ("run.json", "options.json")
    }
    lines = [json.loads(line) for line in (folder / "cells.jsonl").read_text().splitlines()]
    return tables, [line for line in lines if "items" in line]


def test_two_ranks_write_what_one_rank_does(run_main, model_folder, texts, tmp_path):
    chosen = [f"model={model_folder}", *TASKS, *PASSKEY]
    run_main(*chosen, "name=one")
    folder = tmp_path / "ranks"
    folder.mkdir()
    given = [f"data.files=[{texts}/*.txt]", f"data.cache_dir={folder}/cache", "device=cpu"]
    given += ["data=text", f"paths.root={folder}/outputs", "name=two"]
    run_ranks("tests.evaluate.two_ranks", 2, folder, *chosen, *given)
    (one,), (two,) = (
        (x / "outputs" / n).iterdir() for x, n in ((tmp_path, "one"), (folder, "two"))
    )
    assert {path.name for path in two.iterdir()} == {path.name for path in one.iterdir()}
    tables, cells = rows_in(two)
    assert (tables, cells) == rows_in(one)
    assert len(tables) == 2
    assert len(cells) == 3
    assert "Perplexity by context length" in (folder / "rank_0.txt").read_text()
    assert "Perplexity by context length" not in (folder / "rank_1.txt").read_text()


@pytest.fixture
def told(monkeypatch) -> list[str | None]:
    """Lets `evaluate` run as rank 0 of 2, and lists what it tells rank 1: an error, or None."""
    seen: list[str | None] = []

    def gather(ranks, value):
        seen.append(value)
        return [value, None]

    @contextmanager
    def two_ranks(size):
        yield Topology(0, 2)

    monkeypatch.setattr(Topology, "gather", gather)
    monkeypatch.setattr("lctrain.process_group.launched_ranks", two_ranks)
    return seen


@pytest.mark.parametrize(
    "name",
    [
        "lctrain.eval.resume.require_no_cells",
        "lctrain.models.pretrained.load_pretrained",
        "lctrain.eval.documents.evaluation_documents",
        "lctrain.eval.resume.open_cells",
        "lctrain.eval.limits.warn_beyond_positions",
    ],
)
def test_an_error_of_the_first_rank_reaches_the_others(make_config, told, monkeypatch, name):
    def fail(*arguments, **settings):
        raise OSError("the disk is full")

    monkeypatch.setattr(name, fail)
    monkeypatch.setattr(Topology, "of_first", lambda ranks, value: value)
    with pytest.raises(OSError, match="the disk is full"):
        evaluate(make_config())
    assert [*filter(None, told)] == ["the disk is full"] == told[-1:]


@pytest.mark.parametrize("failing", [0, 1, None])
@pytest.mark.parametrize("rank", [0, 1])
def test_ranks_that_wait_for_each_other_fail_together(monkeypatch, rank, failing):
    """Every rank takes part in the same exchanges until one of them has failed."""
    calls: list[str | None] = []

    def gather(ranks, value):
        """Returns what both ranks say: rank 0 its body first, then rank 1 its own."""
        step = len(calls)
        calls.append(value)
        others = "broken" if step == failing != rank else None
        return [value, others] if rank == 0 else [others, value]

    monkeypatch.setattr(Topology, "gather", gather)
    error = {None: None, rank: OSError}.get(failing, ValueError)
    with pytest.raises(error, match="broken") if error else nullcontext():  # noqa: SIM117
        with first_rank_first(Topology(rank, 2)):
            assert len(calls) == rank
            if failing == rank:
                raise OSError("broken")
    assert len(calls) == (2 if failing is None else failing + 1)


def test_each_rank_has_a_gpu_of_its_own(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "1")
    ranks, gpu = Topology(1, 2), torch.device("cuda")
    assert device_of(gpu, ranks) == torch.device("cuda", 1)
    assert device_of(gpu, ONE_RANK) == gpu
    assert device_of(torch.device("cpu"), ranks) == torch.device("cpu")
    with pytest.raises(ValueError, match="a GPU for each rank, got cuda:0"):
        device_of(torch.device("cuda:0"), ranks)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ValueError, match="got cuda and 2 GPUs for rank 2 of this machine"):
        device_of(gpu, ranks)
