"""Files that stay readable whenever the process dies: atomic replacement, and one JSON object per line."""

import errno
import json
import math
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from unirl import run_files

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def write_atomic(path: Path, data: bytes, *, sync: bool = True) -> None:
    """Put `data` at `path`, so that a reader sees the old file or the new one, never a part.

    Args:
        path: the file; its folder must exist.
        data: all of its bytes.
        sync: also survive a power cut; False where losing the newest files does no harm.

    Raises:
        OSError: the disk is full or refuses; no partial file is left, and the message says how much room is needed.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            if sync:
                file.flush()
                os.fsync(file.fileno())
        temporary.replace(path)
        if sync:
            _sync_folder(path.parent)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise _explain(error, path, len(data)) from error


class JsonLines:
    """An append-only file with one JSON object per line and one writer.

    Every line is one write to an O_APPEND file, so a killed writer tears at most the last line. A torn end found on
    opening is closed with a newline: it costs its reader one skipped line.
    """

    def __init__(self, path: Path) -> None:
        """Open or create the file.

        Raises:
            OSError: it cannot be written.
        """
        self._path = path
        self._file: int | None = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
        size = os.fstat(self._file).st_size
        self._torn = size > 0 and os.pread(self._file, 1, size - 1) != b"\n"

    def append(self, record: Mapping[str, object]) -> None:
        """Add one line. NaN and infinities, which JSON lacks, become null and are named under "nonfinite".

        Raises:
            OSError: the disk is full or refuses.
            ValueError: the file was closed.
            TypeError: a value is neither JSON nor a numpy number or array.
        """
        line = (b"\n" if self._torn else b"") + encode_line(record)
        try:
            written = os.write(self._open(), line)
        except OSError as error:
            raise _explain(error, self._path, len(line)) from error
        self._torn = written < len(line)
        if self._torn:
            raise _explain(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), self._path, len(line) - written)

    def sync(self) -> None:
        """Make all lines so far survive a power cut.

        Raises:
            ValueError: the file was closed.
        """
        os.fsync(self._open())

    def close(self) -> None:
        """Close the file; of one that is closed, nothing."""
        if self._file is not None:
            os.close(self._file)
            self._file = None  # its number may soon be another file's

    def _open(self) -> int:
        if self._file is None:
            raise ValueError(f"{self._path}: expected an open file; got one that was closed; write before close()")
        return self._file


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file; none when it is not there. Lines that cannot be read are left out.

    Raises:
        OSError: the file is there, and cannot be read.
    """
    return run_files.read_lines(path)[0]


def encode_line(record: Mapping[str, object]) -> bytes:
    r"""One line of strict JSON, ended by "\n"; see `JsonLines.append`."""
    nonfinite: list[str] = []
    plain = {str(key): _plain(value, str(key), nonfinite) for key, value in record.items()}
    if nonfinite:
        plain["nonfinite"] = nonfinite
    return json.dumps(plain, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode() + b"\n"


def _plain(value: object, name: str, nonfinite: list[str]) -> object:
    """`value` in JSON's own types; the names of its non-finite numbers are added to `nonfinite`."""
    if isinstance(value, np.generic | np.ndarray):
        value = value.tolist()
    if isinstance(value, float) and not math.isfinite(value):
        nonfinite.append(name)
        return None
    if isinstance(value, Mapping):
        return {str(key): _plain(item, f"{name}/{key}", nonfinite) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, f"{name}/{index}", nonfinite) for index, item in enumerate(value)]
    return value


def _explain(error: OSError, path: Path, needed: int) -> OSError:
    if error.errno not in _FULL:
        return error
    free = shutil.disk_usage(path.parent).free
    return OSError(
        error.errno,
        f"expected room for {needed} more bytes; got '{error.strerror}' with {free} bytes free on the disk; free some "
        "space (or lift the quota), then go on with --resume",
        str(path),
    )


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
