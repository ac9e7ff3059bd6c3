# SPDX-License-Identifier: Apache-2.0
"""Does any 32-bit integer of a kernel overflow? Its TTIR is evaluated with intervals.

Numbers are what a launch gives, programs are all of its grid. What is read from memory is an index
or a count, see `LOADED`. Integers that are made of the bits of a float are left alone.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

Interval = tuple[int, int]
INT32 = (-(2**31), 2**31 - 1)
STRIDES = ("y_plane",)  # of operands that may be cut of larger ones: any that 32 bits hold
LOADED = {("products.sum_kernel", "list_ptr"): "tiles"}
"""By kernel and pointer, the argument that what is read is less than, where that is not N."""

DIRECT = {"splat", "broadcast", "expand_dims", "reshape", "trans", "extsi", "index_cast"}
VALUE = re.compile(r"%[\w.]+(?:#\d+)?")


@dataclass
class Statement:
    """A line, and what is in its braces."""

    text: str
    regions: list[list[Statement]] = field(default_factory=list)


def parse(ttir: str) -> list[Statement]:
    top = Statement("", [[]])
    stack = [top]
    for line in ttir.splitlines():
        text = re.sub(r"\s*loc\((?:[^()]|\([^()]*\))*\)", "", line).strip()
        if re.match(r"\} (else|do) \{", text):
            stack[-1].regions.append([])
        elif text.startswith("}"):
            stack.pop().text += f" {text}"
        elif text and not text.startswith("#"):
            stack[-1].regions[-1].append(Statement(text))
            if text.endswith("{"):
                stack.append(stack[-1].regions[-1][-1])
                stack[-1].regions.append([])
    return top.regions[0]


def hull(a: Interval | None, b: Interval | None) -> Interval | None:
    return None if a is None or b is None else (min(a[0], b[0]), max(a[1], b[1]))


def corners(function, a: Interval, b: Interval) -> Interval:
    found = [function(x, y) for x in a for y in b]
    return min(found), max(found)


def divide(a: Interval, b: Interval) -> Interval:
    return corners(lambda x, y: x // y, a, b) if b[0] > 0 else (-max(map(abs, a)), max(map(abs, a)))


def remainder(a: Interval, b: Interval) -> Interval:
    most = max(map(abs, b)) - 1
    return (0, min(a[1], most)) if a[0] >= 0 else (-most, most)


BINARY = {
    "addi": lambda a, b: (a[0] + b[0], a[1] + b[1]),
    "subi": lambda a, b: (a[0] - b[1], a[1] - b[0]),
    "muli": lambda a, b: corners(lambda x, y: x * y, a, b),
    "shli": lambda a, b: corners(lambda x, y: x << y, a, b),
    "shrsi": lambda a, b: corners(lambda x, y: x >> y, a, b),
    "minsi": lambda a, b: (min(a[0], b[0]), min(a[1], b[1])),
    "maxsi": lambda a, b: (max(a[0], b[0]), max(a[1], b[1])),
    "divsi": divide,
    "remsi": remainder,
}


class Evaluation:
    """Of the kernel `name`, launched with these integers on a grid."""

    def __init__(self, name: str, integers: Mapping[str, int], grid: tuple[int, ...]) -> None:
        self.name, self.integers, self.grid = name, integers, grid
        self.values: dict[str, Interval | None] = {}
        self.roots: dict[str, str] = {}  # of pointers: the argument that they point into
        self.conditions: dict[str, list[tuple[str, str]]] = {}  # (a, b) with a < b where it holds
        self.found: set[str] = set()

    def run(self, ttir: str) -> set[str]:
        (module,) = parse(ttir)
        (function,) = (s for s in module.regions[0] if s.text.startswith("tt.func"))
        for name, kind in re.findall(r"%(\w+): (\S+?)[\s,)]", function.text):
            if kind.startswith("!tt.ptr"):
                self.roots[f"%{name}"] = name
            elif kind.startswith("i"):
                value = self.integers[name]
                widest = kind == "i32" and name in STRIDES
                self.values[f"%{name}"] = (0, INT32[1]) if widest else (value, value)
        self.block(function.regions[0])
        return self.found

    def get(self, name: str) -> Interval | None:
        return self.values.get(name)

    def block(self, statements: list[Statement]) -> list[Interval | None]:
        """What it yields."""
        yielded: list[Interval | None] = []
        for statement in statements:
            text = statement.text
            if text.startswith(("scf.yield", "scf.condition")):
                operands = VALUE.findall(text.partition(" : ")[0])
                self.condition = operands[0] if operands else ""
                yielded = [self.get(o) for o in operands]
            elif "scf.for" in text:
                self.loop(statement)
            elif "scf.while" in text:
                self.repeat(statement)
            elif "scf.if" in text:
                parts = [self.block(region) for region in statement.regions]
                self.bind(text, [hull(a, b) for a, b in zip(*parts, strict=True)] if parts[1:] else [])
            elif " = " in text:
                self.step(statement)
        return yielded

    def bind(self, text: str, results: list[Interval | None]) -> None:
        if " = scf" in text:
            name = text.partition(" = ")[0].partition(":")[0]
            for number, result in enumerate(results):
                self.values[f"{name}#{number}" if len(results) > 1 else name] = result

    def settle(self, names: list[str], first: list[Interval | None], body, most: int | None) -> None:
        """Intervals of what a loop hands on that hold for every iteration, of which there are at
        most so many.
        """
        found, state = set(self.found), first
        for attempt in range(3):
            self.values.update(zip(names, state, strict=True))
            after = body()
            self.found = set(found)
            joined = [hull(a, b) for a, b in zip(state, after, strict=True)]
            if joined == state:
                break
            if attempt == 0:
                state = joined
            elif attempt == 1 and most is not None:  # as much more in each iteration
                state = [
                    b and a and (a[0] - most * (a[0] - b[0]), a[1] + most * (b[1] - a[1]))
                    for a, b in zip(state, joined, strict=True)
                ]
            else:
                state = [a if a == b or a is None else INT32 for a, b in zip(state, joined, strict=True)]
        self.values.update(zip(names, state, strict=True))

    def loop(self, statement: Statement) -> None:
        head = statement.text
        counter, start, end, step = re.search(
            r"scf\.for (\S+) = (\S+) to (\S+) step (\S+)", head
        ).groups()
        low, high, by = self.get(start), self.get(end), self.get(step)
        self.values[counter] = (low[0], max(low[0], high[1] - 1))
        handed = re.search(r"iter_args\((.*?)\) ->", head)
        pairs = re.findall(r"(%[\w.]+) = (\S+?)(?:,|$)", handed[1]) if handed else []
        names, first = [a for a, _ in pairs], [self.get(b) for _, b in pairs]
        most = max(0, -((low[0] - high[1]) // max(1, by[0])))
        self.settle(names, first, lambda: self.block(statement.regions[0]), most)
        last = self.block(statement.regions[0])
        self.bind(head, [hull(a, b) for a, b in zip(first, last, strict=True)])

    def repeat(self, statement: Statement) -> None:
        before, body = statement.regions
        pairs = re.findall(r"(%[\w.]+) = (\S+?)[,)]", statement.text.partition("scf.while")[2])
        names, first = [a for a, _ in pairs], [self.get(b) for _, b in pairs]
        inner = re.findall(r"(%[\w.]+):", body[0].text)

        def once() -> list[Interval | None]:
            passed = self.block(before)[1:]
            self.outcome = passed
            own = VALUE.findall(before[-1].text.partition(" : ")[0])[1:]
            self.values.update(zip(inner, passed, strict=True))
            for smaller, larger in self.conditions.get(self.condition, []):
                for name, source in zip(inner, own, strict=True):
                    interval, limit = self.get(name), self.get(larger)
                    if source == smaller and interval and limit:
                        self.values[name] = (interval[0], min(interval[1], limit[1] - 1))
            return self.block(body[1:])

        self.settle(names, first, once, None)
        once()
        self.bind(statement.text, self.outcome)

    def step(self, statement: Statement) -> None:
        text = statement.text
        name, _, right = text.partition(" = ")
        operation = re.match(r'"?\w+\.(\w+)', right)[1]
        operands = VALUE.findall(right.partition(" : ")[0])
        kind = text.rpartition(" -> ")[2] if " -> " in text else text.rpartition(" : ")[2]
        kind = kind.rpartition(" to ")[2].split(", ")[-1]
        if operands and operands[0] in self.roots:
            self.roots[name] = self.roots[operands[0]]
        if not re.search(r"\bi\d+>?$|xi\d+>$", kind):
            return
        result = self.evaluate(operation, right, operands, statement)
        if result is not None and kind.rstrip(">").endswith("i32"):
            if not INT32[0] <= result[0] <= result[1] <= INT32[1]:
                self.found.add(f"{self.name}: {text} is {result[0]:,} … {result[1]:,}")
                result = INT32
        self.values[name] = result

    def evaluate(
        self, operation: str, right: str, operands: list[str], statement: Statement
    ) -> Interval | None:
        given = [self.get(operand) for operand in operands]
        if operation == "constant":
            number = re.search(r"(?:dense<)?(-?\d+|true|false)", right.partition("constant ")[2])[1]
            value = {"true": 1, "false": 0}.get(number) or int(number.replace("false", "0"))
            return value, value
        if operation in ("get_program_id", "get_num_programs"):
            axis = "xyz".index(right.split()[1])
            programs = (*self.grid, 1, 1)[axis]
            return (0, programs - 1) if operation == "get_program_id" else (programs, programs)
        if operation == "make_range":
            end, start = (int(re.search(rf"{key} = (\d+)", right)[1]) for key in ("end", "start"))
            return start, end - 1
        if operation == "load":
            return self.loaded(operands[0], right)
        if operation == "cmpi":
            if " slt, " in right:
                self.conditions[self.named(statement)] = [(operands[0], operands[1])]
            return 0, 1
        if operation == "andi":
            both = [c for o in operands for c in self.conditions.get(o, [])]
            self.conditions[self.named(statement)] = both
            if None in given or any(interval[0] < 0 for interval in given):
                return None
            return 0, min(interval[1] for interval in given)
        if None in given:
            return None
        if operation in BINARY:
            return BINARY[operation](*given)
        if operation in DIRECT or (operation == "extui" and given[0][0] >= 0):
            return given[0]
        if operation == "trunci":
            return given[0]
        if operation == "select":
            return hull(given[1], given[2])
        if operation in ("ori", "xori"):
            return (0, 1) if all(interval == (0, 1) for interval in given) else None
        if operation in ("reduce", "scan"):
            return self.reduced(right, given[0], statement)
        return None

    @staticmethod
    def named(statement: Statement) -> str:
        return statement.text.partition(" = ")[0]

    def loaded(self, pointer: str, right: str) -> Interval:
        if re.search(r"ptr<i8>", right):
            return 0, 255
        root = self.roots.get(pointer, "")
        bound = LOADED.get((self.name, root), "N")
        return -1, self.integers.get(bound, 2**30)

    def reduced(self, right: str, given: Interval, statement: Statement) -> Interval:
        if not any("arith.addi" in inner.text for inner in statement.regions[0]):
            return given
        axis = int(re.search(r"axis = (\d+)", right)[1])
        shape = re.search(r"tensor<([\dx]+)xi\d+>", statement.text.rpartition(" : ")[2])[1]
        terms = int(shape.split("x")[axis])
        return min(given[0], terms * given[0]), max(given[1], terms * given[1])
