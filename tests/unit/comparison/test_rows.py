"""What the stages are compared on: the recipe's files, or the rows that the stages held out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.unit.data.build import CHATML, renderer
from tunesmith.comparison.rows import Rows, branch_lengths, compared_rows, shown
from tunesmith.data.types import Message
from tunesmith.errors import DataError
from tunesmith.recipe.load import parse_recipe
from tunesmith.recipe.models import Recipe


def write(path: Path, rows: list[dict[str, object]]) -> dict[str, object]:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return {"path": str(path)}


def ask(name: str, answer: str = "yes", **more: object) -> dict[str, object]:
    return {"question": name, "answer": answer, **more}


def prefer(name: str, **more: object) -> dict[str, object]:
    return {"prompt": name, "chosen": "yes", "rejected": "not at all", **more}


@pytest.fixture
def files(tmp_path: Path) -> dict[str, dict[str, object]]:
    return {
        "sft": write(tmp_path / "sft.jsonl", [ask("train?")]),
        "sft_heldout": write(tmp_path / "sft_heldout.jsonl", [ask("held out?"), ask("held out?", "no")]),
        "pairs": write(tmp_path / "pairs.jsonl", [prefer("train pair?")]),
        "pairs_heldout": write(tmp_path / "pairs_heldout.jsonl", [prefer("pair?", kind="value"), prefer("pair?")]),
        "eval": write(
            tmp_path / "eval.jsonl",
            [ask("a?", "Yes. ", accepted=["Yes.", "Yes!"], value="Yes"), ask("b?"), ask("a?"), ask("long " * 60)],
        ),
    }


def trial(files: dict[str, dict[str, object]], **compare: object) -> Recipe:
    stages = [
        {"name": "sft", "method": "sft", "train": [files["sft"]], "heldout": [files["sft_heldout"]]},
        {"name": "dpo", "method": "dpo", "train": [files["pairs"]], "heldout": [files["pairs_heldout"]]},
    ]
    values = {"name": "trial", "model": {"path": "x"}, "stages": stages, "compare": compare}
    return parse_recipe(values).recipe


def rows_of(recipe: Recipe, *, max_positions: int | None = None) -> Rows:
    return compared_rows(recipe, renderer(CHATML), max_new_tokens=8, max_positions=max_positions)


def test_the_recipes_own_files_come_first(files: dict[str, dict[str, object]]) -> None:
    rows = rows_of(trial(files, prompts=[files["eval"]], preferences=[files["pairs"]]))
    assert [question.text for question in rows.questions][:2] == ["a?", "b?"]
    assert rows.questions[0].accepted == ("Yes.", "Yes!") and rows.questions[0].value == "Yes"
    assert rows.questions[1].accepted == ("yes",) and rows.questions[1].value is None
    assert len(rows.pairs) == 1
    assert "1 of the rows repeat the prompt of an earlier one; they were left out." in rows.notes


def test_without_files_the_held_out_rows_are_taken(files: dict[str, dict[str, object]]) -> None:
    rows = rows_of(trial(files))
    assert [question.text for question in rows.questions] == ["held out?"]
    assert [pair.kind for pair in rows.pairs] == ["value", ""]
    assert rows.pairs[0].cluster == rows.pairs[1].cluster  # one prompt


def test_without_an_sft_stage_the_last_stages_prompts_are_asked(files: dict[str, dict[str, object]]) -> None:
    recipe = trial(files)
    rows = rows_of(recipe.model_copy(update={"stages": [recipe.stages[1]]}))
    assert [question.text for question in rows.questions] == ["pair?"]
    assert rows.questions[0].accepted == ()  # of a pair, neither answer is the right one


def test_no_held_out_rows_are_said_to_be_missing(files: dict[str, dict[str, object]]) -> None:
    recipe = trial(files)
    bare = [stage.model_copy(update={"heldout": []}) for stage in recipe.stages]
    rows = rows_of(recipe.model_copy(update={"stages": bare}))
    assert rows.questions == [] and rows.pairs == []
    assert rows.no_questions == "stage 'sft' has no held-out rows, and `compare.prompts` is empty"
    assert rows.no_pairs == "stage 'dpo' has no held-out pairs, and `compare.preferences` is empty"
    only_sft = rows_of(recipe.model_copy(update={"stages": recipe.stages[:1]}))
    assert only_sft.no_pairs == "the run has no preference stage, and `compare.preferences` is empty"


def test_num_prompts_counts_usable_prompts(files: dict[str, dict[str, object]]) -> None:
    assert len(rows_of(trial(files, prompts=[files["eval"]], num_prompts=2)).questions) == 2


def test_a_prompt_needs_room_for_its_answer(files: dict[str, dict[str, object]]) -> None:
    recipe = trial(files, prompts=[files["eval"]])
    longest = max(len(question.prompt_ids) for question in rows_of(recipe).questions)
    assert len(rows_of(recipe, max_positions=longest + 8).questions) == 3
    rows = rows_of(recipe, max_positions=longest + 7)
    assert len(rows.questions) == 2
    assert "1 of the rows leave no room for an answer within the model's positions; they were left out." in rows.notes


def test_pairs_where_prompts_are_wanted_and_the_other_way_round(files: dict[str, dict[str, object]]) -> None:
    with pytest.raises(DataError, match="chosen"):
        rows_of(trial(files, preferences=[files["eval"]]))


def test_prompts_are_what_inference_feeds(files: dict[str, dict[str, object]]) -> None:
    question = rows_of(trial(files, prompts=[files["eval"]])).questions[0]
    assert list(question.prompt_ids) == renderer(CHATML).prompt_ids((Message("user", "a?"),))


def test_lengths_count_trained_tokens(files: dict[str, dict[str, object]]) -> None:
    chosen, rejected = branch_lengths(rows_of(trial(files)).pairs[0])
    assert 0 < chosen < rejected


def test_a_conversation_is_shown_with_its_roles() -> None:
    assert shown((Message("user", "hi"),)) == "hi"
    assert shown((Message("system", "be kind"), Message("user", "hi"))) == "system: be kind\n\nuser: hi"
    assert shown("raw") == "raw"


def test_a_question_is_asked_with_its_tools(files: dict[str, dict[str, object]], tmp_path: Path) -> None:
    tools = [{"type": "function", "function": {"name": "look_up", "description": "Looks.", "parameters": {}}}]
    messages = [{"role": "user", "content": "where?"}, {"role": "assistant", "content": "there"}]
    prompts = write(tmp_path / "tools.jsonl", [{"messages": messages, "tools": tools}])
    template = "{% if tools %}{{ '<|im_start|>tools\\n' + tools | tojson + '<|im_end|>' + '\\n' }}{% endif %}" + CHATML
    rendering = renderer(template)
    recipe = trial(files, prompts=[prompts], preferences=[files["pairs"]])
    (question,) = compared_rows(recipe, rendering, max_new_tokens=8, max_positions=None).questions
    assert "look_up" in rendering.codec.decode(question.prompt_ids)
