"""A command that is asked to stop, stops: in time, with the right code, and with nothing lost (R2, F16, F17, F18)."""

from __future__ import annotations

import json
import re
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from tests.support.commands import Command, Server, serving
from tests.support.folders import make_run_inputs, questions, tiny_recipe, write_rows
from tunesmith.runs.lock import run_lock
from tunesmith.train.checkpoint import find_problem, list_steps

NUM_STEPS = 9

HOOKS = "from tests.support import slowness as slow\n"


@pytest.fixture(scope="module")
def server(project: Path) -> Iterator[Server]:
    with serving(project) as started:
        yield started


@dataclass(frozen=True)
class Inputs:
    """Recipes, and what they come to where nothing stops them."""

    sft: str
    dpo: str
    whole: dict[str, bytes]


def _results(folder: Path, stage: str = "sft") -> dict[str, bytes]:
    paths = [folder / f"runs/tiny/stages/{stage}" / name for name in ("metrics.jsonl", "eval.jsonl")]
    weights = folder / f"runs/tiny/stages/{stage}/adapter/adapter_model.safetensors"
    return {path.name: path.read_bytes() for path in [*paths, weights]}


@pytest.fixture(scope="module")
def inputs(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    folder = make_run_inputs(tmp_path_factory.mktemp("inputs"))
    write_rows(folder / "sft.jsonl", questions(16))
    recipe = tiny_recipe(folder, runs_folder="runs")
    stages = recipe["stages"]
    assert isinstance(stages, list)
    changes = {"batch_size": 4, "epochs": 3, "save_every": 4, "eval_every": 3, "forest_tokens": 70}
    stages[0].update(changes, heldout_fraction=0.3)
    stages[1].update(changes)
    paths = {}
    for name, chosen in (("sft", stages[:1]), ("dpo", stages[1:])):
        paths[name] = folder / f"{name}.yaml"
        with paths[name].open("w") as file:
            YAML().dump({**recipe, "stages": chosen}, file)
    code, text = server.run(folder, "run", str(paths["sft"]))
    assert code == 0, text
    assert f"step {NUM_STEPS}/{NUM_STEPS}" in text
    return Inputs(str(paths["sft"]), str(paths["dpo"]), _results(folder))


def _stage(folder: Path) -> Path:
    return folder / "runs/tiny/stages/sft"


def _steps(folder: Path) -> list[int]:
    """Checkpoints, all of which must be whole."""
    checkpoints = _stage(folder) / "checkpoints"
    steps = list_steps(checkpoints)
    problems = [find_problem(checkpoints / f"step-{step}") for step in steps]
    assert not any(problems), problems
    return sorted(steps)


def _num_records(folder: Path) -> int:
    path = _stage(folder) / "metrics.jsonl"
    return len(path.read_bytes().splitlines()) if path.exists() else 0


def _goes_on(server: Server, folder: Path, inputs: Inputs) -> str:
    """The same command, to its end, comes to the same bytes; what it said."""
    code, text = server.run(folder, "run", inputs.sft)
    assert code == 0, text
    assert _results(folder) == inputs.whole
    assert not list((folder / "runs").rglob(".tmp-*"))
    assert not (folder / "runs/tiny/run.lock").exists()
    return text


def _stop(command: Command, number: signal.Signals, *, group: bool = False) -> tuple[int, str, float]:
    """Send it; the exit code, what was said, and the seconds to the end."""
    start = time.monotonic()
    command.send(number, group=group)
    code = command.wait()
    return code, command.text(), time.monotonic() - start


@pytest.mark.parametrize(
    ("number", "code", "group"),
    [(signal.SIGTERM, 143, False), (signal.SIGINT, 130, True), (signal.SIGUSR1, 143, False)],
)
def test_the_step_is_finished_and_saved_and_the_same_command_goes_on(
    server: Server, inputs: Inputs, tmp_path: Path, number: signal.Signals, code: int, group: bool
) -> None:
    command = server.start(tmp_path, "run", inputs.sft, prepare=HOOKS + "slow.slow_steps(0.25)")
    command.until(lambda: _num_records(tmp_path) >= 4, "four steps")
    found, text, _ = _stop(command, number, group=group)
    assert found == code, text
    done = _num_records(tmp_path)
    assert max(_steps(tmp_path)) == done < NUM_STEPS
    assert f"stopped by {number.name} after step {done} of {NUM_STEPS}; it is saved" in text
    assert f"{number.name}: stopping at the next safe point, within 30 s" in text
    assert "The same command goes on from there" in text
    assert "Traceback" not in text
    if number == signal.SIGTERM:  # what is on disk is the same after each
        assert f"going on after step {done}" in _goes_on(server, tmp_path, inputs)


def test_a_second_signal_stops_at_once_and_stays_consistent(server: Server, inputs: Inputs, tmp_path: Path) -> None:
    command = server.start(tmp_path, "run", inputs.sft, prepare=HOOKS + "slow.slow_steps(30, at=6)")
    command.until_said("slow step 6")
    command.send(signal.SIGINT)
    time.sleep(0.5)  # closer together they are one request
    code, text, seconds = _stop(command, signal.SIGINT)
    assert (code, seconds < 3) == (130, True), text
    assert "a second signal (SIGINT) stopped it at once, without a save" in text
    assert max(_steps(tmp_path)) == 4
    assert "going on after step 4" in _goes_on(server, tmp_path, inputs)


def test_a_step_that_hangs_in_c_is_ended_at_the_deadline(server: Server, inputs: Inputs, tmp_path: Path) -> None:
    prepare = HOOKS + "slow.hang_in_step(6)"
    command = server.start(tmp_path, "run", inputs.sft, "stop_within=1s", prepare=prepare)
    command.until_said("hanging 6")
    code, text, seconds = _stop(command, signal.SIGTERM)
    assert code == 143, text
    assert 0.9 < seconds < 3
    assert "SIGTERM: out of time, so the process ends where it is; what was saved before stands" in text
    assert max(_steps(tmp_path)) == 4
    assert "is gone; its lock is taken over" in _goes_on(server, tmp_path, inputs)


def test_a_second_signal_ends_what_hangs_in_c_long_before_the_deadline(
    server: Server, inputs: Inputs, tmp_path: Path
) -> None:
    command = server.start(tmp_path, "run", inputs.sft, prepare=HOOKS + "slow.hang_in_step(6)")
    command.until_said("hanging 6")
    command.send(signal.SIGINT)
    time.sleep(0.5)
    code, text, seconds = _stop(command, signal.SIGTERM)
    assert (code, seconds < 5) == (130, True), text


def test_a_step_that_would_not_end_in_time_is_left_and_the_one_before_it_saved(
    server: Server, inputs: Inputs, tmp_path: Path
) -> None:
    prepare = HOOKS + "slow.slow_forests(1.5, at=7, training=True)"
    command = server.start(tmp_path, "run", inputs.sft, "stop_within=2s", prepare=prepare)
    command.until_said("slow forest")
    code, text, seconds = _stop(command, signal.SIGTERM)
    assert (code, seconds < 3) == (143, True), text
    assert "stopped by SIGTERM in step 7, which would not have been done in time; step 6 is saved" in text
    assert max(_steps(tmp_path)) == 6
    assert "going on after step 6" in _goes_on(server, tmp_path, inputs)


def test_an_evaluation_is_left_and_made_by_the_next_start(server: Server, inputs: Inputs, tmp_path: Path) -> None:
    prepare = HOOKS + "slow.slow_forests(0.5, at=6, training=False)"
    command = server.start(tmp_path, "run", inputs.sft, prepare=prepare)
    command.until_said("slow forest")
    code, text, _ = _stop(command, signal.SIGTERM)
    assert code == 143, text
    assert "stopped by SIGTERM in the evaluation after step 6; step 6 is saved" in text
    evaluated = [json.loads(line)["step"] for line in (_stage(tmp_path) / "eval.jsonl").read_text().splitlines()]
    assert (evaluated, max(_steps(tmp_path))) == ([0, 3], 6)
    _goes_on(server, tmp_path, inputs)


def test_a_signal_during_a_save_waits_for_it(server: Server, inputs: Inputs, tmp_path: Path) -> None:
    command = server.start(tmp_path, "run", inputs.sft, prepare=HOOKS + "slow.slow_saves(0.4)")
    command.until_said("saving")
    code, text, _ = _stop(command, signal.SIGTERM)
    assert code == 143, text
    assert _steps(tmp_path) == [3]  # the best so far
    assert "after step 3 of 9; it is saved" in text
    _goes_on(server, tmp_path, inputs)


def test_the_reference_is_left_between_two_forests(server: Server, inputs: Inputs, tmp_path: Path) -> None:
    command = server.start(tmp_path, "run", inputs.dpo, prepare=HOOKS + "slow.slow_scoring(0.4)")
    command.until_said("packing:")
    code, text, seconds = _stop(command, signal.SIGTERM)
    assert (code, seconds < 2) == (143, True), text
    assert "stage dpo, reference: stopped by SIGTERM; the rows that were scored are kept" in text


def test_preparation_is_left_without_a_traceback_of_its_workers(server: Server, inputs: Inputs, tmp_path: Path) -> None:
    prepare = HOOKS + "slow.slow_rows(2.0)"
    command = server.start(tmp_path, "run", inputs.sft, "data_workers=2", prepare=prepare)
    command.until_said("rendering")
    code, text, seconds = _stop(command, signal.SIGINT, group=True)
    assert (code, seconds < 10) == (130, True), text
    assert "data: stopped by SIGINT; what was prepared so far is kept" in text
    assert "Traceback" not in text
    assert "KeyboardInterrupt" not in text
    assert not (tmp_path / "runs").exists()


def test_a_time_limit_stops_before_it_and_the_same_command_goes_on(
    server: Server, inputs: Inputs, tmp_path: Path
) -> None:
    start = time.monotonic()
    code, text = server.run(tmp_path, "run", inputs.sft, "save_before=9s", prepare=HOOKS + "slow.slow_steps(1.5)")
    seconds = time.monotonic() - start
    assert code == 143, text
    assert seconds < 9.5
    assert 0 < max(_steps(tmp_path)) == _num_records(tmp_path) < NUM_STEPS
    assert "stopped by `save_before` after step" in text


def test_a_pause_of_the_process_is_one_slow_step(server: Server, inputs: Inputs, tmp_path: Path) -> None:
    command = server.start(tmp_path, "run", inputs.sft, prepare=HOOKS + "slow.slow_steps(0.2)")
    command.until(lambda: _num_records(tmp_path) >= 5, "five steps")  # no save and no evaluation before the next
    time.sleep(0.1)
    command.send(signal.SIGSTOP)
    time.sleep(1.0)
    command.send(signal.SIGCONT)
    assert command.wait() == 0, command.text()
    assert _results(tmp_path) == inputs.whole
    lines = (_stage(tmp_path) / "timings.jsonl").read_text().splitlines()
    seconds = sorted(json.loads(line)["seconds"] for line in lines)
    assert seconds[-1] >= 0.9
    assert all(second > 0 for second in seconds)
    left = re.findall(r"(-?)(\d+):(\d\d) left", command.text())
    assert left
    assert all(sign == "" and int(minutes) == 0 for sign, minutes, _ in left)  # the median step, times those left


@pytest.mark.parametrize("arguments", [["compare"], ["merge"], ["chat"]])
def test_other_commands_end_at_once_and_leave_nothing_half_done(
    server: Server, inputs: Inputs, tmp_path: Path, arguments: list[str]
) -> None:
    run = Path(inputs.sft).parent / "runs/tiny"
    before = sorted(str(path) for path in run.rglob("*"))
    prepare = HOOKS + "slow.slow_loading()"
    command = server.start(tmp_path, *arguments, str(run), prepare=prepare)
    command.until_said("loading")
    code, text, seconds = _stop(command, signal.SIGTERM)
    assert (code, seconds < 3) == (143, True), text
    assert text.endswith("stopped\n")
    assert sorted(str(path) for path in run.rglob("*")) == before


def test_a_run_whose_lock_was_deleted_and_taken_stops_before_it_saves(
    server: Server, inputs: Inputs, tmp_path: Path
) -> None:
    owner = server.start(tmp_path, "run", inputs.sft, prepare=HOOKS + "slow.slow_steps(1.0, at=6)")
    owner.until_said("slow step 6")
    path = tmp_path / "runs/tiny/run.lock"
    path.unlink()
    with run_lock(path):
        assert owner.wait() == 6, owner.text()
        assert "has taken this run away" in owner.text()
        assert max(_steps(tmp_path)) == 4


def test_a_second_process_is_kept_out_and_readers_are_not(server: Server, inputs: Inputs, tmp_path: Path) -> None:
    """A comparison or a merge reads finished stages and writes what the run does not: it waits for nobody."""
    run = tmp_path / "runs/tiny"
    owner = server.start(tmp_path, "run", inputs.sft, prepare=HOOKS + "slow.slow_steps(0.2)")
    owner.until(lambda: _num_records(tmp_path) >= 1, "a step")
    code, text = server.run(tmp_path, "run", inputs.sft)
    assert code == 6
    assert f"process {owner.pid} on " in text
    assert "rows" not in text  # it is refused before it reads any
    code, text = server.run(tmp_path, "compare", str(run))
    assert code == 2, text  # no stage is finished yet
    assert "Traceback" not in text
    finished = Path(inputs.sft).parent / "runs/tiny"
    with run_lock(finished / "run.lock"):
        code, text = server.run(tmp_path, "merge", str(finished), "--to", str(tmp_path / "merged"))
    assert code == 0, text
    assert owner.wait() == 0, owner.text()
    assert _results(tmp_path) == inputs.whole
