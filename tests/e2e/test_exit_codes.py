"""Every exit code of the command, from the fault that causes it to the words that say so.

Whatever is wrong: the code of DESIGN section 5, one message with what, where and what to do, no traceback unless it is
asked for, and no byte of what was there before is lost.
"""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from ruamel.yaml import YAML
from safetensors.torch import load_file, save_file

from tests.support.folders import make_run_inputs, questions, tiny_recipe, write_rows
from tunesmith.cli.main import main
from tunesmith.runs.lock import run_lock

RUN = ["run", "recipe.yaml"]
OURS = {"log.jsonl", "run.lock"}  # written by a start that is refused, too
Fault = Callable[[], list[str]]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, its inputs and its recipe; all paths relative to the folder."""
    folder = make_run_inputs(tmp_path_factory.mktemp("finished"))
    with (folder / "recipe.yaml").open("w") as file:
        YAML().dump(tiny_recipe(Path()), file)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert _code(RUN) == 0
    return folder


@pytest.fixture
def inputs(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, as the working directory."""
    copy = tmp_path / "copy"
    shutil.copytree(finished, copy)
    monkeypatch.chdir(copy)
    return copy


def _code(arguments: list[str]) -> int:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert isinstance(stop.value.code, int)
    return stop.value.code


def _files(folder: Path) -> dict[str, bytes]:
    found = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name not in OURS}
    return {str(path.relative_to(folder)): content for path, content in found.items()}


def _stage(name: str) -> Path:
    return Path("runs/tiny/stages") / name


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def _newest_checkpoint(stage: str) -> Path:
    return max((_stage(stage) / "checkpoints").iterdir(), key=lambda path: int(path.name.removeprefix("step-")))


# --- 2: bad input, recipe or data


def _no_recipe() -> list[str]:
    return ["run", "nowhere.yaml"]


def _misspelled_key() -> list[str]:
    Path("recipe.yaml").write_text(Path("recipe.yaml").read_text().replace("batch_size", "batchsize"))
    return RUN


def _wrong_override() -> list[str]:
    return [*RUN, "stages.dpo.beta=high"]


def _no_rows() -> list[str]:
    Path("sft.jsonl").unlink()
    return [*RUN, "name=other"]


def _bad_row() -> list[str]:
    Path("sft.jsonl").write_text('{"question": "a", "answer": 3}\n')
    return RUN


def _no_model() -> list[str]:
    shutil.rmtree("model")
    return RUN


def _pickled_weights() -> list[str]:
    Path("model/model.safetensors").rename("model/pytorch_model.bin")
    return [*RUN, "name=other"]


def _foreign_folder() -> list[str]:
    Path("runs/other").mkdir()
    Path("runs/other/thesis.tex").write_text("years of work")
    return [*RUN, "name=other"]


def _no_run() -> list[str]:
    return ["compare", "nowhere"]


def _no_stage() -> list[str]:
    return ["merge", "runs/tiny", "--stage", "ppo"]


# --- 3: resume refused


def _other_beta() -> list[str]:
    return [*RUN, "stages.dpo.beta=0.5"]


def _other_rows() -> list[str]:
    write_rows(Path("sft.jsonl"), questions(9))
    return RUN


def _other_base() -> list[str]:
    tensors = load_file("model/model.safetensors")
    save_file({name: tensor * 1.01 for name, tensor in tensors.items()}, "model/model.safetensors", {"format": "pt"})
    return RUN


def _one_bit_strict() -> list[str]:
    (_stage("dpo") / "result.json").unlink()
    _flip(_newest_checkpoint("dpo") / "trainable.safetensors")
    return [*RUN, "--strict"]


def _no_optimizer() -> list[str]:
    """The only checkpoint, so there is none to go back to."""
    (_stage("dpo") / "result.json").unlink()
    (_newest_checkpoint("dpo") / "optimizer.safetensors").unlink()
    return RUN


def _altered_result() -> list[str]:
    _flip(_stage("sft") / "adapter/adapter_model.safetensors")
    return RUN


def _rows_gone() -> list[str]:
    Path("sft.jsonl").unlink()
    return RUN


def _broken_manifest() -> list[str]:
    Path("runs/tiny/manifest.json").write_text("{")
    return RUN


def _broken_result() -> list[str]:
    (_stage("sft") / "result.json").write_text('{"stage": "sft"}')
    return ["merge", "runs/tiny", "--stage", "sft"]


# --- 4, 5


def _exploding() -> list[str]:
    return [*RUN, "name=other", "stages.sft.learning_rate=1e38", "stages.sft.epochs=4"]


