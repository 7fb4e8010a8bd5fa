"""Files inside archives: a zip cut in parts is read in place, a tar archive is unpacked once."""

import gzip
import io
import shutil
import tarfile
import zipfile
import zlib
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from types import TracebackType
from typing import IO, cast

from unirl.data.atomic import DataError, atomic_folder

LARGEST_MEMBER = 2**28
_DAMAGED = (zipfile.BadZipFile, zlib.error, OSError, EOFError, NotImplementedError, RuntimeError, ValueError)


class ArchiveError(Exception):
    """An archive that cannot be used at all: unlike a bad record, it ends an import."""

    exit_code = 4
    """Of the process: bad data."""


class JoinedParts(io.RawIOBase):
    """Files read as if they were one, in the order given; nothing is copied."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._files = [path.open("rb") for path in paths]
        self._ends = list(accumulate(path.stat().st_size for path in paths))
        self._place = 0

    def readable(self) -> bool:
        """It is."""
        return True

    def seekable(self) -> bool:
        """It is."""
        return True

    def tell(self) -> int:
        """Bytes from the start of the first part."""
        return self._place

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """As for any file."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._ends[-1] if self._ends else 0}[whence]
        if base + offset < 0:
            raise ValueError(f"expected a place in the file; got {base + offset}; seek from the start")
        self._place = base + offset
        return self._place

    def readinto(self, buffer: memoryview) -> int:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Fill the buffer from the part that the place is in; 0 at the end."""
        index = bisect_right(self._ends, self._place)
        if index == len(self._files):
            return 0
        file = self._files[index]
        file.seek(self._place - (self._ends[index - 1] if index else 0))
        count = file.readinto(buffer)
        self._place += count
        return count

    def close(self) -> None:
        """Close every part."""
        for file in self._files:
            file.close()
        super().close()


class ZipImages:
    """Image files of a zip archive, given as one file or in parts."""

    def __init__(self, parts: Sequence[Path]) -> None:
        self._names = ", ".join(path.name for path in parts)
        try:
            self._zip = zipfile.ZipFile(io.BufferedReader(JoinedParts(parts), 2**20))
        except _DAMAGED as error:
            raise DataError(
                f"{parts[0].parent}: expected a whole zip archive in {self._names}; got: {error}; copy the missing or "
                "cut off parts again"
            ) from error
        names = [info.filename for info in self._zip.infolist() if not info.is_dir()]
        tops = {name.partition("/")[0] for name in names}
        self._top = f"{tops.pop()}/" if len(tops) == 1 else ""
        """The one folder that holds everything, which records may leave out."""
        self._members = set(names)

    def __enter__(self) -> "ZipImages":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._zip.close()

    def read(self, name: str) -> bytes:
        """The bytes of a member, named with or without the folder that holds everything.

        Raises:
            DataError: it is absent, damaged, encrypted or larger than an image.
        """
        member = next((n for n in (name, f"{self._top}{name}") if n in self._members), None)
        if member is None:
            raise DataError(f"expected an image {name[:120]!r} in {self._names}; got none there; drop the record")
        try:
            size = self._zip.getinfo(member).file_size
            if size > LARGEST_MEMBER:
                raise DataError(
                    f"expected an image of at most {LARGEST_MEMBER} bytes; got {size} in {member!r}; drop it"
                )
            return self._zip.read(member)
        except DataError:
            raise
        except _DAMAGED as error:
            raise DataError(f"expected a whole image {member!r}; got: {error}; copy the archive again") from error


def unpack_tar(archive: Path, folder: Path) -> Path:
    """Unpack a tar archive, gzipped or not, into a new folder, whole or not at all; does nothing if it is there.

    Raises:
        DataError: the archive is damaged, or holds anything but files and folders below itself.
    """
    if folder.is_dir():
        return folder
    for stale in folder.parent.glob(f".{folder.name}.*.partial"):
        shutil.rmtree(stale)
    with atomic_folder(folder) as partial:
        try:
            with _plain(archive) as file, tarfile.open(fileobj=file, mode="r|") as tar:
                for member in tar:
                    if not (member.isfile() or member.isdir()):
                        raise DataError(
                            f"{archive}: expected files and folders only; got {member.name[:120]!r}, a link or device; "
                            "do not use this archive"
                        )
                    tar.extract(member, partial, filter="data")
                while file.read(2**20):  # to the end, where gzip's checksum stands
                    pass
        except tarfile.FilterError as error:
            raise DataError(
                f"{archive}: expected members below the archive's own folder; got: {error}; do not use this archive"
            ) from error
        except (tarfile.TarError, zlib.error, EOFError, gzip.BadGzipFile) as error:
            raise DataError(f"{archive}: expected a whole tar archive; got: {error}; copy it again") from error
    return folder


def _plain(archive: Path) -> IO[bytes]:
    return cast("IO[bytes]", gzip.open(archive)) if archive.suffix in (".gz", ".tgz") else archive.open("rb")
