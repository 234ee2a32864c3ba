"""One compilation of a kernel, without a GPU and without tensors."""

from collections.abc import Mapping
from dataclasses import dataclass

import triton


@dataclass(frozen=True)
class KernelVariant:
    """The arguments of ASTSource (of GluonASTSource, for Gluon's kernels) and the options.

    Attributes:
        name: For people and tests.
        kernel: What is compiled.
        signature: Argument name -> Triton's name of its type, "constexpr" among them.
        constants: Values of the constexprs, by place.
        attributes: By place, what launchers find out about aligned tensors and their strides.
        options: The compiler's.
        spill_free: Promise that everything stays in registers; tested.
    """

    name: str
    kernel: triton.JITFunction
    signature: dict[str, str]
    constants: dict[tuple[int, ...], object]
    attributes: dict[tuple[int, ...], list]
    options: Mapping[str, object]
    spill_free: bool


def describe_variant(
    name: str,
    kernel: triton.JITFunction,
    types: Mapping[str, str | None],
    constants: Mapping[str, object],
    options: Mapping[str, object],
    spill_free: bool,
) -> KernelVariant:
    """Describes one compilation by the names of a kernel's arguments.

    Args:
        name: For people and tests.
        kernel: What is compiled.
        types: Argument name -> Triton's name of its type; None is an argument that is not passed.
        constants: Values of the constexprs; may hold more names than the kernel has.
        options: The compiler's.
        spill_free: Whether registers must suffice.
    """
    signature: dict[str, str] = {}
    values: dict[tuple[int, ...], object] = {}
    attributes: dict[tuple[int, ...], list] = {}
    for index, parameter in enumerate(kernel.params):
        argument = parameter.name
        kind = None if argument in constants else types[argument]
        if kind is None:
            signature[argument] = "constexpr"
            values[(index,)] = constants.get(argument)
            continue
        signature[argument] = kind
        if kind.startswith("*") or (kind[0] == "i" and not parameter.do_not_specialize):
            attributes[(index,)] = [["tt.divisibility", 16]]
    return KernelVariant(name, kernel, signature, values, attributes, options, spill_free)
