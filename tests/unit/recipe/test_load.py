"""Every error of a recipe names the file, line, column and key path, and what would be right."""

from __future__ import annotations

from pathlib import Path

import pytest

from tunesmith.errors import RecipeError
from tunesmith.recipe.fields import models_in
from tunesmith.recipe.load import Origin, load_named, load_recipe, parse_recipe
from tunesmith.recipe.models import DpoStage, Full, Lora, Model, Recipe, SftStage, Source

STAGES = models_in(Recipe.model_fields["stages"].annotation)
METHODS = [str(kind.model_fields["method"].default) for kind in STAGES if "method" in kind.model_fields]
ALL_METHODS = f"{', '.join(map(repr, METHODS[:-1]))} or {METHODS[-1]!r}"
GOOD = """\
name: demo
model: {path: base}
stages:
  - name: sft
    method: sft
    train: [{path: sft.jsonl}]
    learning_rate: 1e-4
  - name: dpo
    method: dpo
    train: [{path: pairs.jsonl}]
    beta: 1
"""


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = Path("recipe.yaml")
    path.write_text(GOOD, encoding="utf-8")
    return path


def refusal(path: Path, text: str, *overrides: str) -> str:
    path.write_text(text, encoding="utf-8")
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, overrides)
    return str(caught.value)


def test_a_good_recipe(file: Path) -> None:
    recipe = load_recipe(file).recipe
    sft, dpo = recipe.stages
    assert isinstance(sft, SftStage)
    assert isinstance(dpo, DpoStage)
    assert sft.learning_rate == 1e-4
    assert dpo.beta == 1.0
    assert dpo.tuning == Lora(r=16, alpha=32.0)


def test_origins(file: Path) -> None:
    loaded = load_recipe(file, ["stages.dpo.beta=0.3", "compare.num_prompts=5"])
    assert loaded.origins["stages[0].learning_rate"] == Origin("recipe", "recipe.yaml", 7, 20)
    assert loaded.origins["stages[1].beta"] == Origin("override", text="stages.dpo.beta=0.3")
    assert loaded.origins["compare.num_prompts"].short() == "override"
    assert loaded.origins["compare.num_shown"] == Origin("default")
    assert loaded.origins["stages[1].tuning.r"].short() == "default"
    assert loaded.origins["model.path"].short() == "recipe.yaml:2"
    assert loaded.overrides == ("stages.dpo.beta=0.3", "compare.num_prompts=5")


