"""Tests that an evaluation which SIGKILL has ended goes on, and computes no finished cell again."""

import signal

from lctrain.eval.run_task import Run
from tests.evaluate.test_ranks import rows_in
from tests.forked import run_forked

TASKS = ["tasks=[perplexity,needle]", "lengths=[192,256]", "split=all", "needle.needles=2"]


def test_a_killed_evaluation_goes_on_after_its_last_cell(
    run_main, model_folder, texts, tmp_path, monkeypatch
):
    chosen = [f"model={model_folder}", *TASKS, "needle.by=likelihood"]
    given = [f"data.files=[{texts}/*.txt]", f"data.cache_dir={tmp_path}/cache", "device=cpu"]
    given += ["data=text", f"paths.root={tmp_path}/outputs", "name=killed"]
    module = "tests.evaluate.killed"
    done = run_forked(module, "3", *chosen, *given, cwd=tmp_path, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    (folder,) = (tmp_path / "outputs" / "killed").iterdir()
    assert len(rows_in(folder)[1]) == 2
    with (folder / "cells.jsonl").open("a") as file:
        file.write('{"task": "needle", "method": "", "len')  # the kill came while it was written
    assert not (folder / "report.html").exists()
    computed = []
    compute = Run._result

    def result(self, reading, length, advance):
        computed.append((self.task.name, length))
        return compute(self, reading, length, advance)

    monkeypatch.setattr(Run, "_result", result)
    run_main(*chosen, f"resume={folder}", "name=killed")
    assert computed == [("needle", 192), ("needle", 256)]
    assert (folder / "report.html").exists()
    run_main(*chosen, "name=whole")
    (whole,) = (tmp_path / "outputs" / "whole").iterdir()
    assert rows_in(folder) == rows_in(whole)
