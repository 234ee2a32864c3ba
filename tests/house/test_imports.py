"""Tests that `import lctrain` is quick, and works where Triton is not installed."""

import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import lctrain
from tests.house.test_architecture import SOURCES
from tests.house.test_wheel import site_folders
from tests.house.typecheck import ROOT

WITHOUT_TRITON = """
import sys

class WithoutTriton:
    '''Sees everything that `finder` sees, except triton: a machine where it is not installed.'''

    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "triton":
            return None
        return self.finder.find_spec(name, path, target)

    def __getattr__(self, name):
        return getattr(self.finder, name)

sys.meta_path[:] = [WithoutTriton(finder) for finder in sys.meta_path]
"""


def run_python(code: str, cwd) -> str:
    """Runs code in a new interpreter outside the checkout, and returns its output."""
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], cwd=cwd, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_import_is_light(tmp_path):
    heavy = ["lightning", "datasets", "triton", "matplotlib", "wandb"]
    code = f"import sys, lctrain; print([m for m in {heavy} if m in sys.modules])"
    assert run_python(code, tmp_path).strip() == "[]"


def test_kernels_alone_load_no_framework(tmp_path):
    heavy = ["lightning", "datasets", "transformers", "hydra"]
    code = f"import sys, lctrain.kernels; print([m for m in {heavy} if m in sys.modules])"
    assert run_python(code, tmp_path).strip() == "[]"


@pytest.mark.slow
def test_a_plain_checkout_is_used_without_an_install(tmp_path):
    """Python finds each package by its folder alone, as editors and type checkers do."""
    code = """
        import lctrain.kernels
        import lctrain.recipes.differential.experiment as recipe
        from lctrain.composition import compose

        assert compose("train", ["experiment=first_run"]).name == "first_run"
        print(recipe.__file__)
    """
    folders = [ROOT, ROOT / "kernels", *site_folders()]
    result = subprocess.run(
        [sys.executable, "-S", "-c", textwrap.dedent(code)],  # -S: no hooks of an install
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(map(str, folders))},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert Path(result.stdout.strip()).is_relative_to(ROOT)


@pytest.mark.slow
def test_everything_outside_the_kernels_imports_without_triton(tmp_path):
    within = r"\w+\.(triton|hopper|ranges|launch|prefix_launch|aot)"
    device = re.compile(rf"lctrain_kernels\.(tile|gluon|bench|aot|launch|{within})")
    modules = [module for module in SOURCES if not device.match(module)]
    code = f"""
import importlib
for module in {modules}:
    importlib.import_module(module)
assert "triton" not in sys.modules
print("imported")
"""
    assert run_python(WITHOUT_TRITON + code, tmp_path).strip() == "imported"


def test_attention_runs_without_triton(tmp_path):
    code = """
import torch
from lctrain.kernels import flash_attn_varlen_func

q = torch.randn(10, 4, 8, requires_grad=True)
k = v = torch.randn(10, 2, 8)
boundaries = torch.tensor([0, 3, 10], dtype=torch.int32)
out = flash_attn_varlen_func(q, k, v, boundaries, boundaries, 7, 7, causal=True)
out.sum().backward()
print(tuple(out.shape), q.grad.isfinite().all().item())
"""
    assert run_python(WITHOUT_TRITON + code, tmp_path).strip() == "(10, 4, 8) True"


@pytest.mark.parametrize("name", lctrain.__all__)
def test_every_export_exists(name):
    assert getattr(lctrain, name) is not None
    assert name in dir(lctrain)


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'flash'"):
        _ = lctrain.flash
