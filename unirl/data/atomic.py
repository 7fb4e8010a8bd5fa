"""Files and folders that appear whole or not at all. Nothing here knows what they hold."""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

_CANNOT_WRITE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES}


class DataError(ValueError):
    """Data on disk that cannot be used or written; the message says what was expected, what came and what to do."""


@contextmanager
def atomic_file(path: Path) -> Iterator[IO[bytes]]:
    """A binary file that takes the name `path` when the block ends, synced to disk, and vanishes when it fails.

    Raises:
        DataError: the disk is full or the folder cannot be written.
    """
    with _explain_disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
        try:
            with partial.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
        sync_folder(path.parent)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """A fresh folder to fill, renamed to `path` when the block ends, removed when it fails.

    Raises:
        DataError: `path` exists, the disk is full, or the parent cannot be written.
    """
    if path.exists():
        raise DataError(
            f"{path}: expected a folder that is not there yet; got an existing one; remove it or name another"
        )
    with _explain_disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        try:
            yield partial
            sync_folder(partial)
            partial.rename(path)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def _explain_disk_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in _CANNOT_WRITE:
            raise
        near = next(parent for parent in path.absolute().parents if parent.exists())
        free_mib = shutil.disk_usage(near).free / 2**20
        raise DataError(
            f"{path}: expected to write it; got {error.strerror!r} with {free_mib:.0f} MiB free on its disk; "
            "free some space, raise the file size limit or write elsewhere. Nothing partial was left"
        ) from error
