"""The one error for a name outside its list."""

from typing import Any, get_args


def require_choice(key: str, value: str, choices: Any) -> None:
    """Refuse a value that the Literal type `choices` does not list.

    Raises:
        ValueError: with the config key and all valid names.
    """
    if value not in get_args(choices):
        raise ValueError(f"expected {key} among {', '.join(get_args(choices))}; got {value!r}: set one of them.")
