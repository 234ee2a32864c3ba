"""Tests the tables of kinds that have a folder of records each: cells and what is missing."""

import json

import pytest

from lctrain_kernels.bench import report
from lctrain_kernels.bench.backward_report import backward_table
from lctrain_kernels.bench.decode_report import decode_table
from lctrain_kernels.bench.detached_report import detached_table
from lctrain_kernels.bench.encoder_report import encoder_table
from lctrain_kernels.bench.evaluation_report import evaluation_table, evaluation_tables
from lctrain_kernels.bench.generation_report import TITLES, generation_table, generation_tables
from lctrain_kernels.bench.longest_report import longest_table
from lctrain_kernels.bench.masked_lm_report import masked_lm_table
from lctrain_kernels.bench.memory_plot import draw_curve
from lctrain_kernels.bench.memory_report import (
    PICTURE,
    curve_of,
    memory_records,
    memory_table,
    memory_tables,
)
from lctrain_kernels.bench.newest import RESULTS, newest_record, records_of
from lctrain_kernels.bench.shared_prefix_report import shared_prefix_table
from lctrain_kernels.bench.shares_report import shares_table

# Until they are measured; a kind stays listed without harm.
WITHOUT_RECORD = {"sft"}
HEAD = {"device": "GPU X", "date": "2026-11-30T01:00:00+00:00", "versions": {"torch": "2.11"}}


def test_the_newest_record_counts_by_its_date(tmp_path):
    (tmp_path / "kind").mkdir()
    for name, date in (("a", "2026-12-01"), ("b", "2026-11-30")):
        (tmp_path / "kind" / f"{name}.json").write_text(json.dumps({"date": date}))
    assert newest_record("kind", tmp_path) == {"date": "2026-12-01"}
    assert newest_record("none", tmp_path) is None


@pytest.mark.parametrize("kind", [*report.KINDS, *report.SERIES])
def test_every_kind_has_a_record_and_a_place_on_the_page(kind):
    has_record = newest_record(kind) is not None
    assert has_record or kind in WITHOUT_RECORD
    begin, end = (f"<!-- {kind} tables: {edge} -->" for edge in ("begin", "end"))
    text = report.readme_with_steps(f"{begin}\nold\n{end}\n")
    assert "old" not in text
    assert ("2026" if has_record else report.NOTHING_MEASURED) in text


def test_all_records_of_a_series_are_shown():
    records = records_of("shared_prefix")
    assert len(records) > 1
    begin, end = "<!-- shared_prefix tables: begin -->", "<!-- shared_prefix tables: end -->"
    text = report.readme_with_steps(f"{begin}\n{end}\n")
    assert text.count("| completions |") == len(records)
    assert [record["date"] for record in records] == sorted(record["date"] for record in records)


def test_a_detached_log_sum_exp_has_errors_for_every_deviation():
    errors = {"differentiable": {"out": 3e-7, "dq": 2e-7}, "detached": {"out": 3e-7, "dq": 0.134}}
    sizes = {"prompt": 8, "completions": 2, "length": 4}
    text = detached_table({**HEAD, **sizes, "errors": {"2": errors}})
    assert "| with its gradient, as in lctrain | 2 | 3e-07 | 2e-07 |" in text
    assert "| detached | 2 | 3e-07 | 13% |" in text


def test_every_folder_of_records_is_read_or_named():
    """The others hold details of a log entry, and no page shows them."""
    details = {"forms", "groups", "profile"}
    shown = {*report.KINDS, *report.SERIES, *report.SECTIONS, "step", "ops", "memory", "scale"}
    folders = {path.name for path in RESULTS.iterdir() if path.is_dir()}
    assert folders | WITHOUT_RECORD == shown | details


def test_memory_has_plan_peak_and_failures():
    run = {"tokens": 32_768, "policy": "offload", "planned_gib": 2.0, "planned_host_gib": 0.5}
    layers = ["host/recompute", "device/device"]
    measured = {"peak_gib": 2.25, "reserved_gib": 3.0, "host_gib": 0.5, "tokens_per_s": 1234.0}
    fits = {**run, **measured, "layers": layers, "status": "ok", "step_ms": [9.0, 8.0]}
    fails = {**run, "layers": ["device/recompute"], "status": "out_of_memory"}
    settings = {"shape": "8B", "layers": 2, "rank": 16, "precision": "bf16", "mlp_tokens": None}
    text = memory_table({**HEAD, **settings, "runs": [fits, fails]})
    kept = "inputs of 1 on the GPU, inputs of 1 on the host, attention of 1 on the GPU"
    measured_row = f"| lctrain | offload | {kept} | 2.00 | 2.25 | 3.00 | 0.50 / 0.50 | 1,234 | 2 |"
    assert measured_row in text
    assert "| inputs of 1 on the GPU | 2.00 | out of memory | - | 0.50 / - | - | 0 |" in text
    assert "whole MLPs" in text


