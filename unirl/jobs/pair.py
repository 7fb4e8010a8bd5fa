"""`unirl pair`: make a pair set, prove it right, show it."""

import json
import logging
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unirl.config import PairConfig
from unirl.config_rules import ConfigError, Problem
from unirl.data.atomic import DataError, atomic_file
from unirl.data.pair_report import render_report, summary
from unirl.data.pair_store import PairSet, read_pair_set, write_pair_set
from unirl.data.records import Rejected, image_key, write_rejected
from unirl.jobs.assets import pair_set_of, resolve_encoder
from unirl.jobs.make_pairs import selection_key
from unirl.pairing.certificate import Clustering, Matching
from unirl.pairing.check import clustering_faults, matching_faults
from unirl.types import PairRecord

FAULTY = 4
"""Exit code of a pair set that does not hold: bad data."""
RECOMPUTED = 64
"""Images whose features are computed anew by `verify`."""
_FEATURE_TOLERANCE = 1e-4
_UNIT = 1e-3

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What `verify` found."""

    folder: str
    num_pairs: int
    num_recomputed: int
    """Images whose features were computed anew; 0 when the encoder's weights are not at hand."""
    faults: tuple[str, ...]
    """Plain sentences; empty when everything holds."""


def make(config: PairConfig) -> int:
    """Make the pair set that the config describes in the folder `config.out` and print what is in it.

    Bad records of the sources are named in rejected.jsonl inside the folder; when they stop the job, beside it.

    Raises:
        ConfigError: no folder is named.
        DataError: the folder exists, a source cannot be used, or no pair could be made.
    """
    if config.out is None:
        problem = Problem(key="out", value=None, rule="must name a new folder", fix="try out=pairs")
        raise ConfigError([problem])
    out = Path(config.out)
    if out.exists():
        raise DataError(
            f"{out}: expected a folder that is not there yet; got an existing one; remove it or set another out"
        )
    rejected: list[Rejected] = []
    try:
        pair_set = pair_set_of(config, rejected)
    except DataError:
        if rejected:
            write_rejected(out.with_name(f"{out.name}.rejected.jsonl"), rejected)
        raise
    write_pair_set(out, pair_set)
    sys.stdout.write(f"{out}:\n{json.dumps(summary(pair_set), indent=2)}\n")
    return 0


def verify(folder: Path, *, as_json: bool = False) -> int:
    """Prove a pair set right and print the verdict; 0 when it holds, 4 when not.

    Raises:
        DataError: the folder is not a whole pair set.
    """
    verdict = examine(folder)
    if as_json:
        sys.stdout.write(json.dumps(asdict(verdict), indent=2) + "\n")
    else:
        sys.stdout.writelines(f"fault: {fault}\n" for fault in verdict.faults)
        state = "does not hold" if verdict.faults else "holds"
        sys.stdout.write(
            f"{folder}: {state}: {verdict.num_pairs} pairs, {len(verdict.faults)} faults, "
            f"{verdict.num_recomputed} features computed anew\n"
        )
    return FAULTY if verdict.faults else 0


def examine(folder: Path) -> Verdict:
    """Check a pair set against its certificate with code that shares nothing with what made it.

    Raises:
        DataError: the folder is not a whole pair set.
    """
    pair_set = read_pair_set(folder)
    faults = [*_image_faults(pair_set.pairs)]
    try:
        faults += _certificate_faults(pair_set)
        num_recomputed, differing = _recompute(pair_set)
    except (KeyError, TypeError, IndexError, ValueError) as error:
        raise DataError(
            f"{folder}: expected a certificate and features that fit each other; got {error!r}; make the set again"
        ) from error
    return Verdict(
        folder=str(folder),
        num_pairs=len(pair_set.pairs),
        num_recomputed=num_recomputed,
        faults=(*faults, *differing),
    )


def report(folder: Path, *, out: Path | None = None, as_json: bool = False) -> int:
    """Write a page about a pair set (default: report.html in its folder); print its figures and, last, its path.

    Raises:
        DataError: the folder is not a whole pair set, or the page cannot be written.
    """
    pair_set = read_pair_set(folder)
    page = out or folder / "report.html"
    with atomic_file(page) as file:
        file.write(render_report(pair_set, title=folder.name).encode())
    figures = summary(pair_set)
    if as_json:
        sys.stdout.write(json.dumps(figures, indent=2) + "\n")
        return 0
    shown = {name: value for name, value in figures.items() if not isinstance(value, list | dict)} | figures["kinds"]
    sys.stdout.write("".join(f"{name:<24}{value}\n" for name, value in shown.items()) + f"{page}\n")
    return 0


