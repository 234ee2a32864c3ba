"""Tests lctrain-eval under torchrun: two ranks share the work, and rank 0 writes what one does."""

import json
import os
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lctrain.distributed import ONE_RANK, Topology, topology
from lctrain.eval import Run, Subject
from lctrain.eval.ranks import device_of, first_rank_first
from lctrain.eval.reading import GivenReading
from lctrain.eval.run_task import progress_bar
from lctrain.evaluate import evaluate
from lctrain.process_group import launched_ranks
from lctrain.run.rank import launched_size, local_rank, ranks_on_machine
from tests.distributed.ranks import run_ranks
from tests.distributed.threads import run_in_threads

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

    def exchange(ranks, value):
        seen.append(getattr(value, "message", value))
        return [value, None]

    @contextmanager
    def two_ranks(size):
        yield Topology(0, 2)

    monkeypatch.setattr(Topology, "_exchange", exchange)
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
    calls: list[Any] = []

    def exchange(ranks, value):
        """Returns what both ranks say: rank 0 its body first, then rank 1 its own."""
        step = len(calls)
        calls.append(value)
        others = topology._Failure("broken") if step == failing != rank else None
        return [value, others] if rank == 0 else [others, value]

    monkeypatch.setattr(Topology, "_exchange", exchange)
    error = {None: None, rank: OSError}.get(failing, ValueError)
    with pytest.raises(error, match="broken") if error else nullcontext():  # noqa: SIM117
        with first_rank_first(Topology(rank, 2)):
            assert len(calls) == rank
            if failing == rank:
                raise OSError("broken")
    assert len(calls) == (2 if failing is None else failing + 1)


@pytest.mark.parametrize("shares_itself", [False, True])
@pytest.mark.parametrize("failing", [0, 1])
def test_an_error_inside_a_task_ends_all_ranks_with_its_message(failing, shares_itself):
    def score(reader, length, made):
        if reader.ranks.rank == failing:
            raise OSError("no more memory")
        yield from reader.ranks.gather("an item") if shares_itself else made

    task = SimpleNamespace(
        name="t", score=score, make=lambda _: [1, 2], shares_itself=shares_itself
    )
    task.work = task.size = task.same_as = lambda length: length
    task.title = "T"

    def run(ranks):
        cells = Run(task, Subject(None, None, []), [GivenReading()], (8,), 8, None, ranks)
        with progress_bar(0, "token", shown=False) as bar:
            cells.compute({}, bar)

    errors = run_in_threads(run, 2)
    assert [str(error) for error in errors] == ["no more memory"] * 2
    assert [type(error) for error in errors][failing] is OSError
    assert isinstance(errors[1 - failing], ValueError)


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


SLURM = {
    "SLURM_JOB_ID": "1234567",
    "SLURM_JOB_NAME": "evaluate",
    "SLURM_NODELIST": "node[3-4]",
    "SLURM_NTASKS": "16",
    "SLURM_NNODES": "2",
}
STEP = {
    "SLURM_STEP_ID": "2",
    "SLURM_STEP_NUM_TASKS": "16",
    "SLURM_STEP_NUM_NODES": "2",
}
TASK = {"SLURM_PROCID": "9", "SLURM_LOCALID": "1", "SLURM_NODEID": "1"}


@pytest.fixture
def launched(monkeypatch):
    """Returns a function that sets a launcher's variables, and returns what the ranks join by."""
    found = []
    torchrun = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR"}
    for name in [*os.environ]:  # the tests themselves may be tasks of srun
        if name in torchrun | {"MASTER_PORT"} or name.startswith("SLURM_"):
            monkeypatch.delenv(name)
    monkeypatch.setattr(
        torch.distributed, "init_process_group", lambda *a, **settings: found.append(settings)
    )
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: None)

    def launch(variables):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        with launched_ranks(launched_size()):
            pass
        return found

    return launch


def test_tasks_of_srun_share_an_evaluation(launched):
    (joined,) = launched(SLURM | STEP | TASK)
    assert joined["init_method"] == "tcp://node3:19569"
    assert (joined["rank"], joined["world_size"]) == (9, 16)
    assert (local_rank(), ranks_on_machine()) == (1, 8)


def test_ranks_of_torchrun_inside_of_srun(launched):
    torchrun = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "3", "LOCAL_WORLD_SIZE": "4"}
    (joined,) = launched(SLURM | STEP | TASK | torchrun)
    assert "init_method" not in joined
    assert (local_rank(), ranks_on_machine(), launched_size()) == (3, 4, 4)


@pytest.mark.parametrize(
    "variables",
    [
        SLURM,  # a batch script
        SLURM | TASK | {"SLURM_STEP_NUM_TASKS": "1"},
        SLURM | STEP | TASK | {"SLURM_JOB_NAME": "bash"},  # a shell that srun has opened
    ],
)
def test_processes_that_srun_did_not_start_as_tasks(launched, variables):
    assert launched(variables) == []
    assert (launched_size(), ranks_on_machine()) == (1, 1)
