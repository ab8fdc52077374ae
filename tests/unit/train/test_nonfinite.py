"""F20: where a number was lost is found, written down, and lost again on its own."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.support.lost import BAD_ID, MODULE, Loser, clean_trees, train, with_bad_token
from tests.support.training import (
    MACHINE,
    dpo_stage,
    full_engine,
    lora_engine,
    noisy_references,
    pair_trees,
    sft_stage,
    weights_of,
)
from tunesmith.data.types import Tree
from tunesmith.engine.engine import Engine
from tunesmith.engine.logprobs import Extra, Logprobs
from tunesmith.engine.retry import Budget
from tunesmith.errors import NumericsError, ResourceError, RunFolderError
from tunesmith.objectives import Carried, Objective, dpo, supervised
from tunesmith.runs.records import read_records
from tunesmith.train import reproducer
from tunesmith.train.checkpoint import list_steps, load_checkpoint
from tunesmith.train.nonfinite import Case, Finding, Place, compute_again, examine
from tunesmith.train.optim import trainable_parameters
from tunesmith.train.reproducer import REPORT, TENSORS, open_reproducer, replay, write_reproducer
from tunesmith.train.step import Batch, LostNumberError, accumulate

WHOLE = Budget(10_000)


def case_of(engine: Engine, trees: list[Tree], *, budget: Budget = WHOLE, objective: Objective | None = None) -> Case:
    trainable = trainable_parameters(engine.model)
    references = noisy_references(trees) if objective is not None and objective.needs_reference else None
    return Case(engine, Batch(trees, references), objective or supervised("sft"), budget, MACHINE, "3/sft/1", trainable)


def lost_in(case: Case) -> Finding:
    """What an examination of the case's lost log-probs finds."""
    with pytest.raises(LostNumberError) as caught:
        accumulate(
            case.engine,
            case.batch,
            objective=case.objective,
            forest_tokens=case.budget.forest_tokens,
            tree_tokens=case.budget.tree_tokens,
            machine=MACHINE,
            seed_key=case.seed_key,
        )
    for weight in case.trainable.values():
        weight.grad = None
    return examine(case, "log-prob", caught.value.what, logprob_N=caught.value.logprob_N, trees=caught.value.trees)


def test_the_first_module_and_token_are_found() -> None:
    """Four rows in forests of two; the second row's third token of the answer breaks the first layer."""
    engine = lora_engine(moved=True)
    Loser().watch(engine.model)
    trees = clean_trees(4)
    trees[1] = with_bad_token(trees[1])
    found = lost_in(case_of(engine, trees, budget=Budget(20)))
    assert (found.kind, found.rows, found.module, found.came_back) == ("log-prob", ("tree-1",), MODULE, True)
    assert found.place == Place("tree-1", 0, 2, BAD_ID)
    assert found.cause == "its input and its own weights are finite"
    assert "tree-1" in found.forest_rows
    assert len(found.forest_rows) == 2
    assert f"It began in {MODULE}: its input and its own weights are finite." in str(found)
    assert f"First at token 3 (id {BAD_ID}) of answer 1 of tree-1." in str(found)


@pytest.mark.parametrize("tree_tokens", [None, 12])
def test_the_answer_is_counted_in_the_whole_row(tree_tokens: int | None) -> None:
    """Also where memory was short, and each answer is a forest of its own."""
    engine = lora_engine(moved=True)
    Loser().watch(engine.model)
    trees = clean_trees(2, num_answers=2)
    trees[1] = with_bad_token(trees[1], answer=1, token=4)
    found = lost_in(case_of(engine, trees, budget=Budget(100, tree_tokens), objective=dpo(0.1)))
    assert found.place == Place("tree-1", 1, 4, BAD_ID)
    assert str(found.place) == f"token 5 (id {BAD_ID}) of answer 2 of tree-1"


def test_a_token_of_the_prompt_is_found() -> None:
    engine = lora_engine(moved=True)
    Loser().watch(engine.model)
    (tree,) = clean_trees(1)
    prompt_ids = tree.prompt_ids.copy()
    prompt_ids[1] = BAD_ID
    found = lost_in(case_of(engine, [replace(tree, prompt_ids=prompt_ids)]))
    assert found.place == Place("tree-0", None, 1, BAD_ID)
    assert "token 2 (id 95) of the prompt of tree-0" in str(found)


