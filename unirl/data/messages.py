"""A conversation as a row of plain values: the chat forms that are in use, and the one form that is stored.

The stored form is {"id", "subset", "source", "messages": [{"role", "content": [{"type", "text", "image", "loss"}]}]},
an image being {"bytes", "path"}. It is a chat form itself, so that one reader serves all. docs/interleaved_data.md
shows each form.
"""

import base64
import binascii
import json
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from unirl.data.atomic import DataError
from unirl.data.records import decode_image, encode_png, read_image_file
from unirl.data.tables import Row
from unirl.types import InterleavedSample, Segment, Turn

COLUMNS = ("id", "subset", "source", "system", "messages", "conversations", "images", "image")
"""What `normalise` looks at; other keys of a row are ignored."""
TURNS = ("messages", "conversations")
"""Of these, the columns that may hold the turns; the first that a row has counts."""
MARKER = "<image>"
ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}
"""What a turn may name its role, and what that means."""

_LOSS_KEYS = ("loss", "train", "weight")
_IMAGE_KEYS = ("image", "image_url", "path", "url", "bytes")


def normalise(row: Row, *, default_id: str = "") -> Row:
    """The row in the stored form; consecutive turns of one role become one. Opens no file.

    Args:
        row: a conversation in any of the chat forms.
        default_id: id of a row without one.

    Raises:
        DataError: the row is no conversation that ends with an assistant's answer; says why.
    """
    images = deque(_cell(value) for value in _listed(row, "images") + _listed(row, "image"))
    num_listed = len(images)
    turns: list[Row] = []
    for message in _messages(row):
        role = _role(message)
        content = list(_content(message, role, images, split=bool(num_listed)))
        if turns and turns[-1]["role"] == role:
            _join(turns[-1]["content"], content)
        else:
            turns.append({"role": role, "content": content})
    _place_unmarked(turns, images, num_listed)
    _require_answers(turns)
    return {
        "id": _label(row, "id") or default_id,
        "subset": _label(row, "subset"),
        "source": _label(row, "source"),
        "messages": turns,
    }


def turns_of(cell: Any) -> Any:
    """The turns that a cell holds, also as JSON text; None for text that is no JSON."""
    if not isinstance(cell, str):
        return cell
    try:
        return json.loads(cell)
    except (ValueError, RecursionError):
        return None


def with_bytes(row: Row, folder: Path) -> Row:
    """A stored row whose images are bytes: those of files inside `folder` are read.

    Raises:
        DataError: an image file is missing or outside the folder.
    """

    def loaded(part: Row) -> Row:
        return part | {"image": {"bytes": _image_bytes(part["image"], folder), "path": None}} if part["image"] else part

    return map_parts(row, loaded)


def map_parts(row: Row, change: Any) -> Row:
    """A stored row with `change` applied to each part of each turn."""
    turns = [turn | {"content": [change(part) for part in turn["content"]]} for turn in row["messages"]]
    return row | {"messages": turns}


def to_sample(row: Row, folder: Path, *, pixels: bool = True) -> InterleavedSample:
    """The sample that a stored row holds.

    Args:
        row: from `normalise`.
        folder: where image paths start.
        pixels: False leaves images undecoded: black ones of the same size stand for them.

    Raises:
        DataError: an image is missing or does not decode.
        ValueError: the turns do not alternate.
    """
    turns = tuple(
        Turn(role=turn["role"], segments=tuple(_segment(part, folder, pixels) for part in turn["content"]))
        for turn in row["messages"]
    )
    return InterleavedSample(id=row["id"], turns=turns, subset=row["subset"], source=row["source"])


def to_row(sample: InterleavedSample) -> Row:
    """The stored row of a sample, images as PNG bytes."""
    turns = [{"role": turn.role, "content": [_part(segment) for segment in turn.segments]} for turn in sample.turns]
    return {"id": sample.id, "subset": sample.subset, "source": sample.source, "messages": turns}


def to_json(row: Row) -> Row:
    """A stored row as JSON values: bytes in base64, what is empty or usual left out."""
    turns = [
        {"role": turn["role"], "content": [_json_part(part, turn["role"]) for part in turn["content"]]}
        for turn in row["messages"]
    ]
    return {key: row[key] for key in ("id", "subset", "source") if row[key]} | {"messages": turns}


