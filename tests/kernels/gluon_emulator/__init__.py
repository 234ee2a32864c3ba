"""Runs Gluon kernels for Hopper on a CPU: the Python source of a kernel, on numpy arrays.

Triton's interpreter has no Gluon. Here `values` holds tensors, `memory` shared and global memory,
`machine` the threads, barriers and asynchronous engines, `names` what kernels call `gl`, `assembly`
the PTX of the online softmax.

What it holds: the numbers of a kernel, its barriers (a deadlock is an error, and so is polling
what nobody will change), and its ordering: an asynchronous copy or product happens at a random
moment between its start and the wait that promises its end, in the order of a seed. Shared memory
starts as NaN; addresses outside a tensor and generic writes that no fence has shown to the engines
are errors.

What it does not: layouts, registers and time; barriers inside a warpgroup, whose threads are one
here; the order in which global memory shows what others wrote (acquire, release). Those are the
compiler's (test_hopper_aot.py) and the hardware's (each operation's test_hopper_gpu.py).
"""

from tests.kernels.gluon_emulator.launch import EmulatedKernel, emulate

__all__ = ["EmulatedKernel", "emulate"]
