"""XLA's compiled program as text, read: computations, instructions, and how often each runs.

Only what costing needs is understood; the rest of an instruction stays text. The text is that of
`--xla_dump_hlo_as_text` after code generation: the TPU compiler writes its cycle estimates there and nowhere else.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from math import prod

WIDTHS = {"pred": 1, "f8e4m3fn": 1, "f8e5m2": 1, "bf16": 2, "f16": 2, "f32": 4, "f64": 8, "c64": 8, "c128": 16}
ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\](\{[^{}]*\})?")
HEAD = re.compile(r"^(ENTRY )?%([\w.\-]+) \(")
START = re.compile(r"^\s+(ROOT )?%([\w.\-]+) = ")
CALLED = re.compile(r"\b(?:calls|body|condition|to_apply|branch_computations|called_computations)=\{?(%[^,}\s]+)")
HBM = 0  # the memory space that is not named


class HloError(ValueError):
    """A text that is not a compiled program as this file knows it."""


@dataclass(frozen=True)
class Array:
    dtype: str
    shape: tuple[int, ...]
    space: int  # 0 is HBM, 1 VMEM

    @property
    def size(self) -> int:
        return prod(self.shape)

    @property
    def bytes(self) -> int:
        if self.dtype in WIDTHS:
            return self.size * WIDTHS[self.dtype]
        bits = re.search(r"\d+$", self.dtype)
        return self.size * int(bits.group()) // 8 if bits else 0


@dataclass(frozen=True)
class Instruction:
    name: str
    opcode: str
    arrays: tuple[Array, ...]  # of its result; several where that is a tuple
    operands: tuple[str, ...]
    attributes: str
    root: bool

    def attribute(self, key: str) -> str | None:
        """What stands after `key=`, up to the next comma outside brackets; of a name, without its %."""
        start = re.search(rf"(?:^|[ ,]){key}=", self.attributes)
        if not start:
            return None
        rest = self.attributes[start.end() :]
        return rest[: closing(rest, ",")].lstrip("%")


@dataclass(frozen=True)
class Computation:
    name: str
    instructions: tuple[Instruction, ...]

    @cached_property
    def by_name(self) -> dict[str, Instruction]:
        return {i.name: i for i in self.instructions}

    @property
    def root(self) -> Instruction:
        return next(i for i in self.instructions if i.root)

    @cached_property
    def parameters(self) -> tuple[Instruction, ...]:
        found = [i for i in self.instructions if i.opcode == "parameter"]
        return tuple(sorted(found, key=lambda i: int(i.attributes or 0)))


@dataclass(frozen=True)
class Module:
    computations: dict[str, Computation]
    entry: Computation


def parse(text: str) -> Module:
    computations: dict[str, Computation] = {}
    entry: Computation | None = None
    name: str | None = None
    first, lines = False, list[str]()
    for line in text.splitlines():
        if name is None:
            head = HEAD.match(line)
            if head and line.endswith("{"):
                name, first, lines = head.group(2), bool(head.group(1)), []
        elif line == "}" or line.startswith("}, execution_thread"):
            computations[name] = Computation(name, tuple(instruction(text) for text in lines))
            entry, name = computations[name] if first else entry, None
        elif START.match(line):
            lines.append(line)
        elif lines:  # a kernel's metadata has line breaks
            lines[-1] += line
    if entry is None:
        raise HloError("no ENTRY computation")
    return Module(computations, entry)


def closing(text: str, stop: str) -> int:
    """Where the first of the characters `stop` stands outside of brackets and quotes; the length if nowhere."""
    depth, quoted, escaped = 0, False, False
    for at, character in enumerate(text):
        if quoted:
            quoted = escaped or character != '"'
            escaped = character == "\\" and not escaped
        elif character in stop and depth == 0:
            return at
        elif character == '"':
            quoted = True
        elif character in "({[":
            depth += 1
        elif character in ")}]":
            depth -= 1
    return len(text)


def instruction(line: str) -> Instruction:
    """`ROOT %name = SHAPE opcode(operands), attributes`."""
    start = START.match(line)
    assert start
    rest = line[start.end() :]
    shape = rest[: closing(rest, " ")]
    opcode, _, rest = rest[len(shape) :].lstrip().partition("(")
    end = closing(rest, ")")
    operands, attributes = rest[:end], rest[end + 1 :].lstrip(", ")
    if opcode in ("parameter", "constant"):
        attributes = operands  # its number; its value
    names = tuple(re.findall(r"%([\w.\-]+)", operands))
    return Instruction(start.group(2), opcode, arrays(shape), names, attributes, bool(start.group(1)))


def arrays(shape: str) -> tuple[Array, ...]:
    """The arrays of a shape, `bf16[2,3]{1,0:T(8,128)S(1)}` or a tuple of such, nested ones in order."""
    found = []
    for dtype, dims, layout in ARRAY.findall(shape):
        space = re.search(r"S\((\d+)\)", layout)
        sizes = tuple(int(d) for d in dims.split(",") if d)
        found.append(Array(dtype, sizes, int(space.group(1)) if space else HBM))
    return tuple(found)


def executed(module: Module) -> Iterator[tuple[Computation, Instruction, int]]:
    """(where, instruction, times) of all that the device runs as one piece: a fusion is one, its inside is not."""
    yield from inside(module, module.entry, 1)


def inside(module: Module, where: Computation, times: int) -> Iterator[tuple[Computation, Instruction, int]]:
    for i in where.instructions:
        if i.opcode == "while":
            body = module.computations[str(i.attribute("body"))]
            yield from inside(module, body, times * trip_count(module, where, i))
        elif i.opcode in ("call", "conditional", "async-start"):
            for name in CALLED.findall(i.attributes):
                yield from inside(module, module.computations[name.lstrip("%")], times)
        yield where, i, times


def nested(module: Module, i: Instruction) -> Iterator[Instruction]:
    """An instruction and, of a fusion, all inside it."""
    yield i
    if i.opcode == "fusion":
        for inner in module.computations[str(i.attribute("calls"))].instructions:
            yield from nested(module, inner)


def trip_count(module: Module, where: Computation, loop: Instruction) -> int:
    """How often a scan's loop runs: its condition compares a counter with a constant, and both may be carried.

    Raises HloError for a loop that is none of a scan.
    """
    condition = module.computations[str(loop.attribute("condition"))]
    compare = condition.root
    if compare.opcode == "fusion":
        compare = module.computations[str(compare.attribute("calls"))].root
    if compare.opcode != "compare" or compare.attribute("direction") != "LT":
        raise HloError(f"{loop.name}: ends by {compare.opcode}, not by a counter")
    init = where.by_name[loop.operands[0]]

    def value(name: str) -> int:
        i = condition.by_name[name] if name in condition.by_name else condition.instructions[-1]
        if i.opcode == "get-tuple-element":
            return constant(where, init.operands[int(str(i.attribute("index")))])
        return constant(condition, i.name)

    outer = condition.root.operands if condition.root.opcode == "fusion" else compare.operands
    numbers = [value(name) for name in outer]
    return max(numbers) - min(numbers)  # the counter comes from below


def constant(where: Computation, name: str) -> int:
    """The number behind copies and bitcasts."""
    i = where.by_name[name]
    while i.opcode in ("copy", "bitcast", "convert", "copy-done", "copy-start", "broadcast", "reshape"):
        i = where.by_name[i.operands[0]]
    if i.opcode != "constant":
        raise HloError(f"{name}: is no constant but {i.opcode}")
    return int(i.attributes)
