from __future__ import annotations

import pytest

from tests.unit.data.audit.rows import lines, only, sft, subject
from tunesmith.data.audit.identify import identifier
from tunesmith.data.audit.languages import answer_language, language_facts, language_mix

ENGLISH = (
    "The weather is fine today, and so we shall walk along the river until the evening comes and the lamps are lit."
)
GERMAN = (
    "Das Wetter ist heute schön, und deshalb gehen wir am Fluss entlang, bis der Abend kommt und die Lampen brennen."
)
FRENCH = (
    "Il fait beau aujourd'hui, et nous allons donc nous promener le long de la rivière jusqu'à la tombée de la nuit."
)


@pytest.mark.parametrize(
    ("text", "code"), [(ENGLISH, "en"), (GERMAN, "de"), (FRENCH, "fr"), ("今天天气很好，我们沿着河边散步吧。", "zh")]
)
def test_languages_are_told(text: str, code: str) -> None:
    assert identifier().language(text) == code


@pytest.mark.parametrize(
    "text", ["", "Yes.", "x = {{}}; import os; def f(a, b): return a <= b " * 3, "1234567890 " * 20]
)
def test_short_texts_code_and_numbers_are_left_out(text: str) -> None:
    assert identifier().language(text) == ""


def test_minorities_are_a_note() -> None:
    rows = [sft(place, "Go on?", ENGLISH) for place in range(97)] + [
        sft(place, "Go on?", GERMAN) for place in range(97, 100)
    ]
    found = only(language_mix(subject(rows)))
    assert (lines(found), found.severity) == ([98, 99, 100], "note")
    assert language_facts(subject(rows))[0].value == "en 97.0%, de 3.0%"
    assert language_mix(subject(rows[:-1])) == []  # two rows may be mistakes of the identifier


def test_answers_in_another_language_than_their_question() -> None:
    rows = [sft(0, GERMAN, ENGLISH), sft(1, GERMAN, GERMAN), sft(2, f"Translate into German: {ENGLISH}", GERMAN)]
    found = only(answer_language(subject(rows)))
    assert (lines(found), found.severity) == ([1], "warning")
    assert answer_language(subject(rows[1:])) == []
