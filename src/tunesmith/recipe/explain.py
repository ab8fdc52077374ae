"""Every resolved value of a recipe, with its unit, where it came from and why it is there.

In: a loaded recipe. Out: table rows, or the YAML text that a run folder keeps.
Must not know: terminals, run folders.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass

from tunesmith.recipe.fields import leaves
from tunesmith.recipe.load import LoadedRecipe, Origin
from tunesmith.recipe.models import Strict
from tunesmith.recipe.yaml12 import KeyPath, Value, format_path, scalar

_PLAIN = re.compile(r"[A-Za-z0-9_./][A-Za-z0-9_./+-]*\Z")  # words that need no quotes, if they do not read as numbers


@dataclass(frozen=True, slots=True)
class Explained:
    """One row: `value` as the recipe writes it, `origin` as `recipe.yaml:7`, an override or `default`."""

    path: str
    value: str
    unit: str
    origin: str
    why: str


def explain(loaded: LoadedRecipe) -> list[Explained]:
    """One row for every leaf, in the order of the models."""
    rows = []
    for leaf in leaves(loaded.recipe):
        path = format_path(leaf.path)
        rows.append(Explained(path, write_value(leaf.value), leaf.unit, _origin(loaded.origins[path]), leaf.why))
    return rows


def dump_resolved(loaded: LoadedRecipe) -> str:
    """The recipe with every value written out and, behind it, where it came from. It loads to an equal recipe."""
    return "\n".join(_mapping(loaded.recipe, (), loaded)) + "\n"


def write_value(value: Value) -> str:
    """A leaf in YAML, on one line, quoted only where it would read as something else."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return value if _PLAIN.match(value) and isinstance(scalar(value), str) else _quoted(value)
    if isinstance(value, list):
        return f"[{', '.join(write_value(item) for item in value)}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{write_value(key)}: {write_value(item)}' for key, item in value.items())}}}"
    return repr(value)


def _quoted(text: str) -> str:
    """A double-quoted scalar: JSON's escapes are YAML's, save for pairs of surrogates."""
    quoted = json.dumps(text, ensure_ascii=False)
    return "".join(char if char.isprintable() else _escape(ord(char)) for char in quoted)


def _escape(code: int) -> str:
    if code <= 0xFF:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code <= 0xFFFF else f"\\U{code:08x}"


def _origin(origin: Origin) -> str:
    return origin.where() if origin.kind == "override" else origin.short()


def _mapping(model: Strict, path: KeyPath, loaded: LoadedRecipe) -> list[str]:
    lines: list[str] = []
    for name in type(model).model_fields:
        value: object = model.__dict__[name]
        here = (*path, name)
        if isinstance(value, Strict):
            lines += [f"{name}:", *_indented(_mapping(value, here, loaded))]
        elif isinstance(value, list) and value and isinstance(value[0], Strict):
            lines.append(f"{name}:")
            for number, item in enumerate(value):
                first, *rest = _mapping(item, (*here, number), loaded)
                lines += _indented([f"- {first}", *_indented(rest)])
        else:
            assert isinstance(value, None | bool | int | float | str | list | dict)
            origin = loaded.origins[format_path(here)].short()
            comment = "".join(char if char.isprintable() else "?" for char in origin)  # a file name may hold a newline
            lines.append(f"{name}: {write_value(value)}  # {comment}")
    return lines


def _indented(lines: list[str]) -> list[str]:
    return [f"  {line}" for line in lines]
