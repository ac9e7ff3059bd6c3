# SPDX-License-Identifier: Apache-2.0
"""Files that are whole or not there at all, and folders that one process at a time writes to."""

from __future__ import annotations

import fcntl
import os
import secrets
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

TEMPORARY = ".partial"
LOCK = ".lock"


def write_bytes(path: Path, content: bytes) -> None:
    """Puts ``content`` at ``path`` in one step: readers see the old file or the whole new one.

    It is written beside its final name, flushed to the disk and then renamed. Raises OSError,
    naming ``path``.
    """
    temporary = path.with_name(secrets.token_hex(8) + TEMPORARY)
    with naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            # As open() makes it, the umask decides on its mode; tempfile's would be private.
            with open(temporary, "xb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def cache_folder() -> Path:
    """The package's folder in the user's cache; it may not exist yet."""
    parent = os.environ.get("XDG_CACHE_HOME") or ""
    return (Path(parent) if os.path.isabs(parent) else Path.home() / ".cache") / "pfgm_kernels"


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Has the system's errors name ``path``: that of a full disk names no file by itself."""
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keeps ``folder``, made if need be, to this process; its death in any way ends that, too.

    Raises ValueError where another process holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # A file, and open for writing: network file systems lock nothing else among machines. It stays,
    # as another process may have it open already when this one would remove it.
    with open(folder / LOCK, "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"{folder} is in use: expected to be the only one that writes there, but another "
                "process is at work; wait until it ends or name another folder"
            ) from None
        except OSError as error:
            warnings.warn(
                f"the file system of {folder} knows no locks ({error.strerror}): "
                "see to it that no other process writes there",
                stacklevel=3,
            )
        yield