def test_an_override_of_a_mapping_replaces_what_was_below(file: Path) -> None:
    file.write_text(GOOD + "compare: {num_prompts: 7, num_shown: 3}\n", encoding="utf-8")
    loaded = load_recipe(file, ["compare={num_shown: 2}"])
    assert (loaded.recipe.compare.num_prompts, loaded.recipe.compare.num_shown) == (200, 2)
    assert loaded.origins["compare.num_prompts"] == Origin("default")
    assert loaded.origins["compare.num_shown"] == Origin("override", text="compare={num_shown: 2}")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("beta: 1", "betaa: 1", "recipe.yaml:11:5: stages[1].betaa: unknown key 'betaa'; did you mean 'beta'?"),
        ("name: demo", "nmae: demo\nname: demo", "recipe.yaml:1:1: nmae: unknown key 'nmae'; did you mean 'name'?"),
        (
            "model: {path: base}",
            "model: {path: base, xyz: 1}",
            "recipe.yaml:2:21: model.xyz: unknown key 'xyz'; "
            "known are path, revision, dtype, quantization, attention, kernels, compile, chat_template",
        ),
        (
            "learning_rate: 1e-4",
            "lr: 1e-4",
            "recipe.yaml:7:5: stages[0].lr: unknown key 'lr'; here it is learning_rate",
        ),
        (
            "learning_rate: 1e-4",
            "beta: 0.1",
            "recipe.yaml:7:5: stages[0].beta: unknown key 'beta'; it belongs to the method dpo, "
            "robust_dpo, hinge and 20 more",
        ),
        ("beta: 1", "beta: -1", "recipe.yaml:11:11: stages[1].beta: must be greater than 0, not -1"),
        ("beta: 1", "beta: ten", "recipe.yaml:11:11: stages[1].beta: must be a number, not 'ten'"),
        ("beta: 1", "beta: .inf", "recipe.yaml:11:11: stages[1].beta: must be a finite number, not inf"),
        ("beta: 1", "beta: .nan", "recipe.yaml:11:11: stages[1].beta: must be a finite number, not nan"),
        ("beta: 1", "beta:", "recipe.yaml:11:5: stages[1].beta: must be a number, not null (nothing)"),
        ("beta: 1", "epochs: 1.5", "recipe.yaml:11:13: stages[1].epochs: must be a whole number, not 1.5"),
        ("beta: 1", "epochs: '2'", "recipe.yaml:11:13: stages[1].epochs: must be a whole number, not '2'"),
        ("beta: 1", "epochs: true", "recipe.yaml:11:13: stages[1].epochs: must be a whole number, not true"),
        (
            "beta: 1",
            "offload_activations: no",
            "recipe.yaml:11:26: stages[1].offload_activations: must be true or false, not 'no'",
        ),
        ("name: demo", "name: 3", "recipe.yaml:1:7: name: must be text, not 3"),
        (
            "name: demo",
            "name: ../up",
            "recipe.yaml:1:7: name: must be text that matches ^[A-Za-z0-9][A-Za-z0-9._-]{0,80}$, not '../up'",
        ),
        (
            "beta: 1",
            "schedule: cosin",
            "recipe.yaml:11:15: stages[1].schedule: must be 'cosine', 'linear' or 'constant', not 'cosin'; "
            "did you mean 'cosine'?",
        ),
        (
            "method: dpo",
            "method: dop",
            f"recipe.yaml:9:13: stages[1].method: must be {ALL_METHODS}, not 'dop'; did you mean 'dpo'?",
        ),
        (
            "    method: dpo\n",
            "",
            f"recipe.yaml:8:5: stages[1].method: this key is required: {ALL_METHODS}",
        ),
        ("    train: [{path: pairs.jsonl}]\n", "", "recipe.yaml:8:5: stages[1].train: this key is required"),
        (
            "train: [{path: pairs.jsonl}]",
            "train: []",
            "recipe.yaml:10:12: stages[1].train: must have at least one item",
        ),
        (
            "train: [{path: pairs.jsonl}]",
            "train: pairs.jsonl",
            "recipe.yaml:10:12: stages[1].train: must be a list, not 'pairs.jsonl'",
        ),
        (
            "train: [{path: pairs.jsonl}]",
            "train: [pairs.jsonl]",
            "recipe.yaml:10:13: stages[1].train[0]: must be a mapping, not 'pairs.jsonl'",
        ),
        (
            "path: pairs.jsonl",
            "path: ''",
            "recipe.yaml:10:20: stages[1].train[0].path: must not be empty",
        ),
        (
            "{path: pairs.jsonl}",
            "{path: p, columns: {dpo: 3}}",
            "recipe.yaml:10:38: stages[1].train[0].columns.dpo: must be text, not 3",
        ),
        (
            "beta: 1",
            "tuning: {kind: lor}",
            "recipe.yaml:11:20: stages[1].tuning.kind: must be 'lora' or 'full', not 'lor'; did you mean 'lora'?",
        ),
        ("beta: 1", "tuning: full", "recipe.yaml:11:13: stages[1].tuning: must be a mapping, not 'full'"),
        (
            "beta: 1",
            "tuning: {kind: full, r: 8}",
            "recipe.yaml:11:26: stages[1].tuning.r: unknown key 'r'; known are kind, train_only, freeze",
        ),
        (
            "beta: 1",
            "tuning: {target_modules: 3}",
            "recipe.yaml:11:30: stages[1].tuning.target_modules: must be 'all-linear' or a list, not 3",
        ),
        (
            "beta: 1",
            "tuning: {target_modules: [q_proj, 3]}",
            "recipe.yaml:11:39: stages[1].tuning.target_modules[1]: must be text, not 3",
        ),
        (
            "model: {path: base}",
            "model: base",
            "recipe.yaml:2:8: model: must be a mapping, not 'base'",
        ),
    ],
)
def test_wrong_values(file: Path, old: str, new: str, message: str) -> None:
    assert old in GOOD
    assert refusal(file, GOOD.replace(old, new, 1)) == message


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "name: dpo",
            "name: sft",
            "recipe.yaml:8:11: stages[1].name: 'sft' is already the name of stages[0]; names are folders",
        ),
        (
            "name: dpo",
            "name: base",
            "recipe.yaml:8:11: stages[1].name: 'base' is a reserved word; give the stage another name",
        ),
        (
            "beta: 1",
            "keep: best",
            "recipe.yaml:11:11: stages[1].keep: 'best' needs held-out rows: set heldout or heldout_fraction",
        ),
        (
            "beta: 1",
            "heldout_fraction: 0.1\n    keep: best",
            "recipe.yaml:12:11: stages[1].keep: 'best' needs evaluations to choose from: set eval_every",
        ),
        (
            "beta: 1",
            "eval_every: 5",
            "recipe.yaml:11:17: stages[1].eval_every: there are no held-out rows: "
            "set heldout or heldout_fraction, or 0 here",
        ),
        (
            "beta: 1",
            "heldout: [{path: h}]\n    heldout_fraction: 0.1",
            "recipe.yaml:12:23: stages[1].heldout_fraction: heldout already names the held-out rows; "
            "set only one of the two",
        ),
        (
            "{path: base}",
            "{path: base, quantization: nf4}\nx-stages: 0",
            "recipe.yaml:3:1: x-stages: unknown key 'x-stages'; did you mean 'stages'?",
        ),
        (
            "beta: 1",
            "tuning: {target_modules: []}",
            "recipe.yaml:11:30: stages[1].tuning.target_modules: must name at least one module, or be all-linear",
        ),
        (
            "learning_rate: 1e-4",
            "replay: {sources: [{path: t, format: alpaca}]}",
            "recipe.yaml:7:42: stages[0].replay.sources[0].format: replayed rows are plain text: "
            "use text or auto, not alpaca",
        ),
        (
            "method: sft\n    train: [{path: sft.jsonl}]",
            "method: completion\n    train: [{path: t, format: messages}]",
            "recipe.yaml:6:31: stages[0].train[0].format: a completion stage trains plain text: "
            "use text or auto, not messages",
        ),
        (
            "beta: 1",
            "beta: 1\ncompare: {style: {description: d, pattern: '('}}",
            "recipe.yaml:12:44: compare.style.pattern: is not a regular expression: "
            "missing ), unterminated subpattern at position 0",
        ),
    ],
)
def test_broken_rules(file: Path, old: str, new: str, message: str) -> None:
    assert old in GOOD
    assert refusal(file, GOOD.replace(old, new, 1)) == message


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_quantized_weights_are_not_trained_in_full(file: Path, kind: str) -> None:
    base = f"{{path: base, quantization: {kind}}}"
    text = GOOD.replace("{path: base}", base).replace("beta: 1", "tuning: {kind: full}")
    assert refusal(file, text) == (
        f"recipe.yaml:11:20: stages[1].tuning.kind: {kind} weights cannot be trained: "
        "use lora, or model.quantization: none"
    )


