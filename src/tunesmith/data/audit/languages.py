"""Which languages the rows are in.

In: a subject. Out: findings and a fact. Must not know: files, how findings are shown.
"""

from __future__ import annotations

import re
from collections import Counter

from tunesmith.data.audit.findings import Fact, Finding
from tunesmith.data.audit.identify import UNKNOWN, identifier
from tunesmith.data.audit.subject import Subject, by_share, share
from tunesmith.data.audit.texts import best_answer, last_question

MIN_COUNT = 3  # fewer rows of a language may be mistakes of the identifier
FEW = 0.05  # a smaller share of a language is a minority that the model will hardly learn
# A prompt that asks for another language is answered in another language.
ASKS_FOR_ANOTHER = re.compile(
    r"translat|übersetz|tradu|traduz|vertaal|перев|翻译|翻譯|訳|번역|ترجم"
    r"|\b(?:in|into|to|from|auf|en|em|in het) (?:english|french|german|spanish|italian|portuguese|dutch|russian|"
    r"chinese|japanese|korean|arabic|hindi|latin|greek|turkish|polish|deutsch|englisch|français|anglais|español|inglés)\b"
    r"|\b(?:french|german|spanish|italian|portuguese|dutch|russian|chinese|japanese|korean|arabic|hindi|latin|greek|"
    r"turkish|polish|swedish) (?:word|phrase|sentence|translation|for|poem|song)|language",
    re.IGNORECASE,
)


def language_facts(subject: Subject) -> list[Fact]:
    """The mix of the answers' languages."""
    known = Counter(language for language in subject.spoken if language)
    if not known:
        return []
    mix = ", ".join(f"{name} {count / known.total():.1%}" for name, count in known.most_common(8))
    short = len(subject.spoken) - known.total()
    return [Fact("languages of the answers", f"{mix}{f' ({short:,} too short to tell)' if short else ''}")]


def language_mix(subject: Subject) -> list[Finding]:
    """Languages with under 5 % of the rows but 3 rows or more. note: the model will hardly learn them."""
    spoken = subject.spoken
    known = Counter(language for language in spoken if language)
    few = {name: count for name, count in known.items() if MIN_COUNT <= count < FEW * known.total()}
    if not few:
        return []
    places = [place for place, language in enumerate(spoken) if language in few]
    said = ", ".join(f"{name} {count:,}" for name, count in Counter(few).most_common())
    text = f"{share(len(places), len(spoken))} answers are in languages with under {FEW:.0%} of the rows: {said}."
    notes = {place: f"{spoken[place]}: {best_answer(subject.examples[place])[:200]}" for place in places}
    return [subject.finding("language-mix", "minority languages", "note", places, text, notes=notes, options="")]


def answer_language(subject: Subject) -> list[Finding]:
    """Answers in another language than their question; questions that ask for another language are left out.

    warning from 0.5 % of the rows on, a note below.
    """
    crossed: dict[int, str] = {}
    for place, (example, language) in enumerate(zip(subject.examples, subject.spoken, strict=True)):
        if not language or not example.prompt or example.label is False:
            continue
        question = last_question(example)
        asked = UNKNOWN if ASKS_FOR_ANOTHER.search(question) else identifier().language(question)
        if asked and asked != language:
            crossed[place] = f"question {asked}, answer {language}: {best_answer(example)[:200]}"
    if not crossed:
        return []
    total = len(subject.examples)
    text = f"{share(len(crossed), total)} answers are in another language than their question."
    severity = by_share(len(crossed), total, warning=0.005)
    return [
        subject.finding(
            "answer-language", "answers in another language", severity, sorted(crossed), text, notes=crossed
        )
    ]
