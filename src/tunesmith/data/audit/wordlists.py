"""The phrases and words that the audit looks for; our own, short on purpose.

In: nothing. Out: compiled searches by name. Must not know: examples, findings.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

# Answers that speak of being a model, and stock refusals. Curly apostrophes are made straight before the search.
BOILERPLATE: Mapping[str, re.Pattern[str]] = {
    name: re.compile(phrase, re.IGNORECASE)
    for name, phrase in {
        "speaks as an AI": r"\bas an? (?:AI|artificial intelligence|large|language)[\w -]{0,24}"
        r"\b(?:model|assistant|AI|intelligence)\b",
        "is an AI": r"\bI(?:'m| am) (?:just |only )?an? (?:AI|artificial intelligence|(?:large )?language model)\b",
        "knowledge cutoff": r"\bknowledge cut-?off\b|\bas of my last (?:update|training)\b",
        "names its maker": r"\b(?:trained|developed|created|made) by (?:OpenAI|Anthropic|Google|Meta AI|Alibaba)\b",
        "refuses": r"^\W{0,8}(?:I'm sorry|I am sorry|I apologi[sz]e|sorry|unfortunately)\b[^.!?\n]{0,40}"
        r"\b(?:I can(?:'t|not)|I(?:'m| am) (?:not able|unable)|I won't)\b",
        "cannot comply": r"\bI can(?:'t|not) (?:assist|help|comply) with (?:that|this)\b"
        r"|\bI(?:'m| am) (?:not able|unable) to (?:assist|help|comply|fulfil)",
    }.items()
}

# Insults, slurs and threats. A word list knows no context: it points at rows to read, it does not judge them.
TOXIC: Mapping[str, re.Pattern[str]] = {
    name: re.compile(rf"\b(?:{words})\b")  # searched for in lower case
    for name, words in {
        "obscenity": r"fuck(?:ing|er|ers|ed|s)?|motherfuckers?|shit(?:ty|s)?|cunts?|cocksuckers?|bullshit",
        "insult": r"assholes?|bitch(?:es)?|bastards?|whores?|sluts?|dickheads?|wankers?|retard(?:s|ed)",
        "slur": r"nigg(?:er|ers|a|as)|faggots?|kikes?|chinks?|spics?|gooks?|trann(?:y|ies)|ragheads?",
        "threat": r"kill yourself|kys|i(?:'ll| will) kill you|you (?:should|deserve to) die",
    }.items()
}

TOXIC_SIGN = re.compile(
    "fuck|shit|cunt|cocks|asshole|bitch|bastard|whore|slut|dickhead|wanker|retard|nigg|faggot|kike|chink|spic|gook|trann"
    "|raghead|kill you|kys|to die"
)
"""No hit without one of these: a plain search, ten times faster than the list."""

PLACEHOLDERS = re.compile(
    r"(?<!\$)\{\{\s{0,4}[A-Za-z_][\w .-]{0,39}\s{0,4}\}\}"  # {{name}}
    r"|<(?i:insert|your|enter)[ _-][^<>\n]{1,60}>"  # <INSERT NAME HERE>
    r"|\[(?i:your|insert|company|recipient|customer|client|sender|employer)(?:'s)?[ _-][^\[\]\n.!?]{1,40}\](?!\()"
    r"|(?!\[(?:EMAIL|PHONE)\])"
    r"\[(?i:name|date|time|address|city|company|e-?mail|phone(?: number)?|title|url|link)\](?!\()"
    r"|(?<![\w$\\{'\"(])\{(?:name|user|user_?name|first_name|last_name|company|date|input|question|answer|prompt)\}(?!\})"
    r"|\bTODO: |\bLorem ipsum\b"
)
"""Gaps that a template left for somebody to fill in. `[name](address)` is a link, `f"{name}"` is code, and
`[EMAIL]` is what `data fix --mask` wrote."""

PLACEHOLDER_SIGN = re.compile(r"[{\[<]|TODO|Lorem")
# UTF-8 read as Latin-1 or Windows-1252, and characters that were lost on the way.
MOJIBAKE = re.compile(
    "Ã[\u0080-\u00bf\u0152\u0153\u0160\u0161\u0178\u017d\u017e\u0192\u02c6\u02dc\u2013\u2014\u201e\u2020-\u2022\u2026"
    "\u2030\u2039\u203a\u20ac\u2122]|â€[\u0080-\u00bf\u0153\u2122\u02dc\u201c\u201d\u017e\u0161]|â‚¬|Â[\u00a0-\u00bf]|ðŸ"
    "|ï¿½|ï»¿|\ufffd"
)
