"""Tests the command line of lctrain-bench."""

from pathlib import Path

import pytest
import torch

from lctrain_kernels.bench import __main__ as bench
from lctrain_kernels.bench import dual_chunk
from tests.house.typecheck import ROOT


def test_without_a_gpu_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert bench.main([]) == 2
    assert "lctrain-bench needs a GPU" in capsys.readouterr().err
    assert dual_chunk.main(["--out", "record.json"]) == 2
    assert "needs a GPU" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--workloads", "1x32k,nope"], "workloads must be among 1x32k"),
        (["--peers", ""], "peers must be among lctrain"),
        (["--repetitions", "0"], "must be an integer of at least 1"),
    ],
)
def test_bad_options_are_refused(arguments, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        bench.parse_arguments(arguments)
    assert message in capsys.readouterr().err


def test_names_are_split_at_commas():
    options = bench.parse_arguments(["--workloads", "1x32k,mix32k", "--peers", "lctrain"])
    assert options.workloads == ["1x32k", "mix32k"]
    assert options.peers == ["lctrain"]


def test_default_file_is_named_after_date_and_device(record):
    path = bench.default_output(record)
    assert path.name == "20261123T080000-gpu-x.json"
    assert path.parent == ROOT / "kernels" / "lctrain_kernels" / "bench" / "results"


def test_an_installed_package_writes_where_it_is_run(record, monkeypatch, tmp_path):
    monkeypatch.setattr(bench, "RESULTS", tmp_path / "lctrain" / "kernels" / "results")
    assert bench.default_output(record).parent == Path("bench-results")


@pytest.mark.gpu
def test_it_runs_on_a_gpu(tmp_path, capsys):
    arguments = ["--workloads", "mix32k", "--peers", "lctrain,fa2", "--repetitions", "1"]
    assert bench.main([*arguments, "--check", "--output", str(tmp_path / "run.json")]) == 0
    assert "FlashAttention-2 in torch" in capsys.readouterr().out
    assert (tmp_path / "run.json").is_file()
