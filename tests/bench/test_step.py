"""Tests lctrain-bench step: equal work for every contender, rounds, records, and lost processes."""

import argparse
import json
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from lctrain.bench import __main__ as bench
from lctrain.bench import step
from lctrain.bench.contenders import CONTENDERS, OURS, _registration
from lctrain.bench.shapes import SHAPES, build_shape, tiny
from lctrain.bench.step_process import Job, measure, random_pack, time_step
from lctrain.bench.step_profile import summarize
from lctrain.memory import use_policy
from lctrain.models import patch_model
from tests.float64 import float64_throughout
from tests.numerics import assert_equal_in_float64, near

CPU = torch.device("cpu")
LENGTHS = (7, 12, 5)


@pytest.mark.parametrize("name", SHAPES)
def test_contenders_have_the_same_loss_and_gradients(name):
    """transformers' own loss is float32, so the peer's comes from its logits."""
    shape = tiny(SHAPES[name])
    batch = random_pack(LENGTHS, shape)
    results = []
    for contender in (OURS, "sdpa"):
        with float64_throughout():
            model = CONTENDERS[contender].build(shape, CPU, torch.float64)
            arguments = CONTENDERS[contender].arguments(batch)
            if contender == OURS:
                loss = model(**arguments).loss
            else:
                labels = torch.cat([arguments.pop("labels")[0, 1:], torch.tensor([-100])])
                loss = F.cross_entropy(model(**arguments).logits[0], labels)
            loss.backward()
        results.append([loss.detach(), *(parameter.grad for parameter in model.parameters())])
    assert_equal_in_float64(*results)


@pytest.mark.parametrize("checkpointing", ["none", "full"])
def test_contenders_do_the_same_work(checkpointing):
    job = Job("llama-1b", LENGTHS, checkpointing, True, steps=1, mixed=[(3, 4)], tiny=True)
    ours, theirs = (measure(CONTENDERS[name], job, CPU) for name in (OURS, "sdpa"))
    assert ours["status"] == theirs["status"] == "ok", (ours, theirs)
    for key in ("parameters", "flops"):
        assert ours[key] == theirs[key]
    assert len(ours["step_ms"]) == 1


def test_kept_attention_is_not_computed_again():
    flops, gradients = [], []
    for keep in (True, False):
        model = build_shape(tiny(SHAPES["llama-1b"]), "sdpa", CPU, torch.float32)
        patch_model(model, attention="flash")
        use_policy(model, "checkpoint", keep_attention=2 if keep else 0)
        batch = random_pack(LENGTHS, tiny(SHAPES["llama-1b"]))
        with FlopCounterMode(display=False) as counter:
            model(**batch.arguments()).loss.backward()
        flops.append(counter.get_flop_counts()["Global"][torch.ops.lctrain.varlen_forward])
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert 0 < 2 * flops[0] == flops[1]
    assert all(torch.equal(kept, again) for kept, again in zip(*gradients, strict=True))


def test_a_failure_is_a_result():
    job = Job("llama-1b", (0,), tiny=True)
    found = measure(CONTENDERS["sdpa"], job, CPU)
    assert found["status"] == "error"
    assert "ValueError" in found["reason"]


def test_the_pack_is_the_same_in_every_process():
    shape = tiny(SHAPES["llama-1b"])
    one, two = random_pack(LENGTHS, shape), random_pack(LENGTHS, shape)
    assert torch.equal(one.input_ids, two.input_ids)
    assert not torch.equal(one.input_ids, random_pack(LENGTHS, shape, seed=1).input_ids)


