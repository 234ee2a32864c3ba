"""launch: starts a Triton kernel with little host time.

`kernel[grid](...)` builds a string of all constants and options in every call, to find the compiled
kernel, and compares every global name that the kernel reads. `launch` finds the compiled kernel by
a tuple instead: the device, Triton's own specialisation of each run-time argument, the constants
and the options. The first call with a new tuple takes Triton's way, which compiles the kernel.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import triton
from triton import knobs
from triton.compiler import CompiledKernel
from triton.runtime import driver
from triton.runtime.jit import JITFunction

try:
    from triton._C.libtriton import native_specialize_impl
except ImportError:  # a Triton that launch does not know
    native_specialize_impl = None

OLDEST_TRITON, NEWEST_TRITON = (3, 6), (3, 9)
KNOWN = (
    native_specialize_impl is not None
    and OLDEST_TRITON
    <= tuple(int(part) for part in triton.__version__.split(".")[:2])
    <= NEWEST_TRITON
)
"""Whether the installed Triton has the interfaces that `launch` uses. Others take Triton's way."""


class Ready(NamedTuple):
    """A compiled kernel that has been launched once.

    Attributes:
        kernel: The compiled kernel.
        run: Its launcher.
        function: Its handle in the driver, loaded on one device.
        metadata: Packed numbers of warps, shared memory and blocks in a cluster.
        constants: Values of the kernel's constexpr parameters, in the order of its signature.
    """

    kernel: CompiledKernel
    run: Callable[..., None]
    function: Any
    metadata: Any
    constants: tuple[Any, ...]


class Launcher:
    """Launches one kernel, and keeps what Triton compiled for it.

    Args:
        kernel: The kernel. Its run-time parameters come before its constexpr parameters.
    """

    def __init__(self, kernel: JITFunction[Any]) -> None:
        self.kernel = kernel
        self._ready: dict[tuple[Any, ...], Ready] = {}
        run_time = [one for one in kernel.params if not one.is_constexpr]
        self._flags = tuple(
            (one.is_const, not one.do_not_specialize, not one.do_not_specialize_on_alignment)
            for one in run_time
        )
        self._constants = [one.name for one in kernel.params if one.is_constexpr]
        self._serves = all(
            one.num == i and not one.annotation_type for i, one in enumerate(run_time)
        )

    def __call__(self, grid: Sequence[int], *args: Any, **constants: Any) -> None:
        """Launches the kernel over a grid.

        Args:
            grid: Number of programs in each of at most three dimensions.
            *args: Values of all run-time parameters.
            **constants: Values of the constexpr parameters, and options such as num_warps.
        """
        kernel, runtime = self.kernel, knobs.runtime
        if (
            not self._serves
            or len(args) != len(self._flags)
            or kernel.pre_run_hooks
            or runtime.add_stages_inspection_hook is not None
            or knobs.compilation.instrumentation_mode  # a sanitizer, which has knobs of its own
        ):
            kernel[grid](*args, **constants)
            return
        active = driver.active
        device = active.get_current_device()
        backend = kernel.device_caches[device][3]
        key = (
            device,
            runtime.debug,
            *[
                arg.launch_key
                if type(arg) in KEYED_TYPES
                else native_specialize_impl(backend, arg, *flags)
                for arg, flags in zip(args, self._flags)  # noqa: B905 (as many as checked above)
            ],
            *constants,
            *constants.values(),
        )
        ready = self._ready.get(key)
        if ready is None:
            self._first(key, kernel[grid](*args, **constants), constants)
            return
        stream = active.get_current_stream(device)
        before, after, metadata = runtime.launch_enter_hook, runtime.launch_exit_hook, None
        if is_empty(before) and is_empty(after):
            before = after = None
        else:
            metadata = ready.kernel.launch_metadata(grid, stream, *args, *ready.constants)
        ready.run(
            *grid,
            *_ONES[len(grid)],
            stream,
            ready.function,
            ready.metadata,
            metadata,
            before,
            after,
            *args,
            *ready.constants,
        )

    def _first(self, key: tuple[Any, ...], compiled: Any, constants: dict[str, Any]) -> None:
        """Keeps a compiled kernel, unless Triton gave something else or took a default value."""
        if isinstance(compiled, CompiledKernel) and all(x in constants for x in self._constants):
            values = tuple(constants[name] for name in self._constants)
            self._ready[key] = Ready(
                compiled, compiled.run, compiled.function, compiled.packed_metadata, values
            )


KEYED_TYPES: set[type] = set()
"""Types whose attribute `launch_key` decides Triton's specialisation of an argument."""

_ONES: tuple[tuple[int, ...], ...] = ((1, 1, 1), (1, 1), (1,), ())
_launchers: dict[int, Launcher] = {}  # by id of the kernel, which its launcher keeps alive


def launch(kernel: Any, grid: Sequence[int]) -> Callable[..., Any]:
    """Returns a function that launches a kernel, as `kernel[grid]` does.

    Kernels of Triton's interpreter, and of a Triton that this file does not know, are launched by
    `kernel[grid]` itself.

    Args:
        kernel: Function with the decorator triton.jit or gluon.jit.
        grid: Number of programs in each of at most three dimensions.
    """
    launcher = _launchers.get(id(kernel))
    if launcher is None:
        if not KNOWN or not isinstance(kernel, JITFunction):
            return kernel[grid]
        launcher = _launchers[id(kernel)] = Launcher(kernel)
    return functools.partial(launcher, grid)


def cdiv(number: int, size: int) -> int:
    """Returns number / size, rounded up; triton.cdiv does the same in as much time as a launch."""
    return -(-number // size)


def next_power_of_2(number: int) -> int:
    """Returns the smallest power of two >= number, which is at least 1; see `cdiv`."""
    return 1 << (number - 1).bit_length()


def is_empty(hook: Any) -> bool:
    """Returns whether a hook of Triton's knobs, a chain of functions or None, calls nothing."""
    return hook is None or getattr(hook, "calls", True) == []
