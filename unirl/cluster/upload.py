"""What a submitted job takes along: a folder's files, less what ignore files name, as one archive."""

import stat
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from zipfile import ZIP_DEFLATED, ZipFile, ZipInfo

from ray._private.thirdparty.pathspec.pathspec import PathSpec

LEFT_OUT = (".git", ".venv", "__pycache__", "*.pyc", ".unirl", "/runs", "/checkpoints")
"""Left out of every upload, in the words of .gitignore; so are run directories, wherever they lie."""
IGNORE_FILES = (".gitignore", ".rayignore")
MAX_MB = 100
FOREIGN = ".submitted"
"""Folder in the archive for files that come from elsewhere."""

Rules = Sequence[tuple[Path, PathSpec]]


class SubmitError(ValueError):
    """A submission that was asked for wrongly."""

    exit_code = 2


@dataclass(frozen=True, slots=True)
class Upload:
    """Files by their name in the archive, which becomes the job's working directory."""

    folder: Path
    files: Mapping[str, Path]

    @property
    def megabytes(self) -> float:
        """Of the files, before they are compressed."""
        return sum(file.stat().st_size for file in self.files.values()) / 1e6

    def largest(self, count: int = 3) -> str:
        """The entries of the folder that weigh most, with their sizes."""
        sizes = Counter[str]()
        for name, file in self.files.items():
            top, below, _ = name.partition("/")
            sizes[top + below] += file.stat().st_size
        return ", ".join(f"{name} {size / 1e6:.1f} MB" for name, size in sizes.most_common(count))

    def write(self, archive: Path) -> None:
        """Write the archive; the same files make the same bytes, so that Ray keeps one copy of them."""
        with ZipFile(archive, "w", ZIP_DEFLATED) as out:
            for name, file in sorted(self.files.items()):
                entry = ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))
                entry.external_attr = (stat.S_IFREG | (file.stat().st_mode & 0o777)) << 16
                entry.compress_type = ZIP_DEFLATED
                out.writestr(entry, file.read_bytes())


def collect(folder: Path, settings: Sequence[Path]) -> tuple[Upload, list[str]]:
    """The upload, and the name in it of each settings file: its place in the folder, or one below `FOREIGN`.

    Args:
        folder: becomes the job's working directory.
        settings: files that the command needs, wherever they lie.

    Raises:
        SubmitError: the folder does not exist, or its files are more than `MAX_MB`; names the largest entries.
    """
    folder = folder.resolve()
    if not folder.is_dir():
        raise SubmitError(f"--working-dir: expected a folder; got {folder}; name the one to take along")
    files = {file.relative_to(folder).as_posix(): file for file in _walk(folder, [(folder, _rules(LEFT_OUT))])}
    names: list[str] = []
    for number, file in enumerate(file.resolve() for file in settings):
        inside = file.is_relative_to(folder)
        names.append(file.relative_to(folder).as_posix() if inside else f"{FOREIGN}/{number}_{file.name}")
        files[names[-1]] = file
    upload = Upload(folder, files)
    if upload.megabytes > MAX_MB:
        raise SubmitError(
            f"--working-dir: expected at most {MAX_MB} MB to upload; got {upload.megabytes:.0f} in {folder}, mostly "
            f"{upload.largest()}; name data and checkpoints in a .rayignore (a job reads them from shared storage), or "
            "give another folder"
        )
    return upload, names


def _walk(folder: Path, rules: Rules) -> Iterator[Path]:
    rules = [*rules, *((folder, _rules(file.read_text().splitlines())) for file in _ignore_files(folder))]
    for entry in sorted(folder.iterdir()):
        is_folder = entry.is_dir() and not entry.is_symlink()
        if any(spec.match_file(_name(entry, root, is_folder)) for root, spec in rules):
            continue
        if is_folder and not (entry / "run.json").is_file():
            yield from _walk(entry, rules)
        elif entry.is_file():
            yield entry


def _ignore_files(folder: Path) -> list[Path]:
    return [folder / name for name in IGNORE_FILES if (folder / name).is_file()]


def _rules(lines: Sequence[str]) -> PathSpec:
    return PathSpec.from_lines("gitwildmatch", lines)


def _name(entry: Path, root: Path, is_folder: bool) -> str:
    """As ignore rules see it: a rule that ends with a slash is for folders only."""
    return entry.relative_to(root).as_posix() + ("/" if is_folder else "")
