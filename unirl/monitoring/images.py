"""Pictures in the run directory: WebP files, and the limit on what they may take."""

import io
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

MAX_SIDE_PX = 256
LOSSLESS_SIDE_PX = 64
"""Up to this size every pixel matters to the reader, and lossless costs little."""


def encode_webp(image: NDArray[np.uint8]) -> bytes:
    """RGB uint8 [H, W, 3] as WebP: lossless when small, else quality 85 with the longer side at most 256 px."""
    picture = Image.fromarray(image)
    lossless = max(picture.size) <= LOSSLESS_SIDE_PX
    if max(picture.size) > MAX_SIDE_PX:
        picture.thumbnail((MAX_SIDE_PX, MAX_SIDE_PX))
    out = io.BytesIO()
    picture.save(out, "WEBP", quality=85, lossless=lossless)
    return out.getvalue()


def thin_images(folder: Path, max_bytes: int) -> int:
    """Delete every second shown step, oldest first, until the folder fits. First and newest step stay.

    Args:
        folder: holds files named "<step>_...".
        max_bytes: what the folder may take.

    Returns:
        Number of deleted files.
    """
    by_step: dict[str, list[Path]] = {}
    for file in sorted(folder.glob("*.webp")):
        by_step.setdefault(file.name.split("_")[0], []).append(file)
    sizes = {step: sum(file.stat().st_size for file in files) for step, files in by_step.items()}
    total, deleted, steps = sum(sizes.values()), 0, list(by_step)
    while total > max_bytes and len(steps) > 2:
        for step in steps[1:-1:2]:
            if total <= max_bytes:
                break
            for file in by_step[step]:
                file.unlink()
            deleted += len(by_step[step])
            total -= sizes[step]
            steps.remove(step)
    return deleted
