"""Tests the table of training steps: it shows the newest run of each setting, on equal terms."""

import pytest

from lctrain_kernels.bench import report
from lctrain_kernels.bench.step_report import newest_step_record, step_table


def run(contender, checkpointing, tokens, memory=8.0, number=1):
    """Returns one line of a record."""
    return {
        "run": number,
        "contender": contender,
        "shape": "1B",
        "workload": "mix32k",
        "checkpointing": checkpointing,
        "tokens_per_s": tokens,
        "peak_gib": memory,
    }


RECORD = {
    "device": "GPU X",
    "date": "2026-11-29",
    "versions": {"torch": "2.11"},
    "settings": {"dtype": "bfloat16"},
    "runs": [
        run("ours", "none", 100.0),
        run("ours", "none", 200.0, number=2),
        run("ours", "every layer, attention outputs kept", 150.0),
        run("theirs", "none", 160.0, 9.0),
        run("theirs", "every layer", 100.0),
    ],
}


def test_the_newest_run_counts():
    assert "| 1B | mix32k | none | 200 (8.0 GiB) | 160 (9.0 GiB) | 1.25 |" in step_table(RECORD)


def test_kept_attention_is_compared_with_the_peer_s_checkpointing():
    row = next(line for line in step_table(RECORD).splitlines() if "outputs kept" in line)
    assert row.endswith("| 150 (8.0 GiB) | 100 (8.0 GiB) | 1.50 |")


def test_a_missing_contender_is_a_dash():
    assert "| every layer | - | 100 (8.0 GiB) | - |" in step_table(RECORD)


def test_several_peers_have_a_table_of_ratios():
    runs = [*RECORD["runs"], {**run("third", "none", 50.0), "mfu": 0.25}]
    text = step_table({**RECORD, "runs": runs})
    assert "| 200 (8.0 GiB) | 160 (9.0 GiB) | 50 (8.0 GiB, MFU 0.25) | 1.25 |" in text
    assert "| 1B | mix32k | none | 1.25 | 4.00 |" in text


def test_failures_and_missing_contenders_are_named():
    failed = {**run("theirs", "none", None), "status": "out_of_memory", "reason": "too large"}
    record = {**RECORD, "runs": [RECORD["runs"][0], failed], "missing": {"third": "no module"}}
    assert "| none | 100 (8.0 GiB) | out of memory | - |" in step_table(record)
    assert "Not measured: third (no module)." in step_table(record)


def test_the_optimizer_is_named():
    record = {**RECORD, "settings": {"dtype": "bfloat16", "optimizer": True}}
    assert "forward and backward with fused AdamW" in step_table(record)


def test_a_page_without_the_end_marker_is_refused():
    with pytest.raises(ValueError, match="must hold the lines"):
        report.readme_with_steps("<!-- step tables: begin -->")


def test_the_newest_record_is_of_a_named_device():
    assert "NVIDIA" in newest_step_record()["device"]
