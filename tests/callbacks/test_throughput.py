"""Tests ThroughputMonitor: it counts real tokens, and waits for the device only when it logs."""

from types import SimpleNamespace

import pytest
import torch

from lctrain.callbacks import StepCheckpoint, ThroughputMonitor
from lctrain.callbacks.throughput import Throughput, peak_memory_gib
from lctrain.config import OptimConfig
from lctrain.flops import FlopCounter
from lctrain.module import LongContextModule
from tests.numerics import as_float32
from tests.training import loader, make_batch, make_trainer

PACKS = [make_batch([12, 5], 0), make_batch([30], 1), make_batch([7, 8, 9], 2), make_batch([4], 3)]


def fit(tmp_path, make_llama, monitor, callbacks=(), **settings):
    module = LongContextModule(make_llama(), OptimConfig())
    trainer = make_trainer(tmp_path, [monitor, *callbacks], **settings)
    trainer.fit(module, loader(PACKS))
    return trainer, module


def test_counts(tmp_path, make_llama):
    monitor = ThroughputMonitor(max_tokens=32)
    trainer, module = fit(tmp_path, make_llama, monitor, log_every_n_steps=2)
    counter = FlopCounter.of(module.model)
    assert monitor.total.tokens == sum(batch.num_tokens for batch in PACKS)
    assert monitor.total.fill == monitor.total.tokens / (4 * 32)
    assert monitor.total.flops == sum(counter.step_flops(batch.lengths) for batch in PACKS)
    assert monitor.latest.tokens == PACKS[2].num_tokens + PACKS[3].num_tokens
    assert monitor.steady.tokens == monitor.latest.tokens
    logged = trainer.callback_metrics
    assert float(logged["throughput/fill"]) == as_float32(monitor.latest.fill)
    assert float(logged["throughput/tokens"]) == monitor.total.tokens
    assert float(logged["throughput/tokens_per_second"]) > 0
    assert float(logged["memory/peak_gib"]) > 0
    assert "throughput/mfu" not in logged  # no peak is known for a CPU


def test_steps_after_the_last_logging_step_count(tmp_path, make_llama):
    monitor = ThroughputMonitor()
    fit(tmp_path, make_llama, monitor, log_every_n_steps=3)
    assert monitor.total.tokens == sum(batch.num_tokens for batch in PACKS)
    assert monitor.total.fill is None


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("stop", [2, 3])
def test_a_resumed_run_continues_the_count_of_tokens(tmp_path, make_llama, every, stop):
    """The count continues from a checkpoint between two logging steps, too."""
    settings = {"log_every_n_steps": every, "enable_checkpointing": True}
    saves = StepCheckpoint(tmp_path, every_n_steps=1, keep=4)
    fit(tmp_path, make_llama, ThroughputMonitor(), [saves], **settings)
    resumed = ThroughputMonitor()
    saves = StepCheckpoint(tmp_path / "resumed", every_n_steps=1)
    trainer = make_trainer(tmp_path, [resumed, saves], **settings)
    module = LongContextModule(make_llama(), OptimConfig())
    path = tmp_path / f"step-{stop:08d}.ckpt"
    trainer.fit(module, loader(PACKS), ckpt_path=path, weights_only=True)
    before = sum(batch.num_tokens for batch in PACKS[:stop])
    assert resumed.total.tokens > 0
    assert float(trainer.callback_metrics["throughput/tokens"]) == before + resumed.total.tokens


def test_reads_the_clock_of_the_device_only_when_it_logs(tmp_path, make_llama, monkeypatch):
    waits = []
    monkeypatch.setattr("lctrain.callbacks.throughput._wait", lambda device: waits.append(device))
    fit(tmp_path, make_llama, ThroughputMonitor(), log_every_n_steps=2)
    assert len(waits) == 2


def test_checkpoints_and_validation_do_not_count(tmp_path, make_llama, monkeypatch):
    """Only saving a checkpoint advances this fake clock, so the measured time is zero."""
    now = [0.0]
    clock = SimpleNamespace(perf_counter=lambda: now[0])
    monkeypatch.setattr("lctrain.callbacks.throughput.time", clock)

    class SlowCheckpoint(StepCheckpoint):
        def save(self, trainer):
            super().save(trainer)
            now[0] += 100.0

    monitor = ThroughputMonitor()
    fit(
        tmp_path,
        make_llama,
        monitor,
        [SlowCheckpoint(tmp_path / "c", every_n_steps=1)],
        enable_checkpointing=True,
    )
    assert now[0] > 0.0
    assert monitor.total.seconds == 0.0
    assert monitor.total.tokens_per_second == 0.0


def test_sums_and_differences():
    a, b = Throughput(1, 2, 3, 4), Throughput(10, 20, 30, 40)
    assert b - a == Throughput(9, 18, 27, 36)
    assert a + b == Throughput(11, 22, 33, 44)


@pytest.mark.gpu
def test_mfu_on_a_known_gpu(tmp_path, make_llama):
    from lctrain.flops import peak_flops

    trainer, _ = fit(tmp_path, make_llama, ThroughputMonitor(32), accelerator="gpu")
    known = peak_flops(torch.cuda.get_device_name()) is not None
    assert ("throughput/mfu" in trainer.callback_metrics) == known
    assert peak_memory_gib(torch.device("cuda")) > 0
