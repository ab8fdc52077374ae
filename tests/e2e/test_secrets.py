"""S18: canaries in the environment, in rows, in words of the command line; then every byte of a whole run is searched.

One process runs the commands one after another, the test watches its children's command lines meanwhile. Rows are the
user's content: they may lie, as they are, in the cache of prepared rows (mode 0700), and nowhere else.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest

from tests.support.folders import make_model_folder, pairs, questions, tiny_recipe, write_rows

# Each is put together here, so that no scanner takes this file for a leak.
ENVIRONMENT = {
    "HF_TOKEN": "hf_" + "CanaryOne1234567890abcdefghij",
    "OPENAI_API_KEY": "sk-" + "CanaryTwo1234567890abcdefghij",
    "AWS_SECRET_ACCESS_KEY": "CanaryThree/+bPxRfiCYEXAMPLEKEY0123456789",
    "STORE_PASSWORD": "canary four & more",
    "HTTPS_PROXY": "http://canaryuser:canarypass5@127.0.0.1:9",
}
IN_ROWS = {"row token": "ghp_" + "CanarySix1234567890abcdef", "row address": "https://canaryuser:canarypass7@host"}
IN_WORDS = {"override": "hf_" + "CanaryEight1234567890abcdefg", "recipe": "https://canaryuser:canarypass9@host/model"}
NEEDLES = {**ENVIRONMENT, **IN_ROWS, **IN_WORDS} | {"HTTPS_PROXY": "canarypass5", "recipe": "canarypass9"}
NEEDLES |= {"row address": "canarypass7"}

PROGRAM = """
import json, logging, os, sys, warnings
from tunesmith.cli.main import main
import tunesmith.pipeline.run as pipeline

def call(*words):
    try:
        main(words)
    except SystemExit as ended:
        print("EXIT", ended.code, flush=True)

def refuse(*_, **__):
    raise RuntimeError("the store at https://a:canarypass5@h refused " + os.environ["STORE_PASSWORD"])

for words in json.loads(sys.argv[1]):
    call(*words)
logging.getLogger("huggingface_hub").warning("token %s", os.environ["HF_TOKEN"])
warnings.warn("token " + os.environ["HF_TOKEN"])
whole, pipeline.run_stage = pipeline.run_stage, refuse
for words in json.loads(sys.argv[2]):
    call(*words)
