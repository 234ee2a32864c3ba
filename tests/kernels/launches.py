"""Compares kernel launches with ahead-of-time variants, without running a kernel."""

import torch
from triton.runtime.jit import JITFunction, mangle_type

from lctrain_kernels.options import AttentionOptions
from lctrain_kernels.pack import TiledPack

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def types_of(argument):
    """Returns Triton's type name of an argument; for a named tuple, that of each field."""
    if isinstance(argument, tuple):
        return type(argument)(*map(types_of, argument))
    return "constexpr" if argument is None else mangle_type(argument)


class Launches:
    """Stand-in for a kernel that records the arguments of its launch instead of running."""

    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        return self

    def __call__(self, *args, **options):
        names = self.kernel.arg_names
        self.arguments = dict(zip(names, args, strict=False))
        self.arguments |= {name: options.pop(name) for name in names if name in options}
        self.options = options

    def assert_described_by(self, variant):
        """Asserts that a variant has the types, constants and options of the recorded launch."""
        constants = {
            name: variant.constants[(i,)]
            for i, name in enumerate(variant.signature)
            if (i,) in variant.constants
        }
        assert list(self.arguments) == list(variant.signature)
        assert {name: self.arguments[name] for name in constants} == constants
        types = {name: types_of(x) for name, x in self.arguments.items() if name not in constants}
        assert types == {name: variant.signature[name] for name in types}
        assert self.options.items() <= variant.options.items()


class EachLaunch:
    """Stand-in for a kernel with several launches; takes an iterator with a Launches for each."""

    def __init__(self, launches):
        self.launches = launches

    def __getitem__(self, grid):
        return next(self.launches)


def pack_of(cu_seqlens, schedule, features):
    """Returns a TiledPack of two documents with ids; with query offsets for "offset_dropout"."""
    ids = torch.arange(2, dtype=torch.int32)
    offsets = 128 * ids if features == "offset_dropout" else None
    return TiledPack(cu_seqlens, cu_seqlens, schedule.q_tiles, schedule.k_tiles, ids, offsets)


def options_of(features):
    """Returns the AttentionOptions of a call with the given features, one of FEATURES."""
    dropout = features == "all" or "dropout" in features
    return AttentionOptions(
        softmax_scale=0.1,
        window_right=-1 if features == "full" else 0,
        window=torch.tensor([64, 0], dtype=torch.int32) if features == "all" else None,
        dropout_p=0.1 if dropout else 0.0,
        dropout_seed=torch.tensor([7]) if dropout else None,
        first_head=16 if features == "offset_dropout" else 0,
        deterministic=features == "deterministic",
    )


def launches_of(module, monkeypatch):
    """Replaces a module's kernels by Launches, and returns them by the kernels' names.

    Args:
        module: Module with launchers.
        monkeypatch: The pytest fixture.
    """
    if hasattr(module, "multiprocessors"):
        monkeypatch.setattr(module, "multiprocessors", lambda device: 132)
    replaced = {}
    for name in [name for name in vars(module) if name.endswith("_kernel")]:
        replaced[name] = Launches(getattr(module, name))
        monkeypatch.setattr(module, name, replaced[name])
    return replaced


def describe_for_a_compiler(module, monkeypatch):
    """Makes an ahead-of-time list compile its kernels even if TRITON_INTERPRET is set."""
    for name in [name for name in vars(module) if name.endswith("_kernel")]:
        kernel = getattr(module, name)
        monkeypatch.setattr(module, name, JITFunction(kernel.fn))
