"""`unirl runs fork`: a new run directory that holds a run as it was after one of its checkpoints, to go on otherwise.

Reads the run and changes nothing there; needs no torch and no Ray. What the run left after that step is not taken over.
"""

import json
import os
import re
import shutil
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unirl.data.atomic import DataError, atomic_folder, sync_folder
from unirl.jobs.interrupts import Interrupts
from unirl.jobs.run_dirs import RUNS
from unirl.jobs.runs import find_run
from unirl.learner.commits import COMMIT, LATEST, committed, problem_of, step_of
from unirl.monitoring.durable_files import encode_line, write_atomic
from unirl.monitoring.folder_lock import is_locked
from unirl.monitoring.run_facts import resume_command

LINES = ("metrics.jsonl", "pairs.jsonl", "used_pairs.jsonl", "quarantine.jsonl")
"""Files with a line or more a step."""
_EVALUATION = re.compile(r"[a-z]+_(\d+)\.json")
_IMAGE = re.compile(r"[\w-]+\.webp")
_EVALUATION_IMAGE = re.compile(rb"evaluations/images/([\w-]+\.webp)")

Line = dict[str, Any]


def main(run: Path, new: Path, *, step: int | None = None, as_json: bool = False) -> int:
    """Make the new run; prints how to go on. Returns the exit code.

    Args:
        run: run directory, or its name in runs/.
        new: folder that is not there yet; a name in runs/ where `run` is one.
        step: of a committed checkpoint; None takes the newest.
        as_json: print one JSON object.

    Raises:
        DataError: no such run or checkpoint, a new folder that exists, or a file of the run that cannot be taken.
    """
    source = find_run(run)
    if source != run and len(new.parts) == 1:
        new = RUNS / new
    if is_locked(source):
        sys.stderr.write(f"{source} is being written; it goes on, and only what it has saved is taken\n")
    with Interrupts() as interrupts:
        try:
            fork = make_fork(source, new, step)
        except KeyboardInterrupt:
            sys.stderr.write("ended; nothing was left behind\n")
            return interrupts.exit_code
    command = resume_command(new, fork.run)
    if as_json:
        sys.stdout.write(json.dumps({"run": str(new), "step": fork.step, "resume": command}) + "\n")
    else:
        sys.stdout.write(f"{new}: {source} as it was after step {fork.step}; go on with: {command} key=value\n")
    return 0


@dataclass(frozen=True, slots=True)
class Fork:
    """A run that begins where another was."""

    step: int
    """Steps that both share."""
    run: dict[str, Any]
    """Its run.json."""


def make_fork(source: Path, new: Path, step: int | None) -> Fork:
    """Make `new` whole or not at all.

    Raises:
        DataError: as `main`.
    """
    checkpoint = choose_checkpoint(source, step)
    if new.resolve().is_relative_to(source.resolve()):
        raise DataError(f"fork: expected a folder outside of {source}; got {new}; name another")
    copy = _Copy(source.resolve(), step_of(checkpoint))
    with atomic_folder(new) as folder:
        copy.take_checkpoint(folder, checkpoint.name)
        copy.take_lines(folder)
        copy.take_evaluations(folder)
        copy.take_steps(folder)
        run = copy.describe(folder, new.resolve().name)
        for inner, _, _ in os.walk(folder):
            sync_folder(Path(inner))
    return Fork(copy.last, run)


def choose_checkpoint(source: Path, step: int | None) -> Path:
    """The committed checkpoint after this step, or the newest.

    Raises:
        DataError: there is none; lists those that there are.
    """
    found = {step_of(folder): folder for folder in committed(source / "checkpoints")}
    if not found:
        raise DataError(
            f"fork: expected a run with a committed checkpoint; got none in {source / 'checkpoints'}; let it come to "
            "one (train.save_every, Ctrl-C)"
        )
    if step is not None and step not in found:
        raise DataError(
            f"fork: expected --step with a checkpoint, of {', '.join(map(str, found))}; got {step}; choose one of these"
        )
    return found[max(found) if step is None else step]


