"""Tests the benchmark of memory on a tiny model: its record, and the plan beside it."""

import json
import subprocess

import pytest

from lctrain.bench import memory
from lctrain.bench.__main__ import main
from lctrain.bench.memory_estimate import estimate_rest, extrapolate, joined
from lctrain.bench.memory_peer import checkpoint_layers
from lctrain.memory.layers import checkpointed_layers
from lctrain.memory.store import HostStore


def run(tmp_path, *options):
    output = tmp_path / "folder" / "memory.json"
    assert main(["memory", *options, "--host-gib", "1", "--output", str(output)]) == 0
    return json.loads(output.read_text())


def test_a_tiny_model_is_measured_under_every_policy(tmp_path, capsys):
    policies = ["none", "checkpoint", "offload", "auto"]
    options = ("--tiny", "--layers", "4", "--tokens", "64", "--steps", "1", "--rank", "2")
    record = run(tmp_path, *options, "--policies", ",".join(policies))
    runs = record["runs"]
    assert [(run["policy"], run["tokens"], run["status"]) for run in runs] == [
        (policy, 64, "ok") for policy in policies
    ]
    assert len({run["loss"] for run in runs}) == 1  # the same steps of the same model
    by_policy = {run["policy"]: run for run in runs}
    assert by_policy["offload"]["host_gib"] == by_policy["offload"]["planned_host_gib"]
    assert by_policy["offload"]["layers"] == ["host/recompute"] * 2 + ["device/recompute"] * 2
    assert by_policy["auto"]["planned_policy"] == "none"  # everything fits
    assert by_policy["auto"]["backward_by_head"] is False
    assert record["layers"] == 4
    assert "tokens/s" in capsys.readouterr().out


def test_a_long_step_is_timed_after_short_ones(tmp_path, capsys, monkeypatch):
    """The short steps compile the kernels, and reserve host memory for the long one."""
    sizes = []
    slot = HostStore._slot

    def recorded(store, size, kind, device, largest):
        found = slot(store, size, kind, device, largest)
        sizes.append((size, store.capacity))
        return found

    monkeypatch.setattr(HostStore, "_slot", recorded)
    options = ("--tiny", "--layers", "4", "--tokens", "96", "--steps", "1", "--rank", "2")
    short = ("--warmup-tokens", "32", "--mlp-tokens", "16", "--progress")
    (found,) = run(tmp_path, *options, *short, "--policies", "offload")["runs"]
    assert found["status"] == "ok"
    assert len(found["step_ms"]) == 1
    assert found["kernels_loaded_in_steps"] == []
    first, last = sizes[:2], sizes[2:]  # two layers' inputs are on the host
    assert last[0][0] == 3 * first[0][0]
    assert {capacity for _, capacity in sizes} == {2 * last[0][0]}
    reached = [(phase, layer) for phase, layer, _ in found["progress"]]
    assert reached[:4] == [("forward", layer) for layer in range(4)]
    assert reached[4:] == [("backward", layer) for layer in reversed(range(4))]
    assert "backward reached layer 0" in capsys.readouterr().out
    assert "estimated_from" not in found  # the step has ended


def test_the_rest_of_a_stopped_step_is_estimated():
    """Two segments, of layers 0 to 1 and 2 to 3; a forward takes 2 s, a backward 5 s."""
    forward = [["forward", layer, 1.0 + 2 * layer] for layer in range(4)]
    backward = [["backward", layer, at] for layer, at in ((2, 10.0), (3, 10.5), (2, 15.5))]
    run = {"layers": ["host/rebuilt", "recompute/recompute", "host/device", "recompute/host"]}
    assert estimate_rest({**run, "progress": forward[:3]}, 58) == {}
    assert estimate_rest({**run, "progress": forward + backward}, 58) == {}
    ended = [*forward, *backward, ["backward", 0, 20.0]]
    found = estimate_rest({**run, "progress": ended}, 68)
    # 20 s have run; two layers are left, 5 s each, and each computes its attention again, 2 s each
    assert found == {"estimated_from": 0, "step_ms": [34_000.0], "tokens_per_s": 2.0}
    again = ["device/recompute"] * 4  # the layers that have ended computed it again, too
    found = estimate_rest({"layers": again, "progress": ended}, 68)
    assert found["step_ms"] == [30_000.0]
    kept = ["device/device"] * 2 + ["device/recompute"] * 2  # what is left takes less
    assert estimate_rest({"layers": kept, "progress": ended}, 68)["step_ms"] == [30_000.0]


