"""Bad input ends with its exit code and one message that says what, where and what to do; nothing is written."""

from __future__ import annotations

import gzip
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from tests.support.folders import make_run_inputs, tiny_recipe, write_rows
from tunesmith.cli.main import main

Break = Callable[[Path, dict[str, object]], object]


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    return make_run_inputs(tmp_path)


def _run(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err + captured.out
    code = stop.value.code
    assert isinstance(code, int)
    return code, captured.err


def _write(folder: Path, recipe: dict[str, object]) -> str:
    path = folder / "recipe.yaml"
    with path.open("w") as file:
        YAML().dump(recipe, file)
    return str(path)


def _sft(recipe: dict[str, object]) -> dict[str, object]:
    stages = recipe["stages"]
    assert isinstance(stages, list)
    stage = stages[0]
    assert isinstance(stage, dict)
    return stage


def _absent(folder: Path, recipe: dict[str, object]) -> None:
    (folder / "sft.jsonl").unlink()


def _empty(folder: Path, recipe: dict[str, object]) -> None:
    (folder / "sft.jsonl").write_text("")


def _not_json(folder: Path, recipe: dict[str, object]) -> None:
    (folder / "sft.jsonl").write_text('{"question": "a", "answer": "b"}\n{"question": \n')


def _unknown_format(folder: Path, recipe: dict[str, object]) -> None:
    write_rows(folder / "sft.jsonl", [{"foo": "a", "bar": "b"}])


def _no_assistant(folder: Path, recipe: dict[str, object]) -> None:
    write_rows(folder / "sft.jsonl", [{"messages": [{"role": "user", "content": "Hello?"}]}])


def _no_chosen(folder: Path, recipe: dict[str, object]) -> None:
    write_rows(folder / "pairs.jsonl", [{"question": "a?", "answer": "b"}])


def _all_dropped(folder: Path, recipe: dict[str, object]) -> None:
    _sft(recipe)["max_length"] = 4


def _template_raises(folder: Path, recipe: dict[str, object]) -> None:
    (folder / "t.jinja").write_text("{{ raise_exception('only one turn, please') }}")
    recipe["model"] = {"path": str(folder / "model"), "chat_template": str(folder / "t.jinja")}


def _no_weights(folder: Path, recipe: dict[str, object]) -> None:
    (folder / "model/model.safetensors").unlink()


def _pickled_weights(folder: Path, recipe: dict[str, object]) -> None:
    (folder / "model/model.safetensors").rename(folder / "model/pytorch_model.bin")


def _missing_weights(folder: Path, recipe: dict[str, object]) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model/model.safetensors")
    tensors.pop("model.norm.weight")
    save_file(tensors, folder / "model/model.safetensors", metadata={"format": "pt"})


def _no_model(folder: Path, recipe: dict[str, object]) -> None:
    recipe["model"] = {"path": str(folder / "nowhere")}


def _no_tokenizer(folder: Path, recipe: dict[str, object]) -> None:
    for path in (folder / "model").glob("tokenizer*"):
        path.unlink()


def _foreign_run(folder: Path, recipe: dict[str, object]) -> None:
    (folder / "runs/tiny").mkdir(parents=True)
    (folder / "runs/tiny/thesis.tex").write_text("years of work")


def _run_is_a_file(folder: Path, recipe: dict[str, object]) -> None:
    (folder / "runs").write_text("")


def _unknown_start(folder: Path, recipe: dict[str, object]) -> None:
    _sft(recipe)["start"] = str(folder / "nothing-here")


def _truncated_gzip(folder: Path, recipe: dict[str, object]) -> None:
    whole = gzip.compress(json.dumps({"question": "a?", "answer": "b"}).encode() * 1000)
    (folder / "sft.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    _sft(recipe)["train"] = [{"path": str(folder / "sft.jsonl.gz")}]


def _archive(folder: Path, recipe: dict[str, object]) -> None:
    (folder / "sft.zip").write_bytes(b"PK")
    _sft(recipe)["train"] = [{"path": str(folder / "sft.zip")}]


def _empty_folder(folder: Path, recipe: dict[str, object]) -> None:
    (folder / "my rows").mkdir()
    (folder / "my rows/rows.xlsx").write_bytes(b"PK")
    _sft(recipe)["train"] = [{"path": str(folder / "my rows")}]


def _short_record(folder: Path, recipe: dict[str, object]) -> None:
    (folder / "sft.csv").write_bytes(b"question,answer\na?,b\nc?\n")
    _sft(recipe)["train"] = [{"path": str(folder / "sft.csv")}]


def _mistyped_folder(folder: Path, recipe: dict[str, object]) -> None:
    _sft(recipe)["train"] = [{"path": "model/sft"}]  # could be a data set's id, but there is a folder `model`


def _cut_off(folder: Path, recipe: dict[str, object]) -> None:
    path = folder / "sft.jsonl"
    path.write_bytes(path.read_bytes()[:-10])


def _bad_bytes(folder: Path, recipe: dict[str, object]) -> None:
    path = folder / "sft.jsonl"
    path.write_bytes(path.read_bytes() + b'{"question": "caf\xe9", "answer": "b"}\n')


def _half_a_character(folder: Path, recipe: dict[str, object]) -> None:
    (folder / "sft.jsonl").write_text('{"question": "a?", "answer": "\\ud83d"}\n')


def _wrong_types(folder: Path, recipe: dict[str, object]) -> None:
    def turns(*messages: object) -> dict[str, object]:
        return {"messages": [{"role": "user", "content": "q"}, *messages]}

    reply = {"role": "assistant", "content": "a"}
    rows = [
        turns({"role": "assistant", "content": 3}),
        turns({"role": "assistant", "content": None}),
        turns({"role": "oracle", "content": "a"}),
        turns(reply, reply),
        {"messages": "a"},
    ]
    write_rows(folder / "sft.jsonl", [turns(reply), *rows])


def _mixed(folder: Path, recipe: dict[str, object]) -> None:
    write_rows(folder / "sft.jsonl", [{"question": "a", "answer": "b"}, {"instruction": "a", "output": "b"}])


def _degenerate(folder: Path, recipe: dict[str, object]) -> None:
    write_rows(folder / "pairs.jsonl", [{"prompt": "q", "chosen": "a", "rejected": "a"}] * 3)


def _labels(folder: Path, recipe: dict[str, object]) -> None:
    write_rows(folder / "pairs.jsonl", [{"prompt": "q", "completion": "a", "label": True}])


def _tools(folder: Path, recipe: dict[str, object]) -> None:
    tools = [{"type": "function", "function": {"name": "look", "description": "Looks.", "parameters": {}}}]
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    write_rows(folder / "sft.jsonl", [{"messages": messages, "tools": tools}])


def _no_end_of_text(folder: Path, recipe: dict[str, object]) -> None:
    path = folder / "model/tokenizer_config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps({key: value for key, value in settings.items() if key != "eos_token"}))


def _misspelled_key(folder: Path, recipe: dict[str, object]) -> None:
    _sft(recipe)["heldout_fracton"] = 0.1


def _too_long_and_told_to_stop(folder: Path, recipe: dict[str, object]) -> None:
    _sft(recipe).update({"too_long": "stop", "max_length": 20})


CASES: list[tuple[Break, str]] = [
    (_cut_off, r"sft\.jsonl:8: line: found"),
    (_bad_bytes, r"sft\.jsonl:9: line: found .*0xe9"),
    (_half_a_character, r"sft\.jsonl:1: answer: found half of a surrogate pair"),
    (_wrong_types, r"5 of 6 rows(?s:.*):2: (?s:.*):3: (?s:.*):4: (?s:.*)oracle(?s:.*):5: (?s:.*):6: "),
    (_mixed, r"several formats: 1 alpaca, 1 question_answer"),
    (_degenerate, r"all 3 rows of the train side were dropped: 3 chosen equals rejected"),
    (_labels, r"pairs of a `chosen` .* wanted here, but the file holds one answer with a label"),
    (_tools, r"the chat template drops the tools"),
    (_no_end_of_text, r"no end-of-text token(?s:.*)eos_token"),
    (_misspelled_key, r"heldout_fracton.*heldout_fraction"),
    (_too_long_and_told_to_stop, r"rows are too long(?s:.*)Raise `max_length`"),
    (_absent, r"sft\.jsonl: .*no such file"),
    (_empty, r"sft\.jsonl: the file holds no rows"),
    (_not_json, r"sft\.jsonl:2.*JSON"),
    (_unknown_format, r"foo.*(?s:.*)question"),
    (_no_assistant, r"sft\.jsonl:1.*assistant"),
    (_no_chosen, r"pairs\.jsonl: pairs of a `chosen` and a `rejected` answer are wanted"),
    (_all_dropped, r"all 8 rows .* dropped"),
    (_template_raises, r"only one turn, please"),
    (_no_weights, r"model: .*no weights"),
    (_pickled_weights, r"pickle"),
    (_missing_weights, r"lacks 1 tensors .*model\.norm\.weight"),
    (_no_model, r"nowhere: no such model folder"),
    (_no_tokenizer, r"tokenizer cannot be loaded"),
    (_foreign_run, r"tiny.*thesis\.tex"),
    (_run_is_a_file, r"runs"),
    (_unknown_start, r"stages\[0\]\.start.*nothing-here"),
    (_truncated_gzip, r"sft\.jsonl\.gz.*damaged or cut off"),
    (_archive, r"sft\.zip: archives are not read"),
    (_empty_folder, r"my rows: no file here can be read(?s:.*)rows\.xlsx"),
    (_short_record, r"sft\.csv:3: line: found 1 cells; wanted 2"),
    (_mistyped_folder, r"model/sft: no such file"),
]


@pytest.mark.parametrize(("spoil", "message"), CASES, ids=[case[0].__name__.strip("_") for case in CASES])
def test_bad_input_is_refused(
    spoil: Break, message: str, inputs: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(inputs)
    recipe = tiny_recipe(inputs)
    spoil(inputs, recipe)
    path = _write(inputs, recipe)
    before = _files(inputs)
    code, err = _run(["run", path], capsys)
    assert code == 2
    errors = err[err.index("Error: ") :]
    assert re.search(message, errors), errors
    assert not any("stages" in name for name in set(_files(inputs)) - set(before))
    assert {name: content for name, content in _files(inputs).items() if name in before} == before


def _files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_check_says_the_same_without_starting(inputs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _unknown_format(inputs, {})
    with pytest.raises(SystemExit) as stop:
        main(["check", _write(inputs, tiny_recipe(inputs))])
    assert stop.value.code == 2
    assert "foo" in capsys.readouterr().out
    assert not (inputs / "runs").exists()


def test_a_run_folder_of_another_recipe_is_left_alone(inputs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = _write(inputs, tiny_recipe(inputs))
    assert _run(["run", path], capsys)[0] == 0
    before = _files(inputs / "runs")
    code, err = _run(["run", path, "stages.dpo.beta=0.5"], capsys)
    assert code == 3
    assert "stages[1].beta: 0.1 -> 0.5" in err
    assert _files(inputs / "runs") == before


def test_changed_rows_under_the_same_name_are_refused(inputs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = _write(inputs, tiny_recipe(inputs))
    assert _run(["run", path], capsys)[0] == 0
    rows = (inputs / "sft.jsonl").read_text().replace("number 3", "number three")
    (inputs / "sft.jsonl").write_text(rows)
    (inputs / "runs/tiny/log.jsonl").unlink()  # the one file that a refusal writes to
    before = _files(inputs / "runs")
    code, err = _run(["run", path], capsys)
    assert code == 3
    assert "1 changed" in err and "sft.jsonl:4" in err, err
    log = (inputs / "runs/tiny/log.jsonl").read_text()
    assert "1 changed" in log
    (inputs / "runs/tiny/log.jsonl").unlink()
    assert _files(inputs / "runs") == before


@pytest.mark.skipif(not Path("/sys/kernel").is_dir(), reason="needs Linux's /sys, where not even root may write")
def test_an_unwritable_run_folder_is_refused(inputs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, err = _run(["run", _write(inputs, tiny_recipe(inputs, runs_folder="/sys/kernel/runs"))], capsys)
    assert code == 2
    assert re.search(r"/sys/kernel/runs.*(not permitted|denied|Read-only)", err), err


def test_a_second_process_is_kept_out(inputs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = _write(inputs, tiny_recipe(inputs))
    (inputs / "runs/tiny").mkdir(parents=True)
    hold = (
        "import sys, time\nfrom pathlib import Path\nfrom tunesmith.runs.lock import run_lock\n"
        "with run_lock(Path(sys.argv[1])):\n    print('held', flush=True)\n    time.sleep(60)"
    )
    lock = str(inputs / "runs/tiny/run.lock")
    with subprocess.Popen([sys.executable, "-c", hold, lock], stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        assert owner.stdout.readline() == "held\n"
        code, err = _run(["run", path], capsys)
        owner.kill()
    assert code == 6
    assert str(owner.pid) in err