def test_memory_names_peers_documents_and_runs_that_were_cut():
    peer = {"tokens": 8, "contender": "fa4_liger", "policy": "offload", "status": "ok"}
    peer |= {"peak_gib": 4.0, "reserved_gib": 5.0, "tokens_per_s": 2000.0, "step_ms": [9.0]}
    cut = {"tokens": 9, "contender": "lctrain", "policy": "auto", "layers": ["device/device"]}
    guess = {**peer, "policy": "checkpoint", "estimated_from": [2, 4]}
    cut |= {"planned_gib": 1.0, "planned_host_gib": 0.0, "status": "unfinished"}
    settings = {"shape": "1B", "layers": 2, "rank": None, "precision": "float32", "mlp_tokens": 4}
    text = memory_table({**HEAD, **settings, "documents": 8, "runs": [peer, cut, guess]})
    assert "| 2,000 | estimate from 2 and 4 layers |" in text
    assert "all weights trained" in text
    assert "8 documents of equal length" in text
    assert "| 8 | fa4_liger | offload | - | - | 4.00 | 5.00 | - / - | 2,000 | 1 |" in text
    assert "| 1.00 | unfinished | - | 0.00 / - | - | 0 |" in text
    reached = {"progress": [["forward", 0, 1.0], ["backward", 30, 612.4]], "peak_gib": 136.5}
    text = memory_table({**HEAD, **settings, "documents": 1, "runs": [{**cut, **reached}]})
    assert "| 1.00 | 136.50 until layer 30 of the backward, 612 s; unfinished | - |" in text
    rest = {"estimated_from": 30, "tokens_per_s": 481.0, "step_ms": [9.0]}
    text = memory_table({**HEAD, **settings, "runs": [{**cut, **reached, **rest}]})
    assert "| 481 | estimate from the step until layer 30 of the backward |" in text


def test_all_records_of_memory_are_shown_with_a_curve_of_the_fastest_runs(tmp_path):
    run = {"policy": "auto", "status": "ok", "planned_gib": 1.0, "planned_host_gib": 0.0}
    run |= {"layers": [], "peak_gib": 3.0, "reserved_gib": 3.0, "step_ms": [1.0]}
    slow = {**run, "tokens": 2048, "tokens_per_s": 10.0, "peak_gib": 2.0}
    settings = {"shape": "8B", "layers": 2, "rank": 16, "precision": "bf16", "mlp_tokens": None}
    record = {**HEAD, **settings, "runs": [slow, {**slow, "tokens_per_s": 20.0, "peak_gib": 4.0}]}
    assert curve_of([record]) == {}  # one length
    peer = {**slow, "contender": "fa4", "tokens": 4096}
    failed = {**slow, "status": "out_of_memory", "tokens": 8192}
    later = {**record, "date": "2026-12-01", "runs": [{**slow, "tokens": 4096}, peer, failed]}
    later["runs"].append({**slow, "tokens": 16_384, "estimated_from": [2, 4]})
    later["runs"].append({**peer, "tokens": 32_768, "estimated_from": [2, 4]})
    del later["runs"][-1]["peak_gib"]  # drawn in the panel of the speed only
    packs = {**record, "date": "2026-12-02", "documents": 8, "runs": [{**slow, "tokens": 9}]}
    (tmp_path / "memory").mkdir()
    for name, one in (("c", record), ("b", later), ("a", packs)):
        (tmp_path / "memory" / f"{name}.json").write_text(json.dumps(one))
    records = memory_records(tmp_path)
    assert [one["date"][:10] for one in records] == ["2026-11-30", "2026-12-01", "2026-12-02"]
    points = curve_of(records)
    assert {name: sorted(runs) for name, runs in points.items()} == {
        "lctrain": [2048, 4096, 16_384],
        "fa4": [4096, 32_768],
        "lctrain, packs of 8 documents": [9],
    }
    measured = {"tokens_per_s": 1.0, "tokens": 16_384}
    again = {**record, "date": "2026-12-03", "runs": [{**slow, **measured}]}
    assert curve_of([*records, again])["lctrain"][16_384]["tokens_per_s"] == 1.0
    assert curve_of([again, *records])["lctrain"][16_384]["tokens_per_s"] == 1.0
    cut = {**slow, "status": "unfinished", "tokens": 65_536}
    stopped = {**record, "runs": [cut, {**cut, "tokens": 9, "estimated_from": 24}]}
    assert sorted(curve_of([*records, stopped])["lctrain"]) == [9, 2048, 4096, 16_384]
    guess = {**record, "runs": [{**slow, "tokens": 32_768, "estimated_from": [2, 4]}]}
    assert curve_of([record, guess]) == {}  # one length was measured
    assert points["lctrain"][2048]["peak_gib"] == 4.0  # of the faster policy
    text = memory_tables(records)
    assert text.count("| tokens | contender |") == 3
    assert f"]({PICTURE})" in text
    assert "| Unsloth | Llama-3.1-8B, QLoRA of rank 32 | 342,733 | 80 GB | - |" in text
    assert "not measured here" in text
    assert "Unsloth" not in memory_tables(records[:1])  # without a curve
    pytest.importorskip("matplotlib")
    draw_curve(points, tmp_path / PICTURE)
    assert (tmp_path / PICTURE).read_bytes().startswith(b"\x89PNG")


