"""Whether a compiled kernel forms addresses and masks in 64 bits where sizes may pass 2**31.

Read from Triton's intermediate form (TTIR), as text: the values that lead to an address or a mask, back
to where each begins. Two products are wrong in 32 bits:

    size * size, or index * stride    neither is a constant
    program_id(0) * constant          the number of programs on this axis may reach 2**31; on the others 65535

A remainder is as small as what it is taken by: ``program_id(0) % tiles * BLOCK`` is not meant.
"""

import dataclasses
import re

_VALUE = re.compile(r"%\w+(?:#\d+)?")
_RESULT = re.compile(r"^\s*(%\w+)(?::\d+)? = ([\w.]+)\s*(.*)$")
_LOCATION = re.compile(r" loc\(.*\)\s*$")
_CARRIED = re.compile(r"(%\w+) = (%\w+(?:#\d+)?)")
_IN_32_BITS = re.compile(r"[ x]i32>?$")

_RESHAPES = ("tt.splat", "tt.expand_dims", "tt.broadcast", "tt.reshape", "tt.trans")
_KEEP_CONSTANT = (*_RESHAPES, "arith.extsi", "arith.extui")
_KEEP_LARGE = (*_RESHAPES, "arith.addi", "arith.subi", "arith.divsi", "arith.divui")


@dataclasses.dataclass
class _Operation:
    kind: str
    operands: list[str]
    text: str  # after the kind


def narrow_products(ttir: str) -> list[str]:
    """The products above: names of their results, which Triton takes from the kernel's variables."""
    operations, wanted = _read(ttir)
    found, seen = [], set()
    while wanted:
        name = wanted.pop()
        operation = operations.get(name.partition("#")[0])
        if name in seen or operation is None:
            continue
        seen.add(name)
        if operation.kind == "tt.load":  # what memory holds is an index, in the type that its owner chose
            continue
        if operation.kind in ("arith.muli", "arith.shli") and _IN_32_BITS.search(operation.text):
            constant = [_is_constant(operations, operand) for operand in operation.operands]
            large = [_is_first_program_id(operations, operand) for operand in operation.operands]
            if not any(constant) or (any(large) and not all(constant)):
                found.append(re.sub(r"_\d+$", "", name.removeprefix("%")))
        wanted += operation.operands
    return sorted(set(found))


def _read(ttir: str) -> tuple[dict[str, _Operation], list[str]]:
    """Operation by the name of its result; and the values that are offsets or masks."""
    operations: dict[str, _Operation] = {}
    wanted: list[str] = []
    regions: list[list[_Operation]] = []  # for each open one: what its scf.yield gives a value to
    for line in ttir.splitlines():
        line = _LOCATION.sub("", line).rstrip()
        opened: list[_Operation] = []
        match = _RESULT.match(line)
        if match:
            name, kind, text = match.groups()
            operation = _Operation(kind, _VALUE.findall(text), text)
            operations[name] = operation
            if kind == "tt.addptr":
                wanted.append(operation.operands[1])
            elif kind == "tt.load":
                wanted += operation.operands[1:2]
            elif kind.startswith("scf."):
                opened = [operation]
                for carried, first in _CARRIED.findall(text):
                    operations[carried] = _Operation("carried", [first], "")
                    opened.append(operations[carried])
        elif line.lstrip().startswith("tt.store"):
            wanted += _VALUE.findall(line)[2:3]
        elif line.lstrip().startswith("scf.yield") and regions:
            for operation in regions[-1]:
                operation.operands += _VALUE.findall(line)
        if line.lstrip().startswith("}") and regions:
            closed = regions.pop()
            opened = opened or closed  # "} else {" and "} do {" go on with the same results
        if line.endswith("{"):
            regions.append(opened)
    return operations, wanted


def _is_constant(operations: dict[str, _Operation], name: str) -> bool:
    operation = operations.get(name)
    if operation is None:
        return False
    if operation.kind in _KEEP_CONSTANT:
        return _is_constant(operations, operation.operands[0])
    return operation.kind == "arith.constant"


def _is_first_program_id(operations: dict[str, _Operation], name: str) -> bool:
    operation = operations.get(name)
    if operation is None:
        return False
    if operation.kind in _KEEP_LARGE:
        return any(_is_first_program_id(operations, operand) for operand in operation.operands)
    return operation.kind == "tt.get_program_id" and operation.text.startswith("x")
