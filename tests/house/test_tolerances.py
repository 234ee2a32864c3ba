"""Tests that every tolerance is defined in tests/numerics.py, with an argument for its size.

A literal that holds on one machine fails on another, where sums run in another order.
"""

import ast
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
HOME = "numerics.py"
COMPARISONS = {
    *("approx", "assert_close", "allclose", "isclose"),
    *("assert_allclose", "assert_almost_equal", "assert_array_almost_equal", "assertAlmostEqual"),
}
SMALL = 0.1  # a bound from above that is smaller is a tolerance
ALLOWED = {
    "house/test_tolerances.py": "examples of what is refused",
}
"""File, by its path in tests/, and why it needs tolerances of its own."""


def tolerances(source: str) -> list[int]:
    """Returns the line numbers at which a test file compares floats with a tolerance of its own."""
    lines = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            own = {word.arg for word in node.keywords} & {"atol", "rtol"}
            if name in COMPARISONS or own:
                lines.add(node.lineno)
        elif isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
            for operator, left, right in zip(node.ops, sides, sides[1:], strict=False):
                if isinstance(operator, ast.Lt | ast.LtE) and _is_small(right):
                    lines.add(node.lineno)
                if isinstance(operator, ast.Gt | ast.GtE) and _is_small(left):
                    lines.add(node.lineno)
    return sorted(lines)


def _is_small(bound: ast.expr) -> bool:
    """Returns whether a bound is a small float, or a product with a small float."""
    numbers = [part.value for part in ast.walk(bound) if isinstance(part, ast.Constant)]
    return any(isinstance(number, float) and 0 < number < SMALL for number in numbers)


def test_no_test_has_a_tolerance_of_its_own():
    found = [
        f"tests/{path.relative_to(TESTS).as_posix()}:{line}"
        for path in sorted(TESTS.rglob("*.py"))
        if path.name != HOME and path.relative_to(TESTS).as_posix() not in ALLOWED
        for line in tolerances(path.read_text())
    ]
    assert not found, f"use tests/numerics.py: {', '.join(found)}"


@pytest.mark.parametrize(
    "source",
    [
        "torch.testing.assert_close(a, b)",
        "assert a == pytest.approx(b)",
        "assert not torch.allclose(a, b, rtol=1e-2)",
        "check(a, b, atol=tiny)",
        "assert abs(a - b) < 1e-4",
        "assert abs(a - b) <= 1e-3 * b",
        "assert 1e-6 > abs(a - b)",
    ],
)
def test_what_is_refused(source):
    assert tolerances(source) == [1]


@pytest.mark.parametrize("source", ["assert a < 0.9 * b", "assert a > 1e-3", "assert a == near(b)"])
def test_what_is_not(source):
    assert tolerances(source) == []


def test_allowed_files_exist_and_need_it():
    for name in ALLOWED:
        assert tolerances((TESTS / name).read_text()) or name == "house/test_tolerances.py", name
