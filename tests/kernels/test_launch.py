"""`launch` starts the kernels that Triton itself would start, with the same arguments."""

from typing import NamedTuple

import pytest
import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from lctrain_kernels.launch import KNOWN, cdiv, launch, next_power_of_2


class Pair(NamedTuple):
    left: torch.Tensor
    right: torch.Tensor | None


def scaled(x, pair, rows, length, scale, BLOCK: tl.constexpr, FLAG: tl.constexpr):
    """Kernel that is never compiled."""


class Driver:
    """A GPU driver of device 0 without a GPU."""

    device = 0

    def get_current_device(self):
        return self.device

    def get_current_stream(self, device):
        return 100 + device

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)


@pytest.fixture
def started(monkeypatch):
    """Every launch of a kernel, as (number of the compiled kernel, arguments of its launcher)."""
    launches, compiled = [], []

    def compile_none(kernel, key, signature, device, *_):
        made = object.__new__(CompiledKernel)
        compiled.append(made)
        made.function, made.packed_metadata = f"function {len(compiled)}", len(compiled)
        made._run = lambda *arguments: launches.append(arguments)
        made.launch_metadata = lambda *_: None
        made.module = None
        kernel.device_caches[device][0][key] = made
        return made

    monkeypatch.setattr(JITFunction, "_do_compile", compile_none)
    monkeypatch.setattr(driver, "_active", Driver(), raising=False)
    return launches


def calls():
    """Returns calls (grid, arguments, constants) of `scaled` that need several specialisations."""
    x = torch.zeros(64)
    constants = {"BLOCK": 32, "FLAG": True, "num_warps": 4}
    one = ((5,), (x, Pair(x, None), 16, 7, 0.5), constants)
    return [
        one,
        ((5, 2), (x, Pair(x, None), 32, 9, 0.25), constants),  # as the first
        ((5,), (x[1:], Pair(x, None), 16, 7, 0.5), constants),  # no multiple of 16 bytes
        ((5,), (x, Pair(x, x), 16, 7, 0.5), constants),
        ((5,), (x.half(), Pair(x, None), 16, 7, 0.5), constants),
        ((5,), (x, Pair(x, None), 1, 7, 0.5), constants),
        ((5,), (x, Pair(x, None), 17, 7, 0.5), constants),
        ((5,), (x, Pair(x, None), 2**40, 7, 0.5), constants),
        ((5,), (x, Pair(x, None), 16, 7, 0.5), constants | {"BLOCK": 64}),
        ((5,), (x, Pair(x, None), 16, 7, 0.5), constants | {"num_warps": 8}),
        ((5, 2, 3), (x, Pair(x, None), None, 7, 0.5), constants),
        one,
    ]


def jit():
    return JITFunction(scaled, do_not_specialize=["length"])


@pytest.mark.skipif(not KNOWN, reason="another Triton")
def test_every_launch_is_tritons(started):
    """The same kernels are chosen, and get the same grid, stream, arguments and constants."""
    ours, theirs = jit(), jit()
    for grid, arguments, constants in [*calls(), *calls()]:
        theirs[grid](*arguments, **constants)
    expected = [list(one) for one in started]
    started.clear()
    for grid, arguments, constants in [*calls(), *calls()]:
        launch(ours, grid)(*arguments, **constants)
    assert len(started) == len(expected) == 24
    offset = int(str(started[0][4]).split()[1]) - 1
    for found, wanted in zip(started, expected, strict=True):
        assert found[:4] == tuple(wanted[:4])  # the grid and the stream
        assert found[5] - offset == wanted[5]  # the compiled kernel
        assert len(found) == len(wanted)
        for one, other in zip(found[9:], wanted[9:], strict=True):
            if isinstance(other, (torch.Tensor, Pair)):
                assert type(one) is type(other)
            else:
                assert one == other


@pytest.mark.skipif(not KNOWN, reason="another Triton")
def test_a_known_kernel_is_launched_without_triton(started, monkeypatch):
    """Later launches on a device do not pass JITFunction.run; hooks still see every launch."""
    kernel, (grid, arguments, constants) = jit(), calls()[0]
    launch(kernel, grid)(*arguments, **constants)
    monkeypatch.setattr(JITFunction, "run", lambda *_, **__: pytest.fail("Triton's own way"))
    launch(kernel, grid)(*arguments, **constants)
    assert len(started) == 2
    seen = []
    hook = triton.knobs.runtime.launch_enter_hook
    hook.add(seen.append)
    try:
        launch(kernel, grid)(*arguments, **constants)
    finally:
        hook.remove(seen.append)
    assert started[1][7] is None
    assert started[2][7] is hook


@pytest.mark.skipif(not KNOWN, reason="another Triton")
@pytest.mark.parametrize("watcher", ["sanitizer", "pre_run_hook", "stages_hook"])
def test_what_watches_launches_gets_tritons_way(watcher, started, monkeypatch):
    """Triton reads knobs of a sanitizer, and calls these hooks, in its own way of a launch only."""
    kernel, (grid, arguments, constants) = jit(), calls()[0]
    launch(kernel, grid)(*arguments, **constants)
    passed, original = [], JITFunction.run

    def run(self, *args, **options):
        passed.append(options)
        return original(self, *args, **options)

    monkeypatch.setattr(JITFunction, "run", run)
    launch(kernel, grid)(*arguments, **constants)
    assert not passed
    knobs = triton.knobs
    if watcher == "sanitizer":
        monkeypatch.setattr(knobs.compilation, "instrumentation_mode", "consan")
    elif watcher == "pre_run_hook":
        kernel.add_pre_run_hook(lambda *_, **__: None)
    else:
        monkeypatch.setattr(knobs.runtime, "add_stages_inspection_hook", lambda *_: ("key", "hash"))
    for count in (1, 2):
        launch(kernel, grid)(*arguments, **constants)
        assert len(passed) == count


@pytest.mark.skipif(not KNOWN, reason="another Triton")
def test_each_device_loads_its_own_kernel(started):
    kernel, (grid, arguments, constants) = jit(), calls()[0]
    launch(kernel, grid)(*arguments, **constants)
    driver.active.device = 1
    launch(kernel, grid)(*arguments, **constants)
    launch(kernel, grid)(*arguments, **constants)
    assert [one[3] for one in started] == [100, 101, 101]
    assert started[0][4] != started[1][4] == started[2][4]


def test_a_stand_in_is_called_as_it_is():
    """Kernels of Triton's interpreter and stand-ins of tests get kernel[grid](...)."""
    seen = []
    launch({(2,): lambda *args, **constants: seen.append((args, constants))}, (2,))(1, BLOCK=3)
    assert seen == [((1,), {"BLOCK": 3})]


@pytest.mark.parametrize("number", [1, 2, 3, 64, 65, 1000])
def test_rounding_up(number):
    assert cdiv(number, 64) == triton.cdiv(number, 64)
    assert next_power_of_2(number) == triton.next_power_of_2(number)
