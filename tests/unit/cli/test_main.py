"""The command: what each one calls, what it prints, and the code that it ends with."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import NoReturn

import pytest

from tunesmith.cli.main import main
from tunesmith.errors import (
    DataError,
    LockedError,
    NumericsError,
    ResourceError,
    ResumeError,
    StoppedError,
)
from tunesmith.recipe.load import LoadedRecipe

RECIPE = "name: demo\nmodel: {path: base}\nstages: [{name: sft, method: sft, train: [{path: a.jsonl}]}]\n"


class Outcome:
    """What one call of the command printed and ended with."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err


@pytest.fixture
def command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Outcome]:
    monkeypatch.chdir(tmp_path)
    Path("recipe.yaml").write_text(RECIPE, encoding="utf-8")

    def call(*words: str) -> Outcome:
        with pytest.raises(SystemExit) as ended:
            main(words)
        captured = capsys.readouterr()
        assert isinstance(ended.value.code, int)
        return Outcome(ended.value.code, captured.out, captured.err)

    return call


def stand_in(monkeypatch: pytest.MonkeyPatch, module: str, **functions: object) -> None:
    """Put a module of stand-ins where the real, heavy one would be imported from."""
    replacement = ModuleType(module)
    vars(replacement).update(functions)
    monkeypatch.setitem(sys.modules, module, replacement)


def test_help_names_every_command(command: Callable[..., Outcome]) -> None:
    shown = command("--help")
    assert shown.code == 0
    listed = [line.split()[0] for line in shown.out.split("Commands:\n")[1].splitlines()]
    assert listed[:6] == ["quickstart", "data", "check", "calibrate", "run", "diagnose"]
    assert listed[6:] == ["compare", "chat", "merge", "score", "recipe", "doctor"]


def test_no_words_print_the_help(command: Callable[..., Outcome]) -> None:
    shown = command()
    assert shown.code == 0
    assert shown.out.startswith("Usage: tunesmith")


def test_version(command: Callable[..., Outcome]) -> None:
    shown = command("--version")
    assert (shown.code, shown.out) == (0, "tunesmith 0.1.0\n")


def test_an_unknown_command_names_the_nearest(command: Callable[..., Outcome]) -> None:
    shown = command("rnu", "recipe.yaml")
    assert shown.code == 2
    assert "No such command 'rnu'. Did you mean 'run'?" in shown.err
    assert shown.out == ""


