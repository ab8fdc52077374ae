"""From a recipe file, or a mapping in a notebook, to a checked `Recipe` that knows where each value came from.

In: a path and `key=value` overrides. Out: `LoadedRecipe`. Raises RecipeError with every problem at once, each
with file, line, column and key path.
Must not know: torch, models, data, the environment (nothing is interpolated).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from tunesmith.errors import RecipeError
from tunesmith.recipe.fields import as_given, has, leaves
from tunesmith.recipe.models import Recipe
from tunesmith.recipe.overrides import apply_override, parse_override
from tunesmith.recipe.problems import Problem, problems_of
from tunesmith.recipe.resources import find_recipe
from tunesmith.recipe.rules import broken_rules
from tunesmith.recipe.secrets import REMEDY as SECRETS_REMEDY
from tunesmith.recipe.secrets import held_secrets
from tunesmith.recipe.yaml12 import MAX_BYTES, Document, KeyPath, Place, Value, decode, format_path, read


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a value came from. `source` is the file, or what stands for it; `text` the override as given."""

    kind: Literal["recipe", "override", "default"]
    source: str = ""
    line: int | None = None
    column: int | None = None
    text: str = ""

    def where(self) -> str:
        """As errors name it: `recipe.yaml:7:11` or `override seed=3`."""
        if self.kind == "override":
            return f"override {self.text}"
        return f"{self.source}:{self.line}:{self.column}" if self.line is not None else self.source

    def short(self) -> str:
        """As tables and comments name it: `recipe.yaml:7`, `override` or `default`."""
        if self.kind != "recipe":
            return self.kind
        return f"{self.source}:{self.line}" if self.line is not None else self.source


@dataclass(frozen=True, slots=True)
class LoadedRecipe:
    """A checked recipe. `origins` holds one entry for every leaf, keyed as `stages[1].beta`."""

    recipe: Recipe
    origins: Mapping[str, Origin]
    source: str
    source_path: Path | None = None
    overrides: tuple[str, ...] = ()


@dataclass(slots=True)
class _Values:
    """Plain values, and where each key and value stands."""

    values: dict[str, Value]
    source: str
    keys: dict[KeyPath, Origin] = field(default_factory=dict)
    places: dict[KeyPath, Origin] = field(default_factory=dict)

    def origin(self, path: KeyPath, *, at_key: bool = False) -> Origin:
        """The origin of the value at `path`, or of the nearest thing around it."""
        if at_key and path in self.keys:
            return self.keys[path]
        for length in range(len(path), -1, -1):
            if path[:length] in self.places:
                return self.places[path[:length]]
        return Origin("recipe", self.source)

    def override(self, text: str) -> None:
        """Put a `key=value` in; what it replaces is forgotten, and the mappings made for it come from it too."""
        before = copy.deepcopy(self.values)
        path = apply_override(self.values, parse_override(text))
        made = [path[:length] for length in range(1, len(path)) if not has(before, path[:length])]
        for places in (self.keys, self.places):
            for old in [old for old in places if old[: len(path)] == path]:
                del places[old]
            places.update(dict.fromkeys([*made, path], Origin("override", text=text)))


def load_named(name: str, overrides: Sequence[str] = ()) -> LoadedRecipe:
    """Read a recipe file, or the shipped recipe of that name where there is no such file."""
    path = find_recipe(name)
    return load_recipe(path, overrides, source=name if Path(name) == path else path.name)


def load_recipe(path: Path | str, overrides: Sequence[str] = (), *, source: str | None = None) -> LoadedRecipe:
    """Read a recipe file. Raises RecipeError where it cannot be read or is not a right recipe.

    `source` is what messages call the file; its path if not given.
    """
    source = str(path) if source is None else source
    document = read(decode(_bytes(Path(path)), where=source), where=source)
    if document.value is None:
        raise RecipeError(
            "the file is empty", where=source, remedy="`tunesmith recipe list` names recipes to start from."
        )
    if not isinstance(document.value, dict):
        kind = "list" if isinstance(document.value, list) else "scalar"
        where = f"{source}:{document.values[()].line}"
        raise RecipeError(f"the top level must be a mapping of keys to values, not a {kind}", where=where)
    values = _Values(document.value, source, *_origins(document, source))
    return _checked(values, overrides, source_path=Path(path))


def parse_recipe(
    values: Mapping[str, object] | Recipe, overrides: Sequence[str] = (), *, source: str = "recipe"
) -> LoadedRecipe:
    """Check a recipe given as a mapping, with models in it or not, or as a Recipe.

    `source` stands for the file in messages. Raises RecipeError.
    """
    plain = as_given(values)
    return _checked(_Values(plain, source), overrides)  # type: ignore[arg-type]  # pydantic refuses what is no Value


def _checked(values: _Values, overrides: Sequence[str], *, source_path: Path | None = None) -> LoadedRecipe:
    for text in overrides:
        values.override(text)
    if secrets := held_secrets(values.values):
        raise _refusal(secrets, values, remedy=SECRETS_REMEDY)
    try:
        recipe = Recipe.model_validate(values.values)
    except ValidationError as error:
        raise _refusal(problems_of(error, values.values), values) from None
    problems = broken_rules(recipe)
    if problems:
        raise _refusal(problems, values)
    origins = {
        format_path(leaf.path): values.origin(leaf.path) if has(values.values, leaf.path) else Origin("default")
        for leaf in leaves(recipe)
    }
    return LoadedRecipe(recipe, origins, values.source, source_path, tuple(overrides))


def _refusal(problems: list[Problem], values: _Values, *, remedy: str = "") -> RecipeError:
    found = [(values.origin(problem.path, at_key=problem.at_key), problem) for problem in problems]
    found.sort(key=lambda pair: (pair[0].line or 0, pair[0].column or 0))  # overrides first, then as the file reads
    lines = (f"{origin.where()}: {format_path(it.path)}: {it.text}" for origin, it in found)
    return RecipeError("\n".join(lines), remedy=remedy)


def _bytes(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        remedy = "`tunesmith recipe list` names the recipes that come with Tunesmith."
        raise RecipeError("no such file", where=str(path), remedy=remedy) from None
    except IsADirectoryError:
        raise RecipeError("this is a folder, not a recipe file", where=str(path)) from None
    except OSError as error:
        raise RecipeError(f"cannot be read: {error.strerror}", where=str(path)) from None


def _origins(document: Document, source: str) -> tuple[dict[KeyPath, Origin], dict[KeyPath, Origin]]:
    def origins(places: Mapping[KeyPath, Place]) -> dict[KeyPath, Origin]:
        return {path: Origin("recipe", source, place.line, place.column) for path, place in places.items()}

    return origins(document.keys), origins(document.values)
