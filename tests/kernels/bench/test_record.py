"""Tests the JSON of a run: written, read back, and refused in another format."""

import json

import pytest

from lctrain_kernels.bench.record import BenchmarkRecord


def test_a_saved_record_loads_equal(record, tmp_path):
    path = tmp_path / "results" / "run.json"
    record.save(path)
    assert BenchmarkRecord.load(path) == record


def test_the_file_names_device_versions_and_date(record, tmp_path):
    record.save(tmp_path / "run.json")
    values = json.loads((tmp_path / "run.json").read_text())
    assert values["schema"] == 1
    assert values["device"] == "GPU X"
    assert values["versions"]["triton"] == "3.6.0"
    assert values["date"].startswith("2026-11-23")
    assert set(values["results"][0]) >= {"workload", "peer", "forward_ms", "backward_tflops"}


def test_only_results_with_figures_are_found(record):
    assert record.find("1x32k", "fa2").forward_ms == 3.0
    assert record.find("1x32k", "fla") is None
    assert record.find("mix32k_dropout", "fa4") is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda values: values.update(schema=7), "must have schema 1, got 7"),
        (lambda values: values.pop("device"), "must have the fields"),
        (lambda values: values["results"][0].update(speed=1), "result with wrong fields"),
        (lambda values: values["results"][0].update(status="fine"), "unknown statuses"),
    ],
    ids=["schema", "field", "result field", "status"],
)
def test_a_file_of_another_shape_is_refused(record, tmp_path, change, message):
    path = tmp_path / "run.json"
    record.save(path)
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))
    with pytest.raises(ValueError, match=message):
        BenchmarkRecord.load(path)


def test_a_file_that_is_not_json_is_refused(tmp_path):
    path = tmp_path / "run.json"
    path.write_text("{")
    with pytest.raises(ValueError, match="must be JSON"):
        BenchmarkRecord.load(path)
