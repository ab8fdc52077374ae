"""A step that lost a number, computed again on its own: `python -m tunesmith.pipeline.reproduce FOLDER`.

In: the folder that the run wrote, `runs/NAME/stages/STAGE/nonfinite/step-N`, inside its run (or anywhere, with
`--run runs/NAME`). Out: what is lost this time. Must not know: how a number is lost.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from tunesmith.engine.engine import Engine
from tunesmith.errors import RunFolderError, TunesmithError
from tunesmith.model.compiled import compile_layers
from tunesmith.model.kernels import apply_kernels
from tunesmith.model.machine import Machine
from tunesmith.model.policy import policy_for_training
from tunesmith.pipeline.starts import start_weights
from tunesmith.recipe.load import load_recipe
from tunesmith.runs.folder import open_run
from tunesmith.train.nonfinite import Kind
from tunesmith.train.reproducer import Reproducer, open_reproducer, replay


def reproduce(folder: Path, *, run: Path | None = None) -> tuple[Reproducer, Kind | None, str]:
    """What the folder holds, what is lost when its step is computed again (None: nothing), and in which words.

    Raises RunFolderError where the folder or its run cannot be read, and the errors of loading a model.
    """
    found = open_reproducer(folder)
    opened = open_run(run or folder.resolve().parents[3])
    recipe = load_recipe(opened.recipe_path).recipe
    names = [stage.name for stage in recipe.stages]
    if found.stage.name not in names:
        what = f"has no stage {found.stage.name!r}"
        raise RunFolderError(what, where=str(opened.path), remedy="Give the run that the folder is of, with --run.")
    machine = Machine.detect(found.threads)
    weights = start_weights(recipe, names.index(found.stage.name), opened)
    scores = not found.stage.makes_policy
    policy = policy_for_training(weights, found.stage.tuning, device=machine.device, seed=recipe.seed, scores=scores)
    apply_kernels(policy.model, recipe.model.kernels)
    if recipe.model.compile:
        compile_layers(policy.model)
    kind, what = replay(found, Engine(policy.model), machine=machine)
    return found, kind, what


def main(arguments: list[str] | None = None) -> int:
    """The command; 0 where the same kind of number is lost again, 1 where it is not, else the error's code."""
    parser = argparse.ArgumentParser(prog="python -m tunesmith.pipeline.reproduce", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--run", type=Path, help="the run folder, where FOLDER lies elsewhere")
    given = parser.parse_args(arguments)
    try:
        found, kind, what = reproduce(given.folder, run=given.run)
    except TunesmithError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(f"then: {found.kind} of step {found.step} of stage {found.stage.name}: {found.what}")
    print(f"now (torch {torch.__version__}): {kind or 'nothing'} lost: {what}")
    print("reproduced" if kind == found.kind else "not reproduced")
    return 0 if kind == found.kind else 1


if __name__ == "__main__":
    raise SystemExit(main())
