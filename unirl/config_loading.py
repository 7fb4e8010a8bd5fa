"""Reading a configuration: defaults, then files, then key=value; writing it; comparing two."""

import difflib
import json
from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, cast, get_args, get_origin, get_type_hints

from omegaconf import DictConfig, OmegaConf, read_write
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from unirl.config import (
    SCHEMAS,
    RlConfig,
    default_of,
    entry_type,
    is_table,
    setting_names,
)
from unirl.config_keys import type_name
from unirl.config_rules import AnyConfig, ConfigError, Problem, find_problems

_UNREADABLE = (OSError, UnicodeDecodeError, YAMLError, OmegaConfBaseException)

Config = TypeVar("Config", bound=AnyConfig)

# What people coming from other projects type, and what it is called here.
SYNONYMS = {
    "learning_rate": ("learner.lr",),
    "batch_size": ("rollout.pairs_per_step", "train.samples_per_step"),
    "epochs": ("train.num_epochs",),
    "group_size": ("rollout.num_understanding", "rollout.num_generation"),
    "num_generations": ("rollout.num_understanding", "rollout.num_generation"),
    "cfg_scale": ("rollout.sampling.image.guidance_scale",),
    "max_new_tokens": ("rollout.sampling.text.max_tokens",),
    "actors": ("rollout.text.num_workers", "rollout.image.num_workers"),
    "num_actors": ("rollout.text.num_workers", "rollout.image.num_workers"),
    "max_steps": ("train.num_steps",),
    "steps": ("train.num_steps", "train.max_steps"),
    "output_dir": ("train.run_dir",),
    "model_path": ("model.path",),
    "checkpoint": ("model.path",),
    "beta": ("algorithm.kl_beta",),
    "epsilon": ("algorithm.clip_low", "algorithm.clip_high"),
    "grad_clip": ("learner.max_grad_norm",),
}


def load_config(
    files: Iterable[str | Path], overrides: Iterable[str], schema: type[Config] = RlConfig, *, incomplete: bool = False
) -> Config:
    """The defaults of `schema`, then each file, then each override, later ones on top; checked as a whole.

    A table whose keys the user chooses (rewards.understanding, rewards.generation) is replaced by a file or override
    that assigns it; `rewards.generation.hpsv2.weight=0.5` edits or adds one entry.

    Args:
        files: YAML files with only what differs from the defaults; the value "???" asks the user for one.
        overrides: "key=value" each, the value read as YAML.
        schema: which job's settings.
        incomplete: leave "???" where it stands instead of asking; such a configuration can be looked at, not run.

    Raises:
        ConfigError: a file cannot be read, a key is unknown, a value has the wrong type, or a rule is broken; all of
            them are named at once.
    """
    tree = OmegaConf.structured(schema)
    problems: list[Problem] = []
    for file in files:
        try:
            problems += _assign(tree, schema, "", OmegaConf.to_container(OmegaConf.load(file)) or {})
        except _UNREADABLE as error:
            problems.append(_unreadable(str(file), error))
    for override in overrides:
        problems += _override(tree, schema, override)
    left_open = open_keys(OmegaConf.to_container(tree, resolve=False))
    refused = {problem.key for problem in problems}
    if not incomplete:
        asked = [key for key in left_open if key not in refused]
        problems += [Problem(key, "???", "must be given", f"add {key}=VALUE") for key in asked]
    config, rejected = _instantiate(tree, schema, left_open)
    # What was refused above or is open stands at its default here, of which there is nothing to say.
    problems += [problem for problem in rejected if problem.key not in refused | set(left_open)]
    if config is None or problems:
        raise ConfigError(problems)
    for key in left_open:
        _leave_open(config, key)
    return config


def _instantiate(tree: DictConfig, schema: type[Config], left_open: list[str]) -> tuple[Config | None, list[Problem]]:
    """The tree's settings, defaults in place of open ones, and what is wrong; None when they cannot be resolved."""
    for key in left_open:
        parent, _, leaf = key.rpartition(".")
        node = OmegaConf.select(tree, parent) if parent else tree
        with read_write(node):
            node[leaf] = default_of(schema, key)
    try:
        config = cast("Config", OmegaConf.to_object(tree))
    except OmegaConfBaseException as error:
        reason = str(error).split("\n", 1)[0]
        key = getattr(error, "full_key", None) or "?"
        return None, [Problem(key, "interpolation", f"cannot be resolved: {reason}", "give the value itself")]
    return config, find_problems(config)


def _leave_open(config: object, key: str) -> None:
    *parents, leaf = key.split(".")
    for name in parents:
        config = cast("dict[str, Any]", config)[name] if isinstance(config, dict) else getattr(config, name)
    if isinstance(config, dict):
        config[leaf] = "???"
    else:
        object.__setattr__(config, leaf, "???")  # it is frozen for everybody else


def run_name(file: Path) -> str:
    """train.name of a run's saved settings, whatever job it is of; empty where there is none."""
    try:
        return str(OmegaConf.select(OmegaConf.load(file), "train.name", default=""))
    except _UNREADABLE:
        return ""


def model_settings(file: Path) -> list[str]:
    """The model section of a run's saved settings as overrides, whatever job it is of.

    Raises:
        ConfigError: the file cannot be read.
    """
    try:
        model = OmegaConf.to_container(OmegaConf.load(file).model)
    except _UNREADABLE as error:
        raise ConfigError([_unreadable(str(file), error)]) from error
    return [f"model.{key}={json.dumps(value)}" for key, value in cast("dict[str, Any]", model).items()]


