"""Interprets the PTX of the online softmax on all lanes of a warpgroup."""

import functools
import re
from collections.abc import Sequence

import numpy as np


def run_on_rows(
    asm: str, constraints: str, pack: int, tensors: Sequence[np.ndarray]
) -> list[np.ndarray]:
    """Runs inline PTX on tensors, as gl.inline_asm_elementwise does, for all lanes of a warpgroup.

    Args:
        asm: PTX without loops; its only label is DONE.
        constraints: Constraints of its operands; a number ties an input to an output. Outputs
            "r" are pairs in half precision.
        pack: Elements of each tensor per run of the assembly.
        tensors: float32 [64, 4] or [64, N // 8, 4, 2], the shapes of softmax.py, or numbers.

    Returns:
        The outputs, in the order of the constraints.
    """
    shape = np.broadcast_shapes(*(tensor.shape for tensor in tensors))
    held = [_registers(np.broadcast_to(tensor, shape)) for tensor in tensors]
    inputs = [x[:, :, i::pack] for x in held for i in range(pack)]
    found = []
    for x in _run(asm, constraints.split(","), inputs):
        found += [x.real, x.imag] if np.iscomplexobj(x) else [x]
    results = np.stack(found, axis=3).reshape(4, 32, held[0].shape[2] // pack, -1, pack)
    return [_tensor(results[:, :, :, i].reshape(4, 32, -1), shape) for i in range(results.shape[3])]


def _registers(tensor: np.ndarray) -> np.ndarray:
    """Returns a tensor's elements as [warp, lane, register]."""
    split = tensor.reshape(4, 2, 8, -1, 4, 1 if tensor.ndim == 2 else 2)
    return split.transpose(0, 2, 4, 3, 1, 5).reshape(4, 32, -1).astype(np.float32)


def _tensor(registers: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    split = registers.reshape(4, 8, 4, -1, 2, 1 if len(shape) == 2 else 2)
    return split.transpose(0, 4, 1, 3, 2, 5).reshape(shape)


def _run(asm: str, constraints: list[str], inputs: list[np.ndarray]) -> list[np.ndarray]:
    """Interprets PTX on operands [warp, lane, run]; all lanes of a warp take the same branch."""
    outputs = sum(constraint.startswith("=") for constraint in constraints)
    values = {}
    for i, (tie, x) in enumerate(zip(constraints[outputs:], inputs, strict=True)):
        # The register of a tied input has one name here, that of the output.
        values[f"${tie}" if tie.isdigit() else f"${outputs + i}"] = x
    active = np.ones(inputs[0].shape, np.bool_)
    for predicate, name, operands in _instructions(asm):
        if name == "here":
            active[:] = True
            continue
        if predicate:
            assert (name, operands) == ("bra", ("DONE",))
            assert (values[predicate] == values[predicate][:, :1]).all(), "lanes of a warp part"
            active = active & values[predicate]
            continue
        target, *sources = operands
        result = _execute(name, [_operand(source, values) for source in sources])
        values[target] = np.where(active, result, values.get(target, result))
    unwritten = np.full(inputs[0].shape, np.nan, np.float32)
    return [values.get(f"${i}", unwritten) for i in range(outputs)]


@functools.cache
def _instructions(asm: str) -> list[tuple[str | None, str, tuple[str, ...]]]:
    """Returns the predicate, name and operands of every instruction; "here" is the label DONE."""
    found = []
    for line in re.split(r"[;{}]", asm.replace("DONE:", ";here;")):
        predicate, name, operands = re.fullmatch(
            r"\s*(?:@!(\w+)\s)?\s*(\S*)\s*(.*?)\s*", line
        ).groups()
        if name not in ("", ".reg"):
            found.append((predicate, name, tuple(part.strip() for part in operands.split(","))))
    return found


def _operand(text: str, values: dict[str, np.ndarray]) -> np.ndarray:
    if text.startswith("0f"):
        return np.uint32(int(text[2:], 16)).view(np.float32)
    if text.isdigit() or text.startswith("0x"):
        return np.int64(int(text, 0))
    return values[text]


def _execute(name: str, x: list[np.ndarray]) -> np.ndarray:
    operation, *how = name.split(".")
    if operation == "setp":
        found = {"gt": np.greater, "neu": np.not_equal}[how[0]](*x[:2])
        return found | x[2] if "or" in how else found
    if operation == "vote":
        assert how == ["sync", "any", "pred"]
        return np.broadcast_to(x[0].any(axis=1, keepdims=True), x[0].shape)
    if operation == "shfl":
        assert how == ["sync", "bfly", "b32"]
        return x[0][:, np.arange(32) ^ x[1]]
    if operation == "selp":
        return np.where(x[2], x[0], x[1])
    if operation == "ex2":
        return np.exp2(x[0])
    if operation == "max":
        return np.fmax(*x)
    if operation == "cvt":  # a pair, low half first
        both = np.empty(x[0].shape, np.complex64)
        both.real, both.imag = _half(x[1], how[1]), _half(x[0], how[1])
        return both
    exact = [value.astype(np.float64) for value in x]
    return {
        "mov": lambda: exact[0],
        "neg": lambda: -exact[0],
        "mul": lambda: exact[0] * exact[1],
        "add": lambda: exact[0] + exact[1],
        "sub": lambda: exact[0] - exact[1],
        "fma": lambda: exact[0] * exact[1] + exact[2],
    }[operation]().astype(np.float32)


def _half(x: np.ndarray, name: str) -> np.ndarray:
    """Rounds float32 values to the precision of bfloat16 ("bf16x2") or float16 ("f16x2")."""
    if name == "f16x2":
        return x.astype(np.float16).astype(np.float32)
    bits = x.view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000).view(np.float32)
