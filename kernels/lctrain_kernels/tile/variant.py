"""One compilation of a kernel, without a GPU and without tensors."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import triton


@dataclass(frozen=True)
class KernelVariant:
    """The arguments of ASTSource (of GluonASTSource, for Gluon's kernels) and the options.

    A named tuple of arguments has a named tuple of types; its fields have places (argument, field).

    Attributes:
        name: Label for people and tests.
        kernel: Kernel to compile.
        signature: Argument name -> Triton's name of its type, "constexpr" among them.
        constants: Values of the constexprs, by place.
        attributes: Alignment of tensors and strides, by place, as launchers find it.
        options: Compiler options.
        spill_free: True if the kernel must keep everything in registers; tested.
        multiplies: True if the kernel must use matrix instructions; tested.
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
    """Describes one compilation by the names of a kernel's arguments.

    Args:
        name: Name for reports and tests.
        kernel: Kernel to compile.
        types: Argument name -> Triton's name of its type, or a named tuple of them; None is an
            argument that is not passed.
        constants: Values of the constexprs; may hold more names than the kernel has.
        options: The compiler's.
        spill_free: Whether registers must suffice.
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