def test_one_answer_at_a_time_gives_the_first_lost_log_prob() -> None:
    engine = replace(lora_engine(moved=True), backend="plain")
    Loser().watch(engine.model)
    trees = [clean_trees(2)[0], with_bad_token(clean_trees(2)[1])]
    found = lost_in(case_of(engine, trees))
    assert found.module == MODULE
    assert found.place is not None
    assert found.place.row == "tree-1"  # dense attention loses earlier tokens too: 0 times infinity


def test_a_weight_that_is_not_finite_is_named() -> None:
    engine = full_engine()
    with torch.no_grad():
        engine.model.get_parameter("model.layers.0.mlp.down_proj.weight")[2, :3] = math.nan
    found = lost_in(case_of(engine, clean_trees(2)))
    assert found.module == "model.layers.0.mlp.down_proj"
    assert found.cause == "3 numbers of its weight are not finite"
    assert found.rows == ("tree-0", "tree-1")


def test_what_is_lost_between_modules_is_told_from_what_is_lost_in_one() -> None:
    engine = full_engine()
    module = engine.model.get_submodule("model.layers.0.self_attn.o_proj")
    module.register_forward_pre_hook(lambda _, inputs: (inputs[0] * math.inf,))
    found = lost_in(case_of(engine, clean_trees(1)))
    assert found.module == "model.layers.0.self_attn.o_proj"
    assert "comes from no module (attention, or a function between modules)" in found.cause


@dataclass(frozen=True, slots=True, eq=False)
class LostHead(Engine):
    """The last log-prob of every forest is lost, after the model."""

    def logprobs(self, trees: list[Tree], wants: Sequence[Extra] = ()) -> Logprobs:  # type: ignore[override]
        found = Engine.logprobs(self, trees)
        factor_N = torch.ones(len(found.logprob_N))
        factor_N[-1] = math.nan
        return replace(found, logprob_N=found.logprob_N * factor_N)


def test_the_head_is_what_remains() -> None:
    found = lost_in(case_of(LostHead(full_engine().model), clean_trees(2)))
    assert (found.module, found.came_back) == ("", True)
    assert "Every module's output is finite; it began in the head" in str(found)
    assert found.place is not None
    assert (found.place.row, found.place.token) == ("tree-1", 5)


def test_what_does_not_come_back_is_said() -> None:
    engine = lora_engine(moved=True)
    Loser(times=1).watch(engine.model)
    found = lost_in(case_of(engine, [with_bad_token(clean_trees(1)[0])]))
    assert found.came_back is False
    assert "It did not come back in a second pass over the same rows: it comes and goes." in str(found)


def test_an_examination_changes_nothing() -> None:
    """Modes, hooks, gradients, generators."""
    engine = lora_engine(moved=True, dropout=0.2)
    Loser().watch(engine.model)
    for number, module in enumerate(engine.model.modules()):
        module.training = number % 3 == 0
    modes = [module.training for module in engine.model.modules()]
    engine.logprobs(clean_trees(1))  # the engine puts hooks of its own, once
    hooks = [len(module._forward_hooks) for module in engine.model.modules()]
    weights = weights_of(engine)
    torch.manual_seed(5)
    lost_in(case_of(engine, [with_bad_token(clean_trees(1)[0])]))
    drawn = torch.rand(1)
    torch.manual_seed(5)
    assert drawn.equal(torch.rand(1))
    assert [module.training for module in engine.model.modules()] == modes
    assert [len(module._forward_hooks) for module in engine.model.modules()] == hooks
    assert all(parameter.grad is None for parameter in engine.model.parameters())
    assert all(weight.equal(weights[name]) for name, weight in weights_of(engine).items())


def test_the_rows_of_a_reference_that_is_not_finite_are_named() -> None:
    trees = pair_trees(3)
    case = case_of(lora_engine(moved=True), trees, objective=dpo(0.1))
    references = noisy_references(trees)
    references[2][0] = np.nan
    case = replace(case, batch=Batch(trees, references))
    count = sum(len(reference) for reference in references)
    found = examine(case, "loss", "loss nan.", logprob_N=torch.zeros(count))
    assert found.rows == ("tree-2",)
    assert "The reference's log-probs are not finite." in str(found)


