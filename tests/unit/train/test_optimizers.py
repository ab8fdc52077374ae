"""Each kind of optimizer: its first step by hand, resume bit by bit, its state's bytes, and that it learns."""

from __future__ import annotations

import importlib.util
import math
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from tests.support.optional import needs_bitsandbytes
from tests.support.training import Trial, dpo_stage, sft_stage, weights_of
from tunesmith.errors import MissingExtraError
from tunesmith.model.shapes import weight_bytes
from tunesmith.model.whole import tables_of
from tunesmith.pipeline.memory_predict import moments_bytes
from tunesmith.recipe.models import DpoStage, Full, Lora
from tunesmith.runs.records import read_records
from tunesmith.train.averaged import averaged, settle
from tunesmith.train.checkpoint import load_checkpoint, path_of
from tunesmith.train.optim import (
    OptimizerKind,
    gradient_norm,
    make_optimizer,
    optimizer_tensors,
    restore_optimizer,
    trainable_parameters,
    update,
)
from tunesmith.train.optim_kinds import Joined
from tunesmith.train.progress import Observer, Silent

needs_schedulefree = pytest.mark.skipif(
    importlib.util.find_spec("schedulefree") is None, reason='needs schedulefree: pip install "tunesmith[optimizers]"'
)
KINDS = [
    "adafactor",
    "muon",
    pytest.param("lion", marks=needs_bitsandbytes),
    pytest.param("schedule_free", marks=needs_schedulefree),
]
BETAS = (0.9, 0.999)


def one_step(kind: OptimizerKind, weight: torch.Tensor, gradient: torch.Tensor, decay: float = 0.0) -> torch.Tensor:
    """A weight after its first step at a rate of 0.1."""
    parameter = nn.Parameter(weight.clone())
    optimizer = make_optimizer({"w": parameter}, kind=kind, learning_rate=9.0, betas=BETAS, weight_decay=decay)
    parameter.grad = gradient.clone()
    update(optimizer, {"w": parameter}, learning_rate=0.1, norm=1.0, max_norm=0.0)
    settle(optimizer)
    return parameter.detach()


@needs_bitsandbytes
def test_lions_first_step_is_the_sign() -> None:
    """lr * (sign((1 - beta1) g) + decay * w): Chen et al. 2023, algorithm 2."""
    found = one_step("lion", torch.tensor([[2.0, 2.0]]), torch.tensor([[3.0, -0.001]]), decay=0.5)
    torch.testing.assert_close(found, torch.tensor([[2 - 0.1 - 0.1, 2 + 0.1 - 0.1]]))


def test_adafactors_first_step_of_a_vector_is_the_sign() -> None:
    """beta2 is 0 in step 1, so g / sqrt(g^2); its root mean square is 1, which the clipping at 1 leaves alone."""
    found = one_step("adafactor", torch.tensor([2.0, 2.0]), torch.tensor([3.0, -0.5]))
    torch.testing.assert_close(found, torch.tensor([1.9, 2.1]))


def test_adafactors_first_step_of_a_matrix_by_hand() -> None:
    """Squares 1, 4 / 9, 16: row means 2.5, 12.5; column means 5, 10; the estimate is row * column / mean (7.5)."""
    gradient = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    estimate = torch.tensor([[2.5 * 5, 2.5 * 10], [12.5 * 5, 12.5 * 10]]) / 7.5
    step = gradient / estimate.sqrt()
    step = step / max(1.0, float(step.pow(2).mean().sqrt()))
    torch.testing.assert_close(one_step("adafactor", torch.zeros(2, 2), gradient), -0.1 * step)


def test_muons_first_step_is_orthogonal_and_as_long_as_adamws() -> None:
    """Step length 0.2 sqrt(max side) (Liu et al. 2025, equation 4); torch's five iterations, in bfloat16, bring the
    singular values to between 0.7 and 1.2."""
    torch.manual_seed(0)
    step = one_step("muon", torch.zeros(8, 4), torch.randn(8, 4)) / (-0.1 * 0.2 * math.sqrt(8))
    sizes = torch.linalg.svdvals(step)
    assert 0.6 < float(sizes.min()) <= float(sizes.max()) < 1.3


@needs_schedulefree
def test_schedule_frees_first_step_by_hand() -> None:
    """z moves by lr * sign(g) in step 1, and the average of the z's is that point (Defazio et al. 2024, equation 5)."""
    found = one_step("schedule_free", torch.tensor([[2.0]]), torch.tensor([[0.3]]))
    torch.testing.assert_close(found, torch.tensor([[1.9]]), atol=1e-5, rtol=0)


