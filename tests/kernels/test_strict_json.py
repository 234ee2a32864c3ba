"""Tests JSON that every reader accepts: numbers that are not finite are null."""

import json
import math

import numpy as np
import pytest
import torch

from lctrain_kernels.strict_json import number, to_json, write_json
from tests.strict import parse_strictly

VALUES = {
    "loss": math.nan,
    "list": [1.5, math.inf, (-math.inf, "NaN", None, True)],
    "numpy": np.float64("nan"),
    "inside": {"a": {"b": [math.nan]}},
}
EXPECTED = {
    "loss": None,
    "list": [1.5, None, [None, "NaN", None, True]],
    "numpy": None,
    "inside": {"a": {"b": [None]}},
}


def test_numbers_that_are_not_finite_are_null(tmp_path):
    assert parse_strictly(to_json(VALUES)) == EXPECTED
    write_json(tmp_path / "a.json", VALUES)
    text = (tmp_path / "a.json").read_text()
    assert parse_strictly(text) == EXPECTED
    assert text.endswith("}\n")
    assert VALUES["list"][1] == math.inf  # the given values are unchanged


def test_what_default_makes_of_other_objects_is_finite_too():
    values = {"tensor": torch.tensor([1.5, math.nan]), "numpy": np.float32("inf")}
    text = to_json(values, default=lambda value: value.tolist())
    assert parse_strictly(text) == {"tensor": [1.5, None], "numpy": None}


def test_options_are_those_of_json():
    assert to_json({"b": 2.0, "a": 1}, sort_keys=True) == '{"a": 1, "b": 2.0}'
    assert to_json({"path": object}, default=lambda value: "text") == '{"path": "text"}'
    assert to_json({"a": 1}, indent=1) == json.dumps({"a": 1}, indent=1)


def test_null_is_read_back_as_nan():
    assert number(3) == 3.0
    assert math.isnan(number(json.loads(to_json(math.inf))))


@pytest.mark.parametrize("text", ["NaN", '{"a": [-Infinity]}', "Infinity"])
def test_the_parser_of_the_tests_is_strict(text):
    with pytest.raises(ValueError, match="is no JSON"):
        parse_strictly(text)
