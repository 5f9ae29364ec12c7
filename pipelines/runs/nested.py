"""Nested settings as flat ones."""

from collections.abc import Callable, Mapping
from typing import Any


def flatten(
    values: Mapping[str, Any], prefix: str = "", leaf: Callable[[Mapping[str, Any]], str | None] = lambda values: None
) -> dict[str, Any]:
    """{'a': {'b': 1}} -> {'a.b': 1}; a mapping of which `leaf` makes a text stays one value, that text."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            text = leaf(value)
            flat |= flatten(value, f"{prefix}{name}.", leaf) if text is None else {prefix + name: text}
        else:
            flat[f"{prefix}{name}"] = value
    return flat
