# SPDX-License-Identifier: Apache-2.0
"""Where files come from: a folder, or a ZIP that is read in place and never unpacked."""

from __future__ import annotations

import os
import stat
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Protocol

from pfgm_kernels.training.data.checks import MOST_BYTES, DataError, blaming, damaged

DIRECTORY_ENTRY = b"PK\1\2"


class Source(Protocol):
    """Files by name, relative and with slashes."""

    path: Path
    names: list[str]
    """Sorted; without hidden files."""

    def read(self, name: str) -> bytes:
        """The whole of a small file: an image, or labels. Threads may call it at once."""

    def where(self, name: str) -> str:
        """What to call a file in a message."""


class Folder:
    """A folder and all that is below it, links followed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.names: list[str] = []
        seen: set[str] = set()
        for folder, inner, files in os.walk(path, onerror=_raise, followlinks=True):
            if (real := os.path.realpath(folder)) in seen:
                raise DataError(f"{folder} expects a folder of its own, got a link to {real}")
            seen.add(real)
            inner[:] = [name for name in inner if _shown(name)]
            at = Path(folder).relative_to(path)
            self.names += [(at / name).as_posix() for name in files if _shown(name)]
        self.names.sort()

    def read(self, name: str) -> bytes:
        path = self.path / name
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise DataError(f"{path}: expected a file, got a pipe, socket or device")
        _check_size(path, status.st_size)
        return path.read_bytes()

    def where(self, name: str) -> str:
        return str(self.path / name)


class Archive:
    """A ZIP file. Each of its members is checked, also those that nobody reads.

    Raises ValueError where it is damaged or a member has an absolute path or one that leads out of
    the archive, is a link or a device, is encrypted, or is compressed by another method than
    deflate (of the others, Python cannot bound what they decompress to).
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with blaming(path, "a whole ZIP file"):
            self._file = zipfile.ZipFile(path)
        try:
            self._members = self._checked()
        except BaseException:
            self._file.close()
            raise
        self.names = sorted(name for name in self._members if all(map(_shown, name.split("/"))))

    def _checked(self) -> dict[str, zipfile.ZipInfo]:
        members: dict[str, zipfile.ZipInfo] = {}
        for info in self._file.infolist():
            parts = info.filename.replace("\\", "/").split("/")
            name = "/".join(part for part in parts if part not in ("", "."))
            member = f"{self.path}: the member {info.filename!r}"
            if (parts[0] == "" and name) or parts[0][1:2] == ":" or ".." in parts:
                raise DataError(f"{member} expects a path within the archive, got one out of it")
            if not name.isprintable():
                raise DataError(f"{member} expects a name of printable characters, got others")
            kind = stat.S_IFMT(info.external_attr >> 16)
            if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
                raise DataError(f"{member} expects a file or a folder, got a link or a device")
            if info.flag_bits & 0x1:
                raise DataError(f"{member} expects a plain file, got an encrypted one")
            if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise DataError(
                    f"{member} expects no compression or deflate, got method {info.compress_type}"
                )
            if DIRECTORY_ENTRY in info.extra + info.comment:
                raise damaged(self.path, "a directory of its members", "entries within an entry")
            if name in members:
                raise DataError(f"{member} expects a name of its own, got a second of that name")
            # This compares both names that the archive has of it: else one flipped bit of the
            # directory would make it a file of another kind, which nobody misses.
            with blaming(self.where(name), "a whole member"):
                self._file.open(info).close()
            members[name] = info
        return {name: info for name, info in members.items() if not info.is_dir()}

    def size(self, name: str) -> int:
        """Bytes of a member, unpacked, as the archive declares them; no more are ever read."""
        return self._members[name].file_size

    @contextmanager
    def open(self, name: str) -> Iterator[IO[bytes]]:
        """Opens a member. Whoever reads it is told of damage, in any exception, at its last byte at
        the latest, where its checksum is compared.
        """
        with blaming(self.where(name), "a whole member"):
            file = self._file.open(self._members[name])
        with file:
            yield file

    def read(self, name: str) -> bytes:
        size = self.size(name)
        _check_size(self.where(name), size)
        with self.open(name) as file, blaming(self.where(name), "a whole member"):
            content = file.read()
        if len(content) != size:
            raise damaged(self.where(name), f"{size} bytes", f"{len(content)} bytes")
        return content

    def where(self, name: str) -> str:
        return f"{self.path}/{name}"

    def __enter__(self) -> Archive:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def _shown(name: str) -> bool:
    """Whether a file or folder is not hidden, nor what macOS puts beside each file of a ZIP."""
    return not name.startswith(".") and name != "__MACOSX"


def _check_size(where: object, size: int) -> None:
    if size > MOST_BYTES:
        raise DataError(f"{where}: expected a file of at most {MOST_BYTES:,} bytes, got {size:,}")


def _raise(error: OSError) -> None:
    raise error