def _image_faults(pairs: Sequence[PairRecord]) -> list[str]:
    """An image in two pairs, an aligned pair with two images, or a retrieved one with one."""
    faults = []
    owner: dict[str, str] = {}
    for pair in pairs:
        if pair.generation.image is None:
            faults.append(f"{pair.pair_id}: its generation sample has no image")
            continue
        keys = {image_key(pair.understanding.image), image_key(pair.generation.image)}
        if (len(keys) == 1) != (pair.kind == "aligned"):
            faults.append(f"{pair.pair_id}: {pair.kind}, but its two sides show {len(keys)} images")
        faults += [f"{pair.pair_id}: an image that is in {owner[key]} too" for key in sorted(keys) if key in owner]
        owner |= dict.fromkeys(keys, pair.pair_id)
    return faults


def _certificate_faults(pair_set: PairSet) -> list[str]:
    """Departures of the certificate from the features, and of the pairs from the certificate."""
    proof, und, gen = pair_set.certificate, pair_set.features["understanding"], pair_set.features["generation"]
    if not all(np.abs(np.linalg.norm(rows, axis=1) - 1).max(initial=0) <= _UNIT for rows in (und, gen)):
        return ["the features are not unit rows"]
    rows = np.array(proof["clustered_rows"], np.int64)
    clustering = Clustering(
        medoids=np.array(proof["medoids"], np.int64), assignment=np.array(proof["assignment"], np.int64)
    )
    if pair_set.settings.get("selection", "medoids") == "medoids":
        faults = clustering_faults(np.concatenate([und, gen])[rows], clustering)
    else:
        faults = _drawing_faults(rows, clustering, pair_set)
    used = set(rows[clustering.medoids].tolist())
    und_left = [row for row in range(len(und)) if row not in used]
    gen_left = [row for row in range(len(gen)) if row + len(und) not in used]
    matching = Matching(
        gen_index=np.array(proof["gen_index"], np.int64),
        und_index=np.array(proof["und_index"], np.int64),
        similarity=np.array(proof["similarity"], np.float64),
        threshold=pair_set.settings["threshold"],
        order=pair_set.settings["order"],
    )
    faults += matching_faults(gen[gen_left], und[und_left], matching)
    if faults:
        return faults
    ids = [*proof["understanding_ids"], *proof["generation_ids"]]
    claimed = {("aligned", ids[row], ids[row], 1.0) for row in used}
    for g, u, similarity in zip(proof["gen_index"], proof["und_index"], proof["similarity"], strict=True):
        claimed.add(("retrieved", ids[und_left[u]], ids[len(und) + gen_left[g]], similarity))
    found = {_claim(pair) for pair in pair_set.pairs}
    for name, odd in (("in the certificate only", claimed - found), ("in the pairs only", found - claimed)):
        faults += [f"{kind} pair of {u} and {g} ({s}) is {name}" for kind, u, g, s in sorted(odd)]
    return faults


def _drawing_faults(rows: NDArray[np.int64], drawn: Clustering, pair_set: PairSet) -> list[str]:
    """What is wrong with samples that claim to have been drawn by the seed."""
    ids = [*pair_set.certificate["understanding_ids"], *pair_set.certificate["generation_ids"]]
    seed, number = pair_set.settings["seed"], pair_set.settings["num_aligned"]
    order = sorted(range(len(rows)), key=lambda row: (selection_key(ids[rows[row]], seed), row))
    return [] if drawn.medoids.tolist() == order[:number] else ["aligned pairs are not those that the seed draws"]


def _claim(pair: PairRecord) -> tuple[str, str, str, float]:
    """A pair as the certificate names it; both sides of an aligned one go by the sample that was given."""
    und, gen = pair.understanding.id, pair.generation.id
    if pair.kind == "aligned":
        origin = und if gen == f"{und}/prompt" else gen
        return pair.kind, origin, origin, pair.similarity
    return pair.kind, und, gen, pair.similarity


def _recompute(pair_set: PairSet) -> tuple[int, list[str]]:
    """How many images were embedded anew, and which of them the stored features do not fit."""
    checkpoint = pair_set.settings["encoder_checkpoint"]
    if checkpoint is not None and not Path(checkpoint).is_file():
        _log.warning("features not computed anew: %s, the encoder's weights, is not here", checkpoint)
        return 0, []
    stored: dict[str, NDArray[np.float32]] = {}
    for task in ("understanding", "generation"):
        stored |= dict(zip(pair_set.certificate[f"{task}_ids"], pair_set.features[task], strict=True))
    samples: list[Any] = [s for p in pair_set.pairs for s in (p.understanding, p.generation) if s.id in stored]
    samples = samples[:RECOMPUTED]
    features = resolve_encoder(pair_set.settings["encoder"], checkpoint and Path(checkpoint))(
        [s.image for s in samples]
    )
    wrong = [
        f"sample {sample.id}: its stored features are not those of its image"
        for sample, row in zip(samples, features, strict=True)
        if not np.allclose(row, stored[sample.id], atol=_FEATURE_TOLERANCE)
    ]
    return len(samples), wrong
