"""Commands on the embedded lab: its samples as files, its checkpoint as a contact sheet."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from unirl.config import Family
from unirl.data.atomic import atomic_folder
from unirl.data.records import file_name, write_samples
from unirl.evaluation.intervals import wilson_interval
from unirl.types import GenerationSample, UnderstandingSample

if TYPE_CHECKING:
    from unirl.lab.show import Shown


STUDENTS: tuple[Family, ...] = ("janus_pro", "lumina_dimoo", "anole")
"""The families of which the lab can make a tiny model."""


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


def pretrain(out: Path, *, family: Family) -> int:
    """Train the family's tiny base model from scratch into the new folder `out` and print what it can do."""
    from unirl.lab.pretrain import pretrain as train_base

    sys.stdout.write(json.dumps(train_base(out, family), indent=2) + "\n")
    return 0


def show(out: Path, *, checkpoint: str, count: int, seed: int, guidance: float) -> int:
    """Draw and answer held-out scenes; print how well by category and, last, the path of the contact sheet."""
    from transformers.utils.logging import disable_progress_bar

    from unirl.jobs.evaluate import policy_of
    from unirl.lab.show import show as draw

    disable_progress_bar()
    shown = draw(policy_of(checkpoint), out, n=count, seed=seed, guidance=guidance)
    sys.stdout.write(f"{competence_table(shown)}\n{out / 'lab.png'}\n")
    return 0


def competence_table(shown: Sequence["Shown"]) -> str:
    """How many scenes of each category were drawn exactly and answered rightly, with 95 % intervals over all."""
    rows = [("held-out scenes", "scenes", "drawn exactly", "mean partial score", "answered rightly")]
    for category in (*sorted({one.category for one in shown}), None):
        group = [one for one in shown if category in (one.category, None)]
        exact, right = sum(one.exact for one in group), sum(one.right for one in group)
        partial = sum(one.partial for one in group) / len(group)
        rows.append((category or "all", str(len(group)), str(exact), f"{partial:.2f}", str(right)))
    intervals = [_interval([one.exact for one in shown]), _interval([one.right for one in shown])]
    rows.append(("95 % interval of the share", "", intervals[0], "", intervals[1]))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        row[0].ljust(widths[0]) + "".join(f"  {cell:>{width}}" for cell, width in zip(row[1:], widths[1:], strict=True))
        for row in rows
    )


def _interval(verdicts: Sequence[bool]) -> str:
    low, high = wilson_interval(sum(verdicts), len(verdicts))
    return f"{low:.2f} to {high:.2f}"
