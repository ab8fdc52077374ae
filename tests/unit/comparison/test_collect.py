"""Raw material of the stages: log-probs of samples, KL against its exact value, one model at a time."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from tests.unit.comparison.build import pair
from tunesmith.comparison.collect import answer_tree, collect, record_stage
from tunesmith.comparison.rows import Question, Rows
from tunesmith.engine.attention import ordinary_attention
from tunesmith.recipe.models import Compare
from tunesmith.sample.generate import Answer

VOCABULARY = 24


class Letters:
    """A tokenizer that can only decode."""

    def decode(self, ids: list[int], **_: object) -> str:
        return " ".join(map(str, ids))


@dataclass(eq=False)
class Stage:
    """What `collect` needs of a loaded stage."""

    name: str
    model: PreTrainedModel
    stop_ids: tuple[int, ...] = ()
    tokenizer: Letters = field(default_factory=Letters)


def tiny(seed: int) -> PreTrainedModel:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=32,
        initializer_range=0.4,
    )
    return LlamaForCausalLM(config).eval()


def first_logprobs(model: PreTrainedModel, prompt: tuple[int, ...]) -> np.ndarray:
    with torch.no_grad(), ordinary_attention(model):
        return model(input_ids=torch.tensor([prompt])).logits[0, -1].double().log_softmax(-1).numpy()


def questions(num: int) -> list[Question]:
    return [Question(f"q{n}", (3, 4, 5), "prompt", ("x",), None) for n in range(num)]


def compare(**changes: object) -> Compare:
    return Compare.model_validate({"max_new_tokens": 1, "batch_size": 64, **changes})


def run(
    stages: dict[str, PreTrainedModel], reference: str | None, rows: Rows, settings: Compare, loaded: list[str]
) -> tuple[list, Rows]:
    def load(name: str) -> Stage:
        loaded.append(name)
        return Stage(name, stages[name])

    return collect(
        list(stages),
        reference,
        load=load,  # type: ignore[arg-type]
        rows_of=lambda stage: rows,
        compare=settings,
        seed=5,
        say=lambda line: None,
    )


def test_kl_on_one_token_answers_is_near_the_exact_sum() -> None:
    models = {"base": tiny(1), "sft": tiny(2)}
    rows = Rows(questions(400), [])
    records, _ = run(models, "sft", rows, compare(), [])
    base = records[0]
    deltas = np.array(base.own) - np.array(base.reference)
    p, q = (first_logprobs(models[name], (3, 4, 5)) for name in ("base", "sft"))
    exact = float((np.exp(p) * (p - q)).sum())
    assert exact > 0.1
    assert deltas.mean() == pytest.approx(exact, abs=4 * deltas.std() / np.sqrt(len(deltas)))
    assert records[1].own == pytest.approx(records[1].reference, abs=1e-6)


def test_every_stage_is_loaded_once_and_the_reference_last() -> None:
    loaded: list[str] = []
    models = {"base": tiny(1), "sft": tiny(2), "dpo": tiny(3)}
    records, _ = run(models, "sft", Rows(questions(2), [pair("a")]), compare(), loaded)
    assert loaded == ["base", "dpo", "sft"]
    assert [record.name for record in records] == ["base", "sft", "dpo"]
    assert all(len(record.reference) == 2 and len(record.pairs) == 1 for record in records)


def test_only_one_model_is_in_memory() -> None:
    alive: list[weakref.ref[PreTrainedModel]] = []

    def load(name: str) -> Stage:
        assert not [ref for ref in alive if ref() is not None]
        model = tiny(len(alive))
        alive.append(weakref.ref(model))
        return Stage(name, model)

    collect(
        ["base", "sft"],
        "base",
        load=load,  # type: ignore[arg-type]
        rows_of=lambda stage: Rows(questions(2), []),
        compare=compare(),
        seed=0,
        say=lambda line: None,
    )
    assert len(alive) == 2


def test_pairs_are_scored_as_the_plain_forward_scores_them() -> None:
    model = tiny(1)
    rows = Rows([], [pair("a", lengths=(2, 3))])  # prompt 1 2, answers 5 5 and 5 5 5
    record = record_stage(Stage("sft", model), rows, compare=compare(), seed=0, backend="sdpa", say=lambda line: None)  # type: ignore[arg-type]
    steps = [float(first_logprobs(model, (1, 2, *(5,) * n))[5]) for n in range(3)]
    assert record.pairs[0] == pytest.approx((sum(steps[:2]), sum(steps)), abs=1e-5)


def test_the_stop_token_belongs_to_a_drawn_answer() -> None:
    asked = questions(1)[0]
    tree = answer_tree(asked, Answer((7, 8), 2))
    assert tree.branches[0].ids.tolist() == [7, 8, 2]
    assert answer_tree(asked, Answer((7, 8), None)).branches[0].ids.tolist() == [7, 8]


def test_without_a_style_rule_nothing_is_sampled_for_it() -> None:
    rows = Rows(questions(2), [])
    plain = record_stage(
        Stage("sft", tiny(1)),  # type: ignore[arg-type]
        rows,
        compare=compare(),
        seed=0,
        backend="sdpa",
        say=lambda line: None,
    )
    assert plain.sampled == [] and len(plain.greedy) == len(plain.drawn) == 2
