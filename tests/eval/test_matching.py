"""Tests RULER's scores and the strict ones beside them, on answers with known scores."""

import pytest

from lctrain.eval.matching import ruler_score, strict_score
from tests.numerics import near

CASES = {
    "right": ("The numbers are 42 and 17.", ("42", "17"), "all", 1.0, 1.0),
    "half": ("42", ("42", "17"), "all", 0.5, 0.5),
    "none": ("nothing", ("42",), "all", 0.0, 0.0),
    "inside-another-number": ("1423", ("42",), "all", 1.0, 0.0),
    "inside-another-word": ("cats", ("cat",), "all", 1.0, 0.0),
    "part-of-an-identifier": ("ab-42-cd", ("42",), "all", 1.0, 0.0),
    "identifier": ("It is 1f-2e.", ("1f-2e",), "all", 1.0, 1.0),
    "case": ("PARIS", ("Paris",), "part", 1.0, 1.0),
    "any-of-three": ("in France", ("Gaul", "France", "Francia"), "part", 1.0, 1.0),
    "control-characters": ("4\x0042", ("42",), "all", 1.0, 1.0),
    "marks": ("(C++)", ("C++",), "all", 1.0, 1.0),
}


@pytest.mark.parametrize(
    ("answer", "references", "match", "score", "strict"), CASES.values(), ids=CASES
)
def test_scores(answer, references, match, score, strict):
    assert ruler_score(answer, references, match) == near(score)
    assert strict_score(answer, references, match) == near(strict)


@pytest.mark.parametrize("references", [(), ("",), ("42", " ")])
@pytest.mark.parametrize("score", [ruler_score, strict_score])
def test_an_empty_reference_is_an_error(score, references):
    with pytest.raises(ValueError, match="references must be texts that are not empty"):
        score("42", references, "all")
