"""Figures of sampled answers: what they are, that they are the same each time, and that looking changes nothing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from torch import Tensor

from tests.support.training import (
    MACHINE,
    answer_trees,
    dpo_stage,
    full_engine,
    lora_engine,
    pair_trees,
    references_of,
)
from tests.unit.train.test_carried import Break
from tunesmith.data.types import Tree
from tunesmith.engine.attention import ordinary_attention
from tunesmith.engine.engine import Engine
from tunesmith.objectives import objective_of
from tunesmith.recipe.models import Full, Lora
from tunesmith.recipe.stages import Samples, StageBase
from tunesmith.runs.folder import StageFolder
from tunesmith.runs.records import Record, read_records
from tunesmith.sample.generate import Answer, generate
from tunesmith.train.checkpoint import load_checkpoint
from tunesmith.train.loop import train_stage
from tunesmith.train.optim import trainable_parameters
from tunesmith.train.probe import Probe, begun, distinct_prompts, spread
from tunesmith.train.progress import Silent
from tunesmith.train.samples import repetition, same_language, sampled_tree

KEYS = {"sample_count", "sample_kl", "sample_tokens", "sample_truncated", "sample_repetition", "retained_loss"}
ENGLISH = "The committee has published its report on the future of the railway stations in the northern counties. "
GERMAN = "Der Ausschuss hat gestern seinen Bericht über die Zukunft der Bahnhöfe in den nördlichen Kreisen vorgelegt. "
TREES = pair_trees(12)
RETAINED = answer_trees(5)


def probe_with(*, count: int = 4, stop_ids: Sequence[int] = (2, 5, 9, 11), **settings: object) -> Probe:
    samples = Samples.model_validate({"num_prompts": count, "max_new_tokens": 12} | settings)
    return Probe(samples, distinct_prompts(TREES[8:], count), stop_ids, lambda ids: str(ids), RETAINED)


def run(
    folder: Path,
    *,
    stage: StageBase | None = None,
    probe: Probe | None = None,
    break_after: int = 0,
    engine: Engine | None = None,
) -> list[Record]:
    """Four steps of a stage with dropout, evaluated after every second; the lines of its eval.jsonl."""
    engine = engine or lora_engine(dropout=0.2, moved=True)
    stage = stage or dpo_stage(tuning=Lora(r=4, dropout=0.2), epochs=2, eval_every=2, save_every=1, keep_checkpoints=9)
    train_stage(
        engine=engine,
        stage=stage,
        objective=objective_of(stage),
        train=TREES[:8],
        heldout=TREES[8:],
        references=(references_of(engine, TREES[:8]), references_of(engine, TREES[8:])),
        folder=StageFolder(folder),
        seed=3,
        machine=MACHINE,
        observer=Break(break_after),
        probe=probe,
    )
    return read_records(folder / "eval.jsonl")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    run(folder, probe=probe_with())
    return folder


def number(record: Record, key: str) -> float:
    value = record[key]
    assert isinstance(value, float | int)
    return float(value)


def test_every_evaluation_has_them_and_the_start_has_no_kl(whole: Path) -> None:
    records = read_records(whole / "eval.jsonl")
    assert [record["step"] for record in records] == [0, 2, 4]
    assert all(record.keys() >= KEYS for record in records)
    assert number(records[0], "sample_kl") == pytest.approx(0, abs=1e-5)
    assert abs(number(records[-1], "sample_kl")) > 1e-3
    assert number(records[0], "retained_loss") != number(records[-1], "retained_loss")


def test_looking_changes_nothing(whole: Path, tmp_path: Path) -> None:
    """Weights, moments and every figure of training are those of a run that draws no answers."""
    plain = run(tmp_path)
    for name in (
        "metrics.jsonl",
        "checkpoints/step-4/trainable.safetensors",
        "checkpoints/step-4/optimizer.safetensors",
    ):
        assert (tmp_path / name).read_bytes() == (whole / name).read_bytes(), name
    looked = [
        {key: value for key, value in record.items() if key not in KEYS}
        for record in read_records(whole / "eval.jsonl")
    ]
    assert plain == looked


def test_a_resumed_run_draws_the_same(whole: Path, tmp_path: Path) -> None:
    """KL too: it is from the stage's start, not from where the run went on."""
    with pytest.raises(ConnectionAbortedError):
        run(tmp_path, probe=probe_with(), break_after=3)
    run(tmp_path, probe=probe_with())
    assert (tmp_path / "eval.jsonl").read_bytes() == (whole / "eval.jsonl").read_bytes()


def loaded(folder: Path, step: int) -> Engine:
    """A fresh model with the weights of a checkpoint; step 0: the start's."""
    engine = lora_engine(moved=True)
    if step:
        weights = load_checkpoint(folder / f"checkpoints/step-{step}").weights
        with torch.no_grad():
            for name, parameter in trainable_parameters(engine.model).items():
                parameter.copy_(weights[name])
    return engine


def plain_logprob(engine: Engine, prompt_ids: np.ndarray, ids: Sequence[int]) -> Tensor:
    """Of a whole answer, in float64, through the model's own attention."""
    model = engine.model.double()
    with torch.no_grad(), ordinary_attention(model):
        logits_LV = model(input_ids=torch.tensor([[*prompt_ids.tolist(), *ids]]), use_cache=False).logits[0]
    logprob_LV = logits_LV.log_softmax(-1)
    return sum((logprob_LV[len(prompt_ids) - 1 + place, each] for place, each in enumerate(ids)), torch.zeros(()))


