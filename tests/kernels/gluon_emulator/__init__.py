"""Runs Gluon kernels for Hopper on a CPU: executes a kernel's Python source on numpy arrays.

Triton's interpreter does not run Gluon. The modules are `values` (tensors), `memory` (shared and
global memory), `machine` (threads, barriers, asynchronous engines), `names` (the functions that
kernels call as `gl`) and `assembly` (the PTX of the online softmax).

The emulator checks a kernel's numbers, its barriers and its ordering. A deadlock is an error, and
so is polling an address that nobody will change. An asynchronous copy or product happens at a
random moment between its start and the wait for it; a seed sets the order. Shared memory starts as
NaN. Addresses outside a tensor are errors, and so is an engine's read of a write without a fence.

It does not check layouts, registers and time, barriers inside a warpgroup (whose threads are one
here), or the visibility of global memory (acquire, release). The compiler checks these in
test_hopper_aot.py, and the hardware in each operation's test_hopper_gpu.py.
"""

from tests.kernels.gluon_emulator.launch import EmulatedKernel, emulate

__all__ = ["EmulatedKernel", "emulate"]
