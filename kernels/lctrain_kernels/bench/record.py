"""The record of a benchmark run: a JSON file whose fields are checked when it is read."""

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from lctrain_kernels.strict_json import write_json

SCHEMA = 1
STATUSES = ("ok", "unsupported", "error", "failed_check")


@dataclass(frozen=True)
class Result:
    """Result of one peer on one workload.

    Attributes:
        workload: Name of the workload.
        peer: Name of the peer.
        status: "ok", "unsupported", "error" or "failed_check". Only "ok" has figures.
        reason: Reason why the status is not "ok".
        forward_ms: Median time of the forward, in milliseconds.
        backward_ms: Median time of the backward, in milliseconds.
        forward_tflops: TFLOP/s of the forward, from the workload's count of FLOPs.
        backward_tflops: TFLOP/s of the backward, from the workload's count of FLOPs.
        step_ms: Median time of forward and backward together, where only that is measured, in
            milliseconds.
        peak_bytes: Peak memory of forward and backward beyond the inputs, in bytes.
        forward_peak_bytes: Peak memory of a forward without autograd graph, in bytes.
        error_ratios: Tensor name -> error over that of plain PyTorch, measured with `--check`.
    """

    workload: str
    peer: str
    status: str
    reason: str | None = None
    forward_ms: float | None = None
    backward_ms: float | None = None
    forward_tflops: float | None = None
    backward_tflops: float | None = None
    step_ms: float | None = None
    peak_bytes: int | None = None
    forward_peak_bytes: int | None = None
    error_ratios: dict[str, float] | None = None


@dataclass
class BenchmarkRecord:
    """Record of a benchmark run: device, date, versions, settings and results.

    Attributes:
        device: Name of the GPU.
        date: Time of the run, UTC, ISO 8601.
        versions: Versions of torch, triton and every peer.
        settings: Dtype, repetitions and milliseconds per timing.
        workloads: Name of each workload -> its fields.
        results: One result per peer and workload.
    """

    device: str
    date: str
    versions: dict[str, str]
    settings: dict[str, Any]
    workloads: dict[str, dict[str, Any]] = field(default_factory=dict)
    results: list[Result] = field(default_factory=list)

    def find(self, workload: str, peer: str) -> Result | None:
        """Returns the result of a peer on a workload; None if it is missing or has no figures."""
        for result in self.results:
            if (result.workload, result.peer, result.status) == (workload, peer, "ok"):
                return result
        return None

    def save(self, path: Path) -> None:
        """Writes the record as a JSON file, and creates the folders above it."""
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {"schema": SCHEMA, **asdict(self)}, indent=1)

    @classmethod
    def load(cls, path: Path) -> "BenchmarkRecord":
        """Reads a record from a JSON file that `save` wrote.

        Raises:
            ValueError: if the file is not such a record.
        """
        remedy = "Run lctrain-bench again to write a new one."
        try:
            values = json.loads(path.read_text())
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} must be JSON, got: {error}. {remedy}") from error
        schema = values.pop("schema", None) if isinstance(values, dict) else None
        if schema != SCHEMA:
            raise ValueError(f"{path} must have schema {SCHEMA}, got {schema}. {remedy}")
        expected = {f.name for f in fields(cls)}
        if set(values) != expected:
            wrong = sorted(set(values) ^ expected)
            raise ValueError(f"{path} must have the fields of schema {SCHEMA}: {wrong}. {remedy}")
        try:
            values["results"] = [Result(**result) for result in values["results"]]
        except TypeError as error:
            raise ValueError(f"{path} has a result with wrong fields: {error}. {remedy}") from error
        statuses = {result.status for result in values["results"]} - set(STATUSES)
        if statuses:
            raise ValueError(f"{path} has unknown statuses {sorted(statuses)}. {remedy}")
        return cls(**values)
