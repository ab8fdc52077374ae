"""A method with a state of its own: moved on exactly, kept, and never replaced by a fresh one (R1, R3)."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.support.training import MACHINE, Trial, lora_engine, pair_trees, references_of, sft_stage
from tests.support.training import dpo_stage as make_dpo_stage
from tunesmith.engine.logprobs import Logprobs
from tunesmith.errors import NumericsError, ResumeError
from tunesmith.objectives import Carried, Carrying, Objective, Result, Sum
from tunesmith.recipe.models import Lora
from tunesmith.runs.folder import StageFolder
from tunesmith.runs.records import Value, read_records
from tunesmith.train.checkpoint import OBJECTIVE, OPTIMIZER, STATE, WEIGHTS, load_checkpoint
from tunesmith.train.loop import train_stage
from tunesmith.train.progress import Silent

DECAY = 0.75
FILES = ("metrics.jsonl", *(f"checkpoints/step-6/{name}" for name in (WEIGHTS, OPTIMIZER, STATE, OBJECTIVE)))


def shifted(carried: Carried) -> Callable[[Logprobs], Result]:
    """A made-up method of BCO's kind: rewards are judged against the mean reward so far, kept from step to step."""
    shift = carried.numbers["shift"]

    def function(logprobs: Logprobs) -> Result:
        assert logprobs.reference_N is not None
        reward_B = logprobs.per_branch() - logprobs.per_branch(logprobs.reference_N)
        sign_B = torch.tensor([1.0, -1.0]).repeat(len(reward_B) // 2).to(reward_B)
        loss = torch.nn.functional.softplus(-sign_B * (reward_B - shift)).view(-1, 2).sum()
        pairs = len(reward_B) / 2
        metrics = {"reward": Sum(reward_B.detach().sum(), float(len(reward_B))), "shift": Sum(torch.tensor(shift), 1.0)}
        return Result(Sum(loss, pairs), metrics)

    return function


def start(weights: Mapping[str, Tensor]) -> Carried:
    moving = {name: weight.detach().clone() for name, weight in weights.items() if "lora_B" in name}
    return Carried({"shift": 0.0}, moving)


def advance(before: Carried, result: Result, weights: Mapping[str, Tensor]) -> Carried:
    shift = DECAY * before.numbers["shift"] + (1 - DECAY) * result.metrics["reward"].mean()
    moving = {name: tensor.lerp(weights[name], 1 - DECAY) for name, tensor in before.tensors.items()}
    return Carried({"shift": shift}, moving)


CARRYING = Carrying(start, shifted, advance)
METHOD = Objective(
    "shifted",
    shifted(Carried({"shift": 0.0})),
    lambda tree: 1,
    num_answers=2,
    needs_reference=True,
    carrying=CARRYING,
)


class Break(Silent):
    """Breaks off after a step."""

    def __init__(self, step: int) -> None:
        self._step = step

    def stepped(self, record: Mapping[str, Value], timing: Mapping[str, Value]) -> None:
        if record["step"] == self._step:
            raise ConnectionAbortedError


@dataclass(frozen=True)
class Stateful:
    """Six steps of the method in a folder."""

    folder: Path
    method: Objective = METHOD
    separable: bool = True

    def run(self, break_after: int = 0) -> None:
        engine = lora_engine(dropout=0.1, moved=True)
        trees = pair_trees(11)
        stage = make_dpo_stage(tuning=Lora(r=4, dropout=0.1), epochs=2, save_every=2, keep_checkpoints=3)
        train_stage(
            engine=engine,
            stage=stage,
            objective=replace(self.method, separable=self.separable),
            train=trees,
            references=(references_of(engine, trees), []),
            folder=StageFolder(self.folder),
            seed=3,
            machine=MACHINE,
            observer=Break(break_after),
        )


@pytest.mark.parametrize("separable", [True, False])
def test_it_goes_on_bit_by_bit(tmp_path: Path, separable: bool) -> None:
    whole, broken = Stateful(tmp_path / "whole", separable=separable), Stateful(tmp_path / "b", separable=separable)
    whole.run()
    for step in (1, 3, 5):  # before the first save; in the middle of an epoch; in the next one
        with pytest.raises(ConnectionAbortedError):
            broken.run(step)
    broken.run()
    for name in FILES:
        assert (whole.folder / name).read_bytes() == (broken.folder / name).read_bytes(), name


def test_what_it_carries_is_what_its_records_say(tmp_path: Path) -> None:
    stateful = Stateful(tmp_path)
    stateful.run()
    records = read_records(tmp_path / "metrics.jsonl")
    shift = 0.0
    for record in records:
        assert record["shift"] == pytest.approx(shift, abs=1e-7)  # a step sees what the steps before it left
        reward = record["reward"]
        assert isinstance(reward, float)
        shift = DECAY * shift + (1 - DECAY) * reward
    saved = load_checkpoint(tmp_path / "checkpoints" / "step-6")
    assert saved.state.carried["shift"] == pytest.approx(shift, abs=1e-12)
    assert shift != 0
    begun = start({name: p for name, p in lora_engine(moved=True).model.named_parameters() if p.requires_grad})
    for name, tensor in saved.state.tensors.items():
        assert not tensor.equal(begun.tensors[name])
        assert not tensor.equal(saved.weights[name])


def without_number(carried: Carried) -> Carried:
    return Carried({}, carried.tensors)


def with_another_name(carried: Carried) -> Carried:
    return Carried({"other": 0.0}, carried.tensors)


def without_tensors(carried: Carried) -> Carried:
    return Carried(carried.numbers)


def with_another_shape(carried: Carried) -> Carried:
    return Carried(carried.numbers, {name: tensor[:-1].clone() for name, tensor in carried.tensors.items()})


@pytest.mark.parametrize("change", [without_number, with_another_name, without_tensors, with_another_shape])
def test_a_checkpoint_without_exactly_it_is_refused(tmp_path: Path, change: Callable[[Carried], Carried]) -> None:
    with pytest.raises(ConnectionAbortedError):
        Stateful(tmp_path).run(3)
    other = replace(METHOD, carrying=replace(CARRYING, start=lambda weights: change(start(weights))))
    with pytest.raises(ResumeError, match=rf"{STATE}|{OBJECTIVE}") as caught:
        Stateful(tmp_path, other).run()
    assert caught.value.exit_code == 3


def test_a_number_that_is_none_stops_the_stage(tmp_path: Path) -> None:
    def lost(before: Carried, result: Result, weights: Mapping[str, Tensor]) -> Carried:
        return Carried({"shift": float("nan")}, before.tensors)

    with pytest.raises(NumericsError, match="carries as shift is nan"):
        Stateful(tmp_path, replace(METHOD, carrying=replace(CARRYING, advance=lost))).run()


def test_methods_that_carry_nothing_keep_no_file_for_it(tmp_path: Path) -> None:
    Trial(tmp_path, sft_stage(max_steps=1, save_every=1)).run()
    path = tmp_path / "checkpoints" / "step-1"
    assert not (path / OBJECTIVE).exists()
    assert json.loads((path / STATE).read_text())["carried"] == {}