def test_policies_run_in_turn(tmp_path, monkeypatch):
    order = []
    measured = memory.MemoryBench.measured

    def recorded(bench, config, *given):
        order.append(config.name)
        return measured(bench, config, *given)

    monkeypatch.setattr(memory.MemoryBench, "measured", recorded)
    options = ("--tiny", "--layers", "3", "--tokens", "32", "--steps", "1", "--rank", "2")
    record = run(tmp_path, *options, "--policies", "checkpoint,offload", "--rounds", "2")
    assert order == ["checkpoint", "offload"] * 2
    assert [len(one["step_ms"]) for one in record["runs"]] == [2, 2]
    assert {one["status"] for one in record["runs"]} == {"ok"}


@pytest.fixture
def reach(monkeypatch):
    """Returns reach(report, *progress): reports a layer as on a GPU with a peak of 3 GiB."""

    def call(report, *progress):
        with monkeypatch.context() as gpu:
            gpu.setattr("torch.cuda.is_available", lambda: True)
            gpu.setattr("torch.cuda.max_memory_allocated", lambda: 3 * 2**30)
            report(*progress)

    return call


def test_a_model_is_estimated_from_two_numbers_of_layers(tmp_path, monkeypatch, reach, capsys):
    layers = []

    def measured(bench, config, tokens, plan, report):
        count = len(checkpointed_layers(bench.inner))
        assert (config.keep_inputs or 0) <= count
        layers.append((count, config.keep_attention, plan is None))
        if report is not None:
            reach(report, "forward", 1, 0.5)
        time = [100.0 + 10 * count, 100.0 + 10 * count, 1e6]
        return {"status": "ok", "step_ms": time, "peak_gib": 2.0 + count, "host_gib": 0.5 * count}

    monkeypatch.setattr(memory.MemoryBench, "measured", measured)
    options = ("--tiny", "--layers", "32", "--tokens", "4200", "--estimate-layers", "2,4")
    policy = ("--policies", "offload", "--keep-attention", "32")
    (found,) = run(tmp_path, *options, *policy)["runs"]
    assert layers == [(2, 2, False), (4, 4, False)]
    assert found["estimated_from"] == [2, 4]
    assert found["step_ms"] == [420.0]
    assert found["tokens_per_s"] == 10_000.0
    assert (found["peak_gib"], found["host_gib"]) == (34.0, 16.0)
    assert len(found["layers"]) == 32  # the plan is that of the whole model
    assert [one["peak_gib"] for one in found["measured"]] == [4.0, 6.0]
    assert "estimated" in capsys.readouterr().out
    layers.clear()
    counts = ("--segment-layers", "2", "--reuse-attention", "32", "--keep-inputs", "10")
    (found,) = run(tmp_path, *options, "--policies", "offload", *counts, "--progress")["runs"]
    assert layers == [(2, 0, False), (4, 0, False)]
    assert found["step_ms"] == [420.0]
    assert found["progress"]
    assert "peak_gib" not in found  # two and four layers keep all inputs, unlike the model


def test_the_settings_of_a_policy_are_those_of_the_command(tmp_path):
    options = ("--tiny", "--layers", "6", "--tokens", "64", "--plan-only")
    settings = ("--segment-layers", "3", "--keep-attention", "1", "--reuse-attention", "1")
    further = ("--host-attention", "1", "--keep-inputs", "0", "--backward-by-head")
    record = run(tmp_path, *options, *settings, *further, "--policies", "checkpoint,offload,auto")
    kept, away, chosen = record["runs"]
    shared = ["recompute/recompute", "recompute/recompute"]
    assert kept["layers"] == [
        *("device/rebuilt", *shared, "device/recompute"),
        *("recompute/recompute", "recompute/device"),
    ]
    assert away["layers"] == [
        *("host/rebuilt", *shared, "host/recompute"),
        *("recompute/host", "recompute/device"),
    ]
    assert kept["backward_by_head"] is away["backward_by_head"] is True
    assert chosen["backward_by_head"] is False  # auto chooses for itself
    by_head = ("--backward-by-head", "--steps", "1", "--policies", "none,checkpoint")
    whole, found = run(tmp_path, *options[:-1], *by_head)["runs"]
    assert (whole["backward_by_head"], found["backward_by_head"]) == (False, True)
    assert whole["status"] == found["status"] == "ok"
    assert whole["loss"] == found["loss"]