def test_the_figures_are_those_of_answers_drawn_and_scored_apart(whole: Path) -> None:
    probe, record = probe_with(), read_records(whole / "eval.jsonl")[-1]
    answers = generate(
        loaded(whole, 4).model,
        [prompt_ids.tolist() for prompt_ids in probe.prompts],
        max_new_tokens=12,
        stop_ids=probe.stop_ids,
        temperature=1.0,
        seed=3,
        batch_size=1,
    )
    assert record["sample_tokens"] == pytest.approx(sum(len(answer.ids) for answer in answers) / 4)
    assert record["sample_truncated"] == pytest.approx(sum(answer.stop_id is None for answer in answers) / 4)
    assert 0 < number(record, "sample_truncated") < 1, "the test must see both kinds"
    pairs = list(zip(probe.prompts, answers, strict=True))
    policy, start = loaded(whole, 4), loaded(whole, 0)
    ratios = [plain_logprob(policy, p, a.all_ids) - plain_logprob(start, p, a.all_ids) for p, a in pairs]
    assert record["sample_kl"] == pytest.approx(float(sum(ratios)) / 4, abs=1e-4)
    losses = []
    for tree in RETAINED:
        (branch,) = tree.branches
        prompt_ids = np.concatenate([tree.prompt_ids, branch.ids[~branch.trained]])  # these stand first
        losses.append(-plain_logprob(policy, prompt_ids, branch.ids[branch.trained].tolist()))
    trained = sum(tree.num_trained for tree in RETAINED)
    assert record["retained_loss"] == pytest.approx(float(sum(losses)) / trained, abs=1e-5)


def test_without_stop_ids_every_answer_is_cut(tmp_path: Path) -> None:
    stage = dpo_stage(max_steps=1, tuning=Full(), learning_rate=1e-4)  # and all weights are kept for the KL
    probe = probe_with(stop_ids=(), temperature=0.0)
    record = run(tmp_path, stage=stage, probe=probe, engine=full_engine())[-1]
    assert (record["sample_truncated"], record["sample_tokens"]) == (1.0, 12.0)
    assert "sample_kl" in record


def test_half_precision_draws_too(tmp_path: Path) -> None:
    stage = dpo_stage(max_steps=1, tuning=Lora(r=4))
    records = run(tmp_path, stage=stage, probe=probe_with(), engine=replace(lora_engine(), autocast=torch.bfloat16))
    assert all(math.isfinite(number(record, "sample_kl")) for record in records)


class Notes(Silent):
    """Keeps what is said."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def noted(self, text: str) -> None:
        self.lines.append(text)


def test_memory_without_room_for_the_start_leaves_the_kl_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("Memory", (), {"available": 1000})())
    engine, notes = lora_engine(), Notes()
    found = begun(probe_with(), engine.model, trainable_parameters(engine.model), tell=notes.noted)
    assert found.start is None
    assert "no `sample_kl`" in notes.lines[0]


def test_prompts_without_room_for_an_answer_are_left_out() -> None:
    """128 positions: a prompt of 60 tokens leaves 68."""
    engine, notes = lora_engine(), Notes()
    probe = replace(probe_with(max_new_tokens=69), prompts=[tree.prompt_ids for tree in TREES[6:8]])
    assert [len(prompt_ids) for prompt_ids in probe.prompts] == [2, 60]
    found = begun(probe, engine.model, trainable_parameters(engine.model), tell=notes.noted)
    assert [len(prompt_ids) for prompt_ids in found.prompts] == [2]
    assert "1 of 2 held-out prompts are answered" in notes.lines[0]


def test_repetition_counts_within_an_answer() -> None:
    # 5 and 1 four-grams; (1, 2, 3, 4) comes twice in the first, and in the second it is new
    assert repetition([[1, 2, 3, 4, 1, 2, 3, 4], [1, 2, 3, 4]]) == pytest.approx(1 / 6)
    assert repetition([[7] * 10]) == pytest.approx(6 / 7)
    assert repetition([[1, 2, 3], []]) == 0.0


def test_language_is_told_where_there_is_enough_text() -> None:
    assert same_language([ENGLISH, ENGLISH, GERMAN], [ENGLISH, GERMAN, ENGLISH, "Yes."]) == pytest.approx(2 / 3)
    assert same_language([GERMAN], [ENGLISH]) == 0.0
    assert same_language([ENGLISH], ["Yes.", "No."]) is None
    assert same_language(["?"], [ENGLISH]) is None


def test_a_sampled_tree_holds_the_stop_token() -> None:
    tree = sampled_tree(np.array([5, 6], np.int32), Answer((7, 8), 2))
    assert tree.branches[0].ids.tolist() == [7, 8, 2]
    assert tree.num_trained == 3


def test_prompts_are_distinct_and_from_all_over() -> None:
    def tree(*prompt: int) -> Tree:
        return replace(TREES[0], prompt_ids=np.array(prompt, np.int32))

    trees = [tree(1), tree(1), tree(), tree(2), tree(1), tree(3)]
    assert [prompt.tolist() for prompt in distinct_prompts(trees, 9)] == [[1], [2], [3]]
    assert [prompt.tolist() for prompt in distinct_prompts(trees, 2)] == [[1], [2]]  # rows 0 and 3
    assert distinct_prompts(trees, 0) == []
    assert [each.id for each in spread(TREES, 3)] == ["tree-0", "tree-4", "tree-8"]
    assert spread(TREES[:2], 3) == TREES[:2]
