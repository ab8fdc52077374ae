from __future__ import annotations

from collections import Counter

import pytest

from tests.unit.data.build import rows
from tunesmith.data.formats.detect import detect, kind_of, mixed_error
from tunesmith.data.types import Json
from tunesmith.errors import DataError
from tunesmith.recipe.models import FormatName

TALK: Json = [{"role": "user", "content": "q"}]
TRANSCRIPT = "\n\nHuman: q\n\nAssistant: a"


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"messages": TALK, "id": "1"}, "messages"),
        ({"messages": TALK, "tools": [], "system": "s"}, "messages"),
        ({"conversation": TALK}, "sharegpt"),
        ({"input": "q", "intermediate_steps": [], "output": "a"}, "messages"),
        ({"instruction": "i", "context": "", "response": "o", "category": "c"}, "alpaca"),
        ({"system_prompt": "s", "question": "q", "response": "a"}, "question_answer"),
        ({"query": "q", "response": "a"}, "question_answer"),
        ({"problem": "q", "solution": "s", "answer": "a"}, "question_answer"),
        ({"question": "q", "response_j": "good", "response_k": "bad", "qid": 1}, "preference"),
        ({"system": "s", "input": "q", "chosen": "c", "rejected": "r", "messages": TALK}, "preference"),
        ({"messages": TALK, "chosen": {"role": "assistant"}, "rejected": {}}, "preference"),
        ({"prompt": "p", "response": "c", "chosen": "c", "rejected": "r"}, "preference"),
        ({"prompt": "p", "responses": ["a", "b"], "scores": [1, 2]}, "ranked"),
        ({"messages": TALK, "candidates": ["a", "b"], "ranks": [1, 2]}, "ranked"),
        ({"instruction": "i", "completions": [{"response": "a", "overall_score": 1.0}], "models": []}, "ranked"),
        ({"prompt": "p", "answers": [{"answer": "a", "rank": 1.0}]}, "ranked"),
        ({"question": "q", "answer": "a", "answers": ["a", "b"]}, "question_answer"),  # accepted answers, not ranked
        ({"question": "q", "answers": {"text": ["a"]}}, None),
        ({"prompt": "p", "responses": ["a", "b"]}, None),
        ({"messages": TALK, "label": True}, "labeled"),
        ({"conversations": TALK, "kto_tag": False}, "labeled"),
        ({"prompt": "p", "completion": "c", "label": 0}, "labeled"),
        ({"messages": TALK, "label": None}, "messages"),
        ({"text": "t", "label": 1}, "text"),
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
    ranks = detect(rows({"prompt": "p", "responses": ["a", "b"], "ranks": [1, 2]}), "f")
    assert ranks.reason == "1 of 1 rows have `prompt` and `responses` and `ranks`"
    inside = detect(rows({"prompt": "p", "answers": [{"answer": "a", "rank": 1}]}), "f")
    assert inside.reason == "1 of 1 rows have `prompt` and `answers` with scores in them"
    labels = detect(rows({"messages": TALK, "label": True}), "f")
    assert labels.reason == "1 of 1 rows have `messages` and `label`"


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
    assert "    alpaca            instruction + output/response/completion/answer\n" in text
    assert "    question_answer   question + answer/response/solution/output | prompt + answer" in text
    assert "    labeled           label + the keys of messages" in text
    assert text.endswith("Nearest: preference, which lacks `chosen`; `columns` renames others to it.")


def test_the_remedy_fits_what_was_found() -> None:
    assert refusal({"chosen": "c", "rejected": "r"}).endswith("add a `prompt`, or rename it with `columns`.")
    assert refusal({"ask": "q", "say": "r"}).endswith("for example `columns: {question: q, answer: a}`.")
    assert "needs numbers: add a column `scores`" in refusal({"prompt": "p", "responses": ["a", "b"]})
    assert "keys found: none" in refusal({"text": None})


def test_the_counts_of_a_stream_make_the_same_refusal() -> None:
    kinds: Counter[FormatName | None] = Counter({"text": 2, None: 9, "messages": 7})
    error = mixed_error(kinds, "f")
    assert error.what == "the rows are in several formats: 7 messages, 2 text, 9 of no known shape"