def test_a_failed_run_is_no_estimate():
    failed = {"status": "out_of_memory", "reason": "full"}
    fits = {"status": "ok", "step_ms": [1.0], "peak_gib": 1.0}
    assert extrapolate({2: fits, 4: failed}, 32, 8) == failed
    assert joined([fits, failed], 8) == failed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("2,32",), "must be below the model's 32 layers, got 32"),
        (("4,2",), "must be two rising numbers, such as 2,4, got '4,2'"),
        (("few",), "must be an integer of at least 1, got 'few'"),
        (("2,4",), "must be none, checkpoint or offload with --estimate-layers, got auto"),
        (("2,4", "--policies", "offload", "--keep-attention", "3"), "must be 0 or 32 with"),
        (
            ("2,4", "--policies", "offload", "--reuse-attention", "3"),
            "reuse-attention must be 0 or",
        ),
        (("2,4", "--segment-layers", "3"), "must be multiples of --segment-layers (3), got 2,4"),
    ],
    ids=["deep", "falling", "text", "auto", "some", "reused", "segment"],
)
def test_estimates_that_mean_nothing_are_refused(options, message, capsys):
    with pytest.raises(SystemExit):
        main(["memory", "--estimate-layers", *options])
    assert message in " ".join(capsys.readouterr().err.split())


def test_a_run_that_is_cut_leaves_its_plan_and_progress(tmp_path, monkeypatch, reach):
    output = tmp_path / "memory.json"

    def cut(bench, config, tokens, plan, report):
        reach(report, "forward", 3, 12.5)
        raise KeyboardInterrupt

    monkeypatch.setattr(memory.MemoryBench, "measured", cut)
    options = ("--tiny", "--tokens", "64", "--policies", "offload", "--progress")
    with pytest.raises(KeyboardInterrupt):
        main(["memory", *options, "--output", str(output)])
    (found,) = json.loads(output.read_text())["runs"]
    assert found["status"] == "unfinished"
    assert found["planned_gib"] >= 0
    assert found["progress"] == [["forward", 3, 12.5]]
    assert found["peak_gib"] == 3.0


def test_all_weights_of_another_shape_on_several_documents(tmp_path):
    options = ("--tiny", "--shape", "llama-1b", "--full", "--documents", "4", "--tokens", "64")
    record = run(tmp_path, *options, "--steps", "1", "--policies", "checkpoint")
    assert (record["rank"], record["documents"]) == (None, 4)
    assert "1B" in record["shape"]
    assert record["runs"][0]["status"] == "ok"


def test_peers_have_the_checkpointing_of_transformers(tmp_path, monkeypatch):
    """Each contender has a process of its own; here they run one after the other."""

    def call(command, check):
        assert main(["memory", *command[3:]]) == 0
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(memory.subprocess, "run", call)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    options = ("--tiny", "--tokens", "64", "--steps", "1", "--rank", "2", "--policies", "none")
    record = run(tmp_path, *options, "--contenders", "lctrain,sdpa,fa4_liger")
    ours, kept, offloaded, missing = record["runs"]
    assert [ours["contender"], kept["contender"], missing["contender"]] == [
        "lctrain",
        "sdpa",
        "fa4_liger",
    ]
    assert (kept["policy"], kept["status"]) == ("checkpoint", "ok")
    assert kept["loss"] == ours["loss"]  # the same weights and tokens
    assert offloaded["policy"] == "offload"
    assert offloaded["status"] in ("ok", "error")  # some versions of torch offload from GPUs only
    assert missing["status"] == "missing"
    assert "layers" not in kept


@pytest.mark.parametrize("policy", ["checkpoint", "offload"])
def test_an_older_transformers_composes_the_same_functions(policy, monkeypatch):
    class Model:
        """Has the methods of transformers before 5.23."""

        def gradient_checkpointing_enable(self, options):
            self.options = options

        def _set_gradient_checkpointing(self, enable, func):
            self.func = func

    model = Model()
    checkpoint_layers(model, policy)
    assert model.options == {"use_reentrant": False}
    assert hasattr(model, "func") == (policy == "offload")


def test_short_warmup_steps_need_mlp_tiles(capsys):
    with pytest.raises(SystemExit):
        main(["memory", "--mlp-tokens", "64", "--warmup-tokens", "64"])
    assert "--warmup-tokens must be above --mlp-tokens (64), got 64" in capsys.readouterr().err


def test_plans_need_no_gpu_and_no_memory(tmp_path):
    options = ("--plan-only", "--layers", "2", "--device-gib", "20", "--tokens", "8192,16384")
    short, long = run(tmp_path, *options, "--policies", "offload")["runs"]
    assert short["status"] == "planned"
    assert short["planned_gib"] < long["planned_gib"]
    assert short["planned_longest"] > 0


def test_a_gpu_is_needed_otherwise(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert main(["memory", "--output", str(tmp_path / "x.json")]) == 2
    assert "needs a GPU" in capsys.readouterr().err


def test_unknown_policies_are_refused(capsys):
    with pytest.raises(SystemExit):
        main(["memory", "--policies", "all"])
    assert "policies must be among none, checkpoint, offload, auto" in capsys.readouterr().err
