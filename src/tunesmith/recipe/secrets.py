"""Secrets in a recipe: refused, since a recipe is copied into the run folder, the report and other people's hands.

In: a recipe's plain values, before they are checked. Out: a problem for each value or key that holds a secret, which
does not repeat it. Must not know: files, models of the recipe.
"""

from __future__ import annotations

from collections.abc import Iterator

from tunesmith.recipe.problems import Problem
from tunesmith.recipe.yaml12 import KeyPath, Value
from tunesmith.redact import find_secret

REMEDY = (
    "Take it out: recipes are copied into run folders and reports. Tokens are read from the environment (HF_TOKEN) or "
    "from `hf auth login`. If others have seen the recipe, replace the secret."
)


def held_secrets(values: Value) -> list[Problem]:
    """One problem a place, in the order of the recipe."""
    return [
        Problem(path, f"holds a secret ({kind})", at_key=at_key)
        for path, text, at_key in _texts(values)
        if (kind := find_secret(text))
    ]


def _texts(values: Value) -> Iterator[tuple[KeyPath, str, bool]]:
    """Every text with its place, and whether it is a key; a key that holds a secret is named by what is around it."""
    waiting: list[tuple[KeyPath, Value]] = [((), values)]
    while waiting:
        path, value = waiting.pop()
        if isinstance(value, str):
            yield path, value, False
        elif isinstance(value, dict):
            yield from ((path, key, True) for key in value if isinstance(key, str))
            waiting += [((*path, key), item) for key, item in reversed(value.items())]
        elif isinstance(value, list):
            waiting += [((*path, index), item) for index, item in reversed(list(enumerate(value)))]
