"""Runs modules in new processes that start at once, since they are forked.

`python -m MODULE` imports torch, Lightning and transformers for seconds. Here one process imports
them once per worker of pytest, and forks a process for every module to run. A forked process has
its own session, environment, folder and output, and ends as an interpreter does. Ranks that it
starts with `subprocess.Popen` of `python -m` can be forked, too.
"""

from __future__ import annotations

import array
import atexit
import gc
import importlib
import json
import os
import resource
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, ClassVar

ROOT = Path(__file__).parents[1]
IMPORTED = (
    "lightning.pytorch",
    "torch.distributed.fsdp",
    "transformers.models.llama.modeling_llama",
    "lctrain.build",
    "lctrain.data.datamodule",
    "lctrain.module",
)
"""Modules that a forked process has imported already: what most of them need."""
LONGEST_REQUEST = 1 << 20  # bytes
_server: socket.socket | None = None


class Forked:
    """A module that runs in a forked process: what `subprocess.Popen` would be of `python -m`.

    Args:
        module: Dotted name of the module, or absolute path of a .py file, which runs as `__main__`.
        *arguments: Its `sys.argv[1:]`.
        stdout: Open file of its output.
        stderr: Open file of its errors.
        cwd: Its current folder.
        env: Its environment variables besides those of this process.
        ignored: Whether it ignores warnings, as `python -W ignore` does.
        file_limit: The most bytes that it may write into one file, which simulates a full disk.
        ranks: How many processes it may start by `Popen` of `python -m` that are forked, too: see
            `RankPopen`.

    Attributes:
        pid: Id of the process, and of its session and process group.
        returncode: Its exit status, or the negative number of the signal that ended it; None
            before `wait` or `poll` has found that it has ended.
    """

    def __init__(
        self,
        module: str,
        *arguments: str,
        stdout: IO,
        stderr: IO,
        cwd: Path = ROOT,
        env: Mapping[str, str] | None = None,
        ignored: bool = False,
        file_limit: int | None = None,
        ranks: int = 0,
    ) -> None:
        request = {
            "module": module,
            "arguments": [str(argument) for argument in arguments],
            "cwd": str(cwd),
            "env": {**os.environ, "OMP_NUM_THREADS": "1", **(env or {})},
            "ignored": ignored,
            "file_limit": file_limit,
            "ranks": ranks,
        }
        read, write = os.pipe()
        try:
            _send(_connected(), request, (stdout.fileno(), stderr.fileno(), write))
        finally:
            os.close(write)
        self._status = os.fdopen(read)
        started = self._status.readline()
        assert started, "The process that forks has ended: its error is on stderr."
        self.pid = int(started)
        self.returncode: int | None = None

    def wait(self, timeout: float | None = None) -> int:
        """Returns the exit status once the process has ended.

        Raises:
            subprocess.TimeoutExpired: if it has not ended after `timeout` seconds.
        """
        if self.returncode is None:
            if not select.select([self._status], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(str(self.pid), timeout or 0.0)
            self.returncode = os.waitstatus_to_exitcode(int(self._status.readline()))
            self._status.close()
        return self.returncode

    def poll(self) -> int | None:
        """Returns the exit status if the process has ended."""
        try:
            return self.wait(0.0)
        except subprocess.TimeoutExpired:
            return None

    def send_signal(self, number: int) -> None:
        """Sends a signal to the process, unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)


def run_forked(
    module: str, *arguments: str, check: bool = True, **settings
) -> subprocess.CompletedProcess:
    """Runs a module in a forked process to its end, and returns its status, output and errors.

    Args:
        module: Dotted name of the module, or absolute path of a .py file.
        *arguments: Its `sys.argv[1:]`.
        check: Whether another exit status than 0 is an error.
        **settings: `cwd`, `env`, `ignored`, `file_limit` and `ranks` of `Forked`.

    Raises:
        AssertionError: with the output, if the module fails and `check` is true.
    """
    # Files: a pipe would end with the last child of the process, which may outlive it.
    with tempfile.TemporaryFile("w+") as stdout, tempfile.TemporaryFile("w+") as stderr:
        process = Forked(module, *arguments, stdout=stdout, stderr=stderr, **settings)
        try:
            status = process.wait()
        finally:
            process.send_signal(signal.SIGKILL)  # after a timeout of pytest
        texts = []
        for file in (stdout, stderr):
            file.seek(0)
            texts.append(file.buffer.read().decode(errors="replace"))
    assert not (check and status), "\n".join(texts)
    return subprocess.CompletedProcess([module, *arguments], status, *texts)


def _connected() -> socket.socket:
    """Returns the socket of the process that forks, which starts with the first request."""
    global _server
    if _server is None:
        _server, theirs = socket.socketpair()
        with theirs:
            process = subprocess.Popen(
                [sys.executable, "-m", "tests.forked", str(theirs.fileno())],
                cwd=ROOT,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
            )
        atexit.register(_end, _server, process)
    return _server


def _end(server: socket.socket, process: subprocess.Popen) -> None:
    """Ends the process that forks, which waits for requests."""
    server.close()
    process.wait()


def _send(server: socket.socket, request: dict, files: tuple[int, ...]) -> None:
    """Sends a request, and the open files of the process to fork."""
    content = json.dumps(request).encode()
    assert len(content) < LONGEST_REQUEST
    rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", files))
    server.sendmsg([len(content).to_bytes(8, "big")], [rights])
    server.sendall(content)


def _receive(server: socket.socket) -> tuple[dict, list[int]] | None:
    """Returns the next request and its open files; None if there will be no more."""
    files = array.array("i")
    length, rights, _, _ = server.recvmsg(8, socket.CMSG_SPACE(3 * files.itemsize))
    if not length:
        return None
    files.frombytes(rights[0][2])
    content = b""
    while len(content) < int.from_bytes(length, "big"):
        content += server.recv(LONGEST_REQUEST)
    return json.loads(content), list(files)


def _serve(server: socket.socket) -> None:
    """Forks a process for every request; returns in the forked process, or after the last one."""
    for module in IMPORTED:
        importlib.import_module(module)
    gc.collect()
    gc.freeze()  # so that no collection in a forked process copies the pages
    while (received := _receive(server)) is not None:
        request, files = received
        if os.fork() == 0:
            server.close()
            if _watch(files):
                _run(request, files)
                return
            os._exit(0)
        for file in files:
            os.close(file)
        with suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass


def _watch(files: list[int]) -> bool:
    """Forks once more: returns True in the new process, and False after it has ended."""
    status = files.pop()
    os.setsid()
    if (child := os.fork()) == 0:
        os.close(status)
        return True
    for file in files:
        os.close(file)
    os.write(status, f"{child}\n".encode())
    os.write(status, f"{os.waitpid(child, 0)[1]}\n".encode())
    return False


def _run(request: dict, files: list[int]) -> None:
    """Runs the module of a request in this process."""
    os.setsid()
    for own, file in zip((1, 2), files, strict=True):
        os.dup2(file, own)
        os.close(file)
    if (limit := request["file_limit"]) is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    if request["ignored"]:
        warnings.simplefilter("ignore")
    request |= _ranks_stand_by(request["ranks"])
    os.environ.clear()
    os.environ.update(request["env"])
    os.chdir(request["cwd"])
    module, sys.argv[1:] = request["module"], request["arguments"]
    is_file = module.endswith(".py")
    folders = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    sys.path[:1] = [str(Path(module).parent) if is_file else request["cwd"], *filter(None, folders)]
    if is_file:
        runpy.run_path(module, run_name="__main__")
    else:
        runpy.run_module(module, run_name="__main__", alter_sys=True)


class RankPopen(subprocess.Popen):
    """`Popen` of `python -m MODULE` as launchers call it, in a process that stands by.

    The process is a child of this one and in its process group, but for `start_new_session`. It
    was forked before this one has run anything, so it is as new as a process of `python -m`.
    """

    standing_by: ClassVar[list[tuple[int, int]]] = []
    """Id of every process, and the pipe from which it reads what it is to run."""

    def _execute_child(self, args, executable, preexec_fn, close_fds, pass_fds, cwd, env, *rest):
        python, *options = args if isinstance(args, (list, tuple)) else [args]
        plain = [option for option in options if option != "-u"]
        if python != sys.executable or plain[:1] != ["-m"]:
            return super()._execute_child(
                *(args, executable, preexec_fn, close_fds, pass_fds, cwd, env, *rest)
            )  # another program than Python
        assert self.standing_by, "More ranks were started than `ranks` of the forked process."
        assert preexec_fn is None, "A rank that stands by runs no function of its launcher."
        files, start_new_session = rest[3:9], rest[14]
        assert set(files) == {-1}, "The output of a rank that stands by is that of its launcher."
        self.pid, pipe = self.standing_by.pop()
        self._child_created = True
        request = {
            "module": plain[1],
            "arguments": plain[2:],
            "cwd": str(Path(cwd or ".").absolute()),
            "env": dict(os.environ if env is None else env),
            "new_session": start_new_session,
        }
        with os.fdopen(pipe, "w") as file:
            json.dump(request, file)


def _ranks_stand_by(ranks: int) -> dict:
    """Forks processes that wait to be ranks.

    Returns:
        In this process an empty dictionary; in a forked one what it is to run, once it is a rank.
    """
    if not ranks:
        return {}
    for _ in range(ranks):
        read, write = os.pipe()
        if (child := os.fork()) == 0:
            os.close(write)
            for _, pipe in RankPopen.standing_by:
                os.close(pipe)
            with os.fdopen(read) as file:
                asked = file.read()
            if not asked:  # it was not needed
                os._exit(0)
            request = json.loads(asked)
            if request["new_session"]:
                os.setsid()
            return request
        os.close(read)
        RankPopen.standing_by.append((child, write))
    plain = subprocess.Popen
    for module in list(sys.modules.values()):  # torchrun's has imported it by name
        if vars(module).get("Popen") is plain:
            module.Popen = RankPopen
    return {}


if __name__ == "__main__":
    _serve(socket.socket(fileno=int(sys.argv[1])))
