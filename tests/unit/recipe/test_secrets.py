"""A recipe that holds a secret is refused, and the secret is not repeated."""

from __future__ import annotations

from pathlib import Path

import pytest

from tunesmith.errors import RecipeError
from tunesmith.recipe.load import load_recipe, parse_recipe

HF = "hf_" + "aB3dE6gH9jK2mN5pQ8sT1vW4"
STAGE = {"name": "sft", "method": "sft", "train": [{"path": "a.jsonl"}]}


def refused(values: dict[str, object], *overrides: str) -> str:
    with pytest.raises(RecipeError) as caught:
        parse_recipe(values, overrides)
    return str(caught.value)


def test_a_token_anywhere_is_refused_with_its_place(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"name: demo\nmodel: {{path: base, revision: {HF}}}\n"
        "stages:\n- name: sft\n  method: sft\n  train:\n  - path: https://me:w0rd@host/a.jsonl\n"
    )
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, source="recipe.yaml")
    message = str(caught.value)
    assert "recipe.yaml:2:31: model.revision: holds a secret (an access token)" in message
    assert "recipe.yaml:7:11: stages[0].train[0].path: holds a secret (a user name and password" in message
    assert HF not in message and "w0rd" not in message
    assert "HF_TOKEN" in message


def test_an_override_is_not_repeated() -> None:
    message = refused({"name": "demo", "model": {"path": "base"}, "stages": [STAGE]}, f"model.revision={HF}")
    assert HF not in message
    assert message.startswith("override model.revision=[SECRET]: model.revision: holds a secret")


def test_keys_and_the_values_of_variables_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0a1b2c3d4e5f")
    message = refused({"name": "demo", "model": {"path": "x/0a1b2c3d4e5f"}, "stages": [STAGE], HF: 1})
    assert "model.path: holds a secret (the value of the environment variable WANDB_API_KEY)" in message
    assert "0a1b2c3d4e5f" not in message and HF not in message


def test_a_name_for_a_token_is_an_unknown_key() -> None:
    assert "unknown key 'hf_token'" in refused(
        {"name": "d", "model": {"path": "b", "hf_token": "x"}, "stages": [STAGE]}
    )
