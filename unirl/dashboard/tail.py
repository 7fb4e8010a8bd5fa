"""Files of a run directory that somebody else may be writing, or may have damaged: read on from where we were.

Nothing here trusts the folder: a link out of it, a pipe or a line without end is refused, skipped and counted.
"""

import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

MAX_LINE_BYTES = 32 << 20
"""A longer line counts as bad."""
_CHUNK = 1 << 18
_MARK = 64

Record = dict[str, Any]


def open_inside(folder: Path, name: str) -> int:
    """A file descriptor of a regular file below `folder`, wherever links lead.

    Args:
        folder: a folder without links in its path.
        name: path below it.

    Raises:
        PermissionError: it lies outside, or is no regular file.
        OSError: there is none, or it cannot be read.
    """
    try:
        path = (folder / name).resolve(strict=True)
    except (RuntimeError, ValueError) as error:  # links in a circle; a NUL
        raise FileNotFoundError(name) from error
    if not path.is_relative_to(folder):
        raise PermissionError(f"{name}: expected a file inside the run directory; got a link out of it; copy the file")
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOFOLLOW)
    if not stat.S_ISREG(os.fstat(file).st_mode):
        os.close(file)
        raise PermissionError(f"{name}: expected a regular file; got something else; remove it")
    return file


def read_inside(folder: Path, name: str, most: int) -> bytes:
    """All bytes of a file below `folder`; see `open_inside`.

    Raises:
        PermissionError: it lies outside, is no regular file, or has more than `most` bytes.
        OSError: there is none, or it cannot be read.
    """
    with os.fdopen(open_inside(folder, name), "rb") as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise PermissionError(f"{name}: expected at most {most} bytes; got more; make it smaller")
    return data


def parse(line: bytes) -> Record | None:
    """The JSON object in a line; None when there is none."""
    try:
        record = json.loads(line.decode())
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None


def last_record(folder: Path, name: str) -> Record:
    """The last readable object of a JSON-lines file, looked for in its last 256 kB; {} without one."""
    try:
        file = open_inside(folder, name)
    except OSError:
        return {}
    with os.fdopen(file, "rb") as stream:
        stream.seek(max(0, os.fstat(file).st_size - (1 << 18)))
        lines = stream.read(1 << 18).split(b"\n")[:-1]
    return next((record for line in reversed(lines) if (record := parse(line)) is not None), {})


class Tail:
    """Hands out each whole line of an append-only JSON-lines file once."""

    def __init__(self, folder: Path, name: str) -> None:
        """Remember the file; it need not exist yet."""
        self._folder, self._name = folder, name
        self._start()

    def _start(self) -> None:
        self.position = 0
        """Bytes taken so far: whole lines."""
        self.bad_lines = 0
        """Whole lines that could not be read."""
        self.refused = False
        """The file leads out of the run directory, or is none."""
        self._marks = (b"", b"")
        self._skipping = False

    def _open(self) -> int | None:
        try:
            file = open_inside(self._folder, self._name)
        except PermissionError:
            self.refused = True
            return None
        except OSError:
            return None
        self.refused = False
        return file

    def restarted(self) -> bool:
        """Whether the file is not the one that was read: it shrank or was replaced. Then all begins anew."""
        file = self._open()
        if file is None:
            gone = self.position > 0
        else:
            gone = self.position > 0 and self._read_marks(file) != self._marks
            os.close(file)
        if gone:
            self._start()
        return gone

    def _read_marks(self, file: int) -> tuple[bytes, bytes]:
        """What tells one file from another: its first bytes, and the last ones that were taken."""
        first = min(_MARK, self.position)
        return os.pread(file, first, 0), os.pread(file, first, self.position - first)

    def unread(self) -> int:
        """Bytes that were not taken yet."""
        file = self._open()
        if file is None:
            return 0
        try:
            return max(0, os.fstat(file).st_size - self.position)
        finally:
            os.close(file)

    def records(self, every: int = 1, most: int | None = None) -> Iterator[tuple[int, int, Record]]:
        """(offset, length, object) of each line that was completed since the last call; call `restarted` before.

        Args:
            every: take one line of so many, and pass the others over unread.
            most: stop after about so many bytes; None goes on to the end.
        """
        file, begun = self._open(), self.position
        if file is None:
            return
        try:
            size = _CHUNK
            while data := os.pread(file, size, self.position):
                if most is not None and self.position - begun >= most:
                    break
                end = data.rfind(b"\n") + 1
                if self._skipping:
                    self._skip(data)
                elif end:
                    yield from self._lines(data[:end], every)
                    size = _CHUNK
                elif len(data) < size:
                    break
                elif size >= MAX_LINE_BYTES:
                    self._skipping = True
                else:
                    size *= 2
            self._marks = self._read_marks(file)
        finally:
            os.close(file)

    def _skip(self, data: bytes) -> None:
        end = data.find(b"\n") + 1
        self.position += end or len(data)
        if end:
            self._skipping = False
            self.bad_lines += 1

    def _lines(self, data: bytes, every: int) -> Iterator[tuple[int, int, Record]]:
        for number, line in enumerate(data.split(b"\n")[:-1]):
            offset = self.position
            self.position += len(line) + 1
            if number % every:
                continue
            record = parse(line)
            if record is None:
                self.bad_lines += 1
            else:
                yield offset, len(line), record

    def bytes_at(self, offset: int, length: int) -> bytes:
        """A line that was handed out before; empty when the file is gone."""
        file = self._open()
        if file is None:
            return b""
        try:
            return os.pread(file, length, offset)
        finally:
            os.close(file)

    def lines_at(self, places: Iterator[tuple[int, int]]) -> Iterator[bytes]:
        """Several of them, the file opened once."""
        file = self._open()
        if file is None:
            return
        try:
            for offset, length in places:
                yield os.pread(file, length, offset)
        finally:
            os.close(file)
