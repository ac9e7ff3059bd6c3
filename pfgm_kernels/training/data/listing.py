# SPDX-License-Identifier: Apache-2.0
"""Which files of a source are images, of which class, and which of them are held out."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from os.path import commonpath
from typing import NamedTuple

import numpy as np

from pfgm_kernels.training.data.checks import LABELS, DataError, blaming, damaged
from pfgm_kernels.training.data.dataset import Split, split
from pfgm_kernels.training.data.sources import Source

ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
LABEL_FILE = "dataset.json"


class Listing(NamedTuple):
    """The images of a source, sorted by name within each part."""

    names: list[str]
    labels: np.ndarray | None
    split: Split


def listed(source: Source, held_out: float | None) -> Listing:
    """Labels are those of ``dataset.json``. Without it, where every image is in one of at least two
    folders, these are the classes, 0, 1, ... in the sorted order of their names. Folders that all
    images share, as an archive of a folder has them, do not count.

    Held out are the images in ``val/`` or else ``test/``, where these stand beside ``train/`` (with
    all three, ``test/`` is left alone); otherwise, or where it is 0, the share ``held_out`` of all.
    """
    names = [name for name in source.names if name.lower().endswith(ENDINGS)]
    if not names:
        raise DataError(
            f"{source.path} expects images ({', '.join(ENDINGS)}), "
            f"got {len(source.names)} other files"
        )
    root = commonpath([name.rpartition("/")[0] for name in names])
    root = root and root + "/"
    parts = None if held_out == 0 else _parts(source, names, root)
    if parts is None:
        groups, division = [(root, names)], split(source.path, len(names), held_out)
    else:
        groups = list(parts.items())
        count = len(groups[0][1])
        names = [name for _, part in groups for name in part]
        division = Split(np.arange(len(names)), count, None)
    table = _label_table(source, root, [prefix for prefix, _ in groups])
    if table is None:
        return Listing(names, _folder_labels(source, groups), division)
    return Listing(names, _table_labels(source, names, table), division)


def _parts(source: Source, names: Sequence[str], root: str) -> dict[str, list[str]] | None:
    """The images to train on and those held out, by their folders, where data bring that along."""
    tops = {_top(name, root) for name in names}
    if "train" not in tops or not tops & {"val", "test"}:
        return None
    if others := tops - {"train", "val", "test"}:
        raise DataError(
            f"{source.path} expects train/, val/ and test/ without other images beside them, "
            f"got some in {min(others) or 'none of them'!r}"
        )
    held_out = "val" if "val" in tops else "test"
    return {
        f"{root}{part}/": [name for name in names if _top(name, root) == part]
        for part in ("train", held_out)
    }


def _top(name: str, prefix: str) -> str:
    """The folder below ``prefix`` that holds it, "" for none."""
    return name[len(prefix) :].rpartition("/")[0].partition("/")[0]


def _folder_labels(source: Source, groups: Sequence[tuple[str, list[str]]]) -> np.ndarray | None:
    prefix, names = groups[0]
    classes = sorted({_top(name, prefix) for name in names})
    if len(classes) == 1 or "" in classes:
        return None
    index = {name: label for label, name in enumerate(classes)}
    labels = []
    for prefix, names in groups:
        for name in names:
            label = index.get(_top(name, prefix))
            if label is None:
                raise DataError(
                    f"{source.where(name)}: expected a folder of {prefix} that is a class of "
                    f"{groups[0][0]}, got {_top(name, prefix) or 'none'!r}"
                )
            labels.append(label)
    return np.array(labels)


def _table_labels(
    source: Source, names: Sequence[str], table: Mapping[str, int]
) -> np.ndarray | None:
    if not table:
        return None
    for name in names:
        if name not in table:
            raise DataError(
                f"{source.where(name)}: expected a label of each image in {LABEL_FILE}, "
                "got none of this one"
            )
    return np.array([table[name] for name in names])


def _label_table(source: Source, root: str, prefixes: Sequence[str]) -> dict[str, int] | None:
    """Labels by the images' names, from one file for all or one a part; {} where these say that
    there are none, None without such a file.
    """
    present = set(source.names)
    above = [root[:end] for end in range(len(root) + 1) if end == 0 or root[end - 1] == "/"]
    for places in (*([place] for place in above), prefixes):
        found = [place for place in places if place + LABEL_FILE in present]
        if found:
            return {key: label for at in found for key, label in _read_labels(source, at).items()}
    return None


def _read_labels(source: Source, place: str) -> dict[str, int]:
    """The labels in the JSON file that StyleGAN's and EDM's tools write, {"labels": null} or
    {"labels": [["00000/img00000000.png", 6], ...]}, the names relative to its folder.
    """
    where = source.where(place + LABEL_FILE)
    content = source.read(place + LABEL_FILE)
    with blaming(where, "JSON"):
        values = json.loads(content)
    if not isinstance(values, dict) or "labels" not in values:
        raise damaged(where, 'an object with "labels"', type(values).__name__)
    pairs = values["labels"]
    if pairs is None:
        return {}
    if not isinstance(pairs, list):
        raise damaged(where, "a list of labels or null", type(pairs).__name__)
    table: dict[str, int] = {}
    for pair in pairs:
        match pair:
            case [str(name), int(label)] if not isinstance(label, bool) and 0 <= label < LABELS:
                if table.setdefault(place + name.replace("\\", "/"), label) != label:
                    raise damaged(where, f"one label of {name}", "two")
            case _:
                raise damaged(
                    where, f"pairs of a name and an integer from 0 to {LABELS - 1}", repr(pair)[:80]
                )
    return table
