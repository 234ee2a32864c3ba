"""A second signal: it ends the process, unless torchrun has sent the first one once more."""

import os
import signal
from types import SimpleNamespace

import pytest

from lctrain.run import signals as module
from lctrain.run.signals import ONE_SIGNAL_S, StopSignals


class EndedError(Exception):
    """Stands for the end of the process, with its exit status."""


@pytest.fixture
def second(monkeypatch):
    """Returns second(seconds): the exit status after a second signal so much later, or None."""

    def ended(status):
        raise EndedError(status)

    def after(seconds):
        now = iter((100.0, 100.0 + seconds))
        # Replaced in the module only, since other threads read the clock as well.
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: next(now)))
        system = SimpleNamespace(environ=os.environ, write=os.write, _exit=ended)
        monkeypatch.setattr(module, "os", system)
        stop, sent = StopSignals(), []
        stop.waits, stop.end_others = True, sent.append
        stop._handle(signal.SIGINT, None)
        try:
            stop._handle(signal.SIGTERM, None)
        except EndedError as error:
            assert sent == [signal.SIGKILL]
            return error.args[0]
        assert stop.received == signal.SIGINT
        assert sent == []
        return None

    return after


def test_under_torchrun_two_signals_within_seconds_are_one(second, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    assert second(0.9 * ONE_SIGNAL_S) is None
    assert second(1.1 * ONE_SIGNAL_S) == 128 + signal.SIGTERM


def test_without_torchrun_a_second_signal_ends_the_process(second, monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    assert second(0.1) == 128 + signal.SIGTERM
