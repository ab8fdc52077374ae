"""The public names and their signatures, held against a committed list.

After a wanted change: `python -m tests.architecture.test_public_api` writes the list anew; the commit says why.
"""

from __future__ import annotations

import inspect
from pathlib import Path

import tunesmith

SNAPSHOT = Path(__file__).with_name("public_api.txt")


def public_api() -> str:
    """One line for each public name: its kind and its signature as written."""
    return "".join(f"{_line(name)}\n" for name in sorted(tunesmith.__all__))


def _line(name: str) -> str:
    value: object = getattr(tunesmith, name)
    if inspect.isclass(value):
        return f"class {name}{_signature(value)}"
    return f"def {name}{_signature(value)}" if inspect.isfunction(value) else f"{name}: {type(value).__name__}"


def _signature(value: object) -> str:
    assert callable(value)
    return str(inspect.signature(value))


def test_public_api() -> None:
    assert public_api() == SNAPSHOT.read_text(encoding="utf-8")


def test_every_name_has_a_docstring() -> None:
    values = {name: getattr(tunesmith, name) for name in tunesmith.__all__ if name != "__version__"}
    assert [name for name, value in values.items() if not inspect.getdoc(value)] == []


if __name__ == "__main__":
    SNAPSHOT.write_text(public_api(), encoding="utf-8")