def test_the_forest_and_the_tensor_of_a_lost_gradient_are_found() -> None:
    """Forward and loss are finite, the slope at the bad token is not; what lies behind it in the backward is lost."""
    engine = lora_engine(moved=True)
    Loser("backward").watch(engine.model)
    trees = clean_trees(4)
    trees[2] = with_bad_token(trees[2])
    case = case_of(engine, trees, budget=Budget(20))
    kind, what = compute_again(case)
    assert kind == "gradient"
    found = examine(case, "gradient", what, logprob_N=torch.zeros(24))
    assert "tree-2" in found.forest_rows
    assert len(found.forest_rows) == 2
    assert found.came_back is True
    assert "layers.0.self_attn.o_proj.lora_" in found.tensors[0]  # the first that the backward reaches behind the norm
    assert not any("layers.1" in name or "layers.0.mlp" in name for name in found.tensors)


# the folder


def lost_step(tmp_path: Path, place: str) -> tuple[Engine, Path]:
    """A stage of steps of one row, one of which is bad. Returns the engine as it is then, and the folder."""
    engine = lora_engine(moved=True, dropout=0.1)
    Loser("forward" if place == "forward" else "backward").watch(engine.model)
    trees = clean_trees(3)
    trees[0] = with_bad_token(trees[0])
    with pytest.raises(NumericsError) as caught:
        train(engine, trees, tmp_path, batch_size=1, epochs=3, save_every=0)
    step = len(read_records(tmp_path / "metrics.jsonl")) + 1
    folder = tmp_path / "nonfinite" / f"step-{step}"
    assert f"python -m tunesmith.pipeline.reproduce {folder}" in str(caught.value)
    assert caught.value.exit_code == 4
    return engine, folder


@pytest.mark.parametrize("place", ["forward", "backward"])
def test_the_step_is_lost_again_from_its_folder(tmp_path: Path, place: str) -> None:
    """On a fresh model with other adapter weights: everything else is in the folder, dropout included."""
    _, folder = lost_step(tmp_path, place)
    found = open_reproducer(folder)
    fresh = lora_engine(moved=False, dropout=0.1)
    fresh.model.eval()  # the folder says which modules were in train mode
    Loser("forward" if place == "forward" else "backward").watch(fresh.model)
    kind, what = replay(found, fresh, machine=MACHINE)
    assert kind == found.kind == ("log-prob" if place == "forward" else "gradient")
    assert found.what.startswith(what)  # for a gradient: the same loss, digit by digit
    again = replay(found, fresh, machine=MACHINE)
    assert again == (kind, what)


def test_without_what_broke_it_nothing_is_lost(tmp_path: Path) -> None:
    _, folder = lost_step(tmp_path, "forward")
    kind, what = replay(open_reproducer(folder), lora_engine(dropout=0.1), machine=MACHINE)
    assert kind is None
    assert what.startswith("loss ")


def test_the_folder_names_what_was_found(tmp_path: Path) -> None:
    _, folder = lost_step(tmp_path, "forward")
    report = json.loads((folder / REPORT).read_text())
    assert report["found"]["rows"] == ["tree-0"]
    assert report["found"]["module"] == MODULE
    assert report["found"]["place"] == {"row": "tree-0", "answer": 0, "token": 2, "token_id": BAD_ID}
    assert (report["backend"], report["dtype"], report["autocast"]) == ("sdpa", "float32", None)
    assert report["seed_key"] == f"3/sft/{report['step']}"
    assert {path.name for path in folder.iterdir()} == {REPORT, TENSORS}


def test_the_state_before_the_lost_step_is_saved(tmp_path: Path) -> None:
    """F20: weights equal step k - 1, on disk too, though no save was due; the same command goes on from there."""
    engine, folder = lost_step(tmp_path, "forward")
    step = int(folder.name.removeprefix("step-"))
    assert step > 1, "the bad row must not be the first"
    assert list_steps(tmp_path / "checkpoints") == [step - 1]
    saved = load_checkpoint(tmp_path / "checkpoints" / f"step-{step - 1}").weights
    assert all(weight.equal(saved[name]) for name, weight in weights_of(engine).items())
    kept = open_reproducer(folder).weights
    assert kept is not None
    assert all(weight.equal(kept[name]) for name, weight in weights_of(engine).items())


