"""`key=value` on the command line: a value put into the recipe before it is checked.

In: the recipe's plain values and texts such as `stages.dpo.beta=0.3`, `stages[1].beta=0.3`, `seed=3`.
Out: the values with the overrides in them, and the key path of each.
Must not know: the models; a wrong key or value is found where all of them are.

The value is YAML 1.2, so `no` is a word, `[a, b]` a list and nothing at all null.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from tunesmith.errors import RecipeError
from tunesmith.recipe.problems import nearest
from tunesmith.recipe.yaml12 import KeyPath, Value, format_path, read

_KEY = re.compile(r"[A-Za-z_][\w-]*(\[\d{1,4}\])*(\.[\w-]+(\[\d{1,4}\])*)*\Z")
_PART = re.compile(r"\[(\d+)\]|([\w-]+)")


@dataclass(frozen=True, slots=True)
class Override:
    """`text` as it was given, and its two halves."""

    text: str
    keys: KeyPath
    value: Value

    @property
    def where(self) -> str:
        """As errors name it."""
        return f"override {self.text}"


def parse_override(text: str) -> Override:
    """Take `key=value` apart. Raises RecipeError where it is not of that form or the value is not YAML."""
    where = f"override {text}"
    key, equals, value = text.partition("=")
    if not equals or not _KEY.match(key):
        raise RecipeError(
            "not of the form key=value", where=where, remedy="Examples: seed=3, stages.dpo.beta=0.3, stages[0].epochs=2"
        )
    keys = tuple(int(index) if index else word for index, word in _PART.findall(key))
    try:
        return Override(text, keys, read(value, where=where).value)
    except RecipeError as error:
        raise RecipeError(error.what, where=where, remedy=error.remedy) from None


def apply_override(values: dict[str, Value], override: Override) -> KeyPath:
    """Put the override's value into `values`, in place, and return its key path with every name as an index.

    A mapping that is not there yet is made; a list item must exist, by index or, for stages, by name.
    """
    path: KeyPath = ()
    here: Value = values
    for key, following in zip(override.keys, (*override.keys[1:], None), strict=True):
        step = _step(here, key, path, override)
        path = (*path, step)
        last = following is None
        if isinstance(here, list):
            assert isinstance(step, int)
            here[step] = override.value if last else here[step]
            here = here[step]
        elif isinstance(here, dict):
            assert isinstance(step, str)
            if last:
                here[step] = override.value
            elif here.get(step) is None:
                here[step] = {}
            here = here[step]
    return path


def _step(here: Value, key: str | int, path: KeyPath, override: Override) -> str | int:
    place = format_path(path) or "the recipe"
    if isinstance(here, dict):
        if isinstance(key, int):
            raise RecipeError(f"{place} is no list, so it has no item [{key}]", where=override.where)
        return key
    if not isinstance(here, list):
        raise RecipeError(f"{place} is {here!r} and has nothing below it", where=override.where)
    if isinstance(key, int):
        if key >= len(here):
            raise RecipeError(f"{place} has {len(here)} items; [{key}] is not one of them", where=override.where)
        return key
    names = [item.get("name") for item in here if isinstance(item, dict)]
    if key in names:
        return names.index(key)
    known = [str(name) for name in names if name is not None]
    if not known:
        raise RecipeError(f"{place} is a list: name an item by its number, as in {place}[0]", where=override.where)
    raise RecipeError(
        f"{place} has no {key!r}{nearest(key, known) or '; it has ' + ', '.join(known)}", where=override.where
    )
