# SPDX-License-Identifier: Apache-2.0
"""Which of the tests run: all, or a part.

"thin" is what `make test` takes: on each backend (or instruction set), every test but those marked
`exhaustive`, every value of every parameter of a test, and every named case at least once. It
leaves out what combines these in further ways. A named case is taken by one of the tests that are
made for named cases, another one from case to case. Of kernels that are interpreted or emulated,
where a call takes seconds, it takes every named case and, of every other test, one value, but none
of AROUND; under Triton's interpreter the cases are those of the test of values.

"rest" is what that leaves; "spread" is what runs without regard to it: everything, but on backends
that are interpreted or emulated so many parametrisations of each test, evenly spread.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Iterable

import pytest
from cases import CASES

COLLECTED = pytest.StashKey[list[pytest.Item]]()  # all there is to choose from
PARTS = ("thin", "rest", "spread")
SPREAD = 4
PLACES = ("backend", "instruction_set")
AROUND = tuple(
    f"tests/op/test_{name}"
    for name in (
        *("classes.", "compile.", "density.", "divergence.", "merge.", "on_disk.", "references."),
        *("images.py::test_64_by", "images.py::test_float64", "images.py::test_near"),
        *("images.py::test_on_data", "images.py::test_posterior"),
    )
)
"""What lies around the kernels, or asks more of images than values and gradients: other backends
show as much of it, in less time."""

Group = dict[tuple[str, str | None], list[pytest.Item]]  # by test and by where it runs


def parameters(item: pytest.Item) -> dict[str, object]:
    return item.callspec.params if hasattr(item, "callspec") else {}


def place(item: pytest.Item) -> str | None:
    """Where a test runs that runs on several."""
    found = [p for p in map(parameters(item).get, PLACES) if p is not None]
    return str(getattr(found[0], "name", found[0])) if found else None


def named_case(item: pytest.Item) -> str | None:
    name = parameters(item).get("name")
    return name if name in CASES else None


@functools.cache  # what is compared with all other tests of a group; arrays are long to spell
def values(item: pytest.Item) -> set[tuple[str, str]]:
    """Of a test's parameters, but for the place and the named case; and that it runs at all."""
    apart = (*PLACES, *(["name"] if named_case(item) else []))
    return {("", ""), *((k, repr(v)) for k, v in parameters(item).items() if k not in apart)}


def by_test_and_place(items: Iterable[pytest.Item]) -> Group:
    groups: Group = defaultdict(list)
    for item in items:
        groups[item.nodeid.partition("[")[0], place(item)].append(item)
    return groups


def one_test_for_each_case(
    items: Iterable[pytest.Item], interpreted: set[pytest.Item]
) -> set[pytest.Item]:
    """In float32, which the cases are hard for."""
    tests: dict[tuple[str, str], list[pytest.Item]] = defaultdict(list)
    for item in items:
        name, where = named_case(item), place(item)
        if name is not None and where is not None and "float64" not in item.nodeid:
            tests[where, name].append(item)
    turn = {name: number for number, name in enumerate(CASES)}
    return {
        found[0] if found[0] in interpreted else found[turn[name] % len(found)]
        for (_, name), found in tests.items()
    }


def cover(group: list[pytest.Item], taken: set[pytest.Item]) -> set[pytest.Item]:
    """Few more tests of the group, so that every value occurs in what is then taken."""
    more: set[pytest.Item] = set()
    missing = set().union(*map(values, group)) - set().union(*map(values, taken & {*group}))
    for least in range(len(missing), 0, -1):
        for item in group:
            if len(values(item) & missing) >= least:
                more.add(item)
                missing -= values(item)
    return more


def thin(
    items: list[pytest.Item], emulated: set[pytest.Item], interpreted: set[pytest.Item]
) -> set[pytest.Item]:
    slow = emulated | interpreted
    items = [
        item
        for item in items
        if item.get_closest_marker("exhaustive") is None
        and not (item in slow and item.nodeid.startswith(AROUND))
    ]
    taken = one_test_for_each_case(items, interpreted)
    for group in by_test_and_place(items).values():
        if group[0] not in slow:
            taken |= cover(group, taken)
        elif taken.isdisjoint(group):
            taken.add(group[0])
    return taken


def spread(items: list[pytest.Item], slow: set[pytest.Item]) -> set[pytest.Item]:
    taken = set(items) - slow
    for group in by_test_and_place(item for item in items if item in slow).values():
        step = max(1, len(group) / SPREAD)
        taken |= {group[int(i * step)] for i in range(int(len(group) / step))}
    return taken


def choose(
    items: list[pytest.Item],
    part: str | None,
    emulated: set[pytest.Item],
    interpreted: set[pytest.Item],
) -> set[pytest.Item]:
    """Those of the part, or of all."""
    few, many = thin(items, emulated, interpreted), spread(items, emulated | interpreted)
    return {"thin": few, "rest": many - few, "spread": many}.get(str(part), many | few)
