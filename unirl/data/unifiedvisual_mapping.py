"""Which column of UnifiedVisual-240K holds what. Its column names are not published, so a mapping says so, or a guess.

Nothing here reads rows beyond the first few of a file, to prove that their turns are what a mapping says.
"""

import difflib
import re
from collections.abc import Iterator
from collections.abc import Mapping as Table
from dataclasses import asdict, dataclass, field, fields
from fnmatch import fnmatchcase
from itertools import chain, islice, repeat
from pathlib import Path
from typing import Any

import pyarrow as pa
import yaml

from unirl.data.atomic import DataError
from unirl.data.messages import ROLES, turns_of
from unirl.data.tables import Row, open_table, table_rows

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
_TRIED_ROWS = 8


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
    given_mappings = None if given is None else _parsed(given)
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
        absent = [(key, column) for key, column in mapping.columns().items() if column not in schema.names]
        problems = [f"no column {column!r}, which the mapping names as {key}" for key, column in absent]
        if mapping.turns is not None and mapping.turns in schema.names:
            problems += _turn_problems(mapping.turns, mapping, file)
        missing += [f"{name}: {problem}" for problem in problems]
        taken = ", ".join(f"{key} from {column!r}" for key, column in mapping.columns().items())
        if mapping.images is None:
            ignored = [repr(column) for column in schema.names if column not in mapping.columns().values()]
            taken += f"; no column of images found, ignored: {', '.join(ignored) or 'none'}"
        chosen[file] = mapping, f"{name}: {'mapped' if given_mappings else 'no mapping, guessed'}: {taken}"
    if missing:
        tried = given_mappings or [mapping for mapping, _ in chosen.values()][:1] or [Mapping()]
        said = [said for _, said in chosen.values()]
        raise DataError(_description(source, schemas, missing, said, tried))
    return chosen


def mapping_problems(given: Any) -> list[str]:
    """What is wrong with the content of a mapping.yaml in itself, one clause each."""
    return [problem for entry in _entries(given) for problem in _entry_problems(entry)]


def _entries(given: Any) -> list[Any]:
    return given if isinstance(given, list) else [given]


def _parsed(given: Any) -> list[Mapping]:
    if problems := mapping_problems(given):
        raise DataError(f"mapping: expected {mapping_keys()}; got: {'; '.join(problems)}; correct the file")
    return [Mapping(**{key: value for key, value in entry.items() if value is not None}) for entry in _entries(given)]


def mapping_keys() -> str:
    """The keys of a mapping, for a message."""
    known = ", ".join(item.name for item in fields(Mapping))
    return f"keys {known}, each with a text, roles, subsets and archives with name: name lines"


def _entry_problems(entry: Any) -> list[str]:
    if not isinstance(entry, dict):
        return [f"it is {entry!r}"]
    known = {item.name: item for item in fields(Mapping)}
    problems: list[str] = []
    for key, value in entry.items():
        table = key in ("roles", "subsets", "archives")
        texts = isinstance(value, dict) and all(isinstance(x, str) for pair in value.items() for x in pair)
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            problems.append(f"it has {key!r}{f', did you mean {near[0]}?' if near else ''}")
        elif not (texts if table else isinstance(value, str) or (value is None and known[key].default is None)):
            problems.append(f"{key} is {value!r}")
    if not problems and not (entry.get("turns") or (entry.get("user") and entry.get("assistant"))):
        problems.append("it names neither turns nor user and assistant")
    return problems


def _turn_problems(column: str, mapping: Mapping, file: Path) -> list[str]:
    """What no turn of the first rows has, though the mapping says so; `column` holds the turns."""
    cells = [turns_of(row.get(column)) for row in _first_rows(file, _TRIED_ROWS, [column])]
    turns = [turn for cell in cells if isinstance(cell, list) for turn in cell if isinstance(turn, dict)]
    if not turns:
        return []
    keys = dict.fromkeys(str(key) for turn in turns for key in turn)
    found = ", ".join(map(repr, keys))
    problems = [
        f"no key {name!r} inside the turns of {column!r}, which have {found}; name it as {key}"
        for key, name, usual in (("role", mapping.role, "from"), ("content", mapping.content, "value"))
        if name not in keys and usual not in keys
    ]
    speakers = dict.fromkeys(str(turn.get(mapping.role, turn.get("from"))) for turn in turns)
    if not problems and not any(speaker in ROLES or speaker in mapping.roles for speaker in speakers):
        problems.append(f"turns of {', '.join(map(repr, speakers))}, of which none is known; name them under roles")
    return problems


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


def _description(
    source: Path, schemas: dict[Path, pa.Schema], missing: list[str], said: list[str], tried: list[Mapping]
) -> str:
    """What is there, what is missing, and a mapping to edit."""
    lines = [f"{source}: expected columns that a mapping or a guess can name; got:"]
    described: set[str] = set()
    for file, schema in schemas.items():
        same = str(schema.remove_metadata())
        lines.append(f"  {file.name}{' (columns as above)' if same in described else ''}")
        if same not in described:
            described.add(same)
            example = next(iter(_first_rows(file, 1)), {})
            lines += [f"    {c.name}: {c.type}, for example {_shorten(example.get(c.name))}" for c in schema]
    archives = sorted(path.name for path in source.glob("images/*"))
    lines.append(f"  archives: {', '.join(archives) or 'none in images/'}")
    lines += ["taken:", *(f"  {line}" for line in said)] if said else []
    lines += ["missing:", *(f"  {line}" for line in missing)]
    lines += ["edit this, save it as mapping.yaml and add --mapping mapping.yaml:", *_template(schemas, tried)]
    return "\n".join(lines)


def _template(schemas: dict[Path, pa.Schema], mappings: list[Mapping]) -> Iterator[str]:
    """The lines of a mapping.yaml of these mappings."""
    yield f"  # columns: {' | '.join(dict.fromkeys(name for schema in schemas.values() for name in schema.names))}"
    notes = {"turns": "  # or user: and assistant: below", "subset": "  # or leave it out: the file's name tells"}
    for mapping in mappings:
        leads = chain(["  - "], repeat("    ")) if len(mappings) > 1 else repeat("  ")
        for lead, (key, value) in zip(leads, asdict(mapping).items(), strict=False):
            text = yaml.safe_dump(value, default_flow_style=True, width=10**6).splitlines()[0]
            yield f"{lead}{key}: {text}{notes.get(key, '') if value is None else ''}"


def _schema(file: Path) -> pa.Schema:
    with open_table(file) as table:
        return table.schema_arrow


def _first_rows(file: Path, count: int, columns: list[str] | None = None) -> list[Row]:
    with open_table(file) as table:
        return list(islice(table_rows(table, file, columns=columns), count))


def _shorten(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]}..."


def _squash(text: str) -> str:
    return re.sub(r"[^a-z0-9]", "", text.lower())
