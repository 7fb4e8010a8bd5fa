"""UnifiedVisual-240K: parquet files of text, whose images lie in tar archives beside them."""

import json
import logging
from collections.abc import Iterator
from functools import partial
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any

from unirl.data.archives import ArchiveError, unpack_tar
from unirl.data.atomic import DataError
from unirl.data.interleaved_import import Draft, row_drafts, source_files
from unirl.data.messages import MARKER, map_parts, normalise
from unirl.data.records import read_image_file
from unirl.data.tables import Row
from unirl.data.unifiedvisual_mapping import PARTS, Mapping, mappings_for, part_of, subset_of

_ORIGINS = {"llavacot": "llava_cot", "cotcollection": "cot_collection"}
"""Parts that were taken from another dataset as they are."""

_log = logging.getLogger(__name__)


def drafts(
    source: Path, *, images: Path | None = None, mapping: Any = None, learn_wrong_image: bool = False
) -> Iterator[Draft]:
    """Each row as the mapping reads it.

    Args:
        source: folder of the download, with data/ and images/; or one of its parquet files.
        images: where the archives are unpacked, once; default unpacked/ in the source.
        mapping: content of mapping.yaml; None guesses the columns and says what it took.
        learn_wrong_image: whether the first image of an image correction counts in the loss.
    """
    files = source_files(source, "data/*.parquet", "**/*.parquet")
    root = source if source.is_dir() else source.parent
    if source.is_file() and (root.parent / "images").is_dir():
        root = root.parent
    archives = _Archives(root, images or root / "unpacked")
    for file, (meaning, said) in mappings_for(root, files, mapping).items():
        _log.info(said)
        build = partial(_row, file=file, mapping=meaning, archives=archives, learn_wrong_image=learn_wrong_image)
        yield from row_drafts(file, build, columns=list(meaning.columns().values()))


class _Archives:
    """The image archives, each unpacked when a row first needs it."""

    def __init__(self, source: Path, unpacked: Path) -> None:
        found = [path for path in sorted(source.glob("images/*")) if ".tar" in path.name or path.suffix == ".tgz"]
        self._archives = {path.name.partition(".")[0]: path for path in found}
        self._source, self._unpacked = source, unpacked
        self._folders: dict[str, list[Path]] = {}

    def read(self, name: str, part: str, mapping: Mapping) -> bytes:
        """The bytes of an image, looked for in its part's archive, else in all.

        Raises:
            DataError: no archive has it, or several have.
            ArchiveError: its archive cannot be unpacked.
        """
        stems = [stem for stem in self._archives if part_of(stem, mapping.subsets) == part]
        given = mapping.archives.get(subset_of(part, mapping.subsets))
        if given is not None:
            stems = [stem for stem, path in self._archives.items() if path == self._source / given]
            if not stems:
                raise DataError(f"expected the archive {given!r}, which the mapping names; got none; correct archives")
        stems = stems or list(self._archives)
        pieces = PurePosixPath(name).parts
        for tail in (str(PurePosixPath(*pieces[start:])) for start in range(len(pieces))):
            places = ([folder for folder in self._places(stem) if (folder / tail).is_file()] for stem in stems)
            found = [inside[0] for inside in places if inside]
            if len(found) == 1:
                return read_image_file(found[0], tail)
            if found:
                raise DataError(f"expected one archive with {name[:120]!r}; got {len(found)}; name it under archives")
        looked = ", ".join(stems) or "no archive in images/"
        raise DataError(f"expected an image {name[:120]!r} in {looked}; got none there; download it or drop the record")

    def _places(self, stem: str) -> list[Path]:
        """Where names may start in an archive: at its top, or inside a folder that holds all the rest."""
        if stem not in self._folders:
            try:
                places = [unpack_tar(self._archives[stem], self._unpacked / stem)]
            except DataError as error:
                raise ArchiveError(str(error)) from error
            while len(inside := list(islice(places[-1].iterdir(), 2))) == 1 and inside[0].is_dir():
                places += inside
            self._folders[stem] = places
        return self._folders[stem]


def _row(row: Row, *, file: Path, mapping: Mapping, archives: _Archives, learn_wrong_image: bool) -> Row:
    images = row.get(mapping.images) if mapping.images else None
    part = _part(row, file, images, mapping)
    subset, name = subset_of(part, mapping.subsets), row.get(mapping.id) if mapping.id else None
    origin = _ORIGINS.get(part)
    chat = normalise(
        {
            "id": None if name is None else f"{origin or subset}/{name}",  # ids may start anew in each part
            "subset": subset,
            "source": origin or "unifiedvisual",
            "messages": _messages(row, mapping),
            "images": images,
        }
    )

    def loaded(item: Row) -> Row:
        if item["image"] is None or item["image"]["bytes"] is not None:
            return item
        return item | {"image": {"bytes": archives.read(item["image"]["path"], part, mapping), "path": None}}

    chat = map_parts(chat, loaded)
    if chat["subset"] == "image_correction" and not learn_wrong_image:
        for turn in [turn for turn in chat["messages"] if turn["role"] == "assistant"][:-1]:
            for item in turn["content"]:
                item["loss"] = item["loss"] and item["image"] is None
    return chat


def _part(row: Row, file: Path, images: Any, mapping: Mapping) -> str:
    """Which part of the dataset a row belongs to: by its column, else by the file's name, else by its first image."""
    first = images[0] if isinstance(images, list) and images else images
    first = first.get("path") if isinstance(first, dict) else first
    hints = [row.get(mapping.subset) if mapping.subset else None, file.stem, first]
    for hint in hints:
        if isinstance(hint, str) and (part := part_of(hint, mapping.subsets)):
            return part
    raise DataError(
        f"expected a part of {', '.join(PARTS)} in a subset column, the file's name or an image's path; got "
        f"{str(hints[0])[:40]!r}, {file.stem!r}, {str(first)[:40]!r}; name it under subsets in the mapping"
    )


def _messages(row: Row, mapping: Mapping) -> Any:
    """The turns with our names and markers; what is no list of turns is left for `normalise` to refuse."""
    if mapping.turns is None:
        columns = {"user": mapping.user or "", "assistant": mapping.assistant or ""}
        return [{"role": role, "content": _marked(row.get(column), mapping)} for role, column in columns.items()]
    turns = row.get(mapping.turns)
    if isinstance(turns, str):
        try:
            turns = json.loads(turns)
        except (ValueError, RecursionError):
            return None
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        return turns
    return [_turn(turn, mapping) for turn in turns]


def _turn(turn: Row, mapping: Mapping) -> Row:
    role, content = turn.get(mapping.role, turn.get("from")), turn.get(mapping.content, turn.get("value"))
    role = mapping.roles.get(role, role) if isinstance(role, str) else role
    return turn | {"role": role, "content": _marked(content, mapping)}


def _marked(content: Any, mapping: Mapping) -> Any:
    return content.replace(mapping.marker, MARKER) if isinstance(content, str) else content
