"""What a run folder keeps and what `recipe explain` shows: every value, its unit, its origin, its reason."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunesmith.recipe.explain import dump_resolved, explain, write_value
from tunesmith.recipe.fields import leaves
from tunesmith.recipe.load import load_recipe, parse_recipe
from tunesmith.recipe.resources import shipped_recipes
from tunesmith.recipe.yaml12 import Value, read

VALUES = {
    "name": "n",
    "model": {"path": "embedded:quickstart"},
    "stages": [{"name": "dpo", "method": "dpo", "train": [{"path": "x y.jsonl", "columns": {"prompt": "Q: 1"}}]}],
    "compare": {"style": {"description": "short # and \u2028 kind\nto you \U0001f600\x7f", "pattern": '\\d+ "yes"\''}},
}


def test_a_dumped_recipe_loads_to_an_equal_one(tmp_path: Path) -> None:
    loaded = parse_recipe(VALUES, ["stages.dpo.learning_rate=1e-6", "seed=3"])
    path = tmp_path / "resolved.yaml"
    path.write_text(dump_resolved(loaded), encoding="utf-8")
    assert load_recipe(path).recipe == loaded.recipe


@pytest.mark.parametrize("name", list(shipped_recipes()))
def test_shipped_recipes_survive_dump_and_load(name: str, tmp_path: Path) -> None:
    loaded = load_recipe(shipped_recipes()[name])
    path = tmp_path / "resolved.yaml"
    path.write_text(dump_resolved(loaded), encoding="utf-8")
    assert load_recipe(path).recipe == loaded.recipe


def test_a_dump_says_where_every_value_came_from(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("name: n\nmodel: {path: b}\nstages: [{name: a, method: sft, train: [{path: x}]}]\n")
    lines = dump_resolved(load_recipe(path, ["seed=3"], source="recipe.yaml")).splitlines()
    assert lines[:4] == [
        "name: n  # recipe.yaml:1",
        "model:",
        "  path: b  # recipe.yaml:2",
        "  revision: null  # default",
    ]
    assert "  - name: a  # recipe.yaml:3" in lines
    assert "      - path: x  # recipe.yaml:3" in lines
    assert "seed: 3  # override" in lines
    assert len([line for line in lines if "  # " in line]) == len(list(leaves(load_recipe(path).recipe)))


def test_a_file_name_cannot_break_out_of_its_comment() -> None:
    text = dump_resolved(parse_recipe(VALUES, source="x\nseed: 5"))
    assert "name: n  # x?seed: 5" in text.splitlines()


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "null"),
        (True, "true"),
        (1e-05, "1e-05"),
        (2.0, "2.0"),
        ("runs", "runs"),
        ("a/b.jsonl", "a/b.jsonl"),
        ("no", "no"),
        ("null", '"null"'),
        ("1e-4", '"1e-4"'),
        ("12", '"12"'),
        ("", '""'),
        ("a: b", '"a: b"'),
        (["q_proj", "3"], '[q_proj, "3"]'),
        ({"prompt": "question"}, "{prompt: question}"),
        ("\x85\u2028\U000e0001", '"\\x85\\u2028\\U000e0001"'),
    ],
)
def test_write_value(value: Value, text: str) -> None:
    assert write_value(value) == text


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_every_text_reads_back(text: str) -> None:
    assert read(f"key: {write_value(text)}  # comment", where="r").value == {"key": text}


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_every_number_reads_back(number: float) -> None:
    assert read(f"key: {write_value(number)}", where="r").value == {"key": number}


def test_rows_have_value_unit_origin_and_why() -> None:
    rows = {row.path: row for row in explain(parse_recipe(VALUES, ["stages.dpo.max_length=512"]))}
    row = rows["stages[0].max_length"]
    assert (row.value, row.unit, row.origin) == ("512", "tokens", "override stages.dpo.max_length=512")
    assert row.why == "Longest prompt + answer in tokens; `too_long` says what becomes of longer rows."
    assert rows["stages[0].beta"].origin == "default"
    assert rows["name"].origin == "recipe"
    assert rows["stages[0].max_steps"].unit == "steps"  # also where the type allows null
    assert all(row.why for row in rows.values())
