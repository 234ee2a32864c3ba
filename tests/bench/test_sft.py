"""Tests lctrain-bench sft on a CPU: what it counts, and its record and table."""

import json

import pytest
import torch

from lctrain.bench import sft, sft_process
from lctrain.bench.__main__ import main
from lctrain.bench.sft_process import SFT_CONTENDERS, WARMUP, SftJob, conversations, measure

JOB = SftJob("qwen3-1.7b", row_tokens=128, mean_tokens=30, rows=3, steps=2, tiny=True)
CPU = torch.device("cpu")


def test_conversations_have_their_mean_length_and_trained_answers():
    found = conversations(500, SftJob("qwen3-1.7b"), 1000)
    lengths = [len(one["input_ids"]) for one in found]
    assert 600 < sum(lengths) / len(lengths) < 800
    trained = sum(label >= 0 for one in found for label in one["labels"])
    assert 0.5 < trained / sum(lengths) < 0.8
    assert all(one["labels"][0] == -100 for one in found)


def test_time_ends_with_the_last_step(monkeypatch):
    """What a trainer does after it, such as moving the model to the CPU, is not training."""
    times = iter([10.0, 13.5])
    monkeypatch.setattr(sft_process.time, "perf_counter", lambda: next(times))
    clock = sft_process.Clock(2, 3, CPU)
    for number in range(1, 8):
        clock.step_ends(number)
    assert clock.seconds == 3.5


@pytest.mark.filterwarnings("ignore")
def test_ours_trains_rows_that_are_nearly_full():
    found = measure(SFT_CONTENDERS["lctrain"], JOB, CPU)
    assert found["status"] == "ok", found
    assert 0.8 * 2 * 128 < found["positions"] <= 2 * 128
    assert 0 < found["trained_tokens"] < found["positions"]
    assert found["trained_tokens_per_s"] > 0


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["trl_packed", "trl_padded"])
def test_trl_trains_with_the_same_masks(name, monkeypatch):
    pytest.importorskip("trl", reason="needs TRL")
    seen = []
    count = sft_process.Clock.count

    def remembered(clock, labels, shifted):
        seen.append(labels)
        count(clock, labels, shifted)

    monkeypatch.setattr(sft_process.Clock, "count", remembered)
    found = measure(SFT_CONTENDERS[name], JOB, CPU)
    assert found["status"] == "ok", found
    assert len(seen) == WARMUP + JOB.steps
    timed = seen[WARMUP:]
    assert all(len(labels) == (1 if name == "trl_packed" else 3) for labels in timed)
    assert found["trained_tokens"] == sum(int((one[:, 1:] != -100).sum()) for one in timed)
    assert found["positions"] == sum(one.numel() for one in timed)


def test_a_failure_is_a_result(monkeypatch):
    def fail(*_):
        raise RuntimeError("no such device\nmore")

    monkeypatch.setitem(
        SFT_CONTENDERS, "lctrain", sft_process.SftContender("x", fail, modules=("no_module_here",))
    )
    found = measure(SFT_CONTENDERS["lctrain"], JOB, CPU)
    assert found == {"status": "error", "reason": "RuntimeError: no such device"}
    assert "ModuleNotFoundError" in str(SFT_CONTENDERS["lctrain"].missing(CPU))


def test_the_record_holds_every_contender(tmp_path, capsys, monkeypatch):
    jobs = []

    class Stub:
        missing = None
        versions = {"trl": "9"}  # noqa: RUF012

        def __init__(self, name, module):
            assert module == "lctrain.bench.sft_process"
            self.name = name

        def start(self):
            jobs.append(("start", self.name))

        def measure(self, job):
            jobs.append((job.steps, self.name))
            if self.name == "trl_padded":
                return {"status": "out_of_memory", "reason": "full"}
            speed = 100.0 if self.name == "lctrain" else 80.0
            counts = {"seconds": 1.0, "trained_tokens": 60, "positions": 100, "peak_gib": 2.0}
            return {"status": "ok", "trained_tokens_per_s": speed, **counts}

        def close(self):
            pass

    monkeypatch.setattr(sft, "StepProcess", Stub)
    output = tmp_path / "sft.json"
    assert main(["sft", "--tiny", "--steps", "4", "--output", str(output)]) == 1
    names = list(SFT_CONTENDERS)
    assert jobs == [("start", name) for name in names] + [(4, name) for name in names]
    record = json.loads(output.read_text())
    assert [run["contender"] for run in record["runs"]] == names
    assert record["versions"]["trl"] == "9"
    text = capsys.readouterr().out
    assert "| lctrain, packed rows, fused=True | 100 | 60% | 2.0 | - |" in text
    assert "Liger | 80 | 60% | 2.0 | 1.25 |" in text
    assert "SDPA | out of memory | - | - | - |" in text


def test_without_a_gpu_it_says_so(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["sft"]) == 2
    assert "lctrain-bench sft needs a GPU" in capsys.readouterr().err
