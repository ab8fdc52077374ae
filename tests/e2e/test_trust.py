"""S4, F40: a model of a hub of our own that brings code, through every command, with a canary in the code.

One process for all commands: the hub's client reads its settings when it is imported.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.folders import make_model_folder, questions, write_rows
from tests.support.hub import Hub, serving

CODE = """
import os
from transformers import LlamaConfig, LlamaForCausalLM

with open(os.environ["CANARY"], "a") as file:
    file.write("ran\\n")


class OwnConfig(LlamaConfig):
    model_type = "own_llama"


class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""

PROGRAM = """
import io, json, os, pathlib, sys
import tunesmith.data.hub as hub
from tunesmith.cli.main import main

hub.PAUSES_SECONDS = (0.0, 0.0)
canary = pathlib.Path(os.environ["CANARY"])

def call(*words):
    for name in [name for name in sys.modules if name.startswith("transformers_modules")]:
        del sys.modules[name]  # as in a process of its own
    canary.unlink(missing_ok=True)
    sys.stdin = io.StringIO("y\\n" * 5)
    sys.stderr = said = io.StringIO()
    try:
        main(words)
    except SystemExit as ended:
        text = " ".join(said.getvalue().split())
        print("RESULT", json.dumps([ended.code, canary.exists(), text]), flush=True)
    finally:
        sys.stderr = sys.__stderr__

for words in json.loads(sys.argv[1]):
    call(*words)
"""

Result = tuple[int, bool, str]


def hub_model(folder: Path) -> dict[str, bytes]:
    """A tiny Llama whose classes are its own."""
    make_model_folder(folder)
    config = json.loads((folder / "config.json").read_text())
    own = {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnModel"}
    config |= {"model_type": "own_llama", "architectures": ["OwnModel"], "auto_map": own}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "modeling_own.py").write_text(CODE)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def write_recipe(folder: Path) -> Path:
    write_rows(folder / "sft.jsonl", questions(4))
    source = {"path": str(folder / "sft.jsonl")}
    stage = {"name": "sft", "method": "sft", "train": [source], "batch_size": 4, "max_length": 128, "tuning": {"r": 2}}
    stage["tuning"] = {"kind": "lora", "r": 2}
    recipe = {"name": "own", "threads": 1, "model": {"path": "org/rows"}, "stages": [stage]}
    recipe["compare"] = {"prompts": [source], "max_new_tokens": 2, "num_prompts": 2}
    (folder / "recipe.yaml").write_text(json.dumps(recipe))
    return folder / "recipe.yaml"


def results(folder: Path, hub: Hub, *commands: list[str]) -> list[Result]:
    settings = {"HF_HOME": str(folder / "hf"), "HF_ENDPOINT": hub.endpoint, "HF_HUB_DISABLE_TELEMETRY": "1"}
    settings |= {"HF_HUB_OFFLINE": "0", "CANARY": str(folder / "canary"), "XDG_CACHE_HOME": str(folder / "cache")}
    settings |= {"TRUST_REMOTE_CODE": "1", "TUNESMITH_TRUST_REMOTE_CODE": "1"}  # no variable may switch it on
    ran = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(commands)],
        env={**os.environ, **settings},
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert ran.returncode == 0, ran.stderr
    found = [json.loads(line[7:]) for line in ran.stdout.splitlines() if line.startswith("RESULT ")]
    return [(code, canary, text) for code, canary, text in found]


TRUST = "--trust-remote-code"


@pytest.fixture(scope="module")
def through(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Result]:
    folder = tmp_path_factory.mktemp("trust")
    recipe = str(write_recipe(folder))
    with serving(Hub(kind="models")) as hub:
        commit = hub.push(hub_model(folder / "model"))
        hub.refusal, hub.num_refused = (503, "busy"), 2  # F40: the first command waits, and gets through
        pinned = f"model.revision={commit}"
        commands = {
            "run": ["run", recipe, pinned],
            "check": ["check", recipe, pinned],
            "show": ["data", "show", recipe],
            "unpinned": ["run", recipe, TRUST],
            "branch": ["check", recipe, "model.revision=main", TRUST],
            "short": ["run", recipe, f"model.revision={commit[:12]}", TRUST],
            "recipe key": ["run", recipe, "model.trust_remote_code=true"],
            "own folder": ["run", recipe, f"model.path={folder / 'model'}", pinned, TRUST, "name=folder"],
            "trusted run": ["run", recipe, pinned, TRUST],
            "compare": ["compare", "runs/own"],
            "chat": ["chat", "runs/own"],
            "merge": ["merge", "runs/own"],
            "trusted merge": ["merge", "runs/own", TRUST],
            "trusted chat": ["chat", "runs/own", TRUST],
            "data": ["data", "show", recipe, TRUST],
        }
        return dict(zip(commands, results(folder, hub, *commands.values()), strict=True))


@pytest.mark.parametrize("command", ["run", "check", "compare", "chat", "merge"])
def test_code_is_not_run_without_the_option(through: dict[str, Result], command: str) -> None:
    code, canary, text = through[command]
    assert (code, canary) == (2, False), text
    assert command == "check" or "--trust-remote-code" in text  # check says it in its table


def test_rows_are_shown_without_the_code(through: dict[str, Result]) -> None:
    assert through["show"][:2] == (0, False)


@pytest.mark.parametrize("command", ["unpinned", "branch", "short"])
def test_the_option_needs_a_pinned_commit(through: dict[str, Result], command: str) -> None:
    code, canary, text = through[command]
    assert (code, canary) == (2, False)
    assert "code is only run at a pinned commit" in text and "40-hex" in text


def test_neither_a_recipe_nor_other_commands_can_switch_it_on(through: dict[str, Result]) -> None:
    assert through["recipe key"][:2] == (2, False)
    assert "unknown key 'trust_remote_code'" in through["recipe key"][2]
    assert through["data"][:2] == (2, False)
    assert "No such option" in through["data"][2]


def test_code_in_a_folder_of_its_own_is_not_run(through: dict[str, Result]) -> None:
    code, canary, text = through["own folder"]
    assert (code, canary) == (2, False)
    assert "code is only run from a pinned commit of a hub model" in text


@pytest.mark.parametrize("command", ["trusted run", "trusted merge", "trusted chat"])
def test_pinned_and_allowed_it_works_through_all_commands(through: dict[str, Result], command: str) -> None:
    code, canary, text = through[command]
    assert (code, canary) == (0, True), text
