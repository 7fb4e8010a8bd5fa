"""Commands on the embedded lab: its samples as files, its checkpoint as a contact sheet."""

import json
import sys
from dataclasses import asdict
from pathlib import Path

from unirl.data.atomic import atomic_folder
from unirl.data.records import file_name, write_samples
from unirl.types import GenerationSample, UnderstandingSample

BASE = Path(__file__).parents[1] / "lab" / "checkpoints" / "janus"
"""The tiny checkpoint that ships with the package."""


def write_data(out: Path, *, count: int, seed: int, heldout: bool) -> int:
    """Write `count` lab samples per task into the new folder `out`, as understanding.parquet and generation.parquet.

    Raises:
        DataError: `out` exists or cannot be written.
    """
    from unirl.lab.data import make_generation, make_heldout, make_understanding

    if heldout:
        understanding, generation = make_heldout(count, seed)
    else:
        understanding, generation = make_understanding(count, seed), make_generation(count, seed)
    with atomic_folder(out) as folder:
        write_samples(folder / file_name(UnderstandingSample), understanding, UnderstandingSample)
        write_samples(folder / file_name(GenerationSample), generation, GenerationSample)
    sys.stdout.write(f"{out}: {len(understanding)} questions, {len(generation)} prompts\n")
    return 0


def pretrain(out: Path) -> int:
    """Train the tiny base model from scratch into the new folder `out` and print what it can do."""
    from unirl.lab.pretrain import pretrain as train_base

    sys.stdout.write(json.dumps(train_base(out), indent=2) + "\n")
    return 0


def show(out: Path, *, checkpoint: Path | None, count: int, seed: int, guidance: float) -> int:
    """Draw and answer held-out scenes: a contact sheet in `out`, one JSON line per scene on stdout."""
    from unirl.lab.show import show as draw

    for shown in draw(checkpoint or BASE, out, n=count, seed=seed, guidance=guidance):
        sys.stdout.write(json.dumps(asdict(shown)) + "\n")
    return 0
