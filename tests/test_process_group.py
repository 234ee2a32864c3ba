"""Tests that a rank leaves its process group before Python exits."""

import subprocess
import sys

PROGRAM = """
import atexit, sys
import torch.distributed as dist
atexit.register(lambda: print("left" if not dist.is_initialized() else "still in"))  # runs last
from lctrain.process_group import leave_at_exit
leave_at_exit()
if sys.argv[1] != "none":
    dist.init_process_group("gloo", init_method=f"file://{sys.argv[1]}", rank=0, world_size=1)
"""


def run(store: str) -> str:
    command = [sys.executable, "-c", PROGRAM, store]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def test_the_group_is_left_at_exit(tmp_path):
    assert run(str(tmp_path / "store")) == "left"


def test_a_process_without_a_group_ends_as_ever():
    assert run("none") == "left"