def test_longest_contexts_have_a_row_for_each_machine():
    plans = [
        {"model": model, "device_gib": device, "host_gib": 8, "tokens": tokens}
        for model, device, tokens in (("a", 8, 4096), ("b", 8, 0), ("a", 80, 9216), ("b", 80, 1024))
    ]
    text = longest_table({**HEAD, "rank": 16, "mlp_tokens": 4096, "plans": plans})
    assert "not measured" in text
    assert "| GPU, GiB | host memory used, GiB | a | b |" in text
    assert "| 8 | 8 | 4,096 | does not fit |" in text
    assert "| 80 | 8 | 9,216 | 1,024 |" in text


def test_shared_prefixes_have_both_times():
    shared = {"step_ms": [1.0, 2.0, 4.0], "tokens": 1100, "peak_gib": 1.0, "flops": 1e9}
    separate = {"step_ms": [8.0], "tokens": 9000, "flops": 5e9}
    runs = [{"completions": 8, "shared": shared, "separate": separate, "speedup": 4.0}]
    settings = {"shape": "1B", "prompt": 1024, "completion": 8, "checkpointing": True}
    text = shared_prefix_table({**HEAD, **settings, "runs": runs})
    assert "1B, all weights trained, with checkpointing, a prompt of 1,024 tokens" in text
    assert "| 8 | 2.0 (1,100, 1.0 GiB) | 8.0 (9,000) | 4.00 | 5.00 | 1.25 |" in text


def test_encoders_have_ratios_in_the_order_of_the_peers():
    case = {"model_type": "bert", "rows": 4, "tokens": 1024, "graph": True, "tokens_of_rows": 2000}
    results = [
        {"workload": "b", "peer": "lctrain", "status": "ok", "step_ms": 2.0, "peak_bytes": 2**30},
        {"workload": "b", "peer": "sdpa", "status": "ok", "step_ms": 1.0, "peak_bytes": None},
        {"workload": "b", "peer": "fa4", "status": "error", "step_ms": None, "peak_bytes": None},
    ]
    record = {**HEAD, "settings": {"dtype": "bfloat16"}, "workloads": {"b": case}}
    text = encoder_table({**record, "results": results})
    assert (
        "| bert | 4 of 1,024, 2,000 tokens, CUDA graph | 2.0 (1.0) | 1.0 | error | 0.50, - |"
        in text
    )
    record["workloads"] = {"b": {**case, "layers": 2, "note": "N"}}
    text = encoder_table({**record, "results": results})
    assert "| bert, 2 layers | 4 of 1,024, 2,000 tokens, CUDA graph; N |" in text


def test_masked_models_have_losses_and_perplexities():
    record = {**HEAD, "arguments": ["a=b", "c=d"], "steps": 1200, "findings": {"context": "none"}}
    record |= {"held_out_first": 8.306, "held_out_last": 6.5, "perplexities": [[32, 1547.39]]}
    text = masked_lm_table(record)
    assert "`lctrain-train a=b c=d`: 1,200 steps" in text
    assert "from 8.31 to 6.50" in text
    assert "| 32 | 1,547.4 |" in text
    assert "Context: none." in text


