"""Fixtures for the benchmark's tests: small records and workloads."""

import pytest

from lctrain_kernels.bench.record import BenchmarkRecord, Result
from lctrain_kernels.bench.workloads import Workload


@pytest.fixture
def tiny_workload() -> Workload:
    return Workload("tiny", (13, 1, 20), heads=4, heads_kv=2, head_dim=16)


@pytest.fixture
def record() -> BenchmarkRecord:
    """A record with two peers on 1x32k, and with lctrain alone on mix32k_dropout."""
    figures = {"forward_ms": 2.0, "backward_ms": 5.0, "peak_bytes": 2**30}
    speeds = {"forward_tflops": 300.0, "backward_tflops": 250.0}
    slower = {"forward_ms": 3.0, "backward_ms": 6.0, "peak_bytes": 2**31}
    return BenchmarkRecord(
        device="GPU X",
        date="2026-11-23T08:00:00+00:00",
        versions={"torch": "2.11.0", "triton": "3.6.0"},
        settings={"dtype": "bfloat16", "repetitions": 1, "milliseconds": 100},
        results=[
            Result("1x32k", "lctrain", "ok", **figures, **speeds, error_ratios={"out": 0.9}),
            Result("1x32k", "fa2", "ok", **slower, forward_tflops=200.0, backward_tflops=208.0),
            Result("1x32k", "fla", "error", "RuntimeError: no"),
            Result("mix32k_dropout", "lctrain", "ok", **figures, **speeds),
            Result("mix32k_dropout", "fa4", "unsupported", "has no dropout"),
        ],
    )
