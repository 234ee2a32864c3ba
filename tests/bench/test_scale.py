"""Tests lctrain-bench scale: parts that fail or do not begin, and its tables. See test_sharded."""

import json
import re

import pytest
import torch

from lctrain.bench import scale
from lctrain_kernels.bench import report
from lctrain_kernels.bench.scale_report import NOT_MEASURED, newest_scale_record, scale_table

STEP = {"seconds": 2.0, "tokens_per_second_per_gpu": 50.0, "peak_memory_gib": 3.0}
RECORD = {
    "date": "2030-01-02T00:00:00+00:00",
    "device": "NVIDIA H200",
    "versions": {"torch": "3.0"},
    "settings": {"ranks": 2, "tokens": 64, "documents": 4},
    "parts": {
        "linear": {
            "rows": [
                {**STEP, "shape": "a", "strategy": "alone", "gpus": 1},
                {**STEP, "shape": "a", "strategy": "fsdp2", "gpus": 2}
                | {"tokens_per_second_per_gpu": 45.0},
            ]
        },
        "whole": {"error": "OutOfMemoryError: no room"},
    },
}


def test_parts_that_fail_are_recorded_and_others_go_on(tmp_path, monkeypatch, capsys):
    def run(parts, name):
        if name == "linear":
            raise torch.OutOfMemoryError("no room\nat all")
        return {"rows": []}

    monkeypatch.setattr(scale.Parts, "run", run)
    output = tmp_path / "scale.json"
    options = scale.parse_arguments(["--tiny", "--parts=linear,attention"])
    saved = []
    for record in scale.measure(options, torch.device("cpu")):
        scale.save(record, output)
        saved.append(json.loads(output.read_text())["parts"])
    assert saved[0] == {"linear": {"error": "OutOfMemoryError: no room"}}
    assert saved[1] == {**saved[0], "attention": {"rows": []}}
    assert "Part linear failed: OutOfMemoryError: no room" in scale_table(record)
    monkeypatch.setattr(options, "limit_s", -1)
    assert not list(scale.measure(options, torch.device("cpu")))
    assert "attention: not begun after -1 s" in capsys.readouterr().out


@pytest.mark.parametrize("is_joined", [False, True])
def test_the_command_leaves_the_process_group_that_it_has_joined(tmp_path, monkeypatch, is_joined):
    monkeypatch.setattr(scale.Parts, "run", lambda parts, name: {"rows": []})
    if is_joined:
        store = f"file://{tmp_path}/store"
        torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    try:
        scale.main(["--tiny", "--parts=attention", f"--output={tmp_path}/scale.json"])
        assert torch.distributed.is_initialized() == is_joined
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ("linear,all", "--parts must be among attention, linear, .*got 'linear,all'"),
        ("context-long", "--parts must hold context for context-long"),
    ],
)
def test_wrong_parts(parts, message, capsys):
    with pytest.raises(SystemExit):
        scale.parse_arguments(["--parts", parts])
    assert re.search(message, capsys.readouterr().err)


def test_the_page_has_tables_of_several_gpus_only(tmp_path, monkeypatch):
    folder = tmp_path / "scale"
    folder.mkdir()
    page = "<!-- scale tables: begin -->\n<!-- scale tables: end -->\n"
    monkeypatch.setattr(report, "newest_scale_record", lambda: newest_scale_record(tmp_path))
    of_cpus = {**RECORD, "device": "cpu", "date": "2031"}
    of_one = {**RECORD, "settings": {**RECORD["settings"], "ranks": 1}, "date": "2031"}
    for name, record in (("cpu", of_cpus), ("one", of_one)):
        (folder / f"{name}.json").write_text(json.dumps(record))
    assert NOT_MEASURED in report.readme_with_steps(page)
    (folder / "two.json").write_text(json.dumps(RECORD))
    found = report.readme_with_steps(page)
    assert NOT_MEASURED not in found
    assert "2 x NVIDIA H200, 2030-01-02; torch 3.0." in found
    assert "| a | divided (FSDP2) | 2 | 2.000 | 45 | 0.900 | 3.0 |" in found
    assert report.readme_with_steps(found) == found