def exchange(user: Sequence[str | bytes], assistant: Sequence[str | bytes], *, subset: str, source: str) -> Row:
    """A row of one question and its answer, each of texts and images (the bytes of their files)."""

    def content(parts: Sequence[str | bytes]) -> list[Row]:
        return [{"type": "text", "text": p} if isinstance(p, str) else {"type": "image", "bytes": p} for p in parts]

    turns = [{"role": "user", "content": content(user)}, {"role": "assistant", "content": content(assistant)}]
    return {"subset": subset, "source": source, "messages": turns}


def text_part(text: str, *, loss: bool) -> Row:
    """A stretch of text in the stored form."""
    return {"type": "text", "text": text, "image": None, "loss": loss}


def image_part(image: bytes, *, loss: bool) -> Row:
    """An image, given as the bytes of its file, in the stored form."""
    return _image({"bytes": image, "path": None}, loss)


def _image(cell: Row, loss: bool) -> Row:
    return {"type": "image", "text": None, "image": cell, "loss": loss}


def _messages(row: Row) -> list[Mapping[str, Any]]:
    found = next((turns_of(row[key]) for key in TURNS if row.get(key) is not None), None)
    if not isinstance(found, list) or not found or not all(isinstance(message, dict) for message in found):
        raise DataError(
            f"expected a list of turns under messages or conversations; got keys {sorted(map(str, row))}; rename the "
            "key of the turns to messages, or drop the record"
        )
    if row.get("system"):
        found = [{"role": "system", "content": row["system"]}, *found]
    return found


def _role(message: Mapping[str, Any]) -> str:
    role = message.get("role") if message.get("role") is not None else message.get("from")
    if not isinstance(role, str) or role not in ROLES:
        raise DataError(f"expected a role of {', '.join(ROLES)}; got {role!r}; rename it or drop the record")
    return ROLES[role]


def _content(message: Mapping[str, Any], role: str, images: "deque[Row]", *, split: bool) -> Iterator[Row]:
    """The parts of a turn; markers and parts that name no image take the next of `images`."""
    content = message.get("content") if message.get("content") is not None else message.get("value")
    loss = _flag(message, role == "assistant")
    if isinstance(content, str):
        yield from _split(content, images, loss)
        return
    if not isinstance(content, list):
        raise DataError(
            f"expected the content of the {role} turn as text or a list of parts; got {_kind(content)}; correct it"
        )
    for part in content:
        if isinstance(part, str):
            part = {"type": "text", "text": part}
        if not isinstance(part, dict):
            raise DataError(f"expected parts of text or images; got {_kind(part)}; correct the {role} turn")
        yield from _parts(part, images, loss=_flag(part, loss), split=split)


def _parts(part: Mapping[str, Any], images: "deque[Row]", *, loss: bool, split: bool) -> Iterator[Row]:
    named = next(({key: part[key]} for key in _IMAGE_KEYS if part.get(key) is not None), None)
    kind = part.get("type") or ("text" if part.get("text") is not None else "image")
    if kind == "text":
        text = _text(part.get("text"))
        if split and MARKER in text:
            yield from _split(text, images, loss)
        elif text:
            yield text_part(text, loss=loss)
    elif kind in ("image", "image_url"):
        yield _image(_next(images) if named is None else _cell(named), loss)
    else:
        raise DataError(f"expected parts of type text, image or image_url; got {kind!r}; drop the record or the part")


def _split(content: str, images: "deque[Row]", loss: bool) -> Iterator[Row]:
    """Text and the images at its markers; line ends beside a marker only set it apart."""
    stretches = _text(content).split(MARKER)
    for place, stretch in enumerate(stretches):
        if place:
            yield _image(_next(images), loss)
        text = stretch.strip("\r\n") if len(stretches) > 1 else stretch
        if text.strip():
            yield text_part(text, loss=loss)


def _next(images: "deque[Row]") -> Row:
    if not images:
        raise DataError(f"expected an image for each {MARKER}; got fewer under images; add the missing ones")
    return images.popleft()


def _place_unmarked(turns: list[Row], images: "deque[Row]", num_listed: int) -> None:
    """Images that no marker asks for open the first user turn; some of them only is a mistake."""
    if not images:
        return
    first = next((turn for turn in turns if turn["role"] == "user"), None)
    if len(images) < num_listed or first is None:
        raise DataError(
            f"expected a {MARKER} for each of the {num_listed} images; got {num_listed - len(images)}; "
            "mark where the others belong"
        )
    loss = bool(first["content"]) and first["content"][0]["loss"]
    first["content"][:0] = [_image(cell, loss) for cell in images]
    images.clear()


