"""What the compiler made of a loop: does it move weights about?

Reads the text of an optimised HLO module. Inside a fusion nothing is stored, so only what a fusion's
last instruction does counts.
"""

import collections
import math
import re
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

MOVES = ("copy", "copy-start", "transpose", "concatenate", "slice", "dynamic-slice")

_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\(")
_CALLED = re.compile(
    r"(?:calls|to_apply|body|true_computation|false_computation)=%?([\w.\-]+)"
    r"|branch_computations=\{([^}]*)\}"
)
_SHAPE = re.compile(r"\w+\[([\d,]*)\]")


class _Instruction(NamedTuple):
    name: str
    root: bool
    shapes: tuple[tuple[int, ...], ...]  # of the arrays that it gives
    opcode: str
    operands: tuple[str, ...]
    called: tuple[str, ...]
    text: str


def weight_moves(text: str, params: Any, state: Any = None) -> list[str]:
    """The instructions within the loops of a module that copy, cut or turn a whole weight matrix.

    Args:
        text: the optimised module, as `compiled.as_text()` gives it.
        params: the parameters; a buffer with as many elements as one of their matrices has is taken
            for one,
        state: unless it has the dimensions of one of these arrays, in any order.
    """
    import jax

    sizes = {leaf.size for leaf in jax.tree.leaves(params) if len(_dimensions(leaf.shape)) > 1}
    others = {_dimensions(leaf.shape) for leaf in jax.tree.leaves(state)}
    computations = _parse(text)
    bodies = [
        name
        for instructions in computations.values()
        for instruction in instructions
        if instruction.opcode == "while"
        for name in instruction.called
    ]
    found = []
    for name in _reached(bodies, computations):
        for instruction in computations[name]:
            does = {instruction.opcode}
            if instruction.opcode == "fusion":
                does = {op for name in instruction.called for op in _last(computations[name])}
            given = (shape for shape in instruction.shapes if shape not in others)
            if does & set(MOVES) and sizes & {math.prod(shape) for shape in given}:
                found.append(instruction.text)
    return found


def _parse(text: str) -> dict[str, list[_Instruction]]:
    computations: dict[str, list[_Instruction]] = collections.defaultdict(list)
    name = ""
    for line in text.splitlines():
        if match := _COMPUTATION.match(line):
            name = match[1]
        elif match := _INSTRUCTION.match(line):
            root, own_name, result, opcode = match.groups()
            shapes = (map(int, filter(None, s.split(","))) for s in _SHAPE.findall(result))
            rest = line[match.end() :]
            operands = re.findall(r"%([\w.\-]+)", rest[: rest.find(")")])
            computations[name].append(
                _Instruction(
                    own_name,
                    bool(root),
                    tuple(map(_dimensions, shapes)),
                    opcode,
                    tuple(operands),
                    tuple(_names(rest)),
                    line.strip(),
                )
            )
    return computations


def _last(instructions: list[_Instruction]) -> set[str]:
    """Opcodes of what a fusion stores, seen through what only renames it."""
    named = {instruction.name: instruction for instruction in instructions}
    found, waiting = set(), [instruction for instruction in instructions if instruction.root]
    while waiting:
        instruction = waiting.pop()
        if instruction.opcode in ("bitcast", "tuple"):
            waiting += [named[name] for name in instruction.operands]
        else:
            found.add(instruction.opcode)
    return found


def _dimensions(shape: Iterable[int]) -> tuple[int, ...]:
    return tuple(sorted(size for size in shape if size != 1))


def _names(text: str) -> Iterator[str]:
    for one, several in _CALLED.findall(text):
        yield from [one] if one else re.findall(r"%?([\w.\-]+)", several)


def _reached(names: list[str], computations: dict[str, list[_Instruction]]) -> list[str]:
    """These computations and those they call, without the insides of fusions."""
    found, waiting = [], list(names)
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        found.append(name)
        for instruction in computations[name]:
            if instruction.opcode != "fusion":
                waiting += instruction.called
    return found
