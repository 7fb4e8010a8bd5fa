"""What stands behind the names in a config: "lab:..." for what the package brings or makes, a path for anything else.

Nothing else outside unirl/lab knows the "lab:" names.
"""

import fcntl
import hashlib
import json
import logging
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

from unirl.config import PairConfig
from unirl.config_loading import load_config
from unirl.data.atomic import DataError, atomic_folder
from unirl.data.interleaved import write_interleaved
from unirl.data.pair_store import PairSet, check_files, write_pair_set
from unirl.data.records import Rejected, Sample, file_name, read_samples, stream_samples
from unirl.data.teacher import Teacher
from unirl.jobs.make_pairs import make_pair_set
from unirl.lab.checkpoint_folder import CHECKPOINTS
from unirl.models.checkpoint import stored_tensors
from unirl.models.embedder import Embedder, load_embedder
from unirl.types import GenerationSample, UnderstandingSample

PACKAGE = Path(__file__).parents[1]
# What decides the lab's pairs: a change in any of these files makes new ones.
_LAB_PAIR_SOURCES = ("lab/*.py", "pairing/*.py", "data/teacher.py", "data/pair_store.py", "jobs/make_pairs.py")

_LAB_CONVERSATION_SOURCES = ("lab/*.py", "lab/subsets/*.py", "data/interleaved.py", "data/messages.py")
LAB_CONVERSATIONS = {"lab:unified_visual": 2000, "lab:unified_visual_heldout": 60}
"""Samples of each subset."""

_log = logging.getLogger(__name__)


def resolve_checkpoint(name: str) -> Path:
    """The checkpoint folder behind model.path.

    Raises:
        DataError: no such folder, or one without config.json or with weights that are cut short.
    """
    folder = CHECKPOINTS / name.removeprefix("lab:")
    if not name.startswith("lab:") or not folder.is_dir():
        known = sorted(found.name for found in CHECKPOINTS.iterdir() if found.is_dir())
        folder = _path(name, *(f"lab:{one}" for one in known))
    if not (folder / "config.json").is_file():
        raise DataError(
            f"{folder}: expected a Hugging Face checkpoint folder with config.json; got none; correct the path"
        )
    try:
        stored_tensors(folder)
    except (FileNotFoundError, ValueError) as error:
        raise DataError(str(error)) from error
    return folder


def resolve_pairs(name: str, cache_dir: str | Path, settings: PairConfig | None = None) -> Path:
    """The pair set behind data.pairs; "lab:pairs" is made on first use and kept in `cache_dir`.

    Processes that ask at once wait for each other. A kept set that was damaged is made anew.

    Args:
        name: "lab:pairs" or a folder; settings of `unirl pair make` may follow the former, as in
            "lab:pairs,threshold=0.9".
        cache_dir: where the lab's pair set is kept.
        settings: how the lab's pairs are made; None takes what the name says, or the defaults.

    Raises:
        ConfigError: settings in the name that cannot be.
        DataError: the folder is not a whole pair set.
    """
    lab, *given = name.split(",")
    if lab != "lab:pairs":
        folder = _path(name, "lab:pairs")
        check_files(folder)
        return folder
    settings = settings or load_config([], given, PairConfig)
    folder = Path(cache_dir) / f"lab-pairs-seed{settings.seed}-{_lab_pairs_key(settings)}"
    with locked(folder):
        if folder.exists():
            try:
                check_files(folder)
            except DataError as error:
                _log.warning("making the lab's pairs anew: %s", error)
                shutil.rmtree(folder)
        if not folder.exists():
            _log.info("making the lab's pairs in %s", folder)
            write_pair_set(folder, pair_set_of(settings, []))
    return folder


def check_pairs(name: str) -> None:
    """Look for the pair set behind data.pairs, making nothing.

    Raises:
        ConfigError: settings in the name that cannot be.
        DataError: the folder is not a whole pair set.
    """
    lab, *given = name.split(",")
    if lab == "lab:pairs":
        load_config([], given, PairConfig)
    else:
        check_files(_path(name, "lab:pairs"))


def check_heldout(name: str) -> None:
    """Look for the tables behind evaluation.data, reading none.

    Raises:
        DataError: there is nothing of this name, or it lacks a table.
    """
    if name == "lab:heldout":
        return
    folder = _path(name, "lab:heldout")
    for table in (file_name(UnderstandingSample), file_name(GenerationSample)):
        if not (folder / table).is_file():
            raise DataError(f"{folder}: expected a table {table}; got none; write it, or name another folder")


def check_conversations(name: str) -> None:
    """Look for the conversations behind a source, making nothing.

    Raises:
        DataError: there is nothing of this name.
    """
    if name not in LAB_CONVERSATIONS:
        _path(name, *LAB_CONVERSATIONS)