def _join(before: list[Row], after: list[Row]) -> None:
    if before and after and before[-1]["text"] and after[0]["text"]:
        after[0] |= {"text": f"\n{after[0]['text']}"}
    before += after


def _require_answers(turns: list[Row]) -> None:
    for turn in turns:
        if not any(part["image"] or part["text"].strip() for part in turn["content"]):
            raise DataError(
                f"expected text or an image in each turn; got an {turn['role']} turn without; fill it or drop the "
                "record"
            )
    if not turns or turns[-1]["role"] != "assistant":
        roles = [turn["role"] for turn in turns]
        raise DataError(
            f"expected the assistant's answer at the end; got turns of {', '.join(roles) or 'nobody'}; add the answer "
            "or drop the last turn"
        )


def _listed(row: Row, key: str) -> list[Any]:
    value = row.get(key)
    if value is None:
        return []
    return value if isinstance(value, list) else [value]


def _cell(value: Any) -> Row:
    """The bytes or the path of an image, as {"bytes", "path"}."""
    if isinstance(value, dict):
        found = value.get("bytes")
        if isinstance(found, str):
            found = _base64(found)
        if found is None:
            return _cell(next((value[key] for key in _IMAGE_KEYS[:-1] if value.get(key) is not None), None))
        value = found
    if isinstance(value, bytes):
        return {"bytes": value, "path": None}
    if not isinstance(value, str):
        raise DataError(f"expected an image as a path, a data: URL or bytes; got {_kind(value)}; correct the record")
    if value.startswith("data:"):
        head, _, data = value.partition(",")
        if not head.endswith(";base64"):
            raise DataError(f"expected a data: URL in base64; got {head[:60]!r}; encode the image in base64")
        return {"bytes": _base64(data), "path": None}
    if "://" in value:
        raise DataError(
            f"expected an image at hand; got {_text(value)[:200]!r}, which is never fetched; download it and give its "
            "path"
        )
    return {"bytes": None, "path": _text(value)}


def _base64(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise DataError(f"expected image bytes in base64; got {text[:20]!r}... ({error}); encode them again") from error


def _flag(item: Mapping[str, Any], usual: bool) -> bool:
    """Whether it counts in the loss: its own word, else what is usual."""
    for key in _LOSS_KEYS:
        value = item.get(key)
        if value is None:
            continue
        if not isinstance(value, bool | int | float) or value not in (0, 1):
            raise DataError(f"expected {key} to be true, false, 0 or 1; got {value!r}; weights between are not known")
        return bool(value)
    return usual


def _label(row: Row, key: str) -> str:
    value = row.get(key)
    if value is None:
        return ""
    if not isinstance(value, str | int):
        raise DataError(f"expected a text under {key}; got {_kind(value)}; correct the record")
    return _text(str(value))


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise DataError(f"expected text; got {_kind(value)}; correct the record")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"expected text of whole characters; got {error}; repair or drop the record") from error
    return value


def _kind(value: Any) -> str:
    return "nothing" if value is None else f"a {type(value).__name__}"


def _segment(part: Row, folder: Path, pixels: bool) -> Segment:
    if part["image"] is None:
        return Segment(text=part["text"], in_loss=part["loss"])
    return Segment(image=decode_image(_image_bytes(part["image"], folder), pixels=pixels), in_loss=part["loss"])


def _image_bytes(cell: Row, folder: Path) -> bytes:
    return cell["bytes"] if cell["bytes"] is not None else read_image_file(folder, cell["path"])


def _part(segment: Segment) -> Row:
    if segment.image is not None:
        return image_part(encode_png(segment.image), loss=segment.in_loss)
    return text_part(segment.text or "", loss=segment.in_loss)


def _json_part(part: Row, role: str) -> Row:
    value: Row = {"type": part["type"]}
    if part["image"] is None:
        value["text"] = part["text"]
    elif part["image"]["bytes"] is None:
        value["path"] = part["image"]["path"]
    else:
        value["bytes"] = base64.b64encode(part["image"]["bytes"]).decode()
    if part["loss"] != (role == "assistant"):
        value["loss"] = part["loss"]
    return value
