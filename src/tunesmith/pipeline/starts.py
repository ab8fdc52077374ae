"""Where a stage starts: the stage before, the base, or weights that another run or tool left.

In: the recipe's `start`, the run folder. Out: where the weights lie, and a hash of their files.
Must not know: training.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache
from pathlib import Path

from tunesmith.errors import RecipeError
from tunesmith.model.load import model_folder
from tunesmith.model.policy import Weights
from tunesmith.model.results import read_result, weights_at
from tunesmith.recipe.models import Recipe
from tunesmith.recipe.order import previous_policy
from tunesmith.runs.atomic import sha256_file
from tunesmith.runs.bounded import as_mapping, read_json
from tunesmith.runs.folder import RunFolder

HASHED = ("*.safetensors", "config.json", "adapter_config.json")


def start_weights(recipe: Recipe, index: int, run: RunFolder) -> Weights:
    """The weights that stage number `index` starts from. Raises RecipeError where `start` names nothing usable."""
    stage = recipe.stages[index]
    before = previous_policy(recipe.stages, index)
    if stage.start == "base" or (stage.start == "previous" and before is None):
        return Weights(recipe.model)
    if stage.start == "previous":
        assert before is not None
        return read_result(run, recipe.stages[before].name).weights
    adapter = Path(stage.start)
    if (adapter / "adapter_config.json").is_file():
        _check_base(adapter, recipe)
        return Weights(recipe.model, adapter)
    weights = weights_at(stage.start, chat_template=recipe.model.chat_template, scores=not stage.makes_policy)
    if weights is None:
        raise RecipeError(
            f"{stage.start!r} is no adapter, model or run folder",
            where=f"stages[{index}].start",
            remedy="Say previous, base, a folder with adapter_config.json or config.json, or runs/NAME[:STAGE].",
        )
    return weights


def _check_base(adapter: Path, recipe: Recipe) -> None:
    """An adapter names the base that it was trained on; another base of the same shape would load, and be wrong."""
    try:
        named = as_mapping(read_json(adapter / "adapter_config.json")).get("base_model_name_or_path")
    except (OSError, ValueError) as problem:
        raise RecipeError(f"cannot be read: {problem}", where=str(adapter / "adapter_config.json")) from problem
    base = model_folder(recipe.model)
    if not isinstance(named, str) or named in ("", recipe.model.path) or Path(named).resolve() == base.resolve():
        return
    if Path(named).is_dir() and folder_sha(Path(named)) == folder_sha(base):
        return
    if Path(named).name == base.name or not Path(named).exists():
        return  # the base has moved since, or lies in a hub's cache: its name cannot decide
    raise RecipeError(
        f"the adapter was trained on {named}, the recipe's model is {recipe.model.path}",
        where=str(adapter),
        remedy="Set model.path to the adapter's base.",
    )


def folder_sha(folder: Path) -> str:
    """sha256 over the names and bytes of a folder's weights and configuration."""
    lines = [f"{name}:{sha}\n" for name, sha in file_shas(folder).items()]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def file_shas(folder: Path) -> dict[str, str]:
    """sha256 of each file of a folder's weights and configuration, by name, in the alphabet's order."""
    files = sorted({path for pattern in HASHED for path in folder.glob(pattern)})
    found = {}
    for path in files:
        status = path.stat()
        found[path.name] = _sha_of(path, status.st_ino, status.st_size, status.st_mtime_ns)
    return found


@lru_cache(maxsize=1024)
def _sha_of(path: Path, inode: int, size: int, mtime_ns: int) -> str:
    """A file's hash, taken once while the file stays as it is: a run asks for its base's several times a stage."""
    return sha256_file(path)


def weights_sha_on_disk(weights: Weights) -> str:
    """sha256 over the files of a model and its adapter, and over how they are read."""
    settings = f"{weights.full.dtype}|{weights.full.quantization}"
    adapter = folder_sha(weights.adapter) if weights.adapter is not None else ""
    return hashlib.sha256(f"{folder_sha(model_folder(weights.full))}|{adapter}|{settings}".encode()).hexdigest()
