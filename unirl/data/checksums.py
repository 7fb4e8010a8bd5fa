"""Size and sha256 of files, as manifests hold them, and remembered ones of files that have none."""

import hashlib
import json
import logging
from pathlib import Path
from typing import Any

from unirl.data.atomic import DataError, atomic_file

_log = logging.getLogger(__name__)


def file_facts(path: Path) -> dict[str, Any]:
    """Its size and sha256: {"bytes": 12, "sha256": "..."}."""
    return {"bytes": path.stat().st_size, "sha256": _sha256(path)}


def check_file(path: Path, facts: dict[str, Any], *, whole: str, contents: bool = True) -> None:
    """Compare a file with what a manifest says about it.

    Args:
        path: the file.
        facts: what `file_facts` gave when it was written.
        whole: what it is a part of, for the advice: "pair set".
        contents: False compares the size only.

    Raises:
        DataError: it is missing, cut off or altered.
    """
    if not path.is_file():
        raise DataError(
            f"{path}: expected a file of {facts['bytes']} bytes, as its manifest says; got none; copy or make the "
            f"{whole} again"
        )
    if path.stat().st_size != facts["bytes"]:
        raise DataError(
            f"{path}: expected {facts['bytes']} bytes, as its manifest says; got {path.stat().st_size}; "
            f"it was cut off or altered: copy or make the {whole} again"
        )
    if contents and (found := _sha256(path)) != facts["sha256"]:
        raise DataError(
            f"{path}: expected sha256 {facts['sha256']}, as its manifest says; got {found}; "
            f"it was altered: copy or make the {whole} again"
        )


def remembered_sha256(path: Path, memory: Path) -> str:
    """The sha256 of a file, read again only when its size or time of writing has changed.

    Args:
        path: the file.
        memory: folder of what is remembered, one small file each; made when needed.
    """
    stat = path.stat()
    stamp = {"path": str(path.absolute()), "bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns}
    note = memory / f"{hashlib.sha256(stamp['path'].encode()).hexdigest()[:16]}.json"
    try:
        saved = dict(json.loads(note.read_text()))
        digest = saved.pop("sha256")
        if saved == stamp:
            return digest
    except (OSError, ValueError, KeyError, TypeError):
        pass
    _log.info("reads %s (%d MiB) for its checksum", path, stat.st_size // 2**20)
    digest = _sha256(path)
    with atomic_file(note) as file:
        file.write(json.dumps(stamp | {"sha256": digest}).encode())
    return digest


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
