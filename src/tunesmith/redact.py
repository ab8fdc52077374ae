"""Secrets in texts: where they stand, and the text without them.

In: any text that is about to leave the process: an error, a line of the log, a traceback. Out: the same text, with a
placeholder for every access token, password in an address, and value of a secret environment variable.
Must not know: recipes, files, who prints.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Sequence
from functools import cache, lru_cache
from urllib.parse import quote

PRIVATE_KEY = r"-----BEGIN [A-Z ]{0,40}PRIVATE KEY-----(?:[\s\S]{0,16384}?-----END [A-Z ]{0,40}PRIVATE KEY-----)?"
URL_PASSWORD = r"(?<=://)[^\s/:@]{1,128}:[^\s/@]{1,128}@"
TOKEN = (
    r"(?:hf_[A-Za-z0-9]{16,128}|sk-[\w-]{16,256}|gh[pousr]_[A-Za-z0-9]{16,255}"
    r"|github_pat_\w{20,255}|glpat-[\w-]{16,64}|(?:AKIA|ASIA)[0-9A-Z]{16}(?![0-9A-Z])|xox[abprs]-[\w-]{10,255}"
    r"|AIza[\w-]{30,64}|npm_[A-Za-z0-9]{30,64}|eyJ[\w-]{10,2048}\.eyJ[\w-]{10,4096}\.[\w-]{10,1024})"
)
"""What the services' access tokens look like, without what may stand before them."""

HIDDEN = "[SECRET]"
SECRET_NAMES = ("TOKEN", "KEY", "SECRET", "PASSWORD")
"""Environment variables with one of these in their names hold secrets."""
MIN_VALUE = 8
"""Characters of the shortest value that is taken for a secret: TOKENIZERS_PARALLELISM=false is none."""

# Kind, pattern (its last group, else all of it, is the secret), placeholder. Every repetition is bounded.
_KINDS = (
    ("a private key", PRIVATE_KEY, HIDDEN),
    ("a user name and password in an address", URL_PASSWORD, "[USER:PASSWORD]@"),
    # In a traceback a line break may be spelled as \n, so that a letter stands before the token.
    ("an access token", rf"(?:(?<!\w)|(?<=\\[nrt])){TOKEN}", HIDDEN),
    ("an access token in an address", r"(?<=://)[^\s/:@]{16,256}@", f"{HIDDEN}@"),
    ("a bearer token", r"(?i)\bbearer[ :=]+(?=[^\s]*[0-9])([A-Za-z0-9._~+/=-]{12,4096})", HIDDEN),
    ("credentials", r"(?i)\bauthorization['\"]?[ :=]+['\"]?(?:basic|token|bearer) +([^\s'\"]{6,4096})", HIDDEN),
    (
        "a signed address",
        r"(?i)[?&](?:token|access_token|key|api_key|sig|signature|x-amz-(?:signature|credential|security-token))"
        r"=([^&\s'\"]{6,4096})",
        HIDDEN,
    ),
    (
        "a password",
        r"(?i)(?:password|passwd|api_?key|access_?key(?:_id)?|auth_?token|access_?token|hf_token|secret_?key)"
        r"['\"]?\s{0,4}[=:]\s{0,4}['\"]?([^\s'\",;&)\]}]{8,4096})",
        HIDDEN,
    ),
)
NUM_PLAIN = 4
"""So many of the kinds are sure signs wherever they stand; the others go by the words around them."""


def redact(text: str) -> str:
    """The text with a placeholder for every secret in it."""
    parts, end = [], 0
    for start, stop, placeholder in secret_spans(text):
        parts += [text[end:start], placeholder]
        end = stop
    return "".join([*parts, text[end:]]) if parts else text


def find_secret(text: str) -> str:
    """What the first secret in a text is, in words; "" where there is none. Words around a value are not judged."""
    if kind := find_token(text):
        return kind
    for name, forms in _environment():
        if any(form in text for form in forms):
            return f"the value of the environment variable {name}"
    return ""


def find_token(text: str) -> str:
    """As `find_secret`, by the looks of the secret alone: for files that know nothing of this environment."""
    return next((kind for kind, pattern, _ in _patterns()[:NUM_PLAIN] if pattern.search(text)), "")


def secret_spans(text: str) -> list[tuple[int, int, str]]:
    """Start, end and placeholder of every secret, in order, without overlaps."""
    found = sorted(_spans(text), key=lambda span: (span[0], -span[1]))
    kept: list[tuple[int, int, str]] = []
    for span in found:
        if kept and span[0] < kept[-1][1]:
            start, stop, placeholder = kept[-1]
            kept[-1] = (start, max(stop, span[1]), placeholder)
        else:
            kept.append(span)
    return kept


def _spans(text: str) -> Iterator[tuple[int, int, str]]:
    for _, pattern, placeholder in _patterns():
        for match in pattern.finditer(text):
            yield (*match.span(pattern.groups), placeholder)
    for name, forms in _environment():
        for form in forms:
            start = text.find(form)
            while start >= 0:
                yield start, start + len(form), f"[value of {name}]"
                start = text.find(form, start + len(form))


@cache
def _patterns() -> Sequence[tuple[str, re.Pattern[str], str]]:
    return [(kind, re.compile(pattern), placeholder) for kind, pattern, placeholder in _KINDS]


def _environment() -> Sequence[tuple[str, Sequence[str]]]:
    """Names of the secret variables, and the forms in which each value may be written."""
    named = [(name, value) for name, value in os.environ.items() if len(value) >= MIN_VALUE]
    return _forms(tuple((name, value) for name, value in named if _is_secret_name(name)))


def _is_secret_name(name: str) -> bool:
    return any(word in name.upper() for word in SECRET_NAMES)


@lru_cache(maxsize=4)
def _forms(named: tuple[tuple[str, str], ...]) -> Sequence[tuple[str, Sequence[str]]]:
    """As it stands, in an address, in JSON, in a traceback; the value of a path that exists is no secret."""
    found = []
    for name, value in named:
        if not os.path.exists(os.path.expanduser(value)):  # noqa: PTH110, PTH111 (no path that is too long raises)
            found.append((name, sorted({value, quote(value, safe=""), json.dumps(value)[1:-1], repr(value)[1:-1]})))
    return found
