"""Describes one ahead-of-time compilation of a kernel, which needs no GPU and no tensors.

The tests compile every variant with Triton and ptxas, and check registers, spills and matrix
instructions.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import triton


@dataclass(frozen=True)
class KernelVariant:
    """One compilation of a kernel: its argument types, constants and compiler options.

    The fields are arguments of Triton's ASTSource or GluonASTSource. If an argument is a named
    tuple, its type is a named tuple of types. `constants` and `attributes` then identify a field by
    its indices (argument, field).

    Attributes:
        name: Name in reports and tests.
        kernel: Kernel to compile.
        signature: Argument name -> Triton's name of its type, "constexpr" for a constant.
        constants: Indices of an argument -> value of the constexpr.
        attributes: Indices of an argument -> its divisibility by 16, Triton's "tt.divisibility", as
            at a launch.
        options: Compiler options.
        spill_free: Whether the kernel must compile without register spills; tested.
        multiplies: Whether the kernel must use matrix instructions; tested.
    """

    name: str
    kernel: triton.JITFunction
    signature: dict[str, Any]
    constants: dict[tuple[int, ...], object]
    attributes: dict[tuple[int, ...], list]
    options: Mapping[str, object]
    spill_free: bool
    multiplies: bool = True


def describe_variant(
    name: str,
    kernel: triton.JITFunction,
    types: Mapping[str, Any],
    constants: Mapping[str, object],
    options: Mapping[str, object],
    spill_free: bool,
    multiplies: bool = True,
) -> KernelVariant:
    """Makes the KernelVariant of a kernel from the types and constants of its arguments.

    Args:
        name: Name in reports and tests.
        kernel: Kernel to compile.
        types: Argument name -> Triton's name of its type, or a named tuple of such names; None for
            an argument that is not passed.
        constants: Argument name -> value of the constexpr. Names that the kernel lacks are ignored.
        options: Compiler options.
        spill_free: Whether the kernel must compile without register spills.
        multiplies: Whether the kernel has matrix products.
    """
    signature: dict[str, Any] = {}
    values: dict[tuple[int, ...], object] = {}
    attributes: dict[tuple[int, ...], list] = {}

    def typed(kind: str | None, place: tuple[int, ...], specialised: bool) -> str:
        if kind is None:
            values[place] = None
            return "constexpr"
        if kind.startswith("*") or (kind[0] == "i" and specialised):
            attributes[place] = [["tt.divisibility", 16]]
        return kind

    for index, parameter in enumerate(kernel.params):
        argument = parameter.name
        if argument in constants:
            signature[argument] = "constexpr"
            values[(index,)] = constants[argument]
            continue
        kinds = types[argument]
        if isinstance(kinds, tuple):
            fields = (typed(kind, (index, field), True) for field, kind in enumerate(kinds))
            signature[argument] = type(kinds)(*fields)
        else:
            signature[argument] = typed(kinds, (index,), not parameter.do_not_specialize)
    return KernelVariant(
        name, kernel, signature, values, attributes, options, spill_free, multiplies
    )