"""


@dataclass(frozen=True)
class Ran:
    """What the commands left: their folder, what they printed, and every command line that was seen."""

    folder: Path
    exits: list[str]
    printed: bytes
    command_lines: bytes


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    root = tmp_path_factory.mktemp("canaries")
    inputs, work = root / "inputs", root / "work"
    work.mkdir()
    _write_inputs(inputs, work)
    good = [
        ["check", str(inputs / "recipe.json.yaml")],
        ["run", str(inputs / "recipe.json.yaml")],
        ["compare", "runs/tiny"],
        ["merge", "runs/tiny"],
        ["data", "show", str(inputs / "sft.jsonl"), "--html", "rows.html", "--num-rows", "2"],
        ["data", "audit", str(inputs / "sft.jsonl"), "--json", "audit.json"],
        ["run", str(inputs / "held.yaml")],
        ["run", str(inputs / "recipe.json.yaml"), f"model.revision={IN_WORDS['override']}", "--debug"],
        ["check", f"--{IN_WORDS['override']}"],
        [IN_WORDS["recipe"]],
    ]
    failing = [["run", str(inputs / "recipe.json.yaml"), "name=failing", "seed=5", "--debug"]]
    folders = {"XDG_CACHE_HOME": "cache", "HF_HOME": "hf", "TMPDIR": "tmp", "HOME": "home"}
    for name in folders.values():
        (work / name).mkdir()
    variables = {**os.environ, **ENVIRONMENT, **{key: str(work / name) for key, name in folders.items()}}
    # The words with canaries go in through a file: a person's own command line is not ours to hide.
    program = PROGRAM.replace("sys.argv[1]", repr(json.dumps(good))).replace("sys.argv[2]", repr(json.dumps(failing)))
    (inputs / "program.py").write_text(program)
    command = [sys.executable, str(inputs / "program.py")]
    with (root / "printed").open("wb") as printed:
        child = subprocess.Popen(command, cwd=work, env=variables, stdout=printed, stderr=subprocess.STDOUT)
        lines = _watch(child)
    found = (root / "printed").read_bytes()
    exits = [line for line in found.decode().splitlines() if line.startswith("EXIT")]
    return Ran(work, exits, found, lines)


def _write_inputs(inputs: Path, work: Path) -> None:
    make_model_folder(inputs / "model")
    rows = questions(8)
    rows[0]["answer"] = f"It is {IN_ROWS['row token']}."
    rows[1]["question"] = f"What is at {IN_ROWS['row address']}/x?"
    write_rows(inputs / "sft.jsonl", rows)
    preferences = pairs(8)
    preferences[0]["chosen"] = f"Gladly: {IN_ROWS['row token']}"
    write_rows(inputs / "pairs.jsonl", preferences)
    held = [{**row, "prompt": f"And {row['prompt']}"} for row in pairs(4)]
    held[0]["prompt"] = f"And {IN_ROWS['row address']}/y?"
    write_rows(inputs / "heldout.jsonl", held)
    recipe = tiny_recipe(inputs, runs_folder=str(work / "runs"), data_workers=2)
    prompts = [{"path": str(inputs / "heldout.jsonl")}]
    recipe["compare"] = {"prompts": prompts, "preferences": prompts, "max_new_tokens": 4, "num_prompts": 4}
    (inputs / "recipe.json.yaml").write_text(json.dumps(recipe))
    (inputs / "held.yaml").write_text(json.dumps(recipe | {"model": {"path": IN_WORDS["recipe"]}}))


def _watch(child: subprocess.Popen[bytes]) -> bytes:
    """The command lines of the process and of all below it, until it ends."""
    seen: set[str] = set()
    root = psutil.Process(child.pid)
    deadline = time.monotonic() + 300
    while child.poll() is None:
        assert time.monotonic() < deadline, "the commands hang"
        try:
            for process in [root, *root.children(recursive=True)]:
                seen.update(process.cmdline())
        except psutil.Error:
            pass
        time.sleep(0.05)
    return "\n".join(seen).encode()


def test_the_commands_ended_as_they_should(ran: Ran) -> None:
    # check, run, compare, merge, show; audit (a secret is a blocker); the refused ones; the failing run
    codes = [int(line.split()[1]) for line in ran.exits]
    assert codes == [0, 0, 0, 0, 0, 2, 2, 2, 2, 2, 1], ran.printed.decode()


def test_no_canary_is_in_any_file(ran: Ran) -> None:
    files = [path for path in ran.folder.rglob("*") if path.is_file()]
    prepared = ran.folder / "cache/tunesmith/prepared"
    names = {path.name for path in files}
    assert {"log.jsonl", "report.html", "ledger.parquet", "recipe.yaml", "rows.html", "answers.jsonl"} <= names
    leaks = [
        f"{path.relative_to(ran.folder)}: {name}"
        for path in files
        for name, needle in NEEDLES.items()
        if not (name in IN_ROWS and prepared in path.parents)
        if needle.encode() in _content(path) or json.dumps(needle)[1:-1].encode() in _content(path)
    ]
    assert not leaks


def _content(path: Path) -> bytes:
    """A file's bytes; of a compressed table its values."""
    if path.suffix == ".parquet":
        return json.dumps(pq.read_table(path).to_pylist(), default=str).encode()
    return path.read_bytes()


def test_no_canary_is_printed(ran: Ran) -> None:
    leaks = [name for name, needle in NEEDLES.items() if needle.encode() in ran.printed]
    assert not leaks, ran.printed.decode()
    assert b"Traceback" in ran.printed  # of the failing run, with --debug
    assert b"[value of STORE_PASSWORD]" in ran.printed
    assert b"token [SECRET]" in ran.printed or b"token [value of HF_TOKEN]" in ran.printed


def test_no_canary_is_in_a_command_line(ran: Ran) -> None:
    assert not [name for name, needle in NEEDLES.items() if needle.encode() in ran.command_lines]


def test_the_error_is_in_the_log_without_the_secret(ran: Ran) -> None:
    last = json.loads((ran.folder / "runs/failing/log.jsonl").read_text().splitlines()[-1])
    assert last["kind"] == "RuntimeError"
    assert "[value of STORE_PASSWORD]" in last["text"] and "refuse" in last["traceback"]


def test_what_was_made_is_private(ran: Ran) -> None:
    """S23: the run folder and the caches are the user's alone."""
    for name in ("runs/tiny", "cache/tunesmith/prepared", "cache/tunesmith/reference"):
        assert (name, oct((ran.folder / name).stat().st_mode & 0o777)) == (name, "0o700")
    assert (ran.folder / "runs/tiny/log.jsonl").stat().st_mode & 0o777 == 0o600