def test_a_disk_without_room_keeps_the_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reproducer, "free_bytes", lambda path: 1 << 20)
    case = case_of(lora_engine(), clean_trees(2))
    path, has_weights = write_reproducer(tmp_path, case, Finding("loss", "gone"), stage=sft_stage(), step=7)
    assert not has_weights
    found = open_reproducer(path)
    assert found.weights is None
    assert [tree.sha() for tree in found.batch.trees] == [tree.sha() for tree in clean_trees(2)]


def test_what_a_killed_write_left_is_removed(tmp_path: Path) -> None:
    (tmp_path / "nonfinite/.tmp-step-3-1").mkdir(parents=True)
    case = case_of(lora_engine(), clean_trees(2))
    write_reproducer(tmp_path, case, Finding("loss", "gone"), stage=sft_stage(), step=7)
    assert [path.name for path in (tmp_path / "nonfinite").iterdir()] == ["step-7"]


def test_a_disk_that_fails_hides_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ResourceError("the disk failed")

    monkeypatch.setattr("tunesmith.train.gradient.write_reproducer", fail)
    engine = lora_engine(moved=True)
    Loser().watch(engine.model)
    with pytest.raises(NumericsError, match=r"log-probs that are not finite in tree-0(.|\n)*No reproducer could be"):
        train(engine, [with_bad_token(clean_trees(1)[0])], tmp_path)


@pytest.mark.parametrize("damage", ["missing", "nonsense", "other", "torn"])
def test_a_folder_that_is_none_is_an_error(tmp_path: Path, damage: str) -> None:
    case = case_of(lora_engine(), clean_trees(2))
    path, _ = write_reproducer(tmp_path, case, Finding("loss", "gone"), stage=sft_stage(), step=7)
    if damage == "missing":
        (path / TENSORS).unlink()
    if damage == "torn":
        (path / TENSORS).write_bytes((path / TENSORS).read_bytes()[:100])
    if damage in ("nonsense", "other"):
        (path / REPORT).write_text("[]" if damage == "nonsense" else '{"kind": "tunesmith-run", "layout": 1}')
    with pytest.raises(RunFolderError, match="is no folder of a step that lost a number"):
        open_reproducer(path)


def test_pairs_with_references_come_back_whole(tmp_path: Path) -> None:
    trees = pair_trees(3)
    case = case_of(lora_engine(), trees, objective=dpo(0.1))
    path, _ = write_reproducer(tmp_path, case, Finding("loss", "gone"), stage=dpo_stage(), step=1)
    found = open_reproducer(path).batch
    assert [tree.sha() for tree in found.trees] == [tree.sha() for tree in trees]
    assert found.references is not None
    assert case.batch.references is not None
    assert all(np.array_equal(*pair) for pair in zip(found.references, case.batch.references, strict=True))


def test_what_rows_say_of_themselves_and_what_a_method_carries_come_back(tmp_path: Path) -> None:
    first, second = pair_trees(2)
    answer = first.branches[0]
    weights = np.linspace(0.25, 1, len(answer.ids), dtype=np.float32)
    weighted = replace(first, branches=(replace(answer, weights=weights), first.branches[1]))
    trees = [replace(weighted, scores=(2.0, 0.5), weight=3.0), replace(second, label=False)]
    case = case_of(lora_engine(), trees, objective=dpo(0.1))
    carried = Carried({"shift": 0.25})
    path, _ = write_reproducer(tmp_path, case, Finding("loss", "gone"), stage=dpo_stage(), step=1, carried=carried)
    found = open_reproducer(path)
    assert [tree.sha() for tree in found.batch.trees] == [tree.sha() for tree in trees]
    assert found.batch.trees[1].label is False
    assert found.carried.numbers == carried.numbers


def test_folders_of_earlier_releases_are_read(tmp_path: Path) -> None:
    trees = pair_trees(2)
    path, _ = write_reproducer(
        tmp_path, case_of(lora_engine(), trees, objective=dpo(0.1)), Finding("loss", "gone"), stage=dpo_stage(), step=1
    )
    report = json.loads((path / REPORT).read_text())
    del report["carried"]
    report["rows"] = [{"row": row["row"], "num_answers": row["num_answers"]} for row in report["rows"]]
    (path / REPORT).write_text(json.dumps(report))
    assert [tree.sha() for tree in open_reproducer(path).batch.trees] == [tree.sha() for tree in trees]
