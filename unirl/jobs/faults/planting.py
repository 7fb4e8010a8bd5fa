"""How a fault is planted: a function of the real code takes another's place for the length of a block."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def replaced(owner: Any, name: str, make: Callable[[Any], Any]) -> Iterator[None]:
    """`owner.name` is what `make` returns for the original.

    Args:
        owner: a module or class.
        name: of its function.
        make: takes the original and returns what stands in its place.
    """
    original = getattr(owner, name)
    setattr(owner, name, make(original))
    try:
        yield
    finally:
        setattr(owner, name, original)