def test_several_errors_at_once_in_the_order_of_the_file(file: Path) -> None:
    text = GOOD.replace("beta: 1", "beta: 0").replace("1e-4", "fast").replace("name: demo", "name: demo\nsede: 1")
    assert refusal(file, text, "seed=x").splitlines() == [
        "override seed=x: seed: must be a whole number, not 'x'",
        "recipe.yaml:2:1: sede: unknown key 'sede'; did you mean 'seed'?",
        "recipe.yaml:8:20: stages[0].learning_rate: must be a number, not 'fast'",
        "recipe.yaml:12:11: stages[1].beta: must be greater than 0, not 0",
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "recipe.yaml: the file is empty\n  `tunesmith recipe list` names recipes to start from."),
        ("- a\n", "recipe.yaml:1: the top level must be a mapping of keys to values, not a list"),
        ("\njust words\n", "recipe.yaml:2: the top level must be a mapping of keys to values, not a scalar"),
        (
            "name: a\nname: b\n",
            "recipe.yaml:2:1: name: the key stands twice, first in line 1\n  Remove one of the two.",
        ),
    ],
)
def test_files_that_are_no_recipe(file: Path, text: str, message: str) -> None:
    assert refusal(file, text) == message


def test_a_missing_file() -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe("nowhere/recipe.yaml")
    assert str(caught.value) == (
        "nowhere/recipe.yaml: no such file\n  `tunesmith recipe list` names the recipes that come with Tunesmith."
    )


