"""A step that lost a number, in a folder of its own, and the same step again out of it.

In: a stage's session and what was found; later the folder, and an engine on the same base. Out: `nonfinite/step-N/`
with `report.json` and `tensors.safetensors`; the step, computed anew. Must not know: where a base model lies.

The folder holds all rows of the step in tokens (with masks, reference, and what the rows say of themselves), the
trained weights before the step, the numbers that the method carries, the seed key, the budget, kernel and types. What
it does not hold are the frozen weights, which are the stage's start.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from json import loads
from pathlib import Path

import numpy as np
import torch
from pydantic import TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as pydantic_dataclass
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tunesmith.data.types import Branch, Tree
from tunesmith.engine.engine import Backend, Engine
from tunesmith.engine.retry import Budget
from tunesmith.errors import ResumeError, RunFolderError
from tunesmith.model.machine import Machine
from tunesmith.objectives import Carried, objective_of
from tunesmith.recipe.models import Stage
from tunesmith.runs.atomic import publish_folder, remove_temporaries, write_json
from tunesmith.runs.disk import free_bytes
from tunesmith.train.identity import StageRecipe
from tunesmith.train.noise import noisy
from tunesmith.train.nonfinite import Case, Finding, Kind, compute_again
from tunesmith.train.optim import trainable_parameters
from tunesmith.train.step import Batch
from tunesmith.version import VERSION

FOLDER, REPORT, TENSORS = "nonfinite", "report.json", "tensors.safetensors"
KIND, LAYOUT = "tunesmith-nonfinite", 1
_SPARE_BYTES = 1 << 20

NOTHING = Carried()

Backends: TypeAdapter[Backend] = TypeAdapter(Backend)
Kinds: TypeAdapter[Kind] = TypeAdapter(Kind)
Stages: TypeAdapter[Stage] = TypeAdapter(Stage)


@pydantic_dataclass(frozen=True, slots=True)
class Row:
    """A row without its tokens; folders of the first releases name only the first two."""

    row: str
    num_answers: int
    scores: tuple[float, ...] = ()
    label: bool | None = None
    weight: float = 1.0


@dataclass(frozen=True, slots=True, eq=False)
class Reproducer:
    """A folder that was read. weights: the trained ones before the step; None where the disk had no room for them.

    training: names of the modules that were in train mode. autocast: the type of the products, None for the weights'.
    carried: the numbers that the method had from earlier steps.
    """

    path: Path
    stage: StageRecipe
    step: int
    kind: Kind
    what: str
    batch: Batch
    weights: Mapping[str, Tensor] | None
    seed_key: str
    budget: Budget
    world_size: int
    backend: Backend
    autocast: torch.dtype | None
    skip: bool
    chunk_bytes: int | None
    training: frozenset[str]
    threads: int
    carried: Carried


def write_reproducer(
    folder: Path, case: Case, finding: Finding, *, stage: StageRecipe, step: int, carried: Carried = NOTHING
) -> tuple[Path, bool]:
    """Write the folder of a step under `folder`; returns where, and whether the trained weights had room.

    Of what the method carries the numbers are kept; a live reference is in the rows already, by its log-probs.
    """
    target = folder / FOLDER / f"step-{step}"
    tensors = _row_tensors(case.batch)
    weights = {f"weight.{name}": weight.detach() for name, weight in case.trainable.items()}
    need = _SPARE_BYTES + sum(each.numel() * each.element_size() for each in (*tensors.values(), *weights.values()))
    has_weights = 2 * need < free_bytes(folder)  # the next checkpoint needs room too
    engine = case.engine
    report: dict[str, object] = {
        "kind": KIND,
        "layout": LAYOUT,
        "tunesmith": VERSION,
        "torch": torch.__version__,
        "device": str(case.machine.device),
        "threads": case.machine.threads,
        "stage": stage.model_dump(mode="json"),
        "step": step,
        "seed_key": case.seed_key,
        "forest_tokens": case.budget.forest_tokens,
        "tree_tokens": case.budget.tree_tokens,
        "world_size": case.machine.world_size,
        "backend": engine.backend,
        "dtype": _name(engine.model.dtype),
        "autocast": None if engine.autocast is None else _name(engine.autocast),
        "skip": engine.skip,
        "chunk_bytes": engine.chunk_bytes,
        "training": [name for name, module in engine.model.named_modules() if module.training],
        "has_weights": has_weights,
        "found": asdict(finding),
        "carried": dict(carried.numbers),
        "rows": [_described(tree) for tree in case.batch.trees],
    }
    remove_temporaries(target.parent)
    with publish_folder(target) as temporary:
        content = tensors | (weights if has_weights else {})
        save_file({name: tensor.contiguous() for name, tensor in content.items()}, temporary / TENSORS)
        write_json(temporary / REPORT, report)
    return target, has_weights


def _described(tree: Tree) -> dict[str, object]:
    """What a row is besides its tokens."""
    return {
        "row": tree.id,
        "num_answers": len(tree.branches),
        "scores": list(tree.scores),
        "label": tree.label,
        "weight": tree.weight,
    }


def _row_tensors(batch: Batch) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for number, tree in enumerate(batch.trees):
        tensors[f"row.{number}.prompt_ids"] = _copied(tree.prompt_ids, np.int32)
        for answer, branch in enumerate(tree.branches):
            tensors[f"row.{number}.answer.{answer}.ids"] = _copied(branch.ids, np.int32)
            tensors[f"row.{number}.answer.{answer}.trained"] = _copied(branch.trained, np.bool_)
            if branch.weights is not None:
                tensors[f"row.{number}.answer.{answer}.weights"] = _copied(branch.weights, np.float32)
        if batch.references is not None:
            tensors[f"row.{number}.reference"] = _copied(batch.references[number], np.float32)
    return tensors


def _copied(array: np.ndarray, dtype: type[np.generic]) -> Tensor:
    """The rows may be memory-mapped, and read-only."""
    return torch.from_numpy(np.array(array, dtype=dtype))


def open_reproducer(path: Path) -> Reproducer:
    """Read a folder that `write_reproducer` made. Raises RunFolderError, naming the file, where it is none."""
    try:
        report = loads((path / REPORT).read_text("utf-8"))
        if (report["kind"], report["layout"]) != (KIND, LAYOUT):
            raise ValueError("it is not of this version")
        tensors = load_file(path / TENSORS)
        trees = [_tree(tensors, number, Row(**row)) for number, row in enumerate(report["rows"])]
        references = [tensors[f"row.{number}.reference"].numpy() for number in range(len(trees)) if _has(tensors)]
        prefix = "weight."
        weights = {name.removeprefix(prefix): each for name, each in tensors.items() if name.startswith(prefix)}
        tree_tokens = report["tree_tokens"]
        return Reproducer(
            path=path,
            stage=Stages.validate_python(report["stage"]),
            step=int(report["step"]),
            kind=Kinds.validate_python(report["found"]["kind"]),
            what=str(report["found"]["what"]),
            batch=Batch(trees, references or None),
            weights=weights or None,
            seed_key=str(report["seed_key"]),
            budget=Budget(int(report["forest_tokens"]), None if tree_tokens is None else int(tree_tokens)),
            world_size=int(report["world_size"]),
            backend=Backends.validate_python(report["backend"]),
            autocast=_dtype(report["autocast"]),
            skip=bool(report["skip"]),
            chunk_bytes=None if report["chunk_bytes"] is None else int(report["chunk_bytes"]),
            training=frozenset(str(name) for name in report["training"]),
            threads=int(report["threads"]),
            carried=Carried({str(name): float(number) for name, number in report.get("carried", {}).items()}),
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError, ValidationError) as error:
        what = f"is no folder of a step that lost a number: {type(error).__name__}: {error}"
        remedy = "Give a folder such as runs/NAME/stages/STAGE/nonfinite/step-7."
        raise RunFolderError(what, where=str(path), remedy=remedy) from error


def _has(tensors: Mapping[str, Tensor]) -> bool:
    return "row.0.reference" in tensors


def _tree(tensors: Mapping[str, Tensor], number: int, row: Row) -> Tree:
    branches = []
    for answer in range(row.num_answers):
        start = f"row.{number}.answer.{answer}."
        weights = tensors[start + "weights"].numpy() if start + "weights" in tensors else None
        branches.append(Branch(tensors[start + "ids"].numpy(), tensors[start + "trained"].numpy(), weights))
    prompt_ids = tensors[f"row.{number}.prompt_ids"].numpy()
    return Tree(row.row, prompt_ids, tuple(branches), row.scores, row.label, row.weight)


def replay(found: Reproducer, engine: Engine, *, machine: Machine) -> tuple[Kind | None, str]:
    """The step anew, on a model that holds the stage's start: what is lost (None: nothing), and in which words.

    The engine is made as it was; the trained weights and the modules' modes are put in place, and stay so. Raises
    ResumeError where the model's trained tensors are others.
    """
    trainable = trainable_parameters(engine.model)
    _put_weights(found, trainable)
    for name, module in engine.model.named_modules():
        module.training = name in found.training
    engine = replace(
        engine, backend=found.backend, autocast=found.autocast, skip=found.skip, chunk_bytes=found.chunk_bytes
    )
    engine = noisy(engine, found.stage, key=found.seed_key)
    objective = objective_of(found.stage)
    objective = objective.bound(found.carried) if found.carried.numbers else objective
    case = Case(engine, found.batch, objective, found.budget, machine, found.seed_key, trainable)
    return compute_again(case)


def _put_weights(found: Reproducer, trainable: Mapping[str, nn.Parameter]) -> None:
    if found.weights is None:
        return
    misfits = [
        name
        for name, weight in trainable.items()
        if name not in found.weights or found.weights[name].shape != weight.shape
    ]
    if misfits or len(found.weights) != len(trainable):
        what = (
            f"{TENSORS} does not hold exactly the trained tensors; the first misfit is {[*misfits, 'an extra one'][0]}."
        )
        raise ResumeError(what, where=str(found.path), remedy="Give the base model that the stage started from.")
    with torch.no_grad():
        for name, weight in trainable.items():
            weight.copy_(found.weights[name])


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _dtype(name: object) -> torch.dtype | None:
    dtypes = {_name(dtype): dtype for dtype in (torch.float32, torch.bfloat16, torch.float16)}
    return None if name is None else dtypes[str(name)]
