"""The one reader of run directories: runs below a folder, JSON lines, settings, and what each actor said last.

Somebody else may be writing the files, or may have damaged them. Nothing here trusts the folder: a link out of it, a
pipe or a line without end is refused, skipped and counted.
"""

import json
import os
import re
import stat
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import yaml

MAX_DEPTH = 4
"""Folders between the folder of runs and a run: name, arm and seed of an ablation, and one more."""
MAX_LINE_BYTES = 32 << 20
"""A longer line counts as bad."""
MAX_SETTINGS_BYTES = 1 << 18
MAX_ACTORS = 1000
RECENT_BEATS = 12
_TAIL_BYTES = 1 << 18
BEAT_BYTES = 1 << 13
"""Read from the end of a file of heartbeats for the newest ones."""
_ACTOR = re.compile(r"(?!\.)([\w.-]{1,200}?)\.jsonl", re.ASCII)
_ROTATED = re.compile(r".*\.\d+\.jsonl")
_CHUNK = 1 << 18
_MARK = 64

Record = dict[str, Any]


def find_runs(folder: Path) -> Iterator[Path]:
    """Every run directory at or below a folder, 4 folders down at most, by name.

    What lies inside a run is not searched, and neither are links to folders and folders whose names begin with a dot.
    """
    if (folder / "run.json").is_file():
        yield folder
        return
    for place, folders, files in os.walk(folder):
        path = Path(place)
        if "run.json" in files:
            yield path
            folders.clear()
        elif len(path.relative_to(folder).parts) >= MAX_DEPTH:
            folders.clear()
        folders[:] = sorted(name for name in folders if not name.startswith("."))


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


def list_inside(folder: Path, name: str) -> list[str]:
    """Names in a folder below `folder`, in order; none where it leads out of it, or is not there."""
    try:
        path = (folder / name).resolve(strict=True)
        return sorted(os.listdir(path)) if path.is_relative_to(folder.resolve()) else []
    except (OSError, RuntimeError):
        return []


def parse(line: bytes) -> Record | None:
    """The JSON object in a line; None when there is none."""
    try:
        record = json.loads(line.decode())
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None


def read_lines(path: Path) -> tuple[list[Record], int]:
    """The objects of a JSON-lines file, and how many whole lines could not be read. No file gives no lines.

    What follows the last newline is still being written and not counted.

    Raises:
        OSError: the file is there, and cannot be read.
    """
    path = path.resolve()
    tail = Tail(path.parent, path.name, strict=True)
    return tail.news(), tail.bad_lines


def last_records(folder: Path, name: str, num_bytes: int = _TAIL_BYTES) -> Iterator[Record]:
    """The objects in the last bytes of a JSON-lines file below `folder`, the last one first."""
    try:
        file = open_inside(folder.resolve(), name)
    except OSError:
        return
    with os.fdopen(file, "rb") as stream:
        start = max(0, os.fstat(file).st_size - num_bytes)
        stream.seek(start)
        lines = stream.read(num_bytes).split(b"\n")[int(start > 0) : -1]
    yield from (record for line in reversed(lines) if (record := parse(line)) is not None)


def last_record(folder: Path, name: str) -> Record:
    """The last of them; {} without one."""
    return next(last_records(folder, name), {})


def actor_names(folder: Path) -> list[str]:
    """Actors that have left a heartbeat, by name; `folder` is the run directory."""
    names = (name for name in list_inside(folder, "actors") if not _ROTATED.fullmatch(name))
    return [match[1] for match in map(_ACTOR.fullmatch, names) if match][:MAX_ACTORS]


def last_beats(folder: Path) -> list[Record]:
    """The last heartbeat of each actor that ever wrote one, as monitoring/heartbeat.py writes them.

    Of each are sure: "actor" (the name of its file), "role" (a text) and "time" (Unix seconds).
    """
    beats = []
    for actor in actor_names(folder):
        # A file that was just rotated may hold no line yet.
        names = (f"actors/{actor}.jsonl", f"actors/{actor}.1.jsonl")
        beat = next((found for name in names for found in last_records(folder, name, BEAT_BYTES)), {})
        role = beat.get("role")
        if _time_of(beat) is not None:
            beats.append(beat | {"actor": actor, "role": role[:80] if isinstance(role, str) else ""})
    return beats


def held_versions(folder: Path) -> list[tuple[float, str, int]]:
    """Unix time, actor and policy version of the newest heartbeats of each actor that holds weights, in order."""
    held = []
    for actor in actor_names(folder):
        for beat in islice(last_records(folder, f"actors/{actor}.jsonl", BEAT_BYTES), RECENT_BEATS):
            at, version = _time_of(beat), beat.get("policy_version")
            if at is not None and type(version) is int and 0 <= version < 1 << 31:
                held.append((at, actor, version))
    return sorted(held)


def _time_of(beat: Record) -> float | None:
    at = beat.get("time")
    return float(at) if isinstance(at, int | float) and not isinstance(at, bool) and abs(at) < 1e11 else None


def silent_after_s(heartbeat_s: float) -> float:
    """Seconds without a heartbeat after which an actor counts as silent, by `monitoring.heartbeat_s`."""
    return max(30.0, 6 * heartbeat_s)


def read_settings(folder: Path) -> Record:
    """A run's saved settings by dotted key; {} where they cannot be read."""
    try:
        return parse_settings(read_inside(folder.resolve(), "config.yaml", MAX_SETTINGS_BYTES).decode())
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return {}


def parse_settings(text: str) -> Record:
    """The text of a config.yaml as values by dotted key.

    Raises:
        ValueError: a value that cannot be, such as a 40th of January.
        yaml.YAMLError: no YAML, or aliases.
    """
    return dict(_flat(yaml.load(text, _PlainLoader), ""))


class _PlainLoader(yaml.SafeLoader):
    """Refuses aliases: a short file of them grows without bound."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases")
        return super().compose_node(parent, index)


def _flat(tree: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in tree.items() if isinstance(tree, dict) else ():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{key}.")
        elif isinstance(value, list | dict | str | int | float | None):
            yield f"{prefix}{key}", value
        else:  # dates
            yield f"{prefix}{key}", str(value)


class Tail:
    """Hands out each whole line of an append-only JSON-lines file once."""

    def __init__(self, folder: Path, name: str, *, strict: bool = False) -> None:
        """Remember the file; it need not exist yet.

        Args:
            folder: the run directory.
            name: path below it.
            strict: a file that is there and cannot be opened is an error, not one without lines.
        """
        self._folder, self._name, self._strict = folder, name, strict
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
        except OSError as error:
            if self._strict and not isinstance(error, FileNotFoundError):
                raise
            self.refused = self.refused or isinstance(error, PermissionError)
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

    def news(self) -> list[Record]:
        """The object of each line that was completed since the last call; of a file that was begun anew, of all."""
        self.restarted()
        return [record for _, _, record in self.records()]

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
