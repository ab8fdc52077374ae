"""F22: what looks wrong is said once, with causes; what is merely noisy is not."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from tests.support.training import Trial, dpo_stage, sft_stage
from tunesmith.runs.folder import StageFolder
from tunesmith.runs.records import Value, append_record, read_records
from tunesmith.train.progress import Silent
from tunesmith.train.watch import (
    HELDOUT,
    MOVED_AFTER,
    RISE,
    UNMOVED,
    Figures,
    Watch,
    loss_spike,
    norm_spike,
    start_watch,
    unmoved_weights,
    zero_gradient,
    zero_rate,
)


@dataclass
class Listener(Silent):
    texts: list[str] = field(default_factory=list)

    def noted(self, text: str) -> None:
        self.texts.append(text)


def figures(losses: Sequence[float], norms: Sequence[float] = (), rate: float = 1e-3) -> list[Figures]:
    norms = norms or [1.0] * len(losses)
    pairs = zip(losses, norms, strict=True)
    return [Figures(step, loss, norm, rate, is_update=True) for step, (loss, norm) in enumerate(pairs, start=1)]


def record(step: int, loss: float, *, norm: float = 1.0, rate: float = 1e-3) -> dict[str, Value]:
    return {"step": step, "loss": loss, "grad_norm": norm, "lr": rate}


def watch_of(tmp_path: Path, weights: Mapping[str, nn.Parameter] | None = None) -> tuple[Watch, Listener]:
    listener = Listener()
    folder = StageFolder(tmp_path).create()
    return start_watch(folder, trainable=dict(weights or {}), observer=listener, writes=True), listener


def test_a_loss_of_ten_times_the_median_is_a_spike() -> None:
    sign = loss_spike(figures([0.2, 0.3, 0.2, 0.25, 0.2, 2.6]))
    assert sign is not None
    assert sign.text == "the loss is 2.6, and was usually 0.2 in the 5 steps before"
    assert len(sign.causes) == 3


@pytest.mark.parametrize(
    ("losses", "is_spike"),
    [
        ([2.0, 2.1, 1.9, 2.0, 2.2, 4.0], True),  # median 2, deviation 0.15: 13 of them
        ([2.0, 2.1, 1.9, 2.0, 2.2, 3.4], False),  # 9.4 of them
        ([2.0, 2.1, 1.9, 2.0, 2.2, 2.9], False),
        ([0.02, 0.03, 0.01, 0.02, 0.02, 0.9], False),  # 45 times the median, and less than a nat
        ([9.0, 0.1, 9.0, 0.2, 9.0, 12.0], False),  # as noisy as ever: the median deviation is 0
        ([2.0, 2.1, 1.9, 2.0, 99.0], False),  # four steps are no measure
        ([2.0, 2.1, float("nan"), 1.9, 2.0, 2.2, 40.0], True),  # a step that was left out is none of them
        ([2.0, 2.0, 2.0, 2.0, 2.0, float("nan")], False),
    ],
)
def test_what_is_a_spike_of_the_loss(losses: list[float], is_spike: bool) -> None:
    assert (loss_spike(figures(losses)) is not None) == is_spike


def test_what_is_a_spike_of_the_gradient() -> None:
    quiet = [1.0, 2.0, 1.0, 0.5, 1.0]
    assert norm_spike(figures([1.0] * 6, [*quiet, 21.0])) is not None
    assert norm_spike(figures([1.0] * 6, [*quiet, 19.0])) is None
    assert norm_spike(figures([1.0] * 6, [0.0, 0.0, 0.0, 0.0, 0.0, 19.0])) is None  # nothing to compare with


def test_zero_gradients_are_counted_in_updates() -> None:
    assert zero_gradient(figures([1.0] * 3, [0.0, 0.0, 0.0])) is not None
    assert zero_gradient(figures([1.0] * 3, [1e-7, 1e-30, 0.0])) is not None  # zero but for rounding
    assert zero_gradient(figures([1.0] * 4, [0.0, 0.0, 1e-5, 0.0])) is None
    skipped = Figures(3, 1.0, float("nan"), 1e-3, is_update=False)
    two = figures([1.0, 1.0], [0.0, 0.0])
    assert zero_gradient([*two, skipped]) is None
    assert zero_gradient([*two, skipped, Figures(4, 1.0, 0.0, 1e-3, is_update=True)]) is not None


def test_a_rate_of_zero() -> None:
    assert zero_rate(figures([1.0], rate=0.0)) is not None
    assert zero_rate(figures([1.0], rate=1e-30)) is None


def test_a_loss_that_rises_slowly_and_stays_up(tmp_path: Path) -> None:
    """From 1 to 3 in steps of 0.05: no step is a spike, the median of 20 steps is 1 nat above its lowest at last."""
    watch, listener = watch_of(tmp_path)
    losses = [1.0] * 25 + [1 + 0.05 * step for step in range(40)]
    for step, loss in enumerate(losses, start=1):
        watch.stepped(record(step, loss), [], is_last=False)
    assert [line["kind"] for line in read_records(tmp_path / "warnings.jsonl")] == [RISE]
    assert len(listener.texts) == 1
    assert "the loss has risen" in listener.texts[0]


def test_noise_of_a_usual_run_is_silent(tmp_path: Path) -> None:
    """A falling loss, noisy by a third, norms over a decade: 10 seeds of 300 steps, no warning."""
    for seed in range(10):
        watch, listener = watch_of(tmp_path / str(seed))
        draw = np.random.default_rng(seed)
        for step in range(1, 301):
            loss = (0.3 + 2.5 * np.exp(-step / 60)) * draw.lognormal(0, 0.3)
            watch.stepped(record(step, loss, norm=draw.lognormal(0, 0.6)), [], is_last=False)
        assert listener.texts == []


def test_a_warning_is_said_once_and_names_rows_and_causes(tmp_path: Path) -> None:
    watch, listener = watch_of(tmp_path)
    rows = [f"rows.jsonl:{number}" for number in range(1, 13)]
    for step, loss in enumerate([1.0] * 6 + [30.0, 1.0, 40.0], start=1):
        watch.stepped(record(step, loss), rows, is_last=False)
    (line,) = read_records(tmp_path / "warnings.jsonl")
    assert (line["step"], line["kind"], line["num_rows"], line["rows"]) == (7, "loss spike", 12, rows[:10])
    assert len(listener.texts) == 1
    assert listener.texts[0].startswith("WARNING step 7: the loss is 30, and was usually 1 ")
    assert "Possible causes: rows unlike the others" in listener.texts[0]


@pytest.mark.parametrize("stop", [6, 7, 8, 9])
def test_resumed_at_any_step_the_file_is_the_same(tmp_path: Path, stop: int) -> None:
    """Two kinds of warning, at steps 7 and 9; the process dies behind step 9 and goes on from `stop`."""
    records = [record(step, 30.0 if step == 7 else 1.0, norm=50.0 if step == 9 else 1.0) for step in range(1, 12)]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    for folder, last in ((whole, 11), (broken, 9)):
        watch, _ = watch_of(folder)
        for each in records[:last]:
            append_record(folder / "metrics.jsonl", each)
            watch.stepped(each, [], is_last=False)
    kept = [json.dumps(each) + "\n" for each in records[:stop]]  # as the resume of the records leaves it
    (broken / "metrics.jsonl").write_text("".join(kept))
    watch, _ = watch_of(broken)
    watch.resume(stop)
    for each in records[stop:]:
        watch.stepped(each, [], is_last=False)
    assert len(read_records(whole / "warnings.jsonl")) == 2
    assert (broken / "warnings.jsonl").read_bytes() == (whole / "warnings.jsonl").read_bytes()


def test_weights_that_have_not_moved() -> None:
    weights = {name: nn.Parameter(torch.zeros(3, 2)) for name in ("a.lora_A.weight", "a.lora_B.weight", "norm.weight")}
    folder = StageFolder(Path())
    start = start_watch(folder, trainable=weights, observer=Silent(), writes=True).start

    def text() -> str:
        sign = unmoved_weights(weights, start, 10)
        return sign.text if sign else ""

    assert text() == "after 10 updates the adapter has not moved: every lora_B is as it was"
    with torch.no_grad():
        weights["a.lora_B.weight"][0, 0] = 1e-12  # the smallest step counts
    assert text() == "after 10 updates 2 of 3 trained tensors have not moved, the first is a.lora_A.weight"
    with torch.no_grad():
        weights["a.lora_A.weight"][2, 1] = -1.0
        weights["norm.weight"] += 1.0
    assert text() == ""


def test_nothing_is_said_of_weights_before_an_update() -> None:
    weights = {"w": nn.Parameter(torch.zeros(2))}
    start = start_watch(StageFolder(Path()), trainable=weights, observer=Silent(), writes=True).start
    assert unmoved_weights(weights, start, 0) is None


def test_swapped_numbers_are_a_move() -> None:
    """The two sums see no order, and no update is a permutation; but a sign alone changes the first."""
    weights = {"w": nn.Parameter(torch.tensor([1.0, -1.0]))}
    start = start_watch(StageFolder(Path()), trainable=weights, observer=Silent(), writes=True).start
    with torch.no_grad():
        weights["w"][1] = 1.0
    assert unmoved_weights(weights, start, 1) is None


def test_weights_are_looked_at_after_ten_updates_or_at_the_end(tmp_path: Path) -> None:
    weights = {"w": nn.Parameter(torch.zeros(2))}
    for name, last in (("ten", 99), ("end", 4)):
        watch, _ = watch_of(tmp_path / name, weights)
        for step in range(1, min(last, 12) + 1):
            watch.stepped(record(step, 1.0), [], is_last=step == last)
    steps = [read_records(tmp_path / name / "warnings.jsonl")[0]["step"] for name in ("ten", "end")]
    assert steps == [MOVED_AFTER, 4]


def test_a_held_out_loss_that_is_no_number(tmp_path: Path) -> None:
    watch, _ = watch_of(tmp_path)
    watch.evaluated({"step": 0, "loss": 2.5})
    watch.evaluated({"step": 3, "loss": float("nan")})
    watch.evaluated({"step": 6, "loss": float("nan")})
    assert [(line["step"], line["kind"]) for line in read_records(tmp_path / "warnings.jsonl")] == [(3, HELDOUT)]


def test_another_rank_keeps_no_file(tmp_path: Path) -> None:
    folder = StageFolder(tmp_path).create()
    watch = start_watch(folder, trainable={}, observer=Silent(), writes=False)
    for step, loss in enumerate([1.0] * 6 + [30.0], start=1):
        watch.stepped(record(step, loss), [], is_last=False)
    assert not folder.warnings_path.exists()


# a whole stage


def kinds(folder: Path) -> list[Value]:
    return [line["kind"] for line in read_records(folder / "warnings.jsonl")]


def test_a_usual_stage_has_no_warnings(tmp_path: Path) -> None:
    for name, stage in (("sft", sft_stage(epochs=5)), ("dpo", dpo_stage(epochs=5))):
        Trial(tmp_path / name, stage).run()
        assert kinds(tmp_path / name) == []


def test_an_adapter_that_never_moves_is_said(tmp_path: Path) -> None:
    """1e-30 times a direction of about 1 is nothing beside a weight of 0.05, and would be seen beside one of 0."""
    listener = Listener()
    Trial(tmp_path, sft_stage(epochs=4, learning_rate=1e-30), dropout=0.0).run(listener)
    assert kinds(tmp_path) == [UNMOVED]
    (text,) = (text for text in listener.texts if "WARNING" in text)
    assert "after 10 updates the adapter has not moved" in text
    assert "a learning rate too small for float32" in text