def test_a_registered_attention_gets_the_pack():
    given = []

    def varlen(q, k, v, cu_seqlens, max_seqlen):
        given.append((q.shape, k.shape, cu_seqlens.tolist(), max_seqlen))
        return q

    _registration("bench_test", varlen)()
    shape = tiny(SHAPES["llama-1b"])
    model = build_shape(shape, "bench_test", CPU, torch.float32)
    model(**CONTENDERS["fa4"].arguments(random_pack(LENGTHS, shape))).loss.backward()
    heads, head_dim = shape.settings["num_attention_heads"], shape.settings["head_dim"]
    assert given[0] == ((24, heads, head_dim), (24, 2, head_dim), [0, 7, 19, 24], 12)
    assert len(given) == 2


def test_gpu_contenders_are_named_as_missing_on_a_cpu():
    assert CONTENDERS["fa4_liger"].missing(CPU) == "needs a GPU"
    assert CONTENDERS[OURS].missing(CPU) is None
    absent = step.CONTENDERS["sdpa"].__class__("x", "X", modules=("no_such_module",), on_cpu=True)
    assert "no_such_module" in absent.missing(CPU)


def turn(*times, **more):
    figures = {"host_ms": 1.0, "loss": 2.0, "parameters": 10, "flops": 4e12, "peak_flops": 1e15}
    return {"status": "ok", "step_ms": list(times), "peak_gib": 3.0, **figures, **more}


def test_rounds_are_combined_by_medians():
    turns = [turn(9, 10, 11), turn(20, 20, 50, allocator_retries=2), turn(8, 8, 9)]
    found = step.combine(turns, tokens=1000)
    assert found["round_ms"] == [10, 20, 8]
    assert found["step_ms"] == 10
    assert found["tokens_per_s"] == 100_000
    assert found["mfu"] == near(0.4)
    assert found["allocator_retries"] == 2


def test_a_contender_that_failed_has_its_reason():
    failed = {"status": "out_of_memory", "reason": "tried to allocate"}
    assert step.combine([failed], 10) == failed


class FakeProcess:
    """A process that answers at once and notes the order of jobs."""

    missing = None

    def __init__(self, name, log):
        self.name, self.log = name, log

    def measure(self, job):
        self.log.append((self.name, job.checkpointing, job.profile))
        return turn(10.0, **({"profile": {}} if job.profile else {}))


def test_contenders_take_turns_and_only_ours_keeps_attention():
    arguments = ["--rounds", "2", "--tiny", "--profile", "--shapes", "llama-1b"]
    options = step.parse_arguments([*arguments, "--workloads", "1x32k"])
    log = []
    processes = {name: FakeProcess(name, log) for name in (OURS, "sdpa")}
    for setting in step.settings_of(options):
        step.run_setting(options, processes, setting)
    names = [name for name, checkpointing, _ in log if checkpointing == "full"]
    assert names == [OURS, "sdpa", OURS, "sdpa"]
    assert {name for name, checkpointing, _ in log if checkpointing == "kept"} == {OURS}
    assert [profiled for name, kind, profiled in log if (name, kind) == (OURS, "none")] == [
        False,
        True,
    ]


def test_mixed_steps_have_other_lengths_each():
    options = step.parse_arguments(["--mixed-steps", "3"])
    job = step.make_job(options, "llama-1b", "mix32k", "none", last=True)
    assert len({*map(tuple, job.mixed), tuple(job.lengths)}) == 4
    assert {sum(lengths) for lengths in job.mixed} == {32_768}
    assert not step.make_job(options, "llama-1b", "mix32k", "none", last=False).mixed


def test_a_process_that_dies_is_an_error_and_is_started_again(monkeypatch):
    monkeypatch.setattr(step, "PROCESS", "this")  # prints a poem and ends
    process = step.StepProcess("sdpa")
    answer = SimpleNamespace(loads=lambda line: {"missing": None, "versions": {}})
    monkeypatch.setattr(step, "json", answer)
    process.wait()
    process.close()
    monkeypatch.undo()
    monkeypatch.setattr(step, "PROCESS", "no_such_module")
    process.start()
    process.wait()
    assert process.missing == "the process ended with exit code 1"


