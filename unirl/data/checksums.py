"""Size and sha256 of files, as manifests hold them."""

import hashlib
from pathlib import Path
from typing import Any

from unirl.data.atomic import DataError


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


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