def test_the_backward_in_use_is_compared_within_a_round():
    first = {"ms": {"base": 3.0, "q128_f1": 2.0, "q128_f3": 9.0, "fa4": 1.0}}
    new = {"ms": {"wide": 2.0, "fa4": 5.0}}
    kernels = {"d128_f1": {"backward": 900.0, "delta": 100.0}, "fa4": {"backward": 1500.0}}
    second = {"ms": {"base": 3.0, "d128_f1": 2.0, "fa4": 4.0}, "kernels_us": kernels}
    rounds = [
        {"round": 1, "workloads": {"1x32k_d64": first}},
        {
            "round": 2,
            "workloads": {"1x32k": second, "1x32k_dropout": {"ms": {"base": 1.0}}, "new": new},
        },
    ]
    text = backward_table({**HEAD, "rounds": rounds})
    assert "| `1x32k_d64` | 1 | 3.00 | 2.00 | 1.00 | 0.50 | - | - | - |" in text
    assert "| `1x32k` | 2 | 3.00 | 2.00 | 4.00 | 2.00 | 1.00 | 1.50 | 1.50 |" in text
    assert "| `new` | 2 | - | 2.00 | 5.00 | 2.50 | - | - | - |" in text
    assert "dropout" not in text


def test_decode_has_times_of_installed_libraries_only():
    head = {**HEAD, "copy_bytes_per_s": {"256": 4e12, "512": 2e12}}
    place = {"case": "1x8k", "layout": "page16"}
    ours = {**place, "contender": "lctrain", "microseconds": 1234.56, "bytes_per_s": 2e12}
    results = [ours, {**place, "contender": "fa4", "error": "ModuleNotFoundError"}]
    results.append({**ours, "layout": "dense", "contender": "sdpa", "microseconds": 9.0})
    text = decode_table({**head, "results": results})
    assert "Copies move 4.00 TB/s." in text
    assert "FlashAttention-4" not in text
    assert "| 1x8k | page16 | 1,234.6 (2.00) | - |" in text
    assert "| 1x8k | dense | - | 9.0 (2.00) |" in text


def test_decode_has_configurations_and_prefixes():
    head = {**HEAD, "copy_bytes_per_s": {"256": 4e12}}
    place = {"case": "1x8k", "layout": "page16", "microseconds": 5.0, "bytes_per_s": 2e12}
    configs = [{**place, "contender": "lctrain", "config": name} for name in ("a:1", "b:2")]
    text = decode_table({**head, "results": [*configs, {**place, "contender": "sdpa"}]})
    assert "| lctrain `a:1` | lctrain `b:2` | PyTorch SDPA, `enable_gqa` |" in text
    assert "| 1x8k | page16 | 5.0 (2.00) | 5.0 (2.00) | 5.0 (2.00) |" in text
    assert "Configurations are rows x keys" in text
    assert "read once" not in text
    shared = {**place, "contender": "lctrain_shared", "speedup": 6.37}
    text = decode_table({**head, "results": [shared, {**place, "contender": "lctrain_own_pages"}]})
    assert "| lctrain, prefix copied | lctrain, prefix read once |" in text
    assert "| 1x8k | page16 | 5.0 (2.00) | 5.0 (2.00), 6.4x |" in text
    assert "Configurations" not in text


def test_shares_show_the_slowest_share():
    row = {"exchange": "keys", "whole_seconds": 0.8, "share_seconds": [0.1, 0.125]}
    settings = {"tokens": 131_072, "ranks": 2, "shape": "Llama-3.2-1B"}
    shares = [{**row, "efficiency": 0.8}]
    record = {**HEAD, "settings": settings, "shares": shares, "steps": []}
    text = shares_table(record)
    assert "131,072 tokens" in text
    assert "| keys | 0.8000 | 0.1250 | 0.800 |" in text
    assert "FSDP2" not in text
    step = {"strategy": "fsdp2", "seconds": 0.5, "of_plain": 1.25, "peak_memory_gib": 3.5}
    text = shares_table(record | {"steps": [step]})
    assert "Llama-3.2-1B" in text
    assert "| fsdp2 | 0.5000 | 1.250 | 3.50 |" in text


