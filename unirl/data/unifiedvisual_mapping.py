"""Which column of UnifiedVisual-240K holds what. Its column names are not published, so a mapping says so, or a guess.

Nothing here reads rows beyond the first of a file, which is shown where a mapping is missing.
"""

import re
from collections.abc import Mapping as Table
from dataclasses import dataclass, field, fields
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pyarrow as pa
import yaml

from unirl.data.atomic import DataError
from unirl.data.tables import open_table, table_rows

PARTS = {
    "imagegeneration": "image_generation",
    "imageediting": "image_editing",
    "imagecorrection": "image_correction",
    "mmreasoningo": "mm_reasoning_o",
    "mmreasoningmm": "mm_reasoning_mm",
    "mmreasoningt": "mm_reasoning_t",
    "mminternet": "mm_internet",
    "llavacot": "understanding",
    "cotcollection": "understanding",
}
"""Names of the dataset's parts, as files and archives spell them once only letters and digits are left -> subset."""

_TURNS = ("messages", "conversations", "conversation", "turns", "dialog")
_ASKED = (("question", "answer"), ("instruction", "output"), ("prompt", "response"), ("input", "output"))
_IMAGES = ("images", "image", "image_paths", "image_path")
_IDS = ("id", "uid", "sample_id", "question_id")
_SUBSETS = ("subset", "task", "category")
_LONGEST_SHOWN = 60


@dataclass(frozen=True, slots=True, kw_only=True)
class Mapping:
    """What the columns of some files mean. Keys of mapping.yaml."""

    files: str = "data/*.parquet"
    """Which files, below the source."""
    id: str | None = None
    """Column of the id; none: file name and row number."""
    turns: str | None = None
    """Column of a list of turns, or of such a list as JSON text."""
    role: str = "role"
    """Inside a turn: who speaks."""
    content: str = "content"
    """Inside a turn: text with markers, or a list of parts."""
    roles: dict[str, str] = field(default_factory=dict)
    """Their names of the roles -> user, assistant, system; human and gpt are known."""
    user: str | None = None
    """Instead of turns: column of the question's text."""
    assistant: str | None = None
    """Instead of turns: column of the answer's text."""
    images: str | None = None
    """Column of the images, in the order of the markers."""
    marker: str = "<image>"
    """What stands in the text for an image."""
    subset: str | None = None
    """Column that names the part of the data; none: the file's name does, or the first image's path."""
    subsets: dict[str, str] = field(default_factory=dict)
    """What a name contains -> subset, beside the known parts."""
    archives: dict[str, str] = field(default_factory=dict)
    """Subset -> its archive below the source; default: the one whose name fits."""

    def columns(self) -> dict[str, str]:
        """Key -> column, for the keys that name one."""
        named = {key: getattr(self, key) for key in ("id", "turns", "user", "assistant", "images", "subset")}
        return {key: column for key, column in named.items() if column is not None}


def part_of(text: str, extra: Table[str, str]) -> str | None:
    """The longest name of a part that a text contains, among `PARTS` and the keys of `extra`; None if it has none."""
    squashed = _squash(text)
    found = [name for name in (*map(_squash, extra), *PARTS) if name and name in squashed]
    return max(found, key=len, default=None)


def subset_of(part: str, extra: Table[str, str]) -> str:
    """The subset that a part belongs to."""
    return (PARTS | {_squash(name): subset for name, subset in extra.items()})[part]


def mappings_for(source: Path, files: list[Path], given: Any) -> dict[Path, tuple[Mapping, str]]:
    """The mapping of each file and one line on where it comes from.

    Args:
        source: folder of the download.
        files: its parquet files.
        given: content of mapping.yaml: one mapping, or a list whose entries name their files; None guesses.

    Raises:
        DataError: a mapping does not fit, or nothing can be guessed; shows the columns and a mapping to edit.
    """
    schemas = {file: _schema(file) for file in files}
    chosen: dict[Path, tuple[Mapping, str]] = {}
    missing: list[str] = []
    given_mappings = (
        None if given is None else [_parsed(entry) for entry in (given if isinstance(given, list) else [given])]
    )
    for file, schema in schemas.items():
        name = file.relative_to(source).as_posix() if file.is_relative_to(source) else file.name
        if given_mappings is None:
            mapping = _guess(schema)
        else:
            fitting = (m for m in given_mappings if len(given_mappings) == 1 or fnmatchcase(name, m.files))
            mapping = next(fitting, None)
        if mapping is None:
            missing.append(
                f"{name}: no mapping fits" if given_mappings else f"{name}: no column looks like a conversation"
            )
            continue
        missing += [
            f"{name}: no column {column!r}, which the mapping names as {key}"
            for key, column in mapping.columns().items()
            if column not in schema.names
        ]
        taken = ", ".join(f"{key} from {column!r}" for key, column in mapping.columns().items())
        chosen[file] = mapping, f"{name}: {'mapped' if given_mappings else 'no mapping, guessed'}: {taken}"
    if missing:
        raise DataError(_description(source, schemas, missing))
    return chosen