def test_muon_leaves_tables_and_vectors_to_adamw() -> None:
    model = nn.ModuleDict({"table": nn.Embedding(5, 4), "inside": nn.Linear(4, 4)})
    trainable, tables = trainable_parameters(model), tables_of(model)
    optimizer = make_optimizer(trainable, kind="muon", learning_rate=0.1, betas=BETAS, weight_decay=0.1, tables=tables)
    keys = {name: set(optimizer.state[parameter]) for name, parameter in trainable.items()}
    adamw = {"step", "exp_avg", "exp_avg_sq"}
    assert keys == {"table.weight": adamw, "inside.weight": {"momentum_buffer"}, "inside.bias": adamw}
    assert isinstance(optimizer, Joined)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == 3
    updated = {id(each) for group in optimizer.param_groups for each in group["params"]}
    assert updated == set(map(id, trainable.values()))


def test_b_matrices_have_a_rate_of_their_own() -> None:
    """LoRA+: AdamW's first step is the learning rate, 0.1 for A and 1.6 for B."""
    trainable = {
        "x.lora_A.default.weight": nn.Parameter(torch.zeros(1, 1)),
        "x.lora_B.default.weight": nn.Parameter(torch.zeros(1, 1)),
    }
    optimizer = make_optimizer(
        trainable, kind="adamw", learning_rate=9.0, betas=BETAS, weight_decay=0.0, b_lr_ratio=16.0
    )
    for parameter in trainable.values():
        parameter.grad = torch.full_like(parameter, 0.3)
    update(optimizer, trainable, learning_rate=0.1, norm=1.0, max_norm=0.0)
    assert [parameter.item() for parameter in trainable.values()] == pytest.approx([-0.1, -1.6], abs=1e-5)


def make_layers(kind: OptimizerKind) -> tuple[nn.Module, dict[str, nn.Parameter], torch.optim.Optimizer]:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(64, 128), nn.Linear(128, 2))
    trainable = trainable_parameters(layers)
    return layers, trainable, make_optimizer(trainable, kind=kind, learning_rate=1e-2, betas=BETAS, weight_decay=0.1)


def take_step(
    layers: nn.Module, trainable: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer, number: int
) -> None:
    generator = torch.Generator().manual_seed(number)
    layers(torch.randn(8, 64, generator=generator)).pow(2).sum().backward()
    update(optimizer, trainable, learning_rate=1e-2 / number, norm=gradient_norm(trainable.values()), max_norm=1.0)


