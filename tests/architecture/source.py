"""The project's Python files, parsed once, for the tests of this folder."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[2]
PACKAGE = PROJECT / "src" / "tunesmith"
CODE_FOLDERS = ("src", "tests", "tools", "examples", "benchmarks")


@dataclass(frozen=True)
class Module:
    """A file and its tree. `package` is the folder under src/tunesmith, or the module's own name at the top."""

    path: Path
    text: str
    tree: ast.Module

    @property
    def name(self) -> str:
        return self.path.relative_to(PROJECT).as_posix()

    @property
    def package(self) -> str:
        parts = self.path.relative_to(PACKAGE).parts
        return parts[0].removesuffix(".py")


@cache
def modules(*folders: str) -> tuple[Module, ...]:
    """Every Python file under the folders, virtual environments and caches apart."""
    found = []
    for folder in folders:
        for path in sorted((PROJECT / folder).rglob("*.py")):
            hidden = any(part.startswith(".") for part in path.relative_to(PROJECT).parts)
            if not hidden and "__pycache__" not in path.parts:
                text = path.read_text(encoding="utf-8")
                found.append(Module(path, text, ast.parse(text)))
    return tuple(found)


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Every function and method, nested ones included."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def imports(module: Module, *, typing_too: bool) -> Iterator[tuple[int, str]]:
    """Line and full name of everything that a module imports, in functions too."""
    skipped: set[int] = set()
    for node in ast.walk(module.tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test) and not typing_too:
            skipped.update(id(inner) for statement in node.body for inner in ast.walk(statement))
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module.name}:{node.lineno}: relative import; the layers read absolute ones"
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)