def to_yaml(config: object) -> str:
    """The whole configuration as YAML that `load_config` reads back to an equal one."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def differences(left: Any, right: Any, prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """Settings whose values differ, each with both values.

    An entry that only one table has stands as one value: None on the side that lacks it, and what differs from the
    defaults of such an entry on the other.
    """
    changed: dict[str, tuple[Any, Any]] = {}
    for item in fields(left):
        ours, theirs, key = getattr(left, item.name), getattr(right, item.name), f"{prefix}{item.name}"
        if is_dataclass(ours):
            changed |= differences(ours, theirs, f"{key}.")
        elif is_table(ours) or is_table(theirs):
            for name in dict.fromkeys([*ours, *theirs]):
                one, other = ours.get(name), theirs.get(name)
                if one and other:
                    changed |= differences(one, other, f"{key}.{name}.")
                else:
                    changed[f"{key}.{name}"] = (_entry(one), _entry(other))
        elif ours != theirs:
            changed[key] = (ours, theirs)
    return changed


def _entry(entry: Any) -> dict[str, Any] | None:
    return entry and {key: value for key, (_, value) in differences(type(entry)(), entry).items()}


def _override(tree: DictConfig, schema: type, override: str) -> list[Problem]:
    path, equals, text = override.partition("=")
    if not equals or not path:
        rule = "is not of the form key=value"
        return [Problem(override, "", rule, "name a setting and its value, without spaces")]
    try:
        value = cast("Any", OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"])))["value"]
    except _UNREADABLE as error:
        return [_unreadable(path, error)]
    *parents, leaf = path.split(".")
    hint: Any = schema
    node = tree
    for depth, name in enumerate(parents):
        entry = entry_type(hint)
        hint = entry or (get_type_hints(hint).get(name) if is_dataclass(hint) else None)
        if hint is None:
            return [_unknown(path, value, schema)]
        if entry and name not in node:
            with read_write(node):
                node[name] = entry()
        if OmegaConf.is_missing(node, name) or not isinstance(node[name], DictConfig):
            group = ".".join(parents[: depth + 1])
            rule = f"does not exist: {group} is a value, not a group"
            return [Problem(path, value, rule, f"see `{_lister(group, schema)}`")]
        node = node[name]
    return _assign_one(node, hint, f"{'.'.join([*parents, ''])}", leaf, value, schema)


def _assign(tree: DictConfig, schema: type, prefix: str, values: Any, root: type | None = None) -> list[Problem]:
    """Put a mapping into the node of a settings class or table; what does not fit comes back as problems."""
    if not isinstance(values, Mapping):
        rule = "is a group of settings, not a value"
        return [Problem(prefix.rstrip(".") or "the file", values, rule, "write key: value lines")]
    items = cast("Mapping[str, Any]", values).items()
    return [p for name, value in items for p in _assign_one(tree, schema, prefix, str(name), value, root or schema)]


def _assign_one(node: DictConfig, hint: Any, prefix: str, name: str, value: Any, root: type) -> list[Problem]:
    key = f"{prefix}{name}"
    entry = entry_type(hint)
    inner: Any = entry or (get_type_hints(hint).get(name) if is_dataclass(hint) else Any)
    if inner is None:
        return [_unknown(key, value, root)]
    with read_write(node):
        if is_dataclass(inner):
            if entry:
                node[name] = entry()
            return _assign(node[name], cast("type", inner), f"{key}.", {} if entry and value is None else value, root)
        if entry_type(inner):
            node[name] = {}
            return _assign(node[name], inner, f"{key}.", value, root)
        try:
            OmegaConf.update(node, name, value, merge=False)
        except OmegaConfBaseException:
            return [_refused(key, value, inner, root)]
    return []


def open_keys(values: Any, key: str = "") -> list[str]:
    """Dotted keys of a nested mapping whose value is "???"."""
    if isinstance(values, dict):
        items = cast("dict[str, Any]", values).items()
        return [found for name, value in items for found in open_keys(value, f"{key}.{name}" if key else name)]
    return [key] if values == "???" else []


_KINDS = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "text"}


def _lister(key: str, schema: type) -> str:
    """The command that lists the settings that start so."""
    job = next(name for name, other in SCHEMAS.items() if other is schema)
    return f"unirl config keys {f'--job {job} ' if job != 'train' else ''}{key}"


def _refused(key: str, value: Any, hint: Any, schema: type) -> Problem:
    name = type_name(hint)
    kind = f"one of {', '.join(get_args(hint))}" if get_origin(hint) is Literal else _KINDS.get(name, f"of type {name}")
    return Problem(key, repr(value), f"must be {kind}", f"see `{_lister(key, schema)}`")


def _unreadable(name: str, error: Exception) -> Problem:
    reason = getattr(error, "strerror", None) or " ".join(str(error).split())
    return Problem(name, "unreadable", f"could not be read: {reason}", "check the path and the YAML")


def _unknown(key: str, value: Any, schema: type) -> Problem:
    names = setting_names(schema)
    parent, _, leaf = key.rpartition(".")
    while parent and not any(name.startswith(f"{parent}.") for name in names):
        parent = parent.rpartition(".")[0]
    prefix = f"{parent}." if parent else ""
    group = [name for name in names if name.startswith(prefix)]
    near = difflib.get_close_matches(leaf, [_leaf(name) for name in group], n=1, cutoff=0.75)
    meant = (
        [name for name in group if parent and near and _leaf(name) == near[0]]
        or [name for name in SYNONYMS.get(leaf, ()) if name in names]
        or [name for name in names if _leaf(name) == leaf or (near and _leaf(name) == near[0])]
    )
    inside = dict.fromkeys(name.removeprefix(prefix).partition(".")[0] for name in group)
    fix = f"did you mean {' or '.join(meant)}?" if meant else f"{parent or 'the top level'} has {', '.join(inside)}"
    return Problem(key, value, "is not a setting", fix)


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]
