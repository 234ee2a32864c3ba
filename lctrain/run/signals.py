"""Signals that ask a run to stop. The first ends it after its step, the second at once."""

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
"""Under torchrun a Ctrl-C comes twice, from the terminal and from torchrun: so close, it is one."""


class StopRun(BaseException):
    """Raised when a signal asks the run to end.

    No Exception, so that error handlers do not catch it.

    Attributes:
        number: The signal.
        step: Optimizer steps taken; None outside of training.
    """

    def __init__(self, number: int, step: int | None = None) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.number = number
        self.step = step

    @property
    def status(self) -> int:
        """Exit status, as a shell reports a process that the signal ended."""
        return 128 + self.number


class StopSignals:
    """Handles SIGINT, SIGTERM, SIGHUP and SIGUSR1 inside a with block.

    While the training loop runs (`waits` is set), the first signal is kept in `received` until the
    loop looks; at any other time it raises StopRun where the program is. A second signal ends the
    process at once, with the same exit status.

    Attributes:
        received: The first signal; None before.
        waits: Whether somebody looks at `received` after every step.
        end_others: Sends a signal to other processes of the run, which this one started.
    """

    def __init__(self) -> None:
        """Creates the object; handlers are installed later."""
        self.received: int | None = None
        self.waits = False
        self.end_others: Callable[[int], None] = lambda number: None
        self._since = 0.0
        self._previous: dict[int, Any] = {}

    def install(self, *numbers: int) -> None:
        """Installs the handlers, in the main thread only, as Python requires."""
        if threading.current_thread() is not threading.main_thread():
            return
        for number in numbers:
            previous = signal.signal(number, self._handle)
            self._previous.setdefault(number, previous)

    def __enter__(self) -> StopSignals:
        # SIGUSR1 belongs to Lightning's plugin inside a job of SLURM, until training starts.
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
    """Context that turns the end by a signal into a message and an exit status.

    Args:
        signals: Signals of the run.
        checkpoints: Directory of the run's checkpoints; None for a run without checkpoints.

    Raises:
        SystemExit: with 128 + the signal, as a shell would report it; with 0 in a rank that
            Lightning has started, which would otherwise kill the first one for it.
    """
    try:
        yield
    except StopRun as caught:
        stop = caught
    except Exception as error:
        if signals.received is None:
            raise
        stop = StopRun(signals.received)  # another rank was faster, and this one lost it
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
    """Writes a line past any buffer, which a signal handler must not touch."""
    with suppress(OSError):
        os.write(2, f"\n{text}\n".encode())