def test_generation_marks_projected_times():
    done = {"prefill_seconds": 1.5, "step_ms": 2.25, "tokens_per_s": 12345.6, "new_tokens": 512}
    done |= {"share_of_floor": 0.5, "decode_share": 0.75}
    results = {"graphs": done, "padded": {**done, "new_tokens": 64}}
    results["generate_batch"] = {"error": "RuntimeError"}
    case = {"shape": "1B", "requests": 64, "longest_prompt": 8192, "new_tokens": 512}
    case["log_prob_difference"] = {"tokens": 4096, "mean": 1.5e-4, "largest": 0.5}
    record = {**HEAD, "bandwidth": 4.2e12, "cases": {"batch": {**case, "results": results}}}
    text = generation_table(record)
    assert "1B, requests: 64, prompts of up to 8,192 tokens, 512 new tokens each:" in text
    assert "CUDA graphs | 1.50 | 2.25 | 12,346 | 0.50 (0.75) |" in text
    assert "SDPA | 1.50 | 2.25 | 12,346* | 0.50 (0.75) |" in text
    assert "`generate_batch`, SDPA | error | - | - | - |" in text
    results["generate_batch"] = {"error": "not run after 60 s"}
    assert "`generate_batch`, SDPA | not run | - | - | - |" in generation_table(record)
    assert "4,096 generated tokens" in text
    assert "1.5e-04 nats on average" in text
    assert "Share of both floors" not in text
    case |= {"floor_seconds": 1.5, "prefill_floor_seconds": 0.7}
    case["results"] = {"graphs": {**done, "share_of_floors": 0.55}, "padded": {"error": "none"}}
    text = generation_table({**record, "flops": 9.89e14, "cases": {"batch": case}})
    assert "take at least 0.70 s at 989 TFLOP/s. Share of both floors, 2.20 s" in text
    assert "in the whole time: `lctrain.generate`, CUDA graphs: 0.55." in text


def test_generation_takes_each_time_from_the_newest_record_that_has_it():
    done = {"prefill_seconds": 1.5, "step_ms": 2.25, "tokens_per_s": 10.0, "new_tokens": 8}
    done |= {"share_of_floor": 0.5, "decode_share": 0.75}
    sizes = {"shape": "1B", "requests": 64, "prompt_tokens": 99, "longest_prompt": 64}
    difference = {"tokens": 4, "mean": 1.5e-4, "largest": 0.5}
    case = {**sizes, "new_tokens": 8, "log_prob_difference": difference}
    missing = {"error": "not run after 60 s"}
    first = {"graphs": done, "eager": {**done, "tokens_per_s": 3.0}, "padded": missing}
    second = {"graphs": {**done, "tokens_per_s": 20.0}, "padded": done, "generate_batch": missing}
    head = {**HEAD, "bandwidth": 4.2e12}
    old = {**head, "cases": {"batch": {**case, "results": first}}}
    new = {**head, "date": "2026-12-01", "cases": {"batch": {**case, "results": second}}}
    text = generation_tables([old, new])
    assert text.index("2026-12-01") < text.index("2026-11-30")
    assert "graphs | 1.50 | 2.25 | 10 |" not in text
    assert "| `lctrain.generate`, CUDA graphs | 1.50 | 2.25 | 20 |" in text
    assert "| `lctrain.generate`, no graphs | 1.50 | 2.25 | 3 |" in text
    assert text.count("padded batch") == text.count("nats on average") == 1
    assert text.count("not run") == 1  # no record has generate_batch
    assert "2026-11-30" not in generation_tables([{**old, "cases": new["cases"]}, new])
    other = {**new, "cases": {"batch": {**case, "requests": 1, "results": second}}}
    assert "graphs | 1.50 | 2.25 | 10 |" in generation_tables([old, other])


def test_a_row_of_generation_needs_no_row_above_it():
    """A time may stand alone, in the table of an older record."""
    done = {"prefill_seconds": 1.5, "step_ms": 2.25, "tokens_per_s": 10.0, "new_tokens": 8}
    done |= {"share_of_floor": 0.5, "decode_share": 0.75}
    case = {"shape": "1B", "requests": 64, "longest_prompt": 64, "new_tokens": 8}
    results = dict.fromkeys(TITLES, done)
    cases = {"batch": {**case, "results": results}}
    text = generation_table({**HEAD, "bandwidth": 4.2e12, "cases": cases})
    rows = [line.split(" | ")[0] for line in text.splitlines() if "`" in line]
    assert len(set(rows)) == len(TITLES)
    assert all("generate" in row for row in rows)
    assert "greedy unless the row names temperature or beams" in text