def resolve_conversations(name: str, cache_dir: str | Path) -> Path:
    """The folder or file of conversations behind a source; the lab's are made on first use and kept in `cache_dir`.

    Raises:
        DataError: there is nothing of this name.
    """
    if name not in LAB_CONVERSATIONS:
        return _path(name, *LAB_CONVERSATIONS)
    from unirl.lab.unified_visual import SUBSETS, heldout_samples, training_samples

    count = LAB_CONVERSATIONS[name]
    key = _digest(_LAB_CONVERSATION_SOURCES, {"count": count})
    folder = Path(cache_dir) / f"{name.replace(':', '-').replace('_', '-')}-{key}"
    with locked(folder):
        if not folder.exists():
            make = heldout_samples if name.endswith("heldout") else training_samples
            _log.info("making %d conversations of each of %d subsets in %s", count, len(SUBSETS), folder)
            with atomic_folder(folder) as temporary:
                samples = (sample for subset in SUBSETS for sample in make(subset, count, seed=0))
                write_interleaved(temporary / "interleaved.parquet", samples)
    return folder


def resolve_heldout(
    name: str, num_prompts: int | None = None
) -> tuple[list[UnderstandingSample], list[GenerationSample]]:
    """The held-out samples behind evaluation.data, at most `num_prompts` of each task.

    Raises:
        DataError: the folder lacks a table, or more than 1 % of its records are bad.
    """
    if name == "lab:heldout":
        from unirl.lab.data import make_heldout

        return make_heldout(480 if num_prompts is None else num_prompts)
    folder = _path(name, "lab:heldout")
    understanding, generation = read_samples(folder, UnderstandingSample)[0], read_samples(folder, GenerationSample)[0]
    if num_prompts is not None and min(len(understanding), len(generation)) < num_prompts:
        sizes = len(understanding), len(generation)
        _log.warning("%s: %d questions and %d prompts, fewer than the %d asked for", folder, *sizes, num_prompts)
    return understanding[:num_prompts], generation[:num_prompts]


def pair_set_of(config: PairConfig, rejected: list[Rejected]) -> PairSet:
    """The pair set that a config describes, in memory.

    Args:
        config: sources, teacher, encoder and the constants of pairing.
        rejected: takes the bad records of the sources, so that they are known even when the reading stops.

    Raises:
        DataError: a source cannot be used, or no pair could be made.
    """
    understanding = resolve_samples(config.understanding, UnderstandingSample, config, rejected)
    generation = resolve_samples(config.generation, GenerationSample, config, rejected)
    checkpoint = Path(config.encoder_checkpoint) if config.encoder_checkpoint else None
    pair_set = make_pair_set(
        understanding,
        generation,
        teacher=resolve_teacher(config.teacher, config.seed),
        embed=resolve_encoder(config.encoder, checkpoint),
        config=config,
    )
    return replace(pair_set, rejected=(*rejected, *pair_set.rejected))


def resolve_samples(name: str, kind: type[Sample], config: PairConfig, rejected: list[Rejected]) -> list[Sample]:
    """The samples behind `understanding` or `generation`: drawn from the lab, or read from a folder or file.

    Raises:
        DataError: no such source, or too many of its records are bad.
    """
    if name in ("lab:understanding", "lab:generation"):
        from unirl.lab.data import make_generation, make_understanding

        draw = make_understanding if name == "lab:understanding" else make_generation
        return [_of_kind(sample, kind, name) for sample in draw(config.lab_samples, config.seed)]
    path = _path(name, f"lab:{file_name(kind).removesuffix('.parquet')}")
    return list(stream_samples(path, kind, rejected, max_rejected_fraction=config.max_rejected_fraction))


def resolve_teacher(name: str, seed: int) -> Teacher | None:
    """The teacher behind `teacher`: None for "none".

    Raises:
        DataError: an unknown name.
    """
    match name:
        case "none":
            return None
        case "lab":
            from unirl.lab.teacher import Teacher as LabTeacher

            return LabTeacher(seed=seed)
        case _:
            raise DataError(f"teacher: expected one of lab, none; got {name!r}; correct the key")


def resolve_encoder(name: str, checkpoint: Path | None = None) -> Embedder:
    """The image encoder behind `encoder`: "lab" (colour, shape and place of the lab's objects) or a network.

    Raises:
        FileNotFoundError: the network's weights file is missing.
        ValueError: an unknown name, or a file without the network's weights.
    """
    if name != "lab":
        return load_embedder(name, checkpoint)
    import numpy as np

    from unirl.lab.features import embed

    return lambda images: np.concatenate([embed(image[None]) for image in images])


def _path(name: str, *lab_names: str) -> Path:
    path = Path(name)
    if name.startswith("lab:") or not path.exists():
        known = " or ".join(map(repr, lab_names))
        raise DataError(f"{name}: expected an existing path or {known}; got neither; correct the name")
    return path


def _of_kind(sample: UnderstandingSample | GenerationSample, kind: type[Sample], name: str) -> Sample:
    if not isinstance(sample, kind):
        raise DataError(
            f"{name}: expected a source of {kind.__name__} records; got {type(sample).__name__}; swap the two"
        )
    return sample


def _lab_pairs_key(settings: PairConfig) -> str:
    return _digest(_LAB_PAIR_SOURCES, asdict(settings))


def _digest(sources: Sequence[str], settings: Mapping[str, object]) -> str:
    """Twelve hex digits that change with the settings and with any of the package's files."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for pattern in sources:
        for path in sorted(PACKAGE.glob(pattern)):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the one right to make `folder`; the system gives it up when the process ends."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_name(f".{folder.name}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
