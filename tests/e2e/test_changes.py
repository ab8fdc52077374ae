"""What a run says and does when recipe, rows, base or packages are not those that it began on: F10 to F13, S20."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests.support.folders import make_run_inputs, pairs, questions, tiny_recipe, write_rows
from tunesmith.cli.main import main
from tunesmith.pipeline import run as run_module
from tunesmith.pipeline.options import RunOptions
from tunesmith.pipeline.run import run_recipe
from tunesmith.recipe.load import parse_recipe
from tunesmith.runs.folder import RunFolder
from tunesmith.runs.records import Value
from tunesmith.train.progress import Silent

Edit = Callable[["Bench"], object]


class _Break(Exception):
    pass


class _Watcher(Silent):
    """Keeps what is said; breaks off at a step of a stage."""

    def __init__(self, stage: str = "", step: int = 0) -> None:
        self._at = (stage, step)
        self._stage = ""
        self.texts: list[str] = []

    def started(self, stage: str, *, first_step: int, num_steps: int) -> None:
        self._stage = stage
        self.texts.append(f"{stage} starts at {first_step} of {num_steps}")

    def stepped(self, record: Mapping[str, Value], timing: Mapping[str, Value]) -> None:
        if (self._stage, record["step"]) == self._at:
            raise _Break

    def noted(self, text: str) -> None:
        self.texts.append(text)

    def said(self, part: str) -> bool:
        return any(part in text for text in self.texts)


class Bench:
    """A folder with a model, rows, and one run of SFT and DPO that can be broken off and changed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        recipe = tiny_recipe(folder)
        stages = recipe["stages"]
        assert isinstance(stages, list)
        sft, dpo = ({**stage, "save_every": 1, "schedule": "constant", "warmup_fraction": 0.0} for stage in stages)
        self.recipe = recipe | {"stages": [sft | {"epochs": 2}, dpo]}

    @property
    def run_folder(self) -> RunFolder:
        return RunFolder(self.folder / "runs/tiny")

    def stage(self, number: int, **changes: object) -> None:
        stages = self.recipe["stages"]
        assert isinstance(stages, list)
        stages[number] = stages[number] | changes

    def start(self, watcher: _Watcher | None = None, *, accept: bool = False) -> _Watcher:
        watcher = watcher or _Watcher()
        run_recipe(parse_recipe(self.recipe), observer=watcher, options=RunOptions(accept_data_change=accept))
        return watcher

    def command(self, capsys: pytest.CaptureFixture[str], *options: str) -> tuple[int, str]:
        """Exit code of `tunesmith run`, and what stood on the terminal."""
        path = self.folder / "recipe.yaml"
        path.write_text(json.dumps(self.recipe))
        with pytest.raises(SystemExit) as ended:
            main(["run", str(path), *options])
        captured = capsys.readouterr()
        code = ended.value.code
        assert isinstance(code, int)
        return code, captured.out + captured.err

    def files(self) -> dict[str, bytes]:
        """Every file of the run but its log, which says that it was refused."""
        root = self.run_folder.path
        return {
            str(path.relative_to(root)): path.read_bytes()
            for path in root.rglob("*")
            if path.is_file() and not path.name.startswith("log.jsonl")
        }


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was broken off in the second epoch of SFT (8 rows in steps of 4: step 3 of 4 is saved)."""
    bench = Bench(make_run_inputs(tmp_path_factory.mktemp("begun")))
    with contextlib.suppress(_Break):
        bench.start(_Watcher("sft", 4))
    return bench.folder


@pytest.fixture
def bench(begun: Path) -> Iterator[Bench]:
    """The begun run; files that a test changes are put back, so that their paths stay the same."""
    saved = begun.with_name(f"{begun.name}-saved")
    shutil.copytree(begun, saved)
    yield Bench(begun)
    shutil.rmtree(begun)
    saved.rename(begun)


def rewrite(path: Path, edit: Callable[[list[str]], list[str]]) -> None:
    path.write_text("\n".join(edit(path.read_text().splitlines())) + "\n")


def test_a_changed_recipe_is_refused_field_by_field(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    bench.stage(0, learning_rate=0.001, save_every=7)
    bench.stage(1, beta=0.5)
    before = bench.files()
    code, text = bench.command(capsys)
    assert code == 3
    assert "stages[0].learning_rate: 0.0002 -> 0.001\n" in text
    assert "stages[1].beta: 0.1 -> 0.5\n" in text
    assert "stages[0].save_every: 1 -> 7 (this one alone would be safe: it says when something is saved" in text
    assert "Give this run another `name`, or undo the changes; nothing was overwritten." in text
    assert "Traceback" not in text
    assert bench.files() == before


def test_safe_changes_go_on_and_say_why(bench: Bench) -> None:
    bench.stage(0, save_every=2)
    bench.recipe["memory"] = "fixed"
    watcher = _Watcher("sft", 4)
    with contextlib.suppress(_Break):
        bench.start(watcher)
    assert watcher.said("recipe: stages[0].save_every: 1 -> 2: goes on, because it says when something is saved")
    assert watcher.said("recipe: memory: auto -> fixed: goes on, because it changes sums in their last bits only")
    (entry,) = _changes(bench)
    assert entry["kind"] == "recipe"
    assert [change["path"] for change in entry["fields"]] == ["stages[0].save_every", "memory"]
    with contextlib.suppress(_Break):
        bench.start(_Watcher("sft", 4))
    assert len(_changes(bench)) == 1  # told once


def _changes(bench: Bench) -> list[dict[str, list[dict[str, str]]]]:
    found: list[dict[str, list[dict[str, str]]]] = json.loads(bench.run_folder.manifest_path.read_text())["changes"]
    return found


ROWS: dict[str, tuple[Callable[[list[str]], list[str]], str]] = {
    "edited": (
        lambda rows: [*rows[:2], rows[2].replace("It is", "It was"), *rows[3:]],
        "8 rows before, 8 now: 1 changed; the first: sft.jsonl:3 changed",
    ),
    "added": (
        lambda rows: [*rows, json.dumps(questions(9)[8])],
        "8 rows before, 9 now: 1 added; the first: sft.jsonl:9 was added (train 8 -> 9)",
    ),
    "removed": (
        lambda rows: rows[1:],
        "8 rows before, 7 now: 1 removed; the first: sft.jsonl:1 was removed (train 8 -> 7)",
    ),
    "reordered": (
        lambda rows: [rows[-1], *rows[:-1]],
        "8 rows before, 8 now: 1 reordered; the first: sft.jsonl:8 is sft.jsonl:1 now",
    ),
}


@pytest.mark.parametrize("change", ROWS)
def test_changed_rows_are_refused_with_counts_and_the_first(
    change: str, bench: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    edit, told = ROWS[change]
    rewrite(bench.folder / "sft.jsonl", edit)
    before = bench.files()
    code, text = bench.command(capsys)
    assert code == 3
    assert f"rows of stage sft: {told}\n" in text.replace(f"{bench.folder}/", "")
    assert "--accept-data-change" in text
    assert "Traceback" not in text
    assert bench.files() == before


def test_a_file_that_is_gone_is_named(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    (bench.folder / "sft.jsonl").unlink()
    before = bench.files()
    code, text = bench.command(capsys)
    assert code == 3
    assert "sft.jsonl: is gone, and stage sft has begun on it (8 training rows then)" in text
    assert bench.files() == before


def test_rows_of_a_stage_that_has_not_begun_may_change(bench: Bench) -> None:
    write_rows(bench.folder / "pairs.jsonl", pairs(12))
    watcher = _Watcher("dpo", 3)
    with contextlib.suppress(_Break):
        bench.start(watcher)
    assert watcher.said("dpo starts at 0 of 3")
    assert not watcher.said("rows of stage")


def test_accepted_rows_begin_the_epoch_again_and_are_recorded(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    """F11. 3 of 4 steps are done; 12 rows are 3 steps an epoch, so the second epoch ends at step 2 + 1 + 3 = 6."""
    write_rows(bench.folder / "sft.jsonl", questions(12))
    old_ledger = bench.run_folder.ledger_path.read_bytes()
    code, _ = bench.command(capsys)
    assert code == 3
    watcher = bench.start(accept=True)
    assert watcher.said("sft starts at 3 of 6")
    assert watcher.said("4 added; the first:")
    assert watcher.said("it goes on from its checkpoint, and the epoch begins again with them")
    metrics = bench.run_folder.stage("sft").metrics_path.read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in metrics] == pytest.approx([0.5, 1, 1.5, 4 / 3, 5 / 3, 2])
    (entry,) = _changes(bench)
    assert (entry["kind"], entry["stage"], entry["ledger_before"]) == ("rows", "sft", "ledger-before-1.parquet")
    assert (bench.run_folder.path / "ledger-before-1.parquet").read_bytes() == old_ledger
    assert pq.read_table(bench.run_folder.ledger_path).num_rows == 12 + 8 + 4
    # accepted once is accepted: the next start needs no leave
    assert bench.start().said("stage sft: finished before")
    # ... and what was trained on two versions is nobody else's stage
    bench.recipe["name"] = "other"
    assert not bench.start(_Watcher()).said("stage sft: copied from")


@pytest.mark.parametrize("cut", ["_write_recipe", "write_ledgers", "run_stage"])
def test_what_was_accepted_stays_so_when_the_start_is_killed(
    cut: str, bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*args: object) -> None:
        raise KeyboardInterrupt

    write_rows(bench.folder / "sft.jsonl", questions(12))
    old_ledger = bench.run_folder.ledger_path.read_bytes()
    with monkeypatch.context() as patched:
        patched.setattr(run_module, cut, killed)
        with pytest.raises(KeyboardInterrupt):
            bench.start(accept=True)
    watcher = _Watcher("sft", 4)
    with contextlib.suppress(_Break):
        bench.start(watcher)  # without the flag
    assert watcher.said("sft starts at 3 of 6")
    assert (bench.run_folder.path / "ledger-before-1.parquet").read_bytes() == old_ledger
    assert pq.read_table(bench.run_folder.ledger_path).num_rows == 12 + 8 + 4


def test_a_finished_stage_keeps_its_rows(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    with contextlib.suppress(_Break):
        bench.start(_Watcher("dpo", 2))
    adapter = bench.run_folder.stage("sft").adapter_path / "adapter_model.safetensors"
    trained = adapter.read_bytes()
    rewrite(bench.folder / "sft.jsonl", ROWS["edited"][0])
    code, _ = bench.command(capsys)
    assert code == 3
    watcher = bench.start(accept=True)
    assert watcher.said("accepted: it is finished and stays as it is")
    assert watcher.said("stage sft: finished before")
    assert watcher.said("dpo starts at 1 of 2")
    assert adapter.read_bytes() == trained
    again = bench.start()  # the rows are still others, and were accepted
    assert again.said("stage dpo: finished before")
    rewrite(bench.folder / "sft.jsonl", lambda rows: rows[:-1])
    code, text = bench.command(capsys)  # but not these
    assert code == 3
    assert "--accept-data-change" in text


BASE: dict[str, tuple[Edit, str]] = {
    "weights": (lambda bench: _flip(bench.folder / "model/model.safetensors"), "base: model.safetensors was altered"),
    "config": (lambda bench: _respell(bench.folder / "model/config.json"), "base: config.json was altered"),
    "tokenizer": (
        lambda bench: _edit_json(bench.folder / "model/tokenizer_config.json", pad_token="<|im_start|>"),
        "tokenizer: sha256",
    ),
}


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))


def _respell(path: Path) -> None:
    path.write_text(json.dumps(json.loads(path.read_text())))


def _edit_json(path: Path, **values: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.parametrize("part", BASE)
def test_another_base_is_refused_by_file(part: str, bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    """F12: whatever of the base changed is named, and no leave for rows covers it."""
    edit, told = BASE[part]
    edit(bench)
    before = bench.files()
    code, text = bench.command(capsys, "--accept-data-change")
    assert code == 3
    assert told in text
    assert "--accept-data-change" not in text
    assert bench.files() == before


def test_other_versions_of_packages_are_told_and_recorded(bench: Bench) -> None:
    """F13: the promise of equal bits is off, so it is said; the run goes on."""
    manifest = json.loads(bench.run_folder.manifest_path.read_text())
    now = manifest["packages"]["transformers"]
    manifest["packages"]["transformers"] = "4.0.0"
    bench.run_folder.manifest_path.write_text(json.dumps(manifest))
    watcher = _Watcher("sft", 4)
    with contextlib.suppress(_Break):
        bench.start(watcher)
    assert watcher.said(f"versions: transformers 4.0.0 -> {now} since the last start")
    (entry,) = _changes(bench)
    assert entry["packages"] == {"transformers": ["4.0.0", now]}
    later = _Watcher("sft", 4)
    with contextlib.suppress(_Break):
        bench.start(later)
    assert not later.said("versions:")


def test_a_sweep_over_beta_shares_the_sft_stage(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    bench.start()
    bench.stage(1, beta=0.5)
    code, text = bench.command(capsys)
    assert code == 3
    assert "A run of another name in this folder copies what is finished and unchanged: sft." in text
    code, text = bench.command(capsys, "name=beta-0.5")
    assert code == 0
    assert "stage sft: copied from" in text
    other = RunFolder(bench.folder / "runs/beta-0.5")
    name = "adapter/adapter_model.safetensors"
    ours = [(run.stage("sft").path / name).read_bytes() for run in (bench.run_folder, other)]
    assert ours[0] == ours[1]
    theirs = [(run.stage("dpo").path / name).read_bytes() for run in (bench.run_folder, other)]
    assert theirs[0] != theirs[1]
    code, text = bench.command(capsys, "name=fresh", "--no-reuse")
    assert code == 0
    assert "copied from" not in text
    fresh = RunFolder(bench.folder / "runs/fresh")
    assert (fresh.stage("sft").path / name).read_bytes() == ours[0]  # the copy is what training makes
