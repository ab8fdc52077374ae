"""Whether the disk has room for a run: known from shapes before anything is trained.

In: a recipe, its run folder, the device. Out: nothing; or ResourceError (5) with the bytes of every stage.
Must not know: how anything is saved. Each save asks the disk again for itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from tunesmith.errors import ResourceError
from tunesmith.model.load import forward_dtype
from tunesmith.model.machine import Machine
from tunesmith.model.shapes import WeightBytes, shapes_for_training
from tunesmith.pipeline.memory_stages import disk_bytes
from tunesmith.recipe.models import Recipe, Stage
from tunesmith.runs.disk import free_bytes
from tunesmith.runs.folder import RunFolder


def refuse_small_disk(recipe: Recipe, machine: Machine) -> None:
    """Refuse a run whose checkpoints and results, of all stages that are not finished, do not fit on its disk."""
    run = RunFolder(Path(recipe.runs_folder) / recipe.name)
    needs: dict[str, int] = {}
    for stage in recipe.stages:
        if not run.stage(stage.name).result_path.is_file():
            dtype = forward_dtype(recipe.model, machine.device)
            weights = shapes_for_training(
                recipe.model, stage.tuning, dtype=dtype, scores=not stage.makes_policy
            ).weights
            needs[stage.name] = stage_need_bytes(stage, weights, run)
    refuse_needs(needs, run.path)


def stage_need_bytes(stage: Stage, weights: WeightBytes, run: RunFolder) -> int:
    """Bytes that the stage will still write and keep; what lies in its folder already is room that it has."""
    return max(0, disk_bytes(stage, weights) - _bytes_in(run.stage(stage.name).path))


def refuse_needs(needs: Mapping[str, int], folder: Path) -> None:
    """Raise ResourceError where the disk of `folder` has less free than all stages need together."""
    need, free = sum(needs.values()), free_bytes(folder)
    if need <= free:
        return
    stages = ", ".join(f"{name} {bytes_:,}" for name, bytes_ in needs.items())
    raise ResourceError(
        f"checkpoints and results need {need:,} bytes (stage {stages}), and {free:,} are free.",
        where=str(folder),
        remedy="Free some disk, lower `keep_checkpoints`, or set `runs_folder` to another disk.",
    )


def _bytes_in(folder: Path) -> int:
    if not folder.is_dir():
        return 0
    return sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
