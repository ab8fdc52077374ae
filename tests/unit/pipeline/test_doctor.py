from __future__ import annotations

import io
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from rich.console import Console

from tunesmith.pipeline import doctor
from tunesmith.pipeline.doctor import DoctorReport, Fact, entries_and_bytes, examine, extensions_folder, stale_locks
from tunesmith.selftest.proof import Proof
from tunesmith.selftest.run import CHAPTERS, Outcome

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def named(facts: Sequence[Fact], subject: str) -> Fact:
    (found,) = [fact for fact in facts if fact.subject == subject]
    return found


def printed(report: DoctorReport) -> str:
    out = io.StringIO()
    Console(file=out, width=80).print(report)
    return out.getvalue()


def test_this_machine(tmp_path: Path) -> None:
    report = examine(tmp_path / "runs", {})
    assert torch.__version__.split("+")[0] in named(report.facts, "libraries").text
    assert named(report.facts, "attention sdpa").verdict == "ok"
    memory = named(report.facts, "memory").values
    assert memory is not None
    assert memory["total_bytes"] == os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert "empty" in named(report.facts, "cache rows").text
    shown = printed(report)
    assert max(map(len, shown.splitlines())) <= 80
    assert "\x1b" not in shown  # no colour where no terminal is
    values = json.loads(json.dumps(report.as_json(), allow_nan=False))
    assert [fact["subject"] for fact in values["facts"]] == [fact.subject for fact in report.facts]
    assert not (tmp_path / "runs").exists()
    assert not (tmp_path / "cache").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what a machine without a card lacks")
def test_what_cannot_be_used_says_why(tmp_path: Path) -> None:
    facts = examine(tmp_path, {}).facts
    assert named(facts, "attention varlen").text == "needs a CUDA device"
    assert "float32" in named(facts, "types").text


def test_a_package_that_is_absent_says_what_is_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = {"bitsandbytes": "0.50.2"}
    monkeypatch.setattr(doctor, "installed", found.get)
    facts = examine(tmp_path, {}).facts
    assert named(facts, "bitsandbytes").text == "0.50.2"
    assert named(facts, "triton").verdict == "note"
    assert named(facts, "triton").text.startswith("not installed, so without the flex backend")


def test_a_lock_of_a_killed_build_is_found(tmp_path: Path) -> None:
    """LIBRARIES trap 20."""
    for name in ("old", "new"):
        (tmp_path / "py311_cpu" / name).mkdir(parents=True)
        (tmp_path / "py311_cpu" / name / "lock").touch()
    old = tmp_path / "py311_cpu" / "old" / "lock"
    hours_ago = time.time() - 2 * 3600
    os.utime(old, (hours_ago, hours_ago))
    (fact,) = stale_locks(tmp_path)
    assert fact.verdict == "warning"
    assert "2.0 hours ago" in fact.text
    assert str(old) in fact.text
    assert stale_locks(tmp_path / "nowhere") == []


def test_the_folder_of_extensions_is_torchs() -> None:
    assert extensions_folder({"TORCH_EXTENSIONS_DIR": "/x"}) == Path("/x")
    assert extensions_folder({"XDG_CACHE_HOME": "/c"}) == Path("/c/torch_extensions")
    assert extensions_folder({}) == Path.home() / ".cache" / "torch_extensions"


def test_sizes_of_caches(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x").write_bytes(b"123")
    (tmp_path / "b").write_bytes(b"4567")
    assert entries_and_bytes(tmp_path) == (2, 7)
    assert entries_and_bytes(tmp_path / "nowhere") == (0, 0)


@pytest.mark.parametrize(
    ("environment", "offline"),
    [({}, False), ({"HF_HUB_OFFLINE": "1"}, True), ({"HF_HUB_OFFLINE": "0"}, False), ({"HF_HOME": "/h"}, False)],
)
def test_hub(tmp_path: Path, environment: dict[str, str], offline: bool) -> None:
    fact = named(examine(tmp_path, environment).facts, "hub")
    assert fact.text.startswith("offline" if offline else "online")
    assert all(f"{name}={value}" in fact.text for name, value in environment.items())


def test_secrets_are_not_shown(tmp_path: Path) -> None:
    report = examine(tmp_path, {"HF_TOKEN": "hf_secret", "HF_HOME": "/h"})
    assert "hf_secret" not in printed(report) + json.dumps(report.as_json())


def test_little_disk_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "free_bytes", lambda path: 9 * 2**30)
    fact = named(examine(tmp_path, {}).facts, "disk runs")
    assert (fact.verdict, fact.text.split(",")[-1]) == ("warning", " little for checkpoints")


def test_no_compiler_is_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    assert named(examine(tmp_path, {}).facts, "compiler").verdict == "note"
    monkeypatch.setattr(doctor.shutil, "which", lambda name: f"/bin/{name}" if name == "my-cxx" else None)
    variable = "CC" if torch.cuda.is_available() else "CXX"
    assert named(examine(tmp_path, {variable: "my-cxx"}).facts, "compiler").text == "/bin/my-cxx, for `compile`"


def test_the_self_test_reports_as_it_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    outcomes = [Outcome(chapter, (Proof("a", "b", 0.0, 1.0),), 0.1) for chapter in CHAPTERS[:2]]
    monkeypatch.setattr(doctor, "self_test", lambda device, dtype: iter(outcomes))
    said: list[str] = []
    report = doctor.run_self_test(said.append)
    assert report.ok
    assert len(report.proofs) == len(said) == 2
    assert said[1].startswith(f"[2/{len(CHAPTERS)}] objectives: 1 passed")