def _parsed(entry: Any) -> Mapping:
    known = {item.name: item for item in fields(Mapping)}
    problems = []
    if not isinstance(entry, dict):
        problems, entry = [f"it is {entry!r}"], {}
    for key, value in entry.items():
        table = key in ("roles", "subsets", "archives")
        texts = isinstance(value, dict) and all(isinstance(x, str) for pair in value.items() for x in pair)
        if key not in known:
            problems.append(f"it has {key!r}")
        elif not (texts if table else isinstance(value, str) or (value is None and known[key].default is None)):
            problems.append(f"{key} is {value!r}")
    entry = {key: value for key, value in entry.items() if value is not None}
    if not problems and not (entry.get("turns") or (entry.get("user") and entry.get("assistant"))):
        problems.append("it names neither turns nor user and assistant")
    if problems:
        raise DataError(
            f"mapping: expected keys {', '.join(known)}, each with a text, roles, subsets and archives with name: name "
            f"lines; got: {'; '.join(problems)}; correct the file"
        )
    return Mapping(**entry)


def _guess(schema: pa.Schema) -> Mapping | None:
    """A mapping by the usual names; None when no column can be a conversation."""

    def first(names: tuple[str, ...]) -> str | None:
        return next((name for name in names if name in schema.names), None)

    found: dict[str, Any] = {"id": first(_IDS), "images": first(_IMAGES), "subset": first(_SUBSETS)}
    turns = first(_TURNS)
    if turns is None and "text" in schema.names and pa.types.is_list(schema.field("text").type):
        turns = "text"
    if turns is not None:
        return Mapping(turns=turns, **found)
    for user, assistant in _ASKED:
        if user in schema.names and assistant in schema.names:
            return Mapping(user=user, assistant=assistant, **found)
    return None


def _description(source: Path, schemas: dict[Path, pa.Schema], missing: list[str]) -> str:
    """What is there, what is missing, and a mapping to edit."""
    lines = [f"{source}: expected columns that a mapping or a guess can name; got:"]
    described: set[str] = set()
    for file, schema in schemas.items():
        same = str(schema.remove_metadata())
        lines.append(f"  {file.name}{' (columns as above)' if same in described else ''}")
        if same not in described:
            described.add(same)
            example = _first_row(file)
            lines += [f"    {c.name}: {c.type}, for example {_shorten(example.get(c.name))}" for c in schema]
    archives = sorted(path.name for path in source.glob("images/*"))
    lines += [f"  archives: {', '.join(archives) or 'none in images/'}", "missing:", *(f"  {line}" for line in missing)]
    lines += ["edit this, save it as mapping.yaml and add --mapping mapping.yaml:", *_skeleton(schemas)]
    return "\n".join(lines)


def _skeleton(schemas: dict[Path, pa.Schema]) -> list[str]:
    columns = " | ".join(dict.fromkeys(name for schema in schemas.values() for name in schema.names))
    lines = [f"  # columns: {columns}"]
    notes = {"turns": "or user: and assistant: below", "subset": "or leave it out: the file's name tells"}
    for item in fields(Mapping):
        default = {} if item.default is not None and not isinstance(item.default, str) else item.default
        value = "null" if default is None else "{}" if default == {} else yaml.safe_dump(default).splitlines()[0]
        lines.append(f"  {item.name}: {value}{f'  # {notes[item.name]}' if item.name in notes else ''}")
    return lines


def _schema(file: Path) -> pa.Schema:
    with open_table(file) as table:
        return table.schema_arrow


def _first_row(file: Path) -> dict[str, Any]:
    with open_table(file) as table:
        return next(table_rows(table, file), {})


def _shorten(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]}..."


def _squash(text: str) -> str:
    return re.sub(r"[^a-z0-9]", "", text.lower())
