"""What the texts of rows hold: nothing, stock phrases, private data, gaps, broken characters.

In: a subject. Out: findings. Must not know: files, how findings are shown.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping

from tunesmith.data.audit.findings import Finding, Severity
from tunesmith.data.audit.private import PERSONAL, SECRETS, Pattern, private_kinds
from tunesmith.data.audit.subject import Subject, by_share, plural, share
from tunesmith.data.audit.texts import best_answer, every_text, prompt_text
from tunesmith.data.audit.wordlists import BOILERPLATE, MOJIBAKE, PLACEHOLDER_SIGN, PLACEHOLDERS, TOXIC, TOXIC_SIGN
from tunesmith.data.types import Example

OPENING = 400  # characters: stock phrases open an answer; later on they may be quoted
AROUND = 40  # characters shown on either side of what was found


def is_undesired(example: Example) -> bool:
    """Whether the one answer is labelled undesirable: its faults are what it is there for."""
    return example.label is False


def is_empty(example: Example) -> bool:
    """Whether the answer that is learnt from holds no letter or digit of any script."""
    if any(turn.calls for answer in example.answers if not isinstance(answer, str) for turn in answer):
        return False
    return not any(character.isalnum() for character in best_answer(example))


def empty_answers(subject: Subject) -> list[Finding]:
    """Answers without a letter or digit, and rows that the format dropped as empty.

    warning: there is nothing to learn; note below one in a thousand.
    """
    places = [place for place, example in enumerate(subject.examples) if is_empty(example)]
    lost = [row for row in subject.lost if row.reason.startswith("empty")]
    count, total = len(places) + len(lost), subject.num_rows
    if not count:
        return []
    text = f"{share(count, total)} rows have an empty prompt or answer, or an answer without a letter or digit."
    severity = by_share(count, total, warning=0.001)
    return [subject.lost_finding("empty", "empty answers", severity, places, lost, text)]


def stock_phrases(example: Example) -> list[str]:
    """Names of the stock phrases with which the answer that is learnt from opens."""
    if is_undesired(example):
        return []
    opening = best_answer(example)[:OPENING].replace("’", "'")
    return [name for name, phrase in BOILERPLATE.items() if phrase.search(opening)]


def boilerplate(subject: Subject) -> list[Finding]:
    """Answers that open with "As an AI language model" or a stock refusal.

    note below 1 % of the rows, warning from there on: models copy such phrases far beyond their share.
    """
    found = {place: names for place, example in enumerate(subject.examples) if (names := stock_phrases(example))}
    if not found:
        return []
    counts = Counter(names[0] for names in found.values())
    said = ", ".join(f"{name} {count:,}" for name, count in counts.most_common())
    text = f"{share(len(found), len(subject.examples))} answers open with a stock phrase ({said})."
    notes = {place: best_answer(subject.examples[place])[:OPENING] for place in found}
    severity = by_share(len(found), len(subject.examples), warning=0.01)
    return [subject.finding("boilerplate", "boilerplate answers", severity, sorted(found), text, notes=notes)]


def personal_data(subject: Subject) -> list[Finding]:
    """E-mail addresses, phone numbers, payment cards (Luhn), IBANs (mod 97) and public IP addresses, in any field.

    warning: a model can repeat what it has read.
    """
    return _private(subject, PERSONAL, "personal-data", "personal data")


def secrets(subject: Subject) -> list[Finding]:
    """Access tokens, private keys, passwords in addresses, in any field. blocker: whoever has the model has the key."""
    return _private(subject, SECRETS, "secrets", "secrets")


def _private(subject: Subject, patterns: Mapping[str, Pattern], kind: str, title: str) -> list[Finding]:
    found: dict[int, dict[str, int]] = {}
    for place, example in enumerate(subject.examples):
        if kinds := private_kinds(every_text(example), patterns):
            found[place] = kinds
    if not found:
        return []
    counts = Counter(name for kinds in found.values() for name in kinds)
    said = ", ".join(f"{patterns[name].title} in {count:,}" for name, count in counts.most_common())
    text = f"{share(len(found), len(subject.examples))} rows hold {title}: {said}."
    notes = {
        place: ", ".join(plural(count, patterns[name].title, patterns[name].plural) for name, count in kinds.items())
        for place, kinds in found.items()
    }
    severity: Severity = "blocker" if kind == "secrets" else "warning"
    options = "--drop secrets" if kind == "secrets" else "--mask"
    return [subject.finding(kind, title, severity, sorted(found), text, notes=notes, options=options)]


def placeholder(example: Example) -> str:
    """The first gap that a template left in the prompt or in the answer that is learnt from, with its surroundings."""
    if is_undesired(example):
        return ""
    texts = (text for text in (best_answer(example), prompt_text(example)) if PLACEHOLDER_SIGN.search(text))
    return next((found for text in texts if (found := _around(PLACEHOLDERS, text))), "")


def placeholders(subject: Subject) -> list[Finding]:
    """`{{name}}`, `<INSERT ...>`, `[YOUR NAME]` and their like in prompts and answers.

    warning: the model will write them; note below one in a thousand; blocker from half of the rows on.
    """
    found = _by_text(subject, placeholder)
    if not found:
        return []
    total = len(subject.examples)
    text = f"{share(len(found), total)} rows hold a placeholder that was never filled in."
    severity = by_share(len(found), total, warning=0.001, blocker=0.5)
    return [subject.finding("placeholders", "placeholders", severity, sorted(found), text, notes=found)]


def broken_characters(example: Example) -> str:
    """The first mark of a wrong decoding, with its surroundings."""
    return _around(MOJIBAKE, every_text(example))


def mojibake(subject: Subject) -> list[Finding]:
    """UTF-8 that was read as Latin-1 (Ã©, â€™) and replacement characters (U+FFFD).

    note below one in a thousand rows, warning from there on: the model learns to write them.
    """
    found = _by_text(subject, broken_characters)
    if not found:
        return []
    total = len(subject.examples)
    text = f"{share(len(found), total)} rows hold characters that a wrong decoding left (Ã©, â€™, �)."
    severity = by_share(len(found), total, warning=0.001)
    return [subject.finding("mojibake", "broken characters", severity, sorted(found), text, notes=found)]


def toxic_words(example: Example) -> list[str]:
    """Kinds of toxic words in the answer that is learnt from."""
    if is_undesired(example):
        return []
    answer = best_answer(example).lower()
    if not TOXIC_SIGN.search(answer):
        return []
    return [name for name, words in TOXIC.items() if words.search(answer)]


def toxic(subject: Subject) -> list[Finding]:
    """Hits of a short list of insults, slurs and threats in the answers that are learnt from.

    note below 0.5 % of the rows, warning from there on. A word list knows no context: read the rows.
    """
    found = {place: names for place, example in enumerate(subject.examples) if (names := toxic_words(example))}
    if not found:
        return []
    counts = Counter(name for names in found.values() for name in names)
    said = ", ".join(f"{name} {count:,}" for name, count in counts.most_common())
    total = len(subject.examples)
    text = (
        f"{share(len(found), total)} answers hold a word of the toxic list ({said}); a list has no context: read them."
    )
    notes = {place: ", ".join(names) for place, names in found.items()}
    severity = by_share(len(found), total, warning=0.005)
    return [subject.finding("toxic", "toxic words", severity, sorted(found), text, notes=notes)]


def _by_text(subject: Subject, search: Callable[[Example], str]) -> dict[int, str]:
    return {place: found for place, example in enumerate(subject.examples) if (found := search(example))}


def _around(search: re.Pattern[str], text: str) -> str:
    match = search.search(text)
    if match is None:
        return ""
    start, end = max(0, match.start() - AROUND), min(len(text), match.end() + AROUND)
    return f"{'…' * (start > 0)}{text[start:end].strip()}{'…' * (end < len(text))}"
