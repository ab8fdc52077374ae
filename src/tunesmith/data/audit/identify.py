"""Which language a text is in.

In: a text. Out: its code, or nothing where the text says too little. Must not know: examples, findings.

py3langid on the first 200 characters; short texts and code are left out: the identifier would guess.
"""

from __future__ import annotations

import re
from functools import cache

MAX_CHARACTERS = 200  # more changes little and costs time in proportion
MIN_LETTERS = 60  # below this the identifier guesses
MIN_LETTERS_DENSE = 12  # of scripts without spaces, whose characters say more
MIN_CONFIDENCE = 0.95
MIN_CONFIDENCE_DENSE = 0.6  # the script leaves few languages to choose from
UNKNOWN = ""
CODE = re.compile(r"```|[{};<>=]{2}|\bdef |\bimport |\bSELECT |\bfunction\b|://")


@cache
def identifier() -> Identifier:
    """The identifier; loading it takes a second, so it is loaded once a process."""
    return Identifier()


class Identifier:
    """py3langid with probabilities."""

    def __init__(self) -> None:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier

        self._identifier = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)

    def language(self, text: str) -> str:
        """ISO 639-1 code, or "" where the text says too little."""
        head = text[:MAX_CHARACTERS]
        letters = sum(character.isalpha() for character in head)
        dense = sum("\u3040" <= character <= "\u9fff" or "\uac00" <= character <= "\ud7af" for character in head)
        if letters < MIN_LETTERS and dense < MIN_LETTERS_DENSE:
            return UNKNOWN
        if letters < 0.6 * len(head) or CODE.search(head):
            return UNKNOWN
        code, confidence = self._identifier.classify(head)
        wanted = MIN_CONFIDENCE_DENSE if dense >= MIN_LETTERS_DENSE else MIN_CONFIDENCE
        return str(code) if confidence >= wanted else UNKNOWN
