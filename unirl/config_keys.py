"""What each setting is: key, type, default and the documentation written under its field."""

import ast
import inspect
import textwrap
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from typing import Any, Literal, get_args, get_origin, get_type_hints

from unirl.config import default_text, entry_type
from unirl.config_rules import bound_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """One key of a configuration."""

    key: str
    """Dotted; an entry that the user names stands as "<name>"."""
    type: str
    default: str
    """As one would write it in YAML."""
    rule: str
    """Range of a number; empty for none."""
    doc: str

    def __str__(self) -> str:
        return f"{self.key}: {self.type} = {self.default}" + (f"  ({self.rule})" if self.rule else "")


def list_settings(schema: type) -> list[Setting]:
    """Every setting of a configuration class, in the order of the file."""
    return _settings_of(schema())


def _settings_of(defaults: Any, prefix: str = "") -> list[Setting]:
    settings: list[Setting] = []
    hints, docs = get_type_hints(defaults.__class__), field_docs(defaults.__class__)
    for item in fields(defaults):
        hint, key, default = hints[item.name], f"{prefix}{item.name}", getattr(defaults, item.name)
        entry = entry_type(hint)
        if entry:
            settings += _settings_of(entry(), f"{key}.<name>.")
        elif is_dataclass(default):
            settings += _settings_of(default, f"{key}.")
        else:
            bound = None if isinstance(default, bool | str) else bound_of(key)
            settings.append(
                Setting(
                    key=key,
                    type=type_name(hint),
                    default=default_text(default),
                    rule=bound[0] if bound else "",
                    doc=docs.get(item.name, ""),
                )
            )
    return settings


@cache
def field_docs(schema: type) -> dict[str, str]:
    """The string under each field of a dataclass, as one line."""
    body = ast.parse(textwrap.dedent(inspect.getsource(schema))).body[0]
    assert isinstance(body, ast.ClassDef), schema
    docs: dict[str, str] = {}
    for above, below in zip(body.body, body.body[1:], strict=False):
        if (
            isinstance(above, ast.AnnAssign)
            and isinstance(above.target, ast.Name)
            and isinstance(below, ast.Expr)
            and isinstance(below.value, ast.Constant)
        ):
            docs[above.target.id] = " ".join(str(below.value.value).split())
    return docs


def type_name(hint: Any) -> str:
    """A type as a reader of YAML thinks of it: float, one of a, b, c, int or null, list of str."""
    if get_origin(hint) is Literal:
        return " | ".join(str(choice) for choice in get_args(hint))
    if get_origin(hint) is tuple:
        parts = get_args(hint)
        return f"list of {parts[0].__name__}" if parts[-1] is ... else f"[{', '.join(p.__name__ for p in parts)}]"
    if get_origin(hint) is dict:
        return "mapping"
    if type(None) in get_args(hint):
        return " or ".join(p.__name__ if p is not type(None) else "null" for p in get_args(hint))
    return hint.__name__
