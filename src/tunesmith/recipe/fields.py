"""Walking the recipe's models: which model stands at a key path, and every leaf of a resolved recipe.

In: recipe models, or the plain values that they will be made from. Out: models, key paths, values, fields.
Must not know: files, lines, where a value came from.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import get_args

from pydantic.fields import FieldInfo

from tunesmith.recipe.models import Recipe, Strict, Unit
from tunesmith.recipe.yaml12 import KeyPath, Value

TAG_KEYS = ("method", "kind")  # the keys that choose between models


@dataclass(frozen=True, slots=True)
class Leaf:
    """One value of a resolved recipe that holds no model: a scalar, a list of scalars, a mapping of words."""

    path: KeyPath
    value: Value
    why: str
    unit: str


def leaves(model: Strict, path: KeyPath = ()) -> Iterator[Leaf]:
    """Every leaf in the order of the models' fields."""
    for name, info in type(model).model_fields.items():
        yield from _leaves_of(model.__dict__[name], (*path, name), info)


def as_given(value: object) -> object:
    """A copy in plain values: models as what they were built from, without defaults save the choosing keys."""
    if isinstance(value, Strict):
        names = [name for name in type(value).model_fields if name in value.model_fields_set or name in TAG_KEYS]
        return {name: as_given(value.__dict__[name]) for name in names}
    if isinstance(value, Mapping):
        return {key: as_given(item) for key, item in value.items()}
    return [as_given(item) for item in value] if isinstance(value, list) else value


def _leaves_of(value: object, path: KeyPath, info: FieldInfo) -> Iterator[Leaf]:
    if isinstance(value, Strict):
        yield from leaves(value, path)
    elif isinstance(value, list) and value and isinstance(value[0], Strict):
        for number, item in enumerate(value):
            yield from leaves(item, (*path, number))
    else:
        assert isinstance(value, None | bool | int | float | str | list | dict)  # the models hold nothing else
        yield Leaf(path, value, " ".join((info.description or "").split()), unit_of(info))


def unit_of(info: FieldInfo) -> str:
    """The unit that the field's type carries, or nothing."""
    for item in (*info.metadata, *_parts(info.annotation)):
        if isinstance(item, Unit):
            return item.name
    return ""


def model_at(values: Value, path: KeyPath) -> type[Strict] | None:
    """The model that reads the mapping at `path`; None where the values do not say which, or nothing reads it."""
    models: list[type[Strict]] = [Recipe]
    for part in path:
        if isinstance(part, str):
            model = _choose(models, values)
            if model is None or part not in model.model_fields:
                return None
            models = models_in(model.model_fields[part].annotation)
        values = child(values, part)
    return _choose(models, values)


def child(values: Value, part: str | int) -> Value:
    """The value under a key or index; None where there is none."""
    if isinstance(values, dict) and isinstance(part, str):
        return values.get(part)
    if isinstance(values, list) and isinstance(part, int) and -len(values) <= part < len(values):
        return values[part]
    return None


def has(values: Value, path: KeyPath) -> bool:
    """Whether the values say anything at `path`."""
    for part in path:
        if isinstance(values, dict):
            if part not in values:
                return False
        elif not (isinstance(values, list) and isinstance(part, int) and part < len(values)):
            return False
        values = child(values, part)
    return True


def models_in(annotation: object) -> list[type[Strict]]:
    """The models that a type is made of, in order."""
    return [part for part in _parts(annotation) if isinstance(part, type) and issubclass(part, Strict)]


def _parts(annotation: object) -> list[object]:
    return [annotation, *(part for arg in get_args(annotation) for part in _parts(arg))]


def _choose(models: list[type[Strict]], values: Value) -> type[Strict] | None:
    if len(models) == 1:
        return models[0]
    for model in models:
        for key in TAG_KEYS:
            if key in model.model_fields and model.model_fields[key].default == _tag(values, key):
                return model
    return None


def _tag(values: Value, key: str) -> Value:
    tag = child(values, key)
    return "lora" if key == "kind" and tag is None and isinstance(values, dict) else tag  # as the models read it
