"""Tests that Topology alone gives rank and size, and run/rank.py what launchers set."""

import ast

import pytest

from tests.house.typecheck import ROOT

OWN_RANKS = {
    *("world_size", "global_rank", "is_global_zero", "node_rank"),
    *("get_world_size", "get_rank", "get_node_local_rank"),
}
"""Attributes of Lightning and functions of torch.distributed."""
LAUNCHED = {
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "NODE_RANK", "GROUP_RANK"),
    *("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NTASKS", "SLURM_NODEID"),
    *("SLURM_STEP_NUM_TASKS", "SLURM_STEP_NUM_NODES"),
}
"""Environment variables of torchrun, srun and Lightning."""
LAUNCHES = ("lctrain/run/rank.py", "lctrain/run/launch.py")
"""Files that may name them."""
READS = {
    "lctrain/distributed/topology.py": "it is the source",
    "lctrain/distributed/strategy.py": "it builds the Topology of its ranks",
    "lctrain/distributed/collectives.py": "it asks for the size of a given process group",
}
"""Files that may read OWN_RANKS, and why."""
IMPORTS = (
    *("lctrain/distributed/", "lctrain/process_group.py"),
    *("lctrain/bench/scale.py", "lctrain/bench/shares.py"),  # they start a process group
)
"""Files that may import torch.distributed as a module."""


def reads_ranks(source: str) -> list[int]:
    """Returns the lines that read rank or size from Lightning or torch."""
    nodes = ast.walk(ast.parse(source))
    return [node.lineno for node in nodes if getattr(node, "attr", None) in OWN_RANKS]


def imports_torch(source: str) -> list[int]:
    """Returns the lines that import torch.distributed as a module."""
    nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Import)]
    names = [(node.lineno, alias.name) for node in nodes for alias in node.names]
    return [line for line, name in names if name == "torch.distributed"]


def names_variables(source: str) -> list[int]:
    """Returns the lines with the name of an environment variable of a launcher as a text."""
    nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Constant)]
    return [node.lineno for node in nodes if node.value in LAUNCHED]


@pytest.mark.parametrize(
    ("find", "allowed", "example"),
    [
        (reads_ranks, tuple(READS), "trainer.world_size"),
        (imports_torch, IMPORTS, "import torch.distributed as dist"),
        (names_variables, LAUNCHES, "os.environ['RANK']"),
    ],
)
def test_nothing_else_asks_for_rank_or_size(find, allowed, example):
    found = [
        f"{path.relative_to(ROOT)}:{line}"
        for path in sorted((ROOT / "lctrain").rglob("*.py"))
        if not path.relative_to(ROOT).as_posix().startswith(allowed)
        for line in find(path.read_text())
    ]
    assert not found, f"ask lctrain.distributed.Topology: {found}"
    assert find(example) == [1]


@pytest.mark.parametrize("path", READS)
def test_every_exception_is_needed(path):
    assert reads_ranks((ROOT / path).read_text())
