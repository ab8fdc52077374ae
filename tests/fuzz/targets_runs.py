"""What reads run folders, checkpoints, models and adapters, each given damaged ones.

In: a folder for what the cases share. Out: targets. Must not know: rows.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from tests.fuzz.mutate import damage_bytes, damage_json
from tests.fuzz.run import Target
from tests.support.folders import make_run_inputs, tiny_recipe
from tests.support.training import Trial, sft_stage, weights_of
from tunesmith.data.ledger import fates_text, read_parquet
from tunesmith.model.adapters import continue_adapter, load_adapter
from tunesmith.model.load import load_extended_model, load_model
from tunesmith.model.results import read_result, run_recipe_of, stage_weights, weights_at
from tunesmith.pipeline.run import run_recipe
from tunesmith.recipe.load import parse_recipe
from tunesmith.recipe.models import Lora, Model
from tunesmith.runs.atomic import sha256_file
from tunesmith.runs.folder import open_run
from tunesmith.runs.records import read_records
from tunesmith.train.progress import Silent

CPU = torch.device("cpu")


def run_targets(folder: Path) -> list[Target]:
    """Their shared parts, a finished stage and a finished run, are made here, once."""
    stages, runs = Stages(folder / "stage"), Runs(folder)
    return [
        Target("checkpoint", 0.08, stages.resume_damaged),
        Target("checkpoint_with_a_right_hash", 0.04, stages.resume_forged),
        Target("records_of_a_stage", 0.03, stages.resume_records),
        Target("run_folder", 0.06, runs.read_files),
        Target("run_folder_run_again", 0.01, runs.run_again),
        Target("model", 0.04, runs.load_model),
        Target("adapter", 0.04, runs.load_adapter),
    ]


class Stages:
    """A stage of two steps with a checkpoint of each."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        stage = sft_stage(tuning=Lora(r=4), save_every=1, keep_checkpoints=2, learning_rate=0.1)
        self._stage = stage
        _, engine = Trial(folder, stage, num_train=8).run()
        self._weights = weights_of(engine)

    def _copy(self, folder: Path) -> Path:
        shutil.copytree(self._folder, folder / "stage")
        return folder / "stage"

    def _go_on(self, copy: Path) -> dict[str, Tensor]:
        """Start the stage again in the copy; its weights at the end."""
        _, engine = Trial(copy, self._stage, num_train=8).run(observer=Silent())
        return weights_of(engine)

    def _assert_same(self, found: dict[str, Tensor], what: str) -> None:
        for name, tensor in self._weights.items():
            assert torch.equal(found[name], tensor), f"{what}: the stage went on, and ended with other weights"

    def resume_damaged(self, folder: Path, draw: random.Random) -> None:
        """Files of one or both checkpoints changed or missing: refused, or the same weights at the end."""
        copy = self._copy(folder)
        for _ in range(draw.choice((1, 1, 2))):
            path = draw.choice(_files(copy / "checkpoints"))
            if draw.random() < 0.15:
                path.unlink()
            else:
                damage = damage_json if path.suffix == ".json" and path.stat().st_size else _bytes
                try:
                    path.write_bytes(damage(path.read_bytes(), draw))
                except ValueError:  # damaged before, so no JSON any more
                    path.write_bytes(b"")
        self._assert_same(self._go_on(copy), path.name)

    def resume_forged(self, folder: Path, draw: random.Random) -> None:
        """Changed files whose hashes in the manifest fit again: what is inside is looked at, too."""
        copy = self._copy(folder)
        checkpoint = sorted((copy / "checkpoints").iterdir())[-1]
        path = draw.choice([path for path in _files(checkpoint) if path.name != "manifest.json"])
        damage = damage_json if path.suffix == ".json" else _bytes
        path.write_bytes(damage(path.read_bytes(), draw))
        manifest = json.loads((checkpoint / "manifest.json").read_text())
        entry = manifest["files"][str(path.relative_to(checkpoint))]
        entry |= {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
        (checkpoint / "manifest.json").write_text(json.dumps(manifest))
        self._go_on(copy)

    def resume_records(self, folder: Path, draw: random.Random) -> None:
        """Records and plans beside the checkpoints."""
        copy = self._copy(folder)
        path = draw.choice([path for path in _files(copy) if path.suffix == ".jsonl"])
        path.write_bytes(damage_bytes(path.read_bytes(), draw))
        shutil.rmtree(sorted((copy / "checkpoints").iterdir())[-1])
        read_records(path)
        self._assert_same(self._go_on(copy), path.name)


class Runs:
    """A finished run of SFT and DPO on a tiny model."""

    def __init__(self, folder: Path) -> None:
        self._folder = make_run_inputs(folder)
        self._recipe = parse_recipe(tiny_recipe(folder))
        self._run = run_recipe(self._recipe, observer=Silent())

    def read_files(self, folder: Path, draw: random.Random) -> None:
        """manifest.json, recipe.yaml, ledger.parquet, result.json and the records, through what reads a run."""
        copy = folder / "run"
        shutil.copytree(self._run, copy)
        _damage_one(_files(copy, without=("checkpoints", "adapter")), draw)
        run = open_run(copy)
        run_recipe_of(run)
        fates_text({"sft": read_parquet(run.ledger_path)})
        for name in ("sft", "dpo"):
            read_result(run, name)
            stage_weights(run, name)
            read_records(run.stage(name).metrics_path)
        weights_at(str(copy), chat_template=None)

    def run_again(self, folder: Path, draw: random.Random) -> None:
        """The same command in a finished run with one damaged file: refused, or finished as it was."""
        runs = folder / "runs"
        shutil.copytree(self._run, runs / "tiny")
        names = ("manifest.json", "recipe.yaml", "ledger.parquet", "run.lock")
        (runs / "tiny/run.lock").write_text('{"host": "h", "pid": 1, "start": "then"}')
        _damage_one([runs / "tiny" / name for name in names], draw)
        run_recipe(parse_recipe(tiny_recipe(self._folder, runs_folder=str(runs))), observer=Silent())

    def load_model(self, folder: Path, draw: random.Random) -> None:
        """config.json, the tokenizer's files, the weights."""
        copy = folder / "model"
        shutil.copytree(self._folder / "model", copy)
        _damage_one(_files(copy), draw)
        load_extended_model(Model(path=str(copy)), device=CPU, dtype=torch.float32)

    def load_adapter(self, folder: Path, draw: random.Random) -> None:
        """adapter_config.json and its weights, to read and to train on."""
        copy = folder / "adapter"
        shutil.copytree(self._run / "stages/sft/adapter", copy)
        _damage_one([path for path in _files(copy) if path.suffix != ".md"], draw)
        model = load_model(Model(path=str(self._folder / "model")), device=CPU, dtype=torch.float32)
        if draw.random() < 0.5:
            load_adapter(model, copy)
        else:
            continue_adapter(model, Lora(r=4, alpha=8), copy, seed=0)


def _files(folder: Path, *, without: Sequence[str] = ()) -> list[Path]:
    found = [path for path in folder.rglob("*") if path.is_file()]
    return sorted(path for path in found if not set(path.relative_to(folder).parts) & set(without))


def _bytes(data: bytes, draw: random.Random) -> bytes:
    return damage_bytes(data, draw)


def _damage_one(paths: Sequence[Path], draw: random.Random) -> None:
    path = draw.choice(paths)
    if draw.random() < 0.1:
        path.unlink()
        return
    damage = damage_json if path.suffix == ".json" else damage_bytes
    path.write_bytes(damage(path.read_bytes(), draw))