def test_evaluation_has_speeds_ratios_and_the_sum_of_the_suite():
    at_4k = {"shape": "1B", "length": 4096, "documents": 2, "tokens": 8192, "seconds": 2.0}
    failed = {"shape": "1B", "length": 8192, "error": "OutOfMemoryError: 8 GiB"}
    answers = {"shape": "1B", "task": "ruler", "length": 4096, "prompts": 44, "seconds": 20.0}
    suite = {"shape": "1B", "lengths": [4096, 8192], "seconds": 30.0}
    other = {**suite, "shape": "135M", "task": "passkey"}
    record = {
        **HEAD,
        "perplexity": [{**at_4k, "forward_seconds": 1.9, "speed_ratio": 0.95}, failed],
        "answers": [{**answers, "prefill_seconds": 16.0, "time_ratio": 1.25}],
        "generated": [
            {
                **answers,
                "shortest": 2048,
                "first_seconds": 31.0,
                "prefill_seconds": 16.0,
                "time_ratio": 1.25,
            },
        ],
        "document": [
            {
                "shape": "1B",
                "task": "perplexity",
                "tokens": 2048,
                "seconds": 4.0,
                "peak_bytes": 3 * 2**29,
                "weights_bytes": 2**30,
                "logits_bytes": 2**31,
            }
        ],
        "suite": [
            {**suite, "task": "passkey"},
            {**suite, "task": "ruler"},
            other,
            {"shape": "135M", "task": "ruler", "lengths": [4096], "error": "not run after 501 s"},
        ],
    }
    text = evaluation_table(record)
    assert "| 4,096 | 2 | 4,096 | 0.95 |" in text
    assert "| 8,192 | error | - | - |" in text
    assert "| `ruler` | 4,096 | 44 | - | 20.0 | 16.0 | 1.25 |" in text
    assert "| 2,048 | 4 | 512 | 1.5 | 1.0 | 2.0 |" in text
    assert "1B, `lctrain-eval` at 4,096, 8,192 tokens" in text
    assert "| `ruler` | 2,048 to 4,096 | 44 | 31.0 | 20.0 | 16.0 | 1.25 |" in text
    assert text.count("| all | | 60 |") == text.count("| all |") == 1
    assert "| `ruler` | not run |" in text


def test_a_part_of_the_evaluation_suite_projects_the_whole():
    row = {"shape": "1B", "lengths": [4096], "seconds": 30.0, "documents": 8, "items": 5}
    tasks = ["passkey", "ruler", "perplexity"]
    record = {**HEAD, "perplexity": [], "answers": []}
    text = evaluation_table({**record, "suite": [{**row, "task": task} for task in tasks]})
    assert "| task | measured | seconds, projected |" in text
    assert "| `passkey` | all of it | 30 |" in text
    assert "| `ruler` | 5 of 10 prompts of each task, 30 s | 60 |" in text
    assert "| `perplexity` | 8 of 32 documents, 30 s | 120 |" in text
    assert "| all | | 210 |" in text


def test_evaluation_shows_each_row_once_and_suites_as_a_whole():
    found = {"shape": "1B", "task": "passkey", "length": 4096, "prompts": 20, "seconds": 20.0}
    found |= {"prefill_seconds": 16.0, "time_ratio": 1.25}
    missing = {"shape": "1B", "task": "ruler", "error": "not run after 85 s"}
    suite = [{"shape": "1B", "task": task, "lengths": [4096]} for task in ("passkey", "ruler")]
    done = [{**row, "seconds": 30.0} for row in suite]
    cut = [{**suite[0], "seconds": 31.0}, {**suite[1], "error": "not run after 190 s"}]
    first = {**HEAD, "answers": [found, missing], "suite": done}
    later = [{**found, "time_ratio": 1.5}, {**found, "task": "ruler"}]
    second = {**HEAD, "date": "2026-12-01", "answers": later, "suite": cut}
    text = evaluation_tables([first, second])
    assert "not run" not in text
    assert text.count("| `passkey` | 4,096 | 20 | - | 20.0 | 16.0 | 1.50 |") == 1
    assert text.count("| `ruler` | 4,096 |") == 1
    assert "| 1.25 |" in text
    assert text.count("| `passkey` | all of it | 30 |") == text.count("`passkey` | all of it") == 1
    assert evaluation_tables([{**first, "suite": []}, second]).count("not run") == 1
    assert "2026-11-30" not in evaluation_tables([first, {**first, "date": "2026-12-01"}])
