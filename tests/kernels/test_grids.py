"""Tests the launch grids in the sources: CUDA allows at most 65,535 programs in y and in z."""

import ast
from collections.abc import Iterator
from pathlib import Path

import lctrain_kernels

SOURCES = Path(lctrain_kernels.__file__).parent
FEW = {"heads", "heads_kv", "groups", "cdiv(columns, BIAS_BLOCK)"}
"""Counts that are far below 65,535 in every model; those of tokens and documents are not."""


def grids() -> Iterator[tuple[str, ast.Tuple]]:
    """Yields every launch grid that is written as a tuple, with its place in the sources."""
    for path in sorted(SOURCES.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            launched = isinstance(node, ast.Call) and ast.unparse(node.func) == "launch"
            named = isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "grid"
            grid = node.args[1] if launched else node.value if named else None
            if isinstance(grid, ast.Tuple):
                yield f"{path.relative_to(SOURCES)}:{node.lineno}", grid


def test_only_heads_count_programs_beyond_the_first_dimension():
    found = dict(grids())
    assert any(len(grid.elts) > 1 for grid in found.values())
    for place, grid in found.items():
        for count in grid.elts[1:]:
            assert ast.unparse(count) in FEW, f"{place}: {ast.unparse(grid)}"


def test_every_kernel_is_started_by_launch():
    """Triton's own kernel[grid](...) costs more host time; only `launch` itself calls it."""
    for path in sorted(SOURCES.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript):
                name = ast.unparse(node.func.value)
                assert path == SOURCES / "launch.py" or "kernel" not in name, f"{path}: {name}[...]"