@pytest.mark.parametrize("kind", KINDS)
def test_restored_state_goes_on_bit_by_bit(kind: OptimizerKind, tmp_path: Path) -> None:
    """Through files, as a checkpoint does, the weights as the stage would hand them on."""
    layers, trainable, optimizer = make_layers(kind)
    for number in (1, 2):
        take_step(layers, trainable, optimizer, number)
    state = optimizer_tensors(optimizer, trainable)
    with averaged(optimizer, trainable):
        save_file({name: each.detach() for name, each in trainable.items()}, tmp_path / "weights")
    save_file(state, tmp_path / "state")
    again, weights, restored = make_layers(kind)
    again.load_state_dict(load_file(tmp_path / "weights"))
    restore_optimizer(restored, weights, load_file(tmp_path / "state"))
    take_step(layers, trainable, optimizer, 3)
    take_step(again, weights, restored, 3)
    for name, weight in trainable.items():
        assert weight.equal(weights[name]), name
    found, expected = optimizer_tensors(restored, weights), optimizer_tensors(optimizer, trainable)
    assert found.keys() == expected.keys()
    assert all(found[name].equal(tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("kind", KINDS)
def test_the_state_is_there_before_the_first_step_and_keeps_its_shape(kind: OptimizerKind) -> None:
    layers, trainable, optimizer = make_layers(kind)
    before = {name: (each.shape, each.dtype) for name, each in optimizer_tensors(optimizer, trainable).items()}
    take_step(layers, trainable, optimizer, 1)
    assert before == {name: (each.shape, each.dtype) for name, each in optimizer_tensors(optimizer, trainable).items()}


@pytest.mark.parametrize("kind", ["adamw", *KINDS])
def test_the_forecast_knows_the_states_bytes(kind: OptimizerKind) -> None:
    """Without the few numbers of a tensor or a group (steps, sums), and without the copy that a save makes."""
    model = nn.Sequential(nn.Embedding(300, 64), nn.Linear(64, 128), nn.Linear(128, 2))
    trainable = trainable_parameters(model)
    optimizer = make_optimizer(
        trainable, kind=kind, learning_rate=1e-2, betas=BETAS, weight_decay=0.1, tables=tables_of(model)
    )
    state = [value for each in optimizer.state.values() for value in each.values()]
    found = sum(4 * value.numel() for value in state if isinstance(value, torch.Tensor) and value.ndim)
    assert moments_bytes(kind, weight_bytes(model), "cpu") == found


@needs_schedulefree
def test_a_look_at_the_average_leaves_no_trace() -> None:
    layers, trainable, optimizer = make_layers("schedule_free")
    other, weights, unseen = make_layers("schedule_free")
    for number in (1, 2, 3):
        take_step(layers, trainable, optimizer, number)
        take_step(other, weights, unseen, number)
        before = {name: each.detach().clone() for name, each in trainable.items()}
        with pytest.raises(ZeroDivisionError), averaged(optimizer, trainable):
            moved = any(not each.equal(before[name]) for name, each in trainable.items())
            raise ZeroDivisionError
        assert moved == (number > 1)  # after one step both are the same point but for rounding
    assert all(each.equal(weights[name]) for name, each in trainable.items())


def test_without_the_package_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "schedulefree", None)
    with pytest.raises(MissingExtraError, match=r"tunesmith\[optimizers\]"):
        make_layers("schedule_free")


class StopAt(Silent):
    """Breaks the loop off after a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def stepped(self, record: object, timing: object) -> None:
        assert isinstance(record, dict)
        if record["step"] == self.step:
            raise KeyboardInterrupt


RATES = {"adafactor": 1e-2, "muon": 2e-2, "lion": 2e-3, "schedule_free": 2e-2}


def short_stage(kind: str) -> DpoStage:
    schedule = "constant" if kind == "schedule_free" else "cosine"
    rate = RATES[kind]
    return dpo_stage(optimizer=kind, schedule=schedule, learning_rate=rate, epochs=4, eval_every=4, save_every=3)


def losses_of(folder: Path) -> list[float]:
    return [float(str(record["loss"])) for record in read_records(folder / "metrics.jsonl")]


@pytest.mark.parametrize("kind", KINDS)
def test_each_learns(kind: str, tmp_path: Path) -> None:
    Trial(tmp_path, short_stage(kind), dropout=0.0, num_train=8).run()
    losses = losses_of(tmp_path)
    assert losses[0] == pytest.approx(math.log(2), abs=1e-5)
    assert sum(losses[-2:]) / 2 < 0.8 * losses[0]


@needs_schedulefree
def test_a_broken_off_schedule_free_stage_ends_as_an_unbroken_one(tmp_path: Path) -> None:
    """Its points are told apart in evaluations, saves, on resume and at the end."""
    stage = short_stage("schedule_free")
    whole, broken = (Trial(tmp_path / name, stage, dropout=0.0, num_train=8) for name in ("whole", "broken"))
    _, engine = whole.run()
    observer: Observer = StopAt(5)
    with pytest.raises(KeyboardInterrupt):
        broken.run(observer)
    _, again = broken.run()
    found, expected = weights_of(again), weights_of(engine)
    assert all(each.equal(found[name]) for name, each in expected.items())
    for name in ("metrics.jsonl", "eval.jsonl"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "broken" / name).read_bytes()
    last = load_checkpoint(path_of(tmp_path / "whole" / "checkpoints", 8))
    assert all(each.equal(last.weights[name]) for name, each in expected.items())  # what is saved is what is handed on


def test_muon_trains_a_whole_model(tmp_path: Path) -> None:
    stage = sft_stage(optimizer="muon", tuning=Full(), learning_rate=1e-2, epochs=4)
    Trial(tmp_path, stage).run()
    losses = losses_of(tmp_path)
    assert losses[-1] < 0.8 * losses[0]


def test_lora_plus_moves_b_further(tmp_path: Path) -> None:
    moved = []
    for ratio in (1.0, 16.0):
        stage = sft_stage(learning_rate=1e-4, tuning=Lora(r=4, b_lr_ratio=ratio), max_steps=2)
        trial = Trial(tmp_path / str(ratio), stage, dropout=0.0)
        start = weights_of(trial.engine())
        end = weights_of(trial.run()[1])
        moved.append({key: sum(float((end[n] - start[n]).norm()) for n in end if key in n) for key in ("_A", "_B")})
    assert moved[1]["_B"] > 10 * moved[0]["_B"]
    assert moved[1]["_A"] < 2 * moved[0]["_A"]
