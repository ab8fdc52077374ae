"""A recipe's path to files: one file, a folder, or a pattern.

In: the path as the recipe has it. Out: the files with the names a person knows them by, and what was passed over;
or DataError. Must not know: what the files hold, data sets.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from tunesmith.data.sources.readers import READERS
from tunesmith.errors import DataError
from tunesmith.recipe.resources import embedded

DOCUMENTS = (".txt", ".md")
SUFFIXES = (*READERS, *DOCUMENTS)
ARCHIVES = (".zip", ".tar", ".tgz", ".tar.gz", ".tar.zst", ".tar.bz2", ".tar.xz", ".tbz2", ".txz", ".7z", ".rar")
# About the data, not of it: they lie beside the rows of most data sets.
ABOUT = ("readme", "license", "licence", "notice", "changelog", "citation")
NamedFile = tuple[str, Path]
_MAX_SHOWN = 5


@dataclass(frozen=True, slots=True)
class Found:
    """Files in reading order; `relative` are their names without the place where they lie."""

    files: tuple[NamedFile, ...]
    relative: tuple[str, ...]
    notes: tuple[str, ...] = ()


def resolve(path: str) -> Path:
    """The file that a recipe's path names. Raises DataError where there is none."""
    file = locate(path)
    if file is None:
        raise no_such_file(path)
    if file.is_dir():
        raise DataError("this is a folder, not a file", where=path, remedy=f"Name one file in it: {_supported()}.")
    return file


def locate(path: str) -> Path | None:
    """The file or folder that lies at a recipe's path; None where nothing does."""
    try:
        place = embedded(path) or (Path(path).expanduser() if path.startswith("~") else Path(path))
        return place if place.exists() else None
    except (OSError, ValueError, RuntimeError) as error:  # a NUL, a name of 300 bytes, the home of nobody
        raise DataError(f"not a path that this system can open: {error}", where=repr(path)) from error


def no_such_file(path: str, *, hint: str = "") -> DataError:
    """The refusal of a path where nothing lies."""
    return DataError(
        "no such file", where=path, remedy=f"Paths are relative to the working directory, {Path.cwd()}.{hint}"
    )


def suffix_of(name: str) -> str:
    """The supported suffix of a file name; "" for any other."""
    lower = name.lower()
    return max((suffix for suffix in SUFFIXES if lower.endswith(suffix)), key=len, default="")


def is_pattern(path: str) -> bool:
    """Whether a path that names no file is a pattern of files."""
    return glob.has_magic(path)


def find_file(path: str, place: Path) -> Found:
    """One file. Raises DataError for archives, unknown suffixes and what is no regular file."""
    if place.name.lower().endswith(ARCHIVES):
        raise DataError(
            "archives are not read: their members can overwrite files and fill the disk",
            where=path,
            remedy="Unpack it with a tool of your choice and name the folder.",
        )
    suffix = suffix_of(place.name)
    if not suffix:
        raise DataError("unsupported kind of file", where=path, remedy=f"Supported: {_supported()}.")
    if not place.is_file():
        raise DataError("this is not a regular file", where=path, remedy="Copy its content to a file.")
    return Found(((path, place),), (suffix,))


def find_in_folder(path: str, folder: Path) -> Found:
    """The supported files of a folder, sorted by name; folders within it are passed over."""
    base = path.rstrip("/")
    try:
        entries = sorted(folder.iterdir(), key=lambda entry: entry.name)
    except OSError as error:
        raise DataError(f"the folder cannot be read: {error.strerror or error}", where=path) from error
    named = [(f"{base}/{entry.name}", entry) for entry in entries]
    return _usable(path, named, folder)


def find_by_pattern(path: str) -> Found:
    """The supported files that a pattern matches, sorted by path; `**` matches folders within folders."""
    pattern = os.path.expanduser(path) if path.startswith("~") else path  # noqa: PTH111 - a pattern is no path
    matches = sorted(set(glob.glob(pattern, recursive=True)))  # noqa: PTH207 - keeps the pattern's own spelling
    if not matches:
        raise DataError("no file matches this pattern", where=path, remedy=f"It is read from {Path.cwd()}.")
    return _usable(path, [(match, Path(match)) for match in matches], _fixed_part(pattern))


def _fixed_part(pattern: str) -> Path:
    """The folder above the first wildcard."""
    fixed = []
    for part in Path(pattern).parts[:-1]:
        if glob.has_magic(part):
            break
        fixed.append(part)
    return Path(*fixed)


def _usable(path: str, named: Iterable[NamedFile], base: Path) -> Found:
    files: list[NamedFile] = []
    passed: dict[str, list[str]] = {}
    for name, place in named:
        if reason := _passed_over(place):
            passed.setdefault(reason, []).append(place.name)
            continue
        _refuse_outside(name, place, base)
        files.append((name, place))
    notes = tuple(f"not read, {reason}: {_shown(names)}." for reason, names in sorted(passed.items()))
    if not files:
        raise DataError(
            "no file here can be read", where=path, remedy="\n  ".join([f"Supported: {_supported()}.", *notes])
        )
    return Found(tuple(files), tuple(_relative(place, base) for _, place in files), notes)


def _passed_over(place: Path) -> str:
    """Why an entry of a folder is not read; "" where it is."""
    lower = place.name.lower()
    if lower.startswith("."):
        return "hidden"
    if place.is_dir():
        return "a folder"
    if lower.endswith(ARCHIVES):
        return "an archive (unpack it first)"
    suffix = suffix_of(lower)
    if not suffix:
        return "unsupported kind of file"
    if suffix in DOCUMENTS and lower.removesuffix(suffix).startswith(ABOUT):
        return "about the data"
    return "" if place.is_file() else "not a regular file"


def _refuse_outside(name: str, place: Path, base: Path) -> None:
    if not place.resolve().is_relative_to(base.resolve()):
        raise DataError(
            f"a link that leads out of the folder, to {place.resolve()}",
            where=name,
            remedy="Name that file itself in the recipe, or copy it into the folder.",
        )


def _relative(place: Path, base: Path) -> str:
    return PurePosixPath(os.path.relpath(place, base)).as_posix()


def _shown(names: list[str]) -> str:
    more = f" and {len(names) - _MAX_SHOWN} more" if len(names) > _MAX_SHOWN else ""
    return ", ".join(names[:_MAX_SHOWN]) + more


def _supported() -> str:
    return ", ".join(SUFFIXES)