def _no_memory() -> list[str]:
    return [*RUN, "name=other", "seed=9", "memory=0.001GiB"]


REFUSED: list[tuple[int, Fault, str]] = [
    (2, _no_recipe, r"nowhere\.yaml: no such file"),
    (2, _misspelled_key, r"recipe\.yaml:\d+:\d+: stages\[0\]\.batchsize: .*batch_size"),
    (2, _wrong_override, r"override stages\.dpo\.beta=high: stages\[1\]\.beta"),
    (2, _no_rows, r"sft\.jsonl: .*no such file"),
    (2, _bad_row, r"sft\.jsonl:1: answer: found 3"),
    (2, _no_model, r"model: no such model folder"),
    (2, _pickled_weights, r"model: .*pickle"),
    (2, _foreign_folder, r"runs/other: .*thesis\.tex"),
    (2, _no_run, r"nowhere: is not a run folder"),
    (2, _no_stage, r"runs/tiny: there is no stage 'ppo'"),
    (3, _other_beta, r"runs/tiny: (?s:.*)stages\[1\]\.beta: 0\.1 -> 0\.5"),
    (3, _other_rows, r"(?s:.*)sft(?s:.*)9"),
    (3, _other_base, r"(?s:.*)base"),
    (3, _one_bit_strict, r"checkpoints/step-2(?s:.*)trainable\.safetensors was altered"),
    (3, _no_optimizer, r"checkpoints(?s:.*)optimizer\.safetensors is missing"),
    (3, _altered_result, r"adapter_model\.safetensors"),
    (3, _rows_gone, r"sft\.jsonl: is gone"),
    (3, _broken_manifest, r"manifest\.json: cannot be read"),
    (3, _broken_result, r"result\.json: cannot be read"),
    (4, _exploding, r"(stage sft|step \d)"),
    (5, _no_memory, r"(?s:.*)GiB"),
]


