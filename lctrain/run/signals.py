"""Handles signals that stop a run: the first after its step, the second immediately."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from lctrain.run.rank import is_launched_by_lightning, is_rank_zero

SIGNALS = tuple(
    getattr(signal, name)
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")
    if hasattr(signal, name)
)
ONE_SIGNAL_S = 3.0
"""Seconds within which a second signal is ignored under torchrun, which repeats a Ctrl-C of the
terminal."""


class StopRun(BaseException):
    """Raised when a signal stops the run.

    It is not a subclass of Exception, so that general error handlers do not catch it.

    Attributes:
        number: Number of the signal.
        step: Number of optimizer steps taken; None outside of training.
    """

    def __init__(self, number: int, step: int | None = None) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.number = number
        self.step = step

    @property
    def status(self) -> int:
        """Exit status that a shell reports for a process ended by the signal: 128 + number."""
        return 128 + self.number


class StopSignals:
    """Context manager that handles SIGINT, SIGTERM, SIGHUP and SIGUSR1.

    While the training loop runs (`waits` is true), the first signal is stored in `received`, and
    the loop ends after its step. At other times the first signal raises StopRun immediately. A
    second signal ends the process immediately, with the same exit status.

    Attributes:
        received: Number of the first signal; None before a signal.
        waits: Whether the training loop checks `received` after every step.
        end_others: Function that sends a signal to the ranks which this process started.
    """

    def __init__(self) -> None:
        """Creates the object without installing handlers; the with statement installs them."""
        self.received: int | None = None
        self.waits = False
        self.end_others: Callable[[int], None] = lambda number: None
        self._since = 0.0
        self._previous: dict[int, Any] = {}

    def install(self, *numbers: int) -> None:
        """Installs handlers of signals. It does nothing outside of the main thread.

        Args:
            *numbers: Numbers of the signals.
        """
        if threading.current_thread() is not threading.main_thread():
            return
        for number in numbers:
            previous = signal.signal(number, self._handle)
            self._previous.setdefault(number, previous)

    def __enter__(self) -> StopSignals:
        # In a SLURM job, Lightning's plugin handles SIGUSR1 until training starts.
        slurm = "SLURM_JOB_ID" in os.environ
        self.install(*(n for n in SIGNALS if not (slurm and n == signal.SIGUSR1)))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for number, previous in self._previous.items():
            if previous is not None:
                signal.signal(number, previous)
        self._previous = {}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if self.received is not None:
            if "TORCHELASTIC_RUN_ID" in os.environ and self._seconds() < ONE_SIGNAL_S:
                return
            if is_rank_zero():
                _say(f"{name} again: ending at once.")
            self.end_others(signal.SIGKILL)
            os._exit(128 + number)
        self.received = number
        self._since = time.monotonic()
        if not self.waits:
            raise StopRun(number)
        if is_rank_zero():
            _say(
                f"{name}: ending this step and saving a checkpoint. Once more ends the run at once."
            )

    def _seconds(self) -> float:
        return time.monotonic() - self._since


@contextmanager
def ends_in_order(signals: StopSignals, checkpoints: Path | None) -> Iterator[None]:
    """Context manager that turns StopRun into a message and an exit status.

    Args:
        signals: Signal handlers of the run.
        checkpoints: Directory of the run's checkpoints; None for a run without checkpoints.

    Raises:
        SystemExit: if a signal stopped the run. The status is 128 + the signal's number. It is 0 in
            a rank that Lightning started, since Lightning would otherwise kill rank 0.
    """
    try:
        yield
    except StopRun as caught:
        stop = caught
    except Exception as error:
        if signals.received is None:
            raise
        stop = StopRun(signals.received)  # another rank stopped first, so a collective failed here
        stop.__cause__ = error
    else:
        return
    if stop.step is None:
        signals.end_others(signal.SIGTERM)
    if is_rank_zero():
        _say(_farewell(stop, checkpoints))
    raise SystemExit(0 if is_launched_by_lightning() else stop.status) from None


def _farewell(stop: StopRun, checkpoints: Path | None) -> str:
    from lctrain.run.resume import checkpoints_in

    name = signal.Signals(stop.number).name
    if checkpoints is None:
        return f"Stopped by {name}."
    where = "outside of training" if stop.step is None else f"at step {stop.step}"
    newest = next(iter(checkpoints_in(checkpoints)), None)
    if newest is None:
        return f"Stopped by {name} {where}. There is no checkpoint to go on from."
    return f"Stopped by {name} {where}. The same command with ckpt_path=last goes on from {newest}."


def _say(text: str) -> None:
    """Writes a line to stderr without a buffer, since a signal handler must not use one."""
    with suppress(OSError):
        os.write(2, f"\n{text}\n".encode())
