"""`unirl data`: bring public datasets into stores of interleaved samples, check and show them."""

import importlib
import inspect
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import yaml

from unirl.config_rules import ConfigError, Problem
from unirl.data.atomic import DataError, atomic_file
from unirl.data.interleaved import add_counts, data_files, similar_ids, stream_interleaved, summarise
from unirl.data.interleaved_import import Draft, Plan, import_samples
from unirl.data.interleaved_page import render_page, sample_lines
from unirl.data.records import Rejected
from unirl.data.unifiedvisual_mapping import mapping_keys, mapping_problems

FAULTY = 4
"""Exit code of a store that does not hold: bad data."""
_SHOWN = 10


def import_store(
    plan: Plan, out: Path, *, max_rejected_fraction: float = 0.01, resume: bool = False, as_json: bool = False
) -> int:
    """Make a store with the importer that `plan` names and print what is in it.

    Raises:
        ConfigError: no importer has this name, or its options do not fit.
        DataError: as `import_samples`.
    """
    drafts = partial(_importer(plan.importer, plan.options), Path(plan.source), **_read_options(plan.options))
    manifest = import_samples(out, drafts, plan, max_rejected_fraction=max_rejected_fraction, resume=resume)
    if as_json:
        sys.stdout.write(json.dumps(manifest, indent=2) + "\n")
    else:
        _print_counts(manifest["counts"])
        sys.stdout.write(f"{out}\n")
    return 0


def validate(path: Path, *, max_rejected_fraction: float = 0.01, as_json: bool = False) -> int:
    """Read every sample of a store or file, every image decoded, and print the counts; 0 when it holds, 4 when not.

    Raises:
        DataError: a file is missing, damaged or differs from the manifest.
    """
    data_files(path, contents=True)
    rejected: list[Rejected] = []
    subsets: dict[str, dict[str, int]] = {}
    for sample in stream_interleaved(path, rejected, max_rejected_fraction=1.0):
        add_counts(subsets, sample)
    counts = summarise(subsets) | {"rejected": len(rejected)}
    holds = len(rejected) <= max_rejected_fraction * (counts["samples"] + len(rejected)) and counts["samples"] > 0
    if as_json:
        shown = {"path": str(path), "holds": holds, "counts": counts, "rejected": [asdict(r) for r in rejected]}
        sys.stdout.write(json.dumps(shown, indent=2) + "\n")
    else:
        _print_counts(counts)
        for record in rejected[:_SHOWN]:
            sys.stdout.write(f"left out: {record.source} row {record.row} {record.id!r}: {record.reason}\n")
        sys.stdout.write("".join([f"and {len(rejected) - _SHOWN} more\n"] * (len(rejected) > _SHOWN)))
        sys.stdout.write(f"{path}: {'holds' if holds else f'does not hold: {_fault(counts, max_rejected_fraction)}'}\n")
    return 0 if holds else FAULTY


def show(path: Path, *, name: str | None = None, count: int = 3, out: Path | None = None) -> int:
    """Print the first samples of a store or file, or the one with an id; with `out` also write them as an HTML page.

    Raises:
        DataError: the path cannot be read, or has no good sample, or none of the id.
    """
    rejected: list[Rejected] = []
    samples = stream_interleaved(
        path, rejected, max_rejected_fraction=1.0, pixels=out is not None, only=None if name is None else {name}
    )
    chosen = list(islice(samples, count if name is None else 1))
    if name is not None and not chosen:
        reason = next((f", left out: {record.reason}" for record in rejected if record.id == name), "")
        near = [] if reason else similar_ids(path, name)
        hint = f"did you mean {' or '.join(near)}?" if near else "list some with --count"
        raise DataError(f"{path}: expected a sample {name!r}; got none{reason}; {hint}")
    if not chosen:
        reason = f"{len(rejected)} records, none of them good: {rejected[0].reason}" if rejected else "no record"
        raise DataError(f"{path}: expected a sample to show; got {reason}; `unirl data validate` names all that is bad")
    for sample in chosen:
        sys.stdout.writelines(f"{line}\n" for line in sample_lines(sample))
    if out is not None:
        with atomic_file(out) as file:
            file.write(render_page(chosen, title=path.name).encode())
        sys.stdout.write(f"{out}\n")
    return 0


def _importer(name: str, options: Mapping[str, Any]) -> Callable[..., Iterator[Draft]]:
    """`drafts` of the module `unirl/data/importers/<name>.py`, its options checked."""
    package = importlib.import_module("unirl.data.importers")
    names = sorted(path.stem for path in Path(package.__path__[0]).glob("[!_]*.py"))
    if name not in names:
        raise ConfigError([Problem("importer", name, "is not one", f"take one of {', '.join(names)}")])
    drafts = importlib.import_module(f"unirl.data.importers.{name}").drafts
    taken = {key: p for key, p in inspect.signature(drafts).parameters.items() if key != "source"}
    flags = ", ".join(map(_flag, taken)) or "none"
    problems = [
        Problem(_flag(key), value, f"is no option of {name}", f"it takes {flags}")
        for key, value in options.items()
        if key not in taken
    ]
    problems += [
        Problem(_flag(key), None, f"must be given for {name}", f"add {_flag(key)}; see docs/interleaved_data.md")
        for key, parameter in taken.items()
        if parameter.default is parameter.empty and key not in options
    ]
    if problems:
        raise ConfigError(problems)
    return drafts


def read_mapping(path: Path) -> Any:
    """The content of a mapping.yaml.

    Raises:
        ConfigError: it cannot be read, or has other keys or values than a mapping.
    """
    try:
        given = yaml.safe_load(path.read_text()) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        problem = Problem("--mapping", str(path), f"could not be read: {reason}", "check the path and the YAML")
        raise ConfigError([problem]) from error
    if problems := mapping_problems(given):
        rule = f"is no mapping: {'; '.join(problems)}"
        raise ConfigError([Problem("--mapping", str(path), rule, f"it takes {mapping_keys()}")])
    return given


def _read_options(options: Mapping[str, Any]) -> dict[str, Any]:
    return {key: Path(value) if key == "images" else value for key, value in options.items()}


def _flag(key: str) -> str:
    return f"--{key.replace('_', '-')}"


def _fault(counts: Mapping[str, Any], max_rejected_fraction: float) -> str:
    """Why a store with these counts does not hold."""
    num_rows = counts["samples"] + counts["rejected"]
    if not counts["samples"]:
        return f"none of {num_rows} records is good" if num_rows else "it has no records"
    return f"more than {max_rejected_fraction:.2%} of {num_rows} records are bad"


def _print_counts(counts: Mapping[str, Any]) -> None:
    rows = [(name or "(none)", c) for name, c in counts["subsets"].items()] + [("all", counts)]
    sys.stdout.write(f"{'subset':<20}{'samples':>10}{'images':>10}{'learned images':>16}\n")
    for name, found in rows:
        sys.stdout.write(f"{name:<20}{found['samples']:>10}{found['images']:>10}{found['images_in_loss']:>16}\n")
    sys.stdout.write(f"left out: {counts['rejected']}\n")