@pytest.mark.parametrize(("code", "fault", "message"), REFUSED, ids=[case[1].__name__.strip("_") for case in REFUSED])
def test_a_fault_has_its_code_and_its_words(
    code: int, fault: Fault, message: str, inputs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = fault()
    before = _files(inputs)
    assert _code(arguments) == code, capsys.readouterr()
    _assert_words(capsys.readouterr(), message)
    after = _files(inputs)
    assert {name: after.get(name) for name in before} == before, "something that was there is lost or overwritten"
    if code != 4:  # a run that is refused leaves nothing new either; one that explodes leaves what it did
        assert [name for name in after if name not in before and "stages" in name] == []


def _assert_words(said: object, message: str) -> None:
    """One message: `Error: where: what`, then on lines of its own what to do, where the first does not say it."""
    assert isinstance(said, tuple)
    out, err = said
    assert "Traceback" not in out + err
    assert len(re.findall(r"^Error: ", err, re.MULTILINE)) == 1
    error = err[err.index("Error: ") :]
    assert re.search(message, error), error
    last = error.rstrip().splitlines()[-1]
    # the problems of a recipe or a row say themselves what is wanted
    assert last.startswith("  ") or re.search(r"did you mean|must|should|wanted|No such|one of|number", error), error


# --- 5: disk


@contextmanager
def _largest_file(num_bytes: int) -> Iterator[None]:
    """No file may grow past this: the kernel says EFBIG, as a full quota says EDQUOT."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)


def test_no_room_for_a_checkpoint(inputs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The stage before it stays; the half-written checkpoint is gone."""
    (_stage("dpo") / "result.json").unlink()
    shutil.rmtree(_newest_checkpoint("dpo"))
    for name in ("metrics.jsonl", "timings.jsonl", "eval.jsonl"):
        (_stage("dpo") / name).unlink(missing_ok=True)
    before = _files(_stage("sft"))
    with _largest_file(20_000):
        code = _code(RUN)
    assert code == 5
    _assert_words(capsys.readouterr(), r"(?s:.*)bytes")
    assert _files(_stage("sft")) == before
    assert not list(inputs.rglob(".tmp-*"))
    assert _code(RUN) == 0  # with room, the same command goes on


# --- 6: locked


def test_a_second_process_is_refused(inputs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = _files(inputs)
    with run_lock(Path("runs/tiny/run.lock")):
        assert _code(RUN) == 6
        _assert_words(capsys.readouterr(), rf"runs/tiny: process {os.getpid()} .* has owned this run since")
    assert _files(inputs) == before
    assert _code(RUN) == 0


# --- 130, 143: stopped after a clean save


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_the_same_command_goes_on(
    number: signal.Signals, code: int, inputs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [*RUN, "name=other", "stages.sft.epochs=40"]
    metrics = Path("runs/other/stages/sft/metrics.jsonl")
    ended = threading.Event()

    def stop_at_a_step() -> None:
        while not ended.is_set() and not (metrics.is_file() and metrics.stat().st_size):
            time.sleep(0.005)
        if not ended.is_set():
            os.kill(os.getpid(), number)

    watcher = threading.Thread(target=stop_at_a_step, daemon=True)
    watcher.start()
    try:
        assert _code(arguments) == code
    finally:
        ended.set()
        watcher.join()
    _assert_words(capsys.readouterr(), r"(?s:.*)(saved|kept)")
    steps = [json.loads(line)["step"] for line in metrics.read_text().splitlines()]
    assert 1 <= len(steps) < 80
    saved = [int(path.name.removeprefix("step-")) for path in (metrics.parent / "checkpoints").iterdir()]
    assert max(saved) == steps[-1]
    assert not list(Path("runs").rglob(".tmp-*"))
    assert _code(arguments) == 0


# --- 1: a bug of ours; 0


def _raise_a_bug(*_: object, **__: object) -> None:
    raise ZeroDivisionError("float division by zero")


def test_a_bug_is_called_a_bug(
    inputs: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tunesmith.pipeline.run.run_stage", _raise_a_bug)
    assert _code(RUN) == 1
    said = capsys.readouterr()
    assert "a bug in Tunesmith: ZeroDivisionError" in said.err
    assert "--debug" in said.err
    assert "Traceback" not in said.out + said.err
    for code, arguments in ((1, ["--debug", *RUN]), (2, ["run", "nowhere.yaml", "--debug"])):
        assert _code(arguments) == code
        assert "Traceback" in capsys.readouterr().err


def test_words_that_are_no_command(inputs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["rn", "recipe.yaml"], ["run"], [*RUN, "--strikt"], ["run", "recipe.yaml", "no-equals-sign"]):
        assert _code(arguments) == 2
        said = capsys.readouterr()
        assert "Error: " in said.err
        assert "Traceback" not in said.err


def test_a_finished_run_is_done(inputs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = {name: (_stage(name) / "result.json").read_bytes() for name in ("sft", "dpo")}
    assert _code(RUN) == 0
    assert {name: (_stage(name) / "result.json").read_bytes() for name in ("sft", "dpo")} == results
    assert "Error" not in capsys.readouterr().err


def test_a_damaged_checkpoint_without_strict_goes_back_and_says_so(
    inputs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = (_stage("dpo") / "adapter/adapter_model.safetensors").read_bytes()
    (_stage("dpo") / "result.json").unlink()
    shutil.copytree(_newest_checkpoint("dpo"), _stage("dpo") / "checkpoints/step-99")
    _flip(_stage("dpo") / "checkpoints/step-99/trainable.safetensors")
    assert _code(RUN) == 0
    said = capsys.readouterr()
    assert re.search(
        r"step-99: trainable\.safetensors was altered.* Going back", " ".join((said.out + said.err).split())
    )
    assert (_stage("dpo") / "adapter/adapter_model.safetensors").read_bytes() == whole


# --- F45: paths


@pytest.mark.parametrize("name", ["with spaces", "Ünïcödé ‮ 数据", "x" * 200, "a'b\"c$(d);e&f", "-rf"])
def test_any_path_works(name: str, inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / name
    shutil.copytree(inputs, folder)
    monkeypatch.chdir(folder)
    shutil.rmtree("runs")
    path = folder / "a recipe.yaml"
    with path.open("w") as file:
        YAML().dump(tiny_recipe(folder, stages=tiny_recipe(folder)["stages"][:1]), file)  # type: ignore[index]
    assert _code(["run", str(path)]) == 0
    assert (folder / "runs/tiny/stages/sft/result.json").is_file()


@pytest.mark.parametrize("name", ["../x", "a/b", "", ".", "x" * 255, "nul\0", "CON/..", " x"])
def test_a_name_that_is_no_folder_ends_at_once(name: str, inputs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = _files(inputs)
    assert _code([*RUN, f"name={json.dumps(name)}"]) == 2
    assert "name" in capsys.readouterr().err
    assert _files(inputs) == before


def test_a_path_that_is_too_long_for_the_disk(inputs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _code([*RUN, f"runs_folder={'x' * 256}"]) == 2
    _assert_words(capsys.readouterr(), "too long")
