"""Hugging Face data sets, read from a hub of our own: commits, scripts, configurations, refusals, no network."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.folders import make_model_folder
from tests.support.hub import Files, Hub, serving

CANARY = b"import pathlib\npathlib.Path('canary').write_text('the script ran')\n"
READ = """
import json, sys
from tunesmith.data import hub
from tunesmith.data.sources import open_source, read_rows
from tunesmith.errors import DataError
from tunesmith.recipe.models import Source
hub.PAUSES_SECONDS = (0.01, 0.01, 0.01)
for settings in json.loads(sys.argv[1]):
    source = Source(**settings)
    try:
        opened = open_source(source)
        rows = [[row.id, dict(row.fields)] for row in read_rows(source)]
        print("RESULT", json.dumps([opened.revision, opened.content_sha(), rows]))
    except DataError as error:
        print("RESULT", json.dumps(str(error)))
"""


def jsonl(*texts: str) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


def read(folder: Path, hub: Hub, *sources: dict[str, object], offline: bool = False) -> list[list[object]]:
    """Each source in a process of its own, because the hub's client reads its settings when it is imported."""
    variables = {"HF_HOME": str(folder / "hf"), "HF_ENDPOINT": hub.endpoint, "HF_HUB_DISABLE_TELEMETRY": "1"}
    variables |= dict.fromkeys(("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE"), "01"[offline])
    result = subprocess.run(
        [sys.executable, "-c", READ, json.dumps(sources)],
        env={**os.environ, **variables},
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    return [json.loads(line[7:]) for line in result.stdout.splitlines() if line.startswith("RESULT ")]


def test_a_commit_stays_what_it_was_and_needs_no_network_again(tmp_path: Path) -> None:
    old_files: Files = {
        "data/train-0.jsonl": jsonl("a", "b", "c", "d"),
        "data/test-0.jsonl": jsonl("t"),
        "x.py": CANARY,
        "rows.py": CANARY,
    }
    with serving(Hub()) as hub:
        old = hub.push(old_files)
        newest: dict[str, object] = {"path": "org/rows"}
        pinned = {**newest, "revision": old}
        ((revision, sha, rows),) = read(tmp_path, hub, newest)
        assert revision == old
        assert rows[0] == ["org/rows:train[0]", {"text": "a"}]
        assert [row[1]["text"] for row in rows] == ["a", "b", "c", "d"]
        new = hub.push({**old_files, "data/train-0.jsonl": jsonl("new")})
        moved, kept, sliced, absent, unknown = read(
            tmp_path,
            hub,
            newest,
            pinned,
            {**pinned, "split": "train[1:3]"},
            {**pinned, "split": "validation"},
            {**newest, "revision": "v2"},
        )
        assert "there is no revision 'v2'" in str(unknown)
        assert moved[0] == new and [row[1]["text"] for row in moved[2]] == ["new"]
        assert kept == [old, sha, rows]
        assert [row[0] for row in sliced[2]] == ["org/rows:train[1]", "org/rows:train[2]"]
        assert sliced[1] not in (sha, moved[1])
        assert "there is no split `validation`\n  Set `split` to one of: train (4 rows), test (1 rows)." in str(absent)
        assert not any(line.endswith(".py") for line in hub.log)
        hub.log.clear()
        assert read(tmp_path, hub, pinned, offline=True) == [[old, sha, rows]]
        assert hub.log == []
    assert not list(tmp_path.rglob("canary"))
    assert not list(tmp_path.rglob("x.py"))


def test_only_the_configuration_of_the_card_is_downloaded(tmp_path: Path) -> None:
    card = b"---\nconfigs:\n- config_name: en\n  data_files: en/*\n- config_name: de\n  data_files:\n"
    card += b"  - split: train\n    path: de/*.jsonl\n---\n# Rows\n"
    with serving(Hub()) as hub:
        hub.push({"README.md": card, "en/a.jsonl": jsonl("one"), "en/a.py": CANARY, "de/a.jsonl": jsonl("eins")})
        path: dict[str, object] = {"path": "org/rows"}
        neither, english, french = read(tmp_path, hub, path, {**path, "config": "en"}, {**path, "config": "fr"})
        assert "several configurations\n  Set `config` to one of: en, de." in str(neither)
        assert "no configuration `fr`" in str(french)
        assert english[2] == [["org/rows:train[0]", {"text": "one"}]]
        assert not any("de/a.jsonl" in line or ".py" in line for line in hub.log)


@pytest.mark.parametrize(
    ("refusal", "message"),
    [
        ((404, "RepoNotFound"), "no such local path, and no such data set on the hub"),
        ((403, "GatedRepo"), "the data set is gated"),
        ((401, "GatedRepo"), "hf auth login"),
        ((500, "Oops"), "the hub cannot be reached"),
        ((429, "TooMany"), "the hub cannot be reached"),
    ],
)
def test_refusals_of_the_hub(tmp_path: Path, refusal: tuple[int, str], message: str) -> None:
    with serving(Hub(refusal=refusal)) as hub:
        (found,) = read(tmp_path, hub, {"path": "org/rows"})
    assert message in str(found)


@pytest.mark.parametrize("fault", ["busy", "down", "cut"])
def test_a_hub_that_recovers_is_waited_for(tmp_path: Path, fault: str) -> None:
    """F40: three refusals, or a file that breaks off twice; the fourth attempt has it."""
    status = {"busy": (429, "TooMany"), "down": (503, "Down")}.get(fault)
    rows = jsonl(*(f"text {number}" for number in range(4000)))
    with serving(Hub(refusal=status, num_refused=3, num_cut=2 if fault == "cut" else 0)) as hub:
        hub.push({"train.jsonl": rows})
        (found,) = read(tmp_path, hub, {"path": "org/rows"})
    assert isinstance(found, list), found
    assert len(found[2]) == 4000


def test_without_a_network_the_error_says_what_to_do(tmp_path: Path) -> None:
    hub = Hub(endpoint="http://127.0.0.1:9")  # nothing listens on the port of `discard`
    for offline in (False, True):
        (found,) = read(tmp_path, hub, {"path": "org/rows"}, offline=offline)
        assert "org/rows: no such local path, and the hub cannot be reached" in str(found)
        assert "HF_HUB_OFFLINE" in str(found)


RUN = """
import json, sys, tunesmith
from pathlib import Path
run = tunesmith.run(json.loads(sys.argv[1]))
manifest = json.loads((run / "manifest.json").read_text())
print("RESULT", json.dumps([manifest["revisions"], manifest["rows"]["sft"]["train"], manifest["sources"]]))
"""


def test_a_run_goes_on_with_the_commit_that_it_began_on(tmp_path: Path) -> None:
    """S20: `main` moves between two starts; the second still reads the first commit, by name from the manifest."""
    rows = [{"question": f"Which is number {number}?", "answer": f"It is {number}."} for number in range(8)]
    old_rows = "".join(json.dumps(row) + "\n" for row in rows).encode()
    make_model_folder(tmp_path / "model")
    stage = {"name": "sft", "method": "sft", "train": [{"path": "org/rows"}], "batch_size": 4, "max_length": 128}
    stage |= {"schedule": "constant", "warmup_fraction": 0.0, "max_steps": 1}
    recipe = {"name": "tiny", "model": {"path": "model"}, "stages": [stage], "threads": 1}

    def run(settings: dict[str, object], hub: Hub) -> list[object]:
        variables = {"HF_HOME": str(tmp_path / "hf"), "HF_ENDPOINT": hub.endpoint, "HF_HUB_DISABLE_TELEMETRY": "1"}
        variables |= dict.fromkeys(("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE"), "0")
        result = subprocess.run(
            [sys.executable, "-c", RUN, json.dumps(settings)],
            env={**os.environ, **variables},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
            timeout=180,
        )
        assert result.returncode == 0, result.stderr
        found: list[object] = json.loads(next(line[7:] for line in result.stdout.splitlines() if line[:7] == "RESULT "))
        return found

    with serving(Hub()) as hub:
        old = hub.push({"train.jsonl": old_rows})
        first = run(recipe, hub)
        assert first[:2] == [{"sft": {"org/rows": old}}, 8]
        hub.push({"train.jsonl": old_rows * 2})
        again = run({**recipe, "stages": [{**stage, "max_steps": 2}]}, hub)
        assert again == first
        new = run({**recipe, "name": "other"}, hub)
        assert new[:2] == [{"sft": {"org/rows": hub.main}}, 16]
