"""Pictures of a run: which files may be served, and how many pixels they claim to have. Nothing is decoded here."""

import hashlib
import struct
from dataclasses import dataclass
from pathlib import Path

from unirl.dashboard.shown_pairs import PICTURE
from unirl.run_files import read_inside

MAX_PIXELS = 4_000_000
MAX_BYTES = 16 << 20
FOLDERS = ("images", "evaluations/images")
_TYPES = {"webp": "image/webp", "png": "image/png"}


class TooLargeError(ValueError):
    """A picture that browsers should not be asked to show."""


@dataclass(frozen=True, slots=True)
class Picture:
    """A file that may be shown."""

    data: bytes
    media_type: str
    mark: str
    """Of the content."""


def read_picture(folder: Path, path: str) -> Picture:
    """A picture of a run.

    Args:
        folder: the run directory, without links in its path.
        path: images/NAME or evaluations/images/NAME.

    Raises:
        FileNotFoundError: no such picture, or it is none, or lies outside the run directory.
        TooLargeError: more than 4 megapixels, or 16 MB.
    """
    place, _, name = path.rpartition("/")
    if place not in FOLDERS or not PICTURE.fullmatch(name):
        raise FileNotFoundError(path)
    try:
        data = read_inside(folder, path, MAX_BYTES)
    except PermissionError as error:
        if "bytes" in str(error):
            raise TooLargeError(
                f"expected a picture of at most {MAX_BYTES >> 20} MB; got more; make it smaller"
            ) from error
        raise FileNotFoundError(path) from error
    except OSError as error:
        raise FileNotFoundError(path) from error
    kind = name.rpartition(".")[2]
    size = picture_size(data)
    if size is None or (kind == "png") != data.startswith(b"\x89PNG"):
        raise FileNotFoundError(path)
    if size[0] * size[1] > MAX_PIXELS:
        raise TooLargeError(
            f"expected a picture of at most {MAX_PIXELS / 1e6:g} megapixels; got {size[0]} x {size[1]}; make it smaller"
        )
    return Picture(data, _TYPES[kind], hashlib.sha256(data).hexdigest()[:32])


def picture_size(data: bytes) -> tuple[int, int] | None:
    """Width and height from the header of a PNG or WebP file; None when it is neither."""
    if data[:8] == b"\x89PNG\r\n\x1a\n" and data[12:16] == b"IHDR" and len(data) >= 24:
        return struct.unpack(">II", data[16:24])
    if data[:4] != b"RIFF" or data[8:12] != b"WEBP" or len(data) < 30:
        return None
    match data[12:16]:
        case b"VP8X":
            return 1 + int.from_bytes(data[24:27], "little"), 1 + int.from_bytes(data[27:30], "little")
        case b"VP8L" if data[20] == 0x2F:
            bits = int.from_bytes(data[21:25], "little")
            return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
        case b"VP8 " if data[23:26] == b"\x9d\x01\x2a":
            width, height = struct.unpack("<HH", data[26:30])
            return width & 0x3FFF, height & 0x3FFF
    return None
