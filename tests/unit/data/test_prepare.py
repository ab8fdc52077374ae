from __future__ import annotations

from pathlib import Path

import pytest

from tests.unit.data.build import CHATML, GEMMA, byte_tokenizer, renderer, source, write_jsonl
from tunesmith.data.notes import histogram
from tunesmith.data.prepare import Prepared, prepare_stage, read_examples
from tunesmith.data.render import Renderer
from tunesmith.data.template import choose_template
from tunesmith.data.types import Json
from tunesmith.errors import DataError, ModelError
from tunesmith.recipe.models import CompletionStage, DpoStage, SftStage

STAGES = {"sft": SftStage, "dpo": DpoStage, "completion": CompletionStage}


def prepare(path: Path, method: str = "sft", r: Renderer | None = None, **knobs: object) -> Prepared:
    values = {"name": "one", "method": method, "train": [{"path": str(path)}], **knobs}
    return prepare_stage(STAGES[method].model_validate(values), r or renderer(CHATML))


def refusal(path: Path, method: str = "sft", r: Renderer | None = None, **knobs: object) -> str:
    with pytest.raises(DataError) as error:
        prepare(path, method, r, **knobs)
    return str(error.value)


def qa(number: int, answer: str = "an answer") -> dict[str, Json]:
    return {"question": f"question {number}", "answer": answer}


