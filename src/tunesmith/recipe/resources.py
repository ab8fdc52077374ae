"""Files that come inside the package: the quickstart's model and data, and the shipped recipes.

In: `embedded:...` paths, or nothing. Out: paths of real files.
Must not know: what the files hold.
"""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path, PurePosixPath

from tunesmith.errors import RecipeError
from tunesmith.recipe.problems import nearest

PREFIX = "embedded:"


def package_folder() -> Path:
    """The folder of the installed package."""
    folder = files("tunesmith")
    # Without an __init__ (a bare source tree) this is a MultiplexedPath, whose join gives a plain path too.
    return Path(str(folder.joinpath("recipe"))).parent


def embedded(path: str) -> Path | None:
    """`embedded:quickstart/sft.jsonl.gz` as a file in the package; None for any other path.

    Raises RecipeError where the path leaves the folder or nothing is there.
    """
    if not path.startswith(PREFIX):
        return None
    name = path.removeprefix(PREFIX)
    parts = PurePosixPath(name)
    if not name or parts.is_absolute() or ".." in parts.parts or "\\" in name:
        raise RecipeError("an embedded path names a file inside the package, without `..`", where=path)
    folder = package_folder() / "embedded"
    found = folder.joinpath(*parts.parts)
    if not found.exists():
        known = sorted(item.relative_to(folder).as_posix() for item in folder.rglob("*") if item.is_file())
        remedy = "Embedded are: " + ", ".join(known) if known else "This installation holds no embedded files."
        raise RecipeError(f"no such embedded file{nearest(name, known)}", where=path, remedy=remedy)
    return found


def shipped_recipes() -> dict[str, Path]:
    """The recipes that come with the package: name to file, in alphabetical order."""
    return {path.stem: path for path in sorted((package_folder() / "recipe" / "shipped").glob("*.yaml"))}


def find_recipe(name: str) -> Path:
    """The recipe file that `name` means: a file where there is one, else a shipped recipe of that name.

    Raises RecipeError, naming the shipped ones, where it is neither.
    """
    path = Path(name)
    if path.exists():
        return path
    shipped = shipped_recipes()
    if name in shipped:
        return shipped[name]
    remedy = f"Give a recipe file, or one of the shipped recipes: {', '.join(shipped)}."
    raise RecipeError(
        f"no such file, and no shipped recipe of that name{nearest(name, shipped)}", where=name, remedy=remedy
    )