def test_run_loads_the_recipe_and_says_what_comes_next(
    command: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[LoadedRecipe] = []

    def run_recipe(loaded: LoadedRecipe, **_: object) -> Path:
        given.append(loaded)
        return Path("runs/demo")

    stand_in(monkeypatch, "tunesmith.pipeline.run", run_recipe=run_recipe)
    shown = command("run", "recipe.yaml", "seed=3", "stages.sft.epochs=2")
    assert shown.code == 0
    assert given[0].recipe.seed == 3
    assert given[0].recipe.stages[0].epochs == 2
    assert "The run is in runs/demo." in shown.out
    assert "tunesmith compare runs/demo" in shown.out
    assert "tunesmith chat runs/demo" in shown.out


def test_quickstart_runs_and_compares(command: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[LoadedRecipe] = []

    def run_recipe(loaded: LoadedRecipe, **_: object) -> Path:
        given.append(loaded)
        return Path("runs") / loaded.recipe.name

    stand_in(monkeypatch, "tunesmith.pipeline.run", run_recipe=run_recipe)
    stand_in(monkeypatch, "tunesmith.comparison.run", compare_run=lambda run: run / "report.html")
    shown = command("quickstart", "--name", "2026", "--seed", "7")
    assert shown.code == 0
    assert (given[0].recipe.name, given[0].recipe.seed) == ("2026", 7)  # a name of digits stays a name
    assert "runs/2026/report.html" in shown.out


@pytest.mark.parametrize(("ok", "code"), [(True, 0), (False, 2)])
def test_check_prints_its_report(
    command: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch, ok: bool, code: int
) -> None:
    class Report:
        def __init__(self) -> None:
            self.ok = ok

        def __str__(self) -> str:
            return "three rows"

    stand_in(monkeypatch, "tunesmith.pipeline.check", check_recipe=lambda loaded, *, gpu_memory, bf16: Report())
    shown = command("check", "recipe.yaml")
    assert shown.code == code
    assert "three rows" in shown.out


def test_compare_chat_and_merge(command: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch) -> None:
    talked: list[tuple[Path, str | None]] = []
    stand_in(monkeypatch, "tunesmith.comparison.run", compare_run=lambda run: run / "report.html")
    stand_in(monkeypatch, "tunesmith.serve.chat", chat=lambda run, stage: talked.append((run, stage)))
    stand_in(monkeypatch, "tunesmith.export.merge", merge_run=lambda run, stage, to: to or run / f"export-{stage}")
    assert command("compare", "runs/demo").out == "The report is runs/demo/report.html.\n"
    assert command("chat", "runs/demo", "--stage", "sft").code == 0
    assert talked == [(Path("runs/demo"), "sft")]
    assert command("merge", "runs/demo", "--to", "out").out == "The merged model is in out.\n"


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (DataError("no rows", where="a.jsonl", remedy="Add some."), 2),
        (ResumeError("another run"), 3),
        (NumericsError("the loss is not finite"), 4),
        (ResourceError("the disk is full"), 5),
        (LockedError("in use"), 6),
        (StoppedError("stopped after step 3", signal_number=15), 143),
        (StoppedError("stopped after step 3", signal_number=2), 130),
        (MemoryError(), 5),
        (KeyboardInterrupt(), 130),
    ],
)
def test_exit_codes(
    command: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int
) -> None:
    def run_recipe(loaded: LoadedRecipe, **_: object) -> NoReturn:
        raise error

    stand_in(monkeypatch, "tunesmith.pipeline.run", run_recipe=run_recipe)
    shown = command("run", "recipe.yaml")
    assert shown.code == code
    assert str(error) in shown.err
    assert "Traceback" not in shown.err
    assert shown.out == ""


def test_a_bug_is_one_line_and_debug_shows_the_rest(
    command: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    def run_recipe(loaded: LoadedRecipe, **_: object) -> NoReturn:
        raise ZeroDivisionError("by\nzero")

    stand_in(monkeypatch, "tunesmith.pipeline.run", run_recipe=run_recipe)
    shown = command("run", "recipe.yaml")
    assert shown.code == 1
    assert shown.err == (
        "Error: a bug in Tunesmith: ZeroDivisionError: by zero\n"
        "  Run the command again with --debug for the traceback, and report it.\n"
    )
    for words in (("--debug", "run", "recipe.yaml"), ("run", "recipe.yaml", "--debug")):
        shown = command(*words)
        assert shown.code == 1
        assert "Traceback" in shown.err
        assert "ZeroDivisionError" in shown.err


def test_a_wrong_recipe_is_one_message(command: Callable[..., Outcome]) -> None:
    shown = command("run", "recipe.yaml", "seed=x")
    assert shown.code == 2
    assert shown.err == "Error: override seed=x: seed: must be a whole number, not 'x'\n"


def test_debug_shows_the_traceback_of_a_user_error(command: Callable[..., Outcome]) -> None:
    shown = command("run", "recipe.yaml", "seed=x", "--debug")
    assert shown.code == 2
    assert "Traceback" in shown.err


def test_recipe_schema_is_json(command: Callable[..., Outcome]) -> None:
    assert json.loads(command("recipe", "schema").out)["title"] == "Tunesmith recipe"


def test_recipe_explain_shows_value_unit_origin_and_why(command: Callable[..., Outcome]) -> None:
    shown = command("recipe", "explain", "recipe.yaml", "stages.sft.max_length=64")
    line = next(line for line in shown.out.splitlines() if line.startswith("stages[0].max_length"))
    assert line.split()[1:4] == ["64", "tokens", "override"]
    assert "Longest prompt + answer in tokens" in line
    assert any(line.split()[-0:3] == ["name", "demo", "recipe.yaml:1"] for line in shown.out.splitlines())


def test_recipe_list_names_the_shipped_ones(command: Callable[..., Outcome]) -> None:
    assert "zephyr-7b-ultrafeedback  mistralai/Mistral-7B-v0.1: sft -> dpo" in command("recipe", "list").out