def test_every_row_is_in_the_ledger_with_its_fate(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", qa(1), qa(2, " "), qa(3, "word " * 50), qa(4))
    prepared = prepare(path, r=renderer(CHATML, max_length=60))
    assert [tree.id for tree in prepared.train] == [f"{path}:1", f"{path}:4"]
    fates = {entry.id.removeprefix(f"{path}:"): (entry.outcome, entry.reason) for entry in prepared.ledger}
    assert fates["1"] == fates["4"] == ("kept", "")
    assert fates["2"] == ("dropped", "empty answer")
    assert fates["3"][0] == "dropped"
    assert fates["3"][1].startswith("longer than max_length: ")
    kept = next(entry for entry in prepared.ledger if entry.id == f"{path}:1")
    assert (kept.prompt_tokens, kept.trained_tokens) == (
        len(prepared.train[0].prompt_ids),
        prepared.train[0].num_trained,
    )
    assert (kept.stage, kept.split, kept.source) == ("one", "train", str(path))
    assert sum(count.num_rows for count in prepared.ledger.summary()) == 4


def test_notes_say_format_drops_duplicates_and_template(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", {**qa(1), "id": 7}, qa(1), qa(2, ""), qa(3, "word " * 50))
    tokenizer = byte_tokenizer()
    notes = prepare(path, r=Renderer(tokenizer, choose_template(tokenizer, None), 60)).notes
    assert notes[0].startswith("The model has no chat template: the built-in `chatml` one is used")
    assert notes[1] == f"{path}: format question_answer (4 of 4 rows have `question` and `answer`)."
    assert notes[2] == f"{path}: columns not read: id."
    assert notes[3] == f"WARNING: 1 of 4 train rows dropped, empty answer ({path}:3)."
    assert notes[4].startswith(f"WARNING: 1 of 4 train rows dropped, longer than max_length ({path}:4: ")
    assert notes[4].endswith(" > 60 tokens).")
    assert notes[5].startswith("lengths of the training rows in tokens: median ")
    assert notes[6] == "1 of 2 training rows repeat an earlier one; all are trained."
    assert len(notes) == 7


def test_heldout_fraction_keeps_duplicates_on_one_side(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", *(qa(number % 40) for number in range(120)))
    prepared = prepare(path, heldout_fraction=0.3)
    assert len(prepared.train) + len(prepared.heldout) == 120
    assert len(prepared.heldout) % 3 == 0
    assert 9 <= len(prepared.heldout) <= 66  # 36 expected in groups of 3, standard deviation 8.7
    assert [example.id for example in prepared.heldout_examples] == [tree.id for tree in prepared.heldout]
    assert {entry.split for entry in prepared.ledger} == {"train", "heldout"}
    assert not any("WARNING" in note for note in prepared.notes)


def test_leaks_into_a_heldout_file_are_reported(tmp_path: Path) -> None:
    train = write_jsonl(tmp_path / "a.jsonl", qa(1), qa(2))
    heldout = write_jsonl(tmp_path / "b.jsonl", qa(2, "another"), qa(3))
    prepared = prepare(train, heldout=[{"path": str(heldout)}])
    assert prepared.notes[-1] == (f"WARNING: 1 of 2 held-out rows have a prompt that is also trained ({heldout}:1).")


def test_replay_rows_are_texts_apart(tmp_path: Path) -> None:
    train = write_jsonl(tmp_path / "a.jsonl", qa(1))
    texts = write_jsonl(tmp_path / "t.jsonl", {"text": "the world"}, {"text": "is round"})
    prepared = prepare(train, replay={"sources": [{"path": str(texts)}]})
    assert [len(prepared.train), len(prepared.replay)] == [1, 2]
    assert [entry.split for entry in prepared.ledger] == ["train", "replay", "replay"]
    assert "plain text is wanted here" in refusal(train, replay={"sources": [{"path": str(train)}]})


def test_a_method_refuses_formats_that_do_not_suit_it(tmp_path: Path) -> None:
    answers = write_jsonl(tmp_path / "a.jsonl", qa(1))
    pairs = write_jsonl(tmp_path / "p.jsonl", {"prompt": "q", "chosen": "a", "rejected": "b"})
    text = refusal(answers, "dpo")
    assert (
        f"{answers}: pairs of a `chosen` and a `rejected` answer are wanted here, but the file holds one answer" in text
    )
    assert "it is in the format question_answer (1 of 1 rows have `question` and `answer`)" in text
    assert "Formats with pairs: preference, preferred_output, transcripts, ranked." in text
    assert "one answer a row is wanted here, but the file holds pairs of a `chosen` and" in refusal(pairs)
    assert "For pairs use `method: dpo`" in refusal(pairs)
    assert "plain text is wanted here, but the file holds one answer a row" in refusal(answers, "completion")
    assert len(prepare(pairs, "dpo").train[0].branches) == 2
    assert read_examples(source(pairs)).num_answers == 2


def test_malformed_rows_stop_with_file_and_line(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", qa(1), {"question": 3, "answer": "a"}, {"question": "q"})
    assert refusal(path) == (
        f"{path}: 2 of 3 rows do not fit the format question_answer (2 of 3 rows have `question` and `answer`):\n"
        f"  {path}:2: question: found 3; wanted a string\n"
        f"  {path}:3: answer: found no such key; wanted a string\n"
        "  Mend or delete these rows, name another format with `format:`, or set `on_bad_row: drop`."
    )


def test_rows_that_the_template_refuses_stop_the_run(tmp_path: Path) -> None:
    rows: list[Json] = [{**qa(number), "system": "s"} for number in range(30)]
    path = write_jsonl(tmp_path / "a.jsonl", qa(99), *rows)
    text = refusal(path, r=renderer(GEMMA))
    assert text.startswith(f"{path}: 30 of 31 rows cannot be rendered:\n  {path}:2: the chat template refuses")
    assert "System role not supported" in text
    assert (
        "  ... and 10 more\n  Mend or delete these rows, give another `chat_template`, or set `on_bad_row: drop`."
        in text
    )
    with pytest.raises(ModelError, match="nothing would teach the model to stop"):
        prepare(path, r=renderer(CHATML.replace("<|im_end|>", "")))


def test_all_rows_too_long_shows_lengths_and_the_setting_needed(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", qa(1, "word " * 20), qa(2, "word " * 60), qa(3, ""))
    text = refusal(path, r=renderer(CHATML, max_length=10))
    lengths = [renderer(CHATML).tree(example).num_tokens for example in read_examples(source(path)).examples]
    head, remedy = text.split(f"\n{histogram(lengths)}\n")
    assert head == "stage one: all 3 rows of the train side were dropped: 2 longer than max_length, 1 empty answer"
    assert remedy == f"  `max_length: {max(lengths)}` keeps the over-long ones."


def test_all_rows_degenerate_or_held_out(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", qa(1, ""))
    text = refusal(path)
    assert "all 1 rows of the train side were dropped: 1 empty answer\n  Give rows that can be trained." in text
    path = write_jsonl(tmp_path / "b.jsonl", qa(1))
    assert "heldout_fraction 0.99999 took them all" in refusal(path, heldout_fraction=0.99999)
    assert prepare(path, heldout_fraction=0.00001).notes[-1] == "WARNING: heldout_fraction 1e-05 held out no row."
    assert len(prepare(path).train) == 1  # F29: one row trains


def test_histogram_by_hand() -> None:
    assert histogram([100, 128, 129, 40_000]) == (
        "         1 to    128 tokens: 2 rows\n       129 to    256 tokens: 1 rows\n     32769 to  40000 tokens: 1 rows"
    )


def test_pairs_that_are_equal_are_dropped_and_counted(tmp_path: Path) -> None:
    pair: dict[str, Json] = {"prompt": "q", "chosen": "a", "rejected": "b"}
    path = write_jsonl(tmp_path / "p.jsonl", pair, {**pair, "rejected": "a"}, {**pair, "rejected": " a "})
    prepared = prepare(path, "dpo", renderer(GEMMA))
    assert [entry.reason for entry in prepared.ledger if entry.outcome == "dropped"] == ["chosen equals rejected"] * 2
    assert any(note.startswith("WARNING: 2 of 3 train rows dropped, chosen equals rejected") for note in prepared.notes)