NOW = {
    "device": "GPU X",
    "versions": {"torch": "2.11", "liger-kernel": "0.8.5"},
    "settings": {"dtype": "bfloat16"},
    "missing": {"B": "no"},
    "runs": [],
}


def test_a_record_is_continued(tmp_path):
    path = tmp_path / "record.json"
    assert step.load_record(path, NOW) == NOW
    earlier = {**NOW, "versions": {"torch": "2.11", "triton": "3.6"}, "missing": {}, "runs": [1]}
    path.write_text(json.dumps(earlier))
    found = step.load_record(path, NOW)
    assert found["runs"] == [1]
    assert found["versions"] == {"torch": "2.11", "triton": "3.6", "liger-kernel": "0.8.5"}
    assert found["missing"] == {"B": "no"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "--output must be a JSON record"),
        ("[]", "--output must be a record of steps"),
        (json.dumps({**NOW, "device": "GPU Y"}), "with the same device, got .* Choose another"),
        (json.dumps({**NOW, "versions": {"torch": "2.9"}}), "the same versions, got .*2.9"),
    ],
)
def test_another_file_is_not_continued(tmp_path, text, message):
    path = tmp_path / "record.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        step.load_record(path, NOW)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shapes", "gpt"], "shapes must be among llama-1b, qwen3-1.7b"),
        (["--contenders", "x"], "contenders must be among lctrain, fa4_liger"),
        (["--checkpointing", "some"], "checkpointing must be among none, full, kept"),
        (["--mixed-steps", "-1"], "--mixed-steps must be at least 0"),
    ],
)
def test_bad_options_are_refused(arguments, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        step.parse_arguments(arguments)
    assert message in capsys.readouterr().err


def test_without_a_gpu_it_names_the_trial(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert step.main([]) == 2
    assert "try it with --tiny" in capsys.readouterr().err


def test_idle_time_and_kernels_of_a_profile():
    spans = [("a", 0.0, 40.0), ("b", 30.0, 50.0), ("a", 75.0, 100.0)]
    found = summarize(spans)
    assert found["idle_share"] == 0.25
    assert found["kernels"][0] == {"ms": 0.065, "calls": 2, "kernel": "a"}
    assert summarize([])["idle_share"] is None


def test_the_time_to_issue_is_part_of_the_step():
    whole, issued = time_step(lambda: None, CPU)
    assert 0.0 <= issued <= whole


def test_the_command_times_ours_and_names_what_is_missing(tmp_path, capfd):
    output = tmp_path / "folder" / "step.json"
    arguments = ["--tiny", "--shapes", "llama-1b", "--workloads", "1x32k", "--rounds", "1"]
    arguments += ["--checkpointing", "none", "--contenders", "lctrain,fa2", "--steps", "1"]
    assert bench.main(["step", *arguments, "--output", str(output)]) == 0
    record = json.loads(output.read_text())
    (run, *others) = record["runs"]
    assert run["status"] == "ok"
    assert run["shape"] == "Llama-3.2-1B, tiny"
    assert [other["contender"] for other in others] or record["missing"]
    assert "Wrote" in capfd.readouterr().out


@pytest.mark.parametrize("name", bench.BENCHMARKS)
def test_every_benchmark_has_a_command(name):
    assert callable(bench.importlib.import_module(bench.BENCHMARKS[name][0]).main)


def test_the_overview_and_unknown_names(capsys):
    assert bench.main(["--help"]) == 0
    assert "lctrain-bench BENCHMARK --help" in capsys.readouterr().out
    assert bench.main(["steps"]) == 2
    known = ", ".join(bench.BENCHMARKS)
    assert f"must be one of {known}, got 'steps'" in capsys.readouterr().err


def test_without_a_name_attention_is_timed(monkeypatch):
    given = []
    fake = argparse.Namespace(main=lambda arguments: given.append(arguments) or 0)
    monkeypatch.setattr(bench.importlib, "import_module", lambda name: fake)
    assert bench.main(["--check"]) == 0
    assert given == [["--check"]]