class _Copy:
    """Takes over what a run held after a step, file by file."""

    def __init__(self, source: Path, last: int) -> None:
        self._source, self.last = source, last

    def take_checkpoint(self, folder: Path, name: str) -> None:
        """The checkpoint, first of all: a run that goes on may delete it. With it, the ledger of pairs as it was."""
        place = Path("checkpoints") / name
        try:
            commit = json.loads(self._inside(place / COMMIT).read_bytes())
            for file in [*commit["files"], COMMIT]:
                self._link(place / file, folder)
        except FileNotFoundError as error:
            raise self._gone(name, str(error)) from error
        if problem := problem_of(folder / place):
            raise self._gone(name, problem)
        write_atomic(folder / "checkpoints" / LATEST, name.encode())
        run = commit["state"].get("run", {})
        if "pairs" in run and (self._source / "pairing.jsonl").exists():
            write_atomic(folder / "pairing.jsonl", encode_line({"state": run["pairs"]}))

    def take_lines(self, folder: Path) -> None:
        """Lines of steps up to the last, with the pictures that they show, and the events up to then."""
        images: set[str] = set()

        def until(name: str) -> Iterator[bytes]:
            for text, line in self._lines(Path(name)):
                if _is_until(line, self.last):
                    images.update(_images(line))
                    yield text

        for name in LINES:
            if (self._source / name).exists():
                _write(folder / name, until(name))
        for image in sorted(images):
            with suppress(FileNotFoundError):  # thinned
                self._link(Path("images") / image, folder)
        events = list(self._lines(Path("events.jsonl")))
        # What has no step is told from what came later by those that have one.
        ends = max((place for place, (_, event) in enumerate(events) if _is_until(event, self.last)), default=-1)
        kept = [text for text, event in events[: ends + 1] if "step" not in event or _is_until(event, self.last)]
        _write(folder / "events.jsonl", kept)

    def take_evaluations(self, folder: Path) -> None:
        """Evaluations after steps up to the last, with their pictures."""
        for file in sorted((self._source / "evaluations").glob("*.json")):
            named = _EVALUATION.fullmatch(file.name)
            if named is None or int(named[1]) > self.last:
                continue
            place = Path("evaluations") / file.name
            self._link(place, folder)
            for image in sorted(set(_EVALUATION_IMAGE.findall((folder / place).read_bytes()))):
                with suppress(FileNotFoundError):
                    self._link(Path("evaluations/images") / image.decode(), folder)

    def take_steps(self, folder: Path) -> None:
        """The journal of steps up to the last."""
        for file in sorted((self._source / "journal").glob("step_*.parquet")):
            if int(file.stem[5:]) <= self.last:
                self._link(Path("journal") / file.name, folder)

    def describe(self, folder: Path, name: str) -> dict[str, Any]:
        """Settings as they were, an event that says whence the run came, and last of all its run.json."""
        try:
            write_atomic(folder / "config.yaml", self._inside(Path("config.yaml")).read_bytes())
        except FileNotFoundError as error:
            raise DataError(f"fork: expected a config.yaml in {self._source}; got none; restore the file") from error
        with suppress(FileNotFoundError):
            write_atomic(folder / "overrides.txt", self._inside(Path("overrides.txt")).read_bytes())
        try:
            before = json.loads(self._inside(Path("run.json")).read_bytes())
            origin, attempt = str(before["id"]), int(before["attempt"]) + 1
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"fork: expected a run.json with id and attempt in {self._source}; got {error!r}; restore the file"
            ) from error
        message, now = f"forked from {origin} after step {self.last}", time.strftime("%Y-%m-%dT%H:%M:%S%z")
        event = {"v": 1, "time": time.time(), "attempt": attempt, "kind": "fork", "message": message}
        with (folder / "events.jsonl").open("ab") as out:
            out.write(encode_line(event | {"step": self.last}))
            out.flush()
            os.fsync(out.fileno())
        run = before | {
            "id": name,
            "forked_from": {"id": origin, "step": self.last},
            "created": now,
            "updated": now,
            "attempt": attempt,
            "status": "interrupted",
            "reason": message,
        }
        write_atomic(folder / "run.json", json.dumps(run, indent=1, ensure_ascii=False).encode())
        return run

    def _lines(self, place: Path) -> Iterator[tuple[bytes, Line]]:
        """The lines of a file, as they are and as read; what cannot be read, or is being written, is left out."""
        with suppress(FileNotFoundError), self._inside(place).open("rb") as file:
            for text in file:
                with suppress(ValueError):
                    line = json.loads(text) if text.endswith(b"\n") else None
                    if isinstance(line, dict):
                        yield text, line

    def _link(self, place: Path, folder: Path) -> None:
        """Give a file of the run, which is never changed in place, a second name; copy it where that cannot be."""
        real, target = self._inside(place), folder / place
        if target.exists():  # evaluations share pictures
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(real, target)
        except FileNotFoundError:
            raise
        except OSError:  # another file system, or one without links
            shutil.copy2(real, target)
            with target.open("rb") as copied:
                os.fsync(copied.fileno())

    def _inside(self, place: Path) -> Path:
        """The file itself.

        Raises:
            DataError: it lies outside of the run.
            FileNotFoundError: there is none.
        """
        real = (self._source / place).resolve(strict=True)
        if ".." in place.parts or not real.is_relative_to(self._source) or not real.is_file():
            raise DataError(
                f"fork: expected a file of the run itself; got {self._source / place}, which is {real}; put the file "
                "itself there"
            )
        return real

    def _gone(self, name: str, why: str) -> DataError:
        return DataError(
            f"fork: expected a whole checkpoint {name} in {self._source}; got {why}; it may have been deleted "
            "meanwhile (train.keep_checkpoints): choose a newer one"
        )


def _write(file: Path, lines: Iterable[bytes]) -> None:
    with file.open("wb") as out:
        out.writelines(lines)
        out.flush()
        os.fsync(out.fileno())


def _is_until(line: Mapping[str, Any], last: int) -> bool:
    return type(line.get("step")) is int and line["step"] <= last


def _images(line: Line) -> Iterator[str]:
    """Names of the pictures that a line of pairs.jsonl shows."""
    for side in (line.get("understanding"), line.get("generation")):
        if isinstance(side, dict):
            samples = side.get("samples")
            holders = [side, *samples] if isinstance(samples, list) else [side]
            named = [holder.get("image") for holder in holders if isinstance(holder, dict)]
            yield from (name for name in named if isinstance(name, str) and _IMAGE.fullmatch(name))
