"""Fixtures for all tests (seed, device, float64, tiny models), and skips of the GPU tests.

Without a GPU the Triton kernels run under Triton's interpreter. Triton reads TRITON_INTERPRET when
a kernel is defined, so the variable is set before anything imports triton.
"""

import gc
import os
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

from lctrain.warn import forget_logged
from tests.float64 import built_in_float64, float64_throughout
from tests.process_state import process_state_kept

HAS_GPU = torch.cuda.is_available()
if HAS_GPU:
    # cuDNN's attention, torch 2.11: NaN in dq, dk and dv of 4 key heads after calls with 2 or 8, in
    # a process without lctrain's kernels too. References use the other kernels of SDPA.
    torch.backends.cuda.enable_cudnn_sdp(False)
else:
    os.environ["TRITON_INTERPRET"] = "1"
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("MPLBACKEND", "Agg")
if os.environ.get("LCTRAIN_TEST_ONEDNN") == "off":  # `make test-cpus`
    torch.backends.mkldnn.enabled = False
    without = str(Path(__file__).parent / "without_onednn")  # the same in every new process
    os.environ["PYTHONPATH"] = os.pathsep.join(
        filter(None, (without, os.environ.get("PYTHONPATH")))
    )


@pytest.hookimpl(wrapper=True)
def pytest_collection():
    """Imports and collects without the garbage collector, which finds nothing to free meanwhile.

    Later collections leave out what these imports have made: looking at it takes 0.4 s each time.
    """
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()
        gc.collect()
        gc.freeze()


def pytest_collection_modifyitems(items):
    missing = {}
    if not HAS_GPU:
        missing["gpu"] = pytest.mark.skip(reason="needs a GPU")
    elif torch.version.hip is not None or torch.cuda.get_device_capability()[0] != 9:
        missing["hopper"] = pytest.mark.skip(reason="needs a Hopper GPU")
    for item in items:
        for marker, skip in missing.items():
            if item.get_closest_marker(marker):
                item.add_marker(skip)
    # Files with long tests first: short ones fill what is left, so no worker waits for the other.
    files = Counter(map(file_of, items))
    slow = {file_of(item) for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: (file_of(item) not in slow, -files[file_of(item)]))


def file_of(item):
    """Returns the file of a test, as pytest prints it."""
    return item.nodeid.partition("::")[0]


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Lets one worker run all tests of a file, which builds the fixtures of the module once.

    With `--dist loadgroup`, a worker also runs all tests of an xdist_group, of whichever file.
    """
    if config.getvalue("dist") != "loadgroup":
        return None
    from xdist.scheduler import LoadGroupScheduling

    class ByFile(LoadGroupScheduling):
        def _split_scope(self, nodeid):
            group = super()._split_scope(nodeid)
            return nodeid.partition("::")[0] if group == nodeid else group

    return ByFile(config, log)


@pytest.fixture(autouse=True, scope="module")
def state_after_a_module():
    """Runs a module's fixtures and tests inside `process_state_kept`."""
    with process_state_kept():
        yield


@pytest.fixture(autouse=True)
def state_after_a_test():
    """Runs each test inside `process_state_kept`."""
    with process_state_kept():
        yield


@pytest.fixture(autouse=True)
def no_warning_logged_yet():
    """Lets every test see the warnings that a process logs once."""
    forget_logged()


@pytest.fixture(autouse=True)
def seed():
    """Seeds torch, so that a test's random numbers do not depend on the tests before it."""
    torch.manual_seed(0)


@pytest.fixture
def float64_stays_float64():
    """Runs the test inside `float64_throughout`."""
    with float64_throughout():
        yield


@pytest.fixture
def in_float64_but_frequencies():
    """Runs the test inside `built_in_float64`, with RoPE frequencies in float32."""
    with built_in_float64(float32_frequencies=True):
        yield


@pytest.fixture
def in_float64():
    """Runs the test inside `built_in_float64`."""
    with built_in_float64():
        yield


@pytest.fixture(autouse=True, scope="session")
def quick_interpreter():
    """Runs Triton's interpreter without repeated work."""
    if not HAS_GPU and find_spec("triton"):
        from tests.quick_interpreter import quicken

        quicken()


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Returns the GPU if there is one, otherwise the CPU."""
    return torch.device("cuda" if HAS_GPU else "cpu")


@pytest.fixture
def make_llama():
    """Returns a factory of tiny random Llamas in float32 and eval mode: make_llama(**config)."""
    from transformers import LlamaConfig, LlamaForCausalLM

    def make(*, seed: int = 0, attn_implementation: str = "sdpa", **overrides) -> LlamaForCausalLM:
        settings = {
            "vocab_size": 97,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "max_position_embeddings": 256,
            "bos_token_id": 1,
            "eos_token_id": 2,
        } | overrides
        torch.manual_seed(seed)
        config = LlamaConfig(**settings, attn_implementation=attn_implementation)
        return LlamaForCausalLM(config).eval()

    return make


@pytest.fixture
def ordered_products(monkeypatch):
    """Fixture: Triton's interpreter sums each element of a product of tiles in one order.

    It multiplies by NumPy's BLAS, whose order depends on the place of a row in a tile. That of a
    GPU's matrix instructions does not.
    """
    matmul = np.matmul

    def ordered(a, b, dtype=None, **options):
        if a.ndim != 2 or b.ndim != 2 or options:
            return matmul(a, b, dtype=dtype, **options)
        dtype = np.result_type(a, b) if dtype is None else dtype
        out = np.zeros((a.shape[0], b.shape[1]), dtype)
        with np.errstate(all="ignore"):
            for k in range(a.shape[1]):
                out += a[:, k, None].astype(dtype) * b[k, None, :].astype(dtype)
        return out

    monkeypatch.setattr(np, "matmul", ordered)
