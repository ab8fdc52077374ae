"""The run folder: where everything of a run lies, and what it is known by.

In: the folder of all runs and the name of one. Out: paths, and the manifest. Must not know: what the files hold, torch.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tunesmith.errors import ResumeError, RunFolderError
from tunesmith.runs.atomic import make_folder, remove_temporaries, write_json
from tunesmith.runs.disk import disk_errors
from tunesmith.runs.inventory import read_object
from tunesmith.version import VERSION

KIND = "tunesmith-run"
"""Marks a manifest as ours; a folder without it is never written to."""

PACKAGES = ("torch", "transformers", "peft", "tokenizers", "safetensors", "numpy", "pyarrow", "bitsandbytes")
_GIT_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class StageFolder:
    """Where one stage's files lie; `create` makes the folder."""

    path: Path

    @property
    def metrics_path(self) -> Path:
        """Exactly one record a step, no clock in it."""
        return self.path / "metrics.jsonl"

    @property
    def timings_path(self) -> Path:
        """One record a step: seconds, rates, memory."""
        return self.path / "timings.jsonl"

    @property
    def eval_path(self) -> Path:
        """One record an evaluation on the held-out rows."""
        return self.path / "eval.jsonl"

    @property
    def warnings_path(self) -> Path:
        """One record for whatever looked wrong while the stage trained."""
        return self.path / "warnings.jsonl"

    @property
    def checkpoints(self) -> Path:
        """Folder of `step-N` folders."""
        return self.path / "checkpoints"

    @property
    def result_path(self) -> Path:
        """What the stage made; written last, so it is there only for a finished stage."""
        return self.path / "result.json"

    @property
    def adapter_path(self) -> Path:
        """The adapter, as peft loads it."""
        return self.path / "adapter"

    @property
    def model_path(self) -> Path:
        """The whole model, as transformers loads it."""
        return self.path / "model"

    def has_begun(self) -> bool:
        """Whether there is a checkpoint or a result, so that other inputs would make two runs of one."""
        return self.result_path.is_file() or any(self.checkpoints.glob("step-*"))

    def create(self) -> StageFolder:
        """Make the folders, and remove what an interrupted write left in them."""
        with disk_errors(self.path):
            make_folder(self.checkpoints)
        remove_temporaries(self.path)
        remove_temporaries(self.checkpoints)
        return self


@dataclass(frozen=True, slots=True)
class RunFolder:
    """Where a run's files lie. It exists as a run from its first manifest on."""

    path: Path

    @property
    def recipe_path(self) -> Path:
        """The resolved recipe."""
        return self.path / "recipe.yaml"

    @property
    def manifest_path(self) -> Path:
        """Versions, git commit, hashes."""
        return self.path / "manifest.json"

    @property
    def ledger_path(self) -> Path:
        """What became of every input row."""
        return self.path / "ledger.parquet"

    @property
    def report_path(self) -> Path:
        """The comparison, for a browser."""
        return self.path / "report.html"

    @property
    def summary_path(self) -> Path:
        """The comparison's figures."""
        return self.path / "compare" / "summary.json"

    @property
    def lock_path(self) -> Path:
        """Names the owner while a process works in the folder."""
        return self.path / "run.lock"

    def stage(self, name: str) -> StageFolder:
        """The folder of the stage `name`; nothing is made yet."""
        return StageFolder(self.path / "stages" / name)

    def stage_names(self) -> list[str]:
        """Names of the stages that have a folder, in the alphabet's order."""
        stages = self.path / "stages"
        return sorted(path.name for path in stages.iterdir() if path.is_dir()) if stages.is_dir() else []

    def read_manifest(self) -> dict[str, object]:
        """The manifest; empty where there is none yet.

        Raises RunFolderError (2) where it is not one of ours, ResumeError (3) where it is damaged.
        """
        with disk_errors(self.manifest_path):
            if not self.manifest_path.is_file():
                return {}
        try:
            manifest = read_object(self.manifest_path)
        except (ValueError, OSError) as error:
            remedy = "Restore it from a copy, or give the run another `name`; nothing was changed."
            raise ResumeError(f"cannot be read: {error}.", where=str(self.manifest_path), remedy=remedy) from error
        if manifest.get("kind") != KIND:
            remedy = "Nothing was written. Give the run another name, or move the folder away."
            raise RunFolderError(
                "is not the manifest of a Tunesmith run.", where=str(self.manifest_path), remedy=remedy
            )
        return manifest

    def update_manifest(self, values: Mapping[str, object]) -> None:
        """Set the given top-level entries (hashes of data, template, weights, reference) and keep the others."""
        write_json(self.manifest_path, {**(self.read_manifest() or _new_manifest()), **values})


def create_or_open(root: Path | str, name: str) -> RunFolder:
    """The run folder `root/name`, made with mode 0700 and a manifest where it is new.

    An existing run is opened as it is; whether it is of the same recipe is the caller's question. Raises
    RunFolderError where the folder cannot be written, or holds files that are not a run of ours.
    """
    folder = RunFolder(Path(root) / name)
    with disk_errors(folder.path):
        make_folder(folder.path)
        if not os.access(folder.path, os.W_OK | os.X_OK):
            raise PermissionError(13, "Permission denied")
        foreign = [path.name for path in folder.path.iterdir() if path != folder.lock_path]
    if not folder.read_manifest():
        _refuse_foreign(folder, foreign)
        folder.update_manifest({})
    remove_temporaries(folder.path, spare_living=True)  # a comparison may write its report beside the run
    return folder


def open_run(path: Path | str) -> RunFolder:
    """An existing run folder, for reading. Raises RunFolderError where there is none."""
    folder = RunFolder(Path(path))
    if not folder.read_manifest():
        remedy = "Give the folder that `tunesmith run` printed, such as runs/NAME."
        raise RunFolderError("is not a run folder: it has no manifest.json.", where=str(path), remedy=remedy)
    return folder


def _refuse_foreign(folder: RunFolder, names: list[str]) -> None:
    names = [name for name in names if not name.startswith(".tmp-manifest.json")]  # died before its first manifest
    if names:
        shown = ", ".join(sorted(names)[:3])
        remedy = "Nothing was written. Give the run another name, or move the folder away."
        raise RunFolderError(f"holds files that are no Tunesmith run ({shown}).", where=str(folder.path), remedy=remedy)


def _new_manifest() -> dict[str, object]:
    return {
        "kind": KIND,
        "layout": 1,
        "tunesmith": VERSION,
        "python": platform.python_version(),
        "platform": f"{sys.platform}-{platform.machine()}",
        "packages": package_versions(),
        "git": _git_commit(),
    }


def package_versions() -> dict[str, str]:
    """Versions of the installed packages that a result depends on."""
    return {name: version for name in PACKAGES if (version := _package_version(name)) is not None}


def _package_version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git_commit() -> str | None:
    """Commit of the working directory's repository; None where there is none, or no git."""
    command = ["git", "rev-parse", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_GIT_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None
