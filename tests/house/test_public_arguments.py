"""Tests that a public name says what it needs if an argument has a wrong type."""

import contextlib
import importlib
import inspect
import io

import pytest

from lctrain.failure import _raised_on_purpose

MODULES = (
    "lctrain",
    *(f"lctrain.{name}" for name in ("attention", "callbacks", "config", "data", "distributed")),
    *(f"lctrain.{name}" for name in ("eval", "generation", "kernels", "loss", "memory", "models")),
)
WRONG = {"None": None, "int": 3, "float": 1.5, "text": "x", "list": [], "object": object()}
"""Values of all required arguments, by name."""


def required(signature):
    """Returns the parameters of a signature that have no default."""
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return [p for p in signature.parameters.values() if p.kind in named and p.default is p.empty]


def public(module):
    """Yields the names and functions or classes of a module that need an argument."""
    loaded = importlib.import_module(module)
    for name in getattr(loaded, "__all__", ()):
        made = getattr(loaded, name)
        is_error = inspect.isclass(made) and issubclass(made, BaseException)
        if not callable(made) or is_error or getattr(made, "_is_protocol", False):
            continue
        with contextlib.suppress(ValueError, TypeError):  # a type alias has no signature
            if required(signature := inspect.signature(made)):
                yield name, made, signature


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("module", MODULES)
def test_wrong_types_are_named(module, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    bugs = []
    for name, made, signature in public(module):
        for kind, value in WRONG.items():
            given = {parameter.name: value for parameter in required(signature)}
            try:
                with contextlib.redirect_stdout(io.StringIO()):
                    result = made(**given)
                    if inspect.isgenerator(result):
                        next(result, None)  # its body begins here
            except Exception as error:
                if not _raised_on_purpose(error):
                    bugs.append(f"{name}({kind}): {type(error).__name__}: {error}")
    assert not bugs
    assert not list(tmp_path.iterdir())
