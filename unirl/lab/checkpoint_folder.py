"""Writes a lab checkpoint's folder whole or not at all, with what is known of it in lab.json."""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

CHECKPOINTS = Path(__file__).parent / "checkpoints"
"""The tiny checkpoints that ship with the package, each a "lab:" name."""


def write_folder(path: Path, write_files: Callable[[Path], None], facts: dict[str, Any] | None = None) -> None:
    """Let `write_files` fill a new folder and put it at `path`; an older checkpoint folder there is replaced.

    Facts go to lab.json with the sha256 of every file.

    Raises:
        ValueError: `path` is there and is not a checkpoint folder.
    """
    if path.exists() and not (path / "config.json").is_file():
        raise ValueError(f"expected nothing or an older checkpoint at {path}; got something else; choose another path")
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}-") as scratch:
        fresh, old = Path(scratch) / "fresh", Path(scratch) / "old"
        write_files(fresh)
        if facts is not None:
            files = sorted(file for file in fresh.rglob("*") if file.is_file())
            sums = {str(file.relative_to(fresh)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
            (fresh / "lab.json").write_text(json.dumps(facts | {"sha256": sums}, indent=2) + "\n")
        if path.exists():
            path.rename(old)
        os.replace(fresh, path)
        shutil.rmtree(old, ignore_errors=True)
