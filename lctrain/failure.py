"""Reports the error of a failed command: a message for an expected error, a traceback for a bug.

An error is expected if lctrain raised it deliberately, if it is about a file or about memory, or if
the configuration cannot be composed. Its message names the value and the remedy. Every other error
is a bug of lctrain or of a library.
"""

from __future__ import annotations

import dis
import json
import os
import re
import sys
import time
import traceback
from collections.abc import Sequence
from types import TracebackType

from lctrain.config_errors import Known, explain_config_error
from lctrain.pluralize import pluralize
from lctrain.run.rank import local_rank

EXPECTED_STATUS = 2
"""Exit status after an expected error."""
BUG_STATUS = 1
MOST_LINES = 10
"""Largest number of lines in a message, the hint about the traceback included."""
FULL_ERROR = "HYDRA_FULL_ERROR"
OURS = ("lctrain", "lctrain_kernels")
_WORKER = re.compile(r"^Caught (\w+) in (\w+) worker process (\d+)\.\n", re.MULTILINE)
_KILLED = re.compile(r"DataLoader worker \(pid[^)]*\) (?:is killed by signal: (\w+)|exited)")
_CONFIG_MODULES = ("hydra", "omegaconf", "yaml")


def explain(
    error: BaseException, overrides: Sequence[str] = (), known: Known = tuple
) -> str | None:
    """Returns the message of an expected error, or None for a bug.

    Args:
        error: The error, with its traceback.
        overrides: Overrides of the command line.
        known: Returns the dotted names of all keys of the configuration.
    """
    module = type(error).__module__.partition(".")[0]
    plain = str(error).startswith(("Config group override must be", "Unexpected type for root"))
    if (
        module in _CONFIG_MODULES or plain or _reads_config(error)
    ):  # Hydra and OmegaConf also raise errors of Python's own types
        return explain_config_error(error, overrides, known)
    if killed := _KILLED.search(str(error)):
        how = f"by {killed[1]}" if killed[1] else "unexpectedly"
        return (
            f"a worker process that builds batches ended {how}. Memory may have run out: lower "
            "data.num_workers, or use data.num_workers=0 to build batches in the run itself."
        )
    if worker := _WORKER.search(str(error)):
        return _from_worker(str(error), worker)
    if module in OURS or (isinstance(error, ValueError) and _raised_on_purpose(error)):
        return str(error)
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        place = error.filename if error.filename2 is None else error.filename2  # a rename's target
        return f"{place}: {error.strerror}. Check the path, its permissions and the free space."
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror} (errno {error.errno}). Check the disk and the permissions."
    if type(error).__name__ == "OutOfMemoryError":
        more = "Use fewer tokens at a time, a smaller model, or a GPU with more memory."
        if hasattr(error, "remedy"):  # of a training step
            setting = "" if error.remedy is None else f"{error.remedy}, or lower data.max_tokens"
            more = setting or "Lower data.max_tokens"
            more += "; memory.plan=true says what a step takes and what fits."
        return f"{str(error).splitlines()[0]} {more}"
    if type(error).__name__ == "MisconfigurationException":  # Lightning refuses a setting
        return f"{' '.join(str(error).split())} Check the settings of trainer."
    return None


def report_failure(
    program: str, error: BaseException, overrides: Sequence[str] = (), known: Known = tuple
) -> int:
    """Prints an error to stderr, as a message or a traceback.

    With several ranks on a machine, only local rank 0 prints the whole message; the other ranks
    print its first line. Under torchrun, the message is also written to the error file, which
    torchrun's summary shows.

    Args:
        program: Name of the command.
        error: The error, with its traceback.
        overrides: Overrides of the command line.
        known: Returns the dotted names of all keys of the configuration.

    Returns:
        The exit status.
    """
    if isinstance(error, BrokenPipeError):  # the reader of the output, such as `head`, has ended
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BUG_STATUS
    message = explain(error, overrides, known)
    rank = local_rank()
    if message is None:
        traceback.print_exception(error)
    elif rank != 0:
        print(f"{program} (rank {rank}): {message.splitlines()[0]}", file=sys.stderr)
    else:
        print(shorten(f"{program}: {message}"), file=sys.stderr)
        print(f"({FULL_ERROR}=1 shows where it was raised.)", file=sys.stderr, flush=True)
    _tell_torchrun(message or f"{type(error).__name__}: {error}")
    return BUG_STATUS if message is None else EXPECTED_STATUS


def shorten(message: str) -> str:
    """Returns at most MOST_LINES - 1 lines of a message, with a note if lines are left out."""
    lines = [line for line in message.splitlines() if line.strip()]
    if len(lines) < MOST_LINES:
        return "\n".join(lines)
    kept = lines[: MOST_LINES - 2]
    return "\n".join([*kept, f"... and {pluralize(len(lines) - len(kept), 'more line')}"])


def _raised_on_purpose(error: BaseException) -> bool:
    """Whether a `raise` statement of lctrain raised an error.

    A ValueError of a call such as int("x") in lctrain is a bug.
    """
    last = _innermost(error.__traceback__)
    if last is None:
        return False
    name = str(last.tb_frame.f_globals.get("__name__", ""))
    if name == "__main__":
        spec = last.tb_frame.f_globals.get("__spec__")
        name = getattr(spec, "name", "") or ""
    code = last.tb_frame.f_code.co_code
    instruction = dis.opname[code[last.tb_lasti]] if last.tb_lasti >= 0 else ""
    return name.partition(".")[0] in OURS and instruction == "RAISE_VARARGS"


def _reads_config(error: BaseException) -> bool:
    """Whether Hydra failed because a configuration file is not UTF-8."""
    trace = error.__traceback__
    while isinstance(error, UnicodeDecodeError) and trace is not None:
        if trace.tb_frame.f_globals.get("__name__") == "hydra._internal.config_repository":
            return True
        trace = trace.tb_next
    return False


def _innermost(trace: TracebackType | None) -> TracebackType | None:
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace


def _from_worker(text: str, worker: re.Match[str]) -> str | None:
    """Returns the message of an expected error in a worker process; None if the error is a bug.

    Args:
        text: Message of the error, which contains the worker's traceback.
        worker: Match of _WORKER: type of the error, and name and number of the worker.
    """
    kind, number = worker[1], worker[3]
    frames = re.findall(r'^  File "(.*?)", line \d+, in .*\n    (.*)$', text, re.MULTILINE)
    marked = re.search(rf"^(?:[\w.]+\.)?{kind}: (.*)", text[worker.end() :], re.MULTILINE | re.S)
    if marked is None or not frames:
        return None
    path, line = frames[-1]
    ours = any(f"{os.sep}{folder}{os.sep}" in path for folder in (*OURS, "kernels"))
    if not (ours and line.startswith("raise")):
        return None
    return f"{marked[1].strip()} (raised in worker process {number})"


def _tell_torchrun(message: str) -> None:
    """Writes torchrun's error file, which its summary shows, if torchrun started this process."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not path:
        return
    information = {"timestamp": str(int(time.time())), "py_callstack": message}
    record = {"message": {"message": message, "extraInfo": information}}
    try:
        with open(path, "w") as file:
            json.dump(record, file)
    except OSError:
        return  # the message has been printed; only torchrun's summary lacks it
