from __future__ import annotations

import pytest

from tests.unit.data.build import rows
from tunesmith.data.formats.detect import detect, kind_of
from tunesmith.data.types import Json
from tunesmith.errors import DataError
from tunesmith.recipe.models import FormatName

TALK: Json = [{"role": "user", "content": "q"}]
TRANSCRIPT = "\n\nHuman: q\n\nAssistant: a"


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"messages": TALK, "id": "1"}, "messages"),
        ({"conversations": TALK}, "sharegpt"),
        ({"instruction": "i", "input": "", "output": "o"}, "alpaca"),
        ({"question": "q", "answer": "a"}, "question_answer"),
        ({"prompt": "q", "answer": "a"}, "question_answer"),
        ({"prompt": "p", "completion": "c"}, "prompt_completion"),
        ({"text": "t"}, "text"),
        ({"prompt": "p", "chosen": "c", "rejected": "r", "messages": TALK}, "preference"),
        ({"chosen": TALK, "rejected": TALK}, "preference"),
        ({"system": "s", "question": "q", "chosen": "c", "rejected": "r"}, "preference"),
        ({"instruction": "i", "input": "", "output": "o", "chosen": "c", "rejected": "r"}, "preference"),
        ({"conversations": TALK, "chosen": {}, "rejected": {}}, "preference"),
        ({"chosen": TRANSCRIPT, "rejected": TRANSCRIPT}, "transcripts"),
        ({"chosen": TRANSCRIPT.strip(), "rejected": TRANSCRIPT.strip()}, "transcripts"),
        ({"input": {}, "preferred_output": [], "non_preferred_output": []}, "preferred_output"),
        ({"chosen": "c", "rejected": "r"}, None),
        ({"text": None, "question": "q", "answer": "a"}, "question_answer"),  # Parquet fills missing keys with null
        ({"text": None}, None),
        ({}, None),
    ],
)
def test_a_row_shows_its_format(fields: dict[str, Json], name: FormatName | None) -> None:
    assert kind_of(fields) == name


def test_the_decision_comes_with_its_reason() -> None:
    found = detect(rows({"question": "q", "answer": "a"}, {"question": "q"}), "f")
    assert (found.format, found.reason) == ("question_answer", "1 of 2 rows have `question` and `answer`")
    pairs = detect(rows({"chosen": TRANSCRIPT, "rejected": TRANSCRIPT}), "f")
    assert pairs.reason == "1 of 1 rows have `chosen` and `rejected` as 'Human: / Assistant:' transcripts"


def test_a_mixed_file_is_refused_with_counts() -> None:
    mixed: list[dict[str, Json]] = [{"text": "t"}] * 3 + [{"messages": TALK}] * 2 + [{"x": 1}]
    with pytest.raises(DataError) as error:
        detect(rows(*mixed), "f")
    assert "f: the rows are in several formats: 3 text, 2 messages, 1 of no known shape" in str(error.value)


def refusal(fields: dict[str, Json]) -> str:
    with pytest.raises(DataError) as error:
        detect(rows(fields), "f")
    return str(error.value)


def test_an_unknown_file_is_refused_with_the_keys_found_wanted_and_nearest() -> None:
    text = refusal({"prompt": "p", "rejected": "r", "note": "n"})
    assert "f: unknown format: no row has the keys of one\n  keys found: prompt, rejected, note\n" in text
    assert "    alpaca            instruction + output\n" in text
    assert "    question_answer   question + answer | prompt + answer\n" in text
    assert text.endswith("Nearest: preference, which lacks `chosen`; `columns` renames others to it.")


def test_the_remedy_fits_what_was_found() -> None:
    assert refusal({"chosen": "c", "rejected": "r"}).endswith("add a `prompt`, or rename it with `columns`.")
    assert refusal({"query": "q", "response": "r"}).endswith("for example `columns: {question: q, answer: a}`.")
    assert "keys found: none" in refusal({"text": None})
