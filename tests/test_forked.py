"""Tests that a forked process does what `python -m MODULE` does, and runs itself as one of them."""

import atexit
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tests.forked import IMPORTED, Forked, run_forked

NAME = "tests.test_forked"


def main(what: str) -> None:
    """Runs in the forked process."""
    if what == "see":
        import lightning.pytorch  # noqa: F401 - it is there already

        atexit.register(print, "at exit")
        threading.Thread(target=lambda: (time.sleep(0.1), print("thread"))).start()
        print(Path.cwd(), os.environ["COLOUR"], os.environ.get("LEFT_OUT"), sys.argv[2:])
        print(sys.modules["__main__"].__spec__.name, os.getsid(0) == os.getpid() == os.getpgid(0))
    elif what == "modules":
        print(*sys.modules)
    elif what == "write":
        Path("file").write_bytes(bytes(2000))
    elif what == "fail":
        raise ValueError("it failed")
    elif what == "wait":
        time.sleep(3600)
    elif what == "launch":
        launch()
    elif what == "rank":
        print(Path.cwd(), os.environ["RANK"], sys.argv[2:], sys.modules["__main__"].__spec__.name)
        print(
            os.getppid() == int(os.environ["LAUNCHER"]), os.getpgid(0) == os.getpgid(os.getppid())
        )
        if os.environ["RANK"] == "1":
            sys.stdout.flush()
            Path("waits").touch()
            time.sleep(3600)
        sys.exit(3)
    else:
        sys.exit(7)


def launch() -> None:
    """Starts two ranks as launchers do, ends the second by a signal, and prints how they end."""
    from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler

    statuses = []
    for rank in range(2):
        process = subprocess.Popen(
            [sys.executable, "-u", "-m", NAME, "rank", "a b"],
            env=os.environ | {"LAUNCHER": str(os.getpid()), "RANK": str(rank)},
            cwd="folder",
            start_new_session=rank == 1,
        )
        if rank == 1:
            while process.poll() is None and not Path("folder/waits").exists():
                time.sleep(0.01)
            os.killpg(process.pid, signal.SIGTERM)
        statuses.append(process.wait())
    echo = subprocess.run(["echo", "another program"], capture_output=True, text=True)
    print(statuses, subprocess_handler.Popen is subprocess.Popen, echo.stdout)


def test_it_has_its_own_arguments_environment_folder_and_session(tmp_path, monkeypatch):
    run_forked(NAME, "exit", check=False)  # the process that forks has started
    monkeypatch.setenv("LEFT_OUT", "as at the time of the call")
    done = run_forked(NAME, "see", "a b", cwd=tmp_path, env={"COLOUR": "red"})
    assert done.stdout.splitlines() == [
        f"{tmp_path} red as at the time of the call ['a b']",
        f"{NAME} True",
        "thread",
        "at exit",
    ]
    assert done.stderr == ""


def test_it_runs_a_file(tmp_path):
    """The file sees the modules beside it and those of PYTHONPATH, as with `python FILE`."""
    (tmp_path / "here").mkdir()
    (tmp_path / "there").mkdir()
    (tmp_path / "here" / "beside_it.py").write_text("word = 'beside'")
    (tmp_path / "there" / "on_the_path.py").write_text("word = 'path'")
    file = tmp_path / "here" / "main.py"
    file.write_text(
        "import sys, beside_it, on_the_path\n"
        "if __name__ == '__main__': print(*sys.argv, beside_it.word, on_the_path.word)"
    )
    done = run_forked(str(file), "a", env={"PYTHONPATH": str(tmp_path / "there")})
    assert done.stdout == f"{file} a beside path\n"


def test_its_status_is_returned(tmp_path):
    assert run_forked(NAME, "exit", check=False).returncode == 7
    done = run_forked(NAME, "fail", check=False)
    assert done.returncode == 1
    assert done.stderr.endswith("ValueError: it failed\n")
    with pytest.raises(AssertionError, match="ValueError: it failed"):
        run_forked(NAME, "fail")
    done = run_forked(NAME, "write", cwd=tmp_path, file_limit=1000, check=False)
    assert "File too large" in done.stderr
    assert (tmp_path / "file").stat().st_size == 1000


def test_it_gets_signals():
    with open(os.devnull, "w") as output:
        process = Forked(NAME, "wait", stdout=output, stderr=output)
    assert process.poll() is None
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.0)
    process.send_signal(signal.SIGTERM)
    assert process.wait() == process.poll() == -signal.SIGTERM
    process.send_signal(signal.SIGTERM)  # it has ended, so nobody gets it


def test_the_ranks_that_it_starts_are_forked(tmp_path):
    """They are its children, and have what `Popen` asks for, also in modules that import it."""
    (tmp_path / "folder").mkdir()
    done = run_forked(NAME, "launch", cwd=tmp_path, ranks=3)
    assert done.stdout.splitlines() == [
        f"{tmp_path}/folder 0 ['a b'] {NAME}",
        "True True",
        f"{tmp_path}/folder 1 ['a b'] {NAME}",
        "True False",
        "[3, -15] True another program",
        "",
    ]
    done = run_forked(NAME, "launch", cwd=tmp_path, ranks=1, check=False)
    assert "More ranks were started than `ranks` of the forked process." in done.stderr


def test_no_command_is_imported_before_it_runs():
    """A module that runs as `__main__` after it was imported would exist twice."""
    done = run_forked(NAME, "modules")
    assert set(IMPORTED) <= set(done.stdout.split())
    assert not {"lctrain.train", "lctrain.evaluate"} & set(done.stdout.split())


if __name__ == "__main__":
    main(sys.argv[1])
