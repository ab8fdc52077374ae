"""Personal data and secrets: where they stand in a text, and the text without them.

In: a text. Out: matches by kind, or the text with a placeholder for each. Must not know: examples, files.

What is found is never printed: every excerpt of the audit passes through `mask` first (TRAPS S18, S22).
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from tunesmith import redact


@dataclass(frozen=True, slots=True)
class Pattern:
    """A kind of private text: a search, a check of what it found, and the placeholder that takes its place."""

    title: str
    plural: str
    search: re.Pattern[str]
    placeholder: str
    check: Callable[[str], bool]


# Issuers' first digits and lengths: without them one long number in ten would pass the check.
_ISSUED = re.compile(
    r"(?:4\d{15}(?:\d{3})?|5[1-5]\d{14}|2[2-7]\d{14}|3[47]\d{13}|3[068]\d{12}|35\d{14}|6[0-9]\d{14,17})$"
)


def luhn(text: str) -> bool:
    """Whether the digits are a payment card's: an issuer's prefix and length, and the check digit (ISO/IEC 7812-1)."""
    digits = [int(character) for character in text if character.isdigit()]
    if not _ISSUED.match("".join(map(str, digits))) or len(set(digits)) == 1:
        return False
    doubled = [digit * 2 - 9 * (digit > 4) if place % 2 else digit for place, digit in enumerate(reversed(digits))]
    return sum(doubled) % 10 == 0


def iban(text: str) -> bool:
    """Whether the check digits of an IBAN hold (ISO 13616: mod 97 is 1)."""
    compact = re.sub(r"[ -]", "", text).upper()
    if not 15 <= len(compact) <= 34:
        return False
    return int("".join(str(int(character, 36)) for character in compact[4:] + compact[:4])) % 97 == 1


def public_address(text: str) -> bool:
    """Whether an IP address could be somebody's: not the machine itself, nor a private net."""
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return False
    if address.version == 6:
        return not (address.is_loopback or address.is_unspecified or address.is_link_local)
    private = ("10.", "127.", "0.", "192.168.", "255.", *(f"172.{number}." for number in range(16, 32)))
    return not text.startswith(private) and not text.endswith(".0.0.0")


def phone(text: str) -> bool:
    """Whether the number has as many digits as telephone numbers have (ITU-T E.164: 15 at most)."""
    return 9 <= sum(character.isdigit() for character in text) <= 15


def _always(text: str) -> bool:
    return bool(text)


def _pattern(title: str, search: str, placeholder: str, check: Callable[[str], bool] = _always) -> Pattern:
    return Pattern(title, f"{title}{'es' if title.endswith('ss') else 's'}", re.compile(search), placeholder, check)


# A card or an IBAN comes before a phone: their digits could be taken for one. Every repetition is bounded, so that no
# text makes a search slow.
PERSONAL: Mapping[str, Pattern] = {
    "email": _pattern(
        "e-mail address", r"(?<![\w.+-])[\w.+%-]{1,64}@(?:[\w-]{1,63}\.){1,8}[^\W\d_]{2,24}(?![\w@])", "[EMAIL]"
    ),
    "iban": _pattern("IBAN", r"(?<!\w)[A-Z]{2}\d{2}(?:[ -]?[A-Z0-9]{2,4}){3,8}(?!\w)", "[IBAN]", iban),
    "card": _pattern(
        "payment card number", r"(?<![\w.+-])[2-6]\d{3}(?:[ -]?\d){10,15}(?![ -]?\d|\.\d|\w)", "[CARD]", luhn
    ),
    "phone": _pattern(
        "phone number",
        r"(?<![\w+.])(?:\+\d{1,3}[ .-]?(?:\(\d{1,4}\)[ .-]?)?\d{1,4}(?:[ .-]?\d{2,4}){2,4}"
        r"|\(\d{3}\) ?\d{3}[ .-]\d{4}|\d{3}[.-]\d{3}[.-]\d{4})(?![\w-]|\.\d)",
        "[PHONE]",
        phone,
    ),
    "ip": _pattern(
        "IP address",
        r"(?<![\w.:])(?:\d{1,3}(?:\.\d{1,3}){3}|(?:[0-9a-fA-F]{0,4}:){3,7}[0-9a-fA-F]{1,4})(?![\w:]|\.\d)",
        "[IP]",
        public_address,
    ),
}
SECRETS: Mapping[str, Pattern] = {
    "private key": _pattern(
        "private key",
        redact.PRIVATE_KEY,
        "[PRIVATE KEY]",
    ),
    "url password": _pattern("password in an address", redact.URL_PASSWORD, "[USER:PASSWORD]@"),
    "token": _pattern("access token", rf"(?<![\w-]){redact.TOKEN}", redact.HIDDEN),
}
# Secrets first: an address with a password looks like an e-mail address.
PRIVATE: Mapping[str, Pattern] = {**SECRETS, **PERSONAL}
# No match without one of these: most texts are passed over by plain searches, which are a hundred times faster.
_SIGNS: Mapping[str, re.Pattern[str]] = {
    "email": re.compile("@"),
    "iban": re.compile(r"[A-Z]{2}\d{2}"),
    "card": re.compile(r"\d{4}"),
    "phone": re.compile(r"\d{2}[ .)-]|\+\d{5}"),
    "ip": re.compile(r"\d\.\d{1,3}\.|:[0-9a-fA-F]{0,4}:"),
    "private key": re.compile("PRIVATE KEY"),
    "url password": re.compile("://"),
    "token": re.compile(r"hf_|sk-|gh[pousr]_|github_pat_|glpat-|AKIA|ASIA|xox|AIza|npm_|eyJ"),
}


def private_kinds(text: str, patterns: Mapping[str, Pattern]) -> dict[str, int]:
    """How many matches of each kind a text holds; kinds without one are left out."""
    counts = {}
    for name, pattern in patterns.items():
        if count := sum(1 for _ in _matches(name, pattern, text)):
            counts[name] = count
    return counts


def mask(text: str) -> str:
    """The text with a placeholder for everything private."""
    for name, pattern in PRIVATE.items():
        parts, end = [], 0
        for match in _matches(name, pattern, text):
            parts += [text[end : match.start()], pattern.placeholder]
            end = match.end()
        text = "".join([*parts, text[end:]]) if parts else text
    return text


def _matches(name: str, pattern: Pattern, text: str) -> Iterator[re.Match[str]]:
    if not _SIGNS[name].search(text):
        return
    yield from (match for match in pattern.search.finditer(text) if pattern.check(match.group()))