def test_a_folder(file: Path) -> None:
    with pytest.raises(RecipeError, match=r"^\.: this is a folder, not a recipe file$"):
        load_recipe(".")


def test_an_unreadable_file(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path, mode: str) -> None:
        raise PermissionError(13, "Permission denied")  # chmod would not stop root

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(RecipeError, match=r"^recipe\.yaml: cannot be read: Permission denied$"):
        load_recipe(file)


def test_the_environment_is_not_read(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CANARY", "x")
    file.write_text(GOOD.replace("path: base", "path: '$CANARY/${CANARY}'"), encoding="utf-8")
    assert load_recipe(file).recipe.model.path == "$CANARY/${CANARY}"


def test_a_mapping_in_a_notebook() -> None:
    values = {"name": "n", "model": {"path": "b"}, "stages": [{"name": "a", "method": "sft", "train": [{"path": "x"}]}]}
    loaded = parse_recipe(values, ["stages.a.epochs=3"])
    assert loaded.recipe.stages[0].epochs == 3
    assert loaded.origins["model.path"] == Origin("recipe", "recipe")
    assert loaded.source_path is None
    assert values["stages"] == [{"name": "a", "method": "sft", "train": [{"path": "x"}]}]  # not changed by overrides


def test_a_wrong_mapping_in_a_notebook() -> None:
    with pytest.raises(RecipeError, match=r"^recipe: stages: must have at least one item$"):
        parse_recipe({"name": "n", "model": {"path": "b"}, "stages": []})


def test_a_recipe_built_from_the_models_is_checked_too() -> None:
    stage = SftStage(name="a", train=[Source(path="x")], tuning=Full(), keep="best")
    recipe = Recipe(name="n", model=Model(path="b"), stages=[stage])
    with pytest.raises(RecipeError) as caught:
        parse_recipe(recipe)
    assert str(caught.value).startswith("recipe: stages[0].keep: 'best' needs held-out rows")
    assert parse_recipe(recipe, ["stages.a.keep=final"]).recipe.stages[0].tuning == Full()


def test_models_inside_a_mapping() -> None:
    stage = SftStage(name="a", train=[Source(path="x")], epochs=2)
    loaded = parse_recipe({"name": "n", "model": Model(path="b"), "stages": [stage]}, ["stages.a.tuning.r=4"])
    assert loaded.recipe.stages[0].tuning == Lora(r=4)
    assert loaded.origins["stages[0].epochs"].short() == "recipe"
    assert loaded.origins["stages[0].batch_size"].short() == "default"


def test_a_shipped_recipe_by_name() -> None:
    loaded = load_named("dpo-mix-7k")
    assert loaded.source == "dpo-mix-7k.yaml"
    assert loaded.origins["name"].short() == "dpo-mix-7k.yaml:3"


def test_a_file_goes_before_a_shipped_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("dpo-mix-7k").write_text(GOOD, encoding="utf-8")
    assert load_named("dpo-mix-7k").recipe.name == "demo"
