from __future__ import annotations

import time

import pytest

from tests.unit.data.audit.rows import clean, labeled, lines, only, pair, sft, subject
from tunesmith.data.audit.contents import (
    boilerplate,
    broken_characters,
    empty_answers,
    mojibake,
    personal_data,
    placeholder,
    placeholders,
    secrets,
    stock_phrases,
    toxic,
)
from tunesmith.data.audit.private import PERSONAL, SECRETS, mask, private_kinds
from tunesmith.data.audit.subject import Lost, Subject
from tunesmith.data.audit.wordlists import MOJIBAKE, PLACEHOLDERS, TOXIC, TOXIC_SIGN

# Written in two halves, so that no scanner of secrets takes this file for a leak.
TOKENS = [
    "hf_" + "AbCdEfGhIjKlMnOpQrSt",
    "sk-" + "proj-abcdefghijklmnop1234",
    "ghp_" + "a1B2c3D4e5F6g7H8i9J0",
    "AKIA" + "IOSFODNN7EXAMPLE",
    "xoxb-" + "123456789012-abc",
]
PRIVATE = {
    "email": ["jane.doe+x@mail.example.org", "j@ü.de"],
    "phone": ["+49 30 901820 12", "(415) 555-2671", "415-555-2671", "+1 (202) 456-1111"],
    "card": ["4111 1111 1111 1111", "5500005555555559", "3782-822463-10005"],
    "iban": ["DE89 3704 0044 0532 0130 00", "GB82WEST12345698765432"],
    "ip": ["203.0.113.7", "2001:db8:0:1:1:1:1:1"],
}
INNOCENT = [
    "4111 1111 1111 1112",  # wrong check digit
    "DE89 3704 0044 0532 0130 01",
    "version 10.0.0.1 and 1.2.3",
    "12:30:45 on 2024-05-06",
    "3.14159265358979 or 1234567890123456",
    "scale_sk-x, task-oriented-programming-language",
    "meet @ noon, a@b",
    "https://example.org/path?x=1:2@3",
    "x = y[1:2:3], a::b::c",
]


@pytest.mark.parametrize(("kind", "text"), [(kind, text) for kind, texts in PRIVATE.items() for text in texts])
def test_personal_data_is_found_and_masked(kind: str, text: str) -> None:
    assert list(private_kinds(f"Reach me: {text}, please.", PERSONAL)) == [kind]
    assert mask(f"Reach me: {text}, please.") == f"Reach me: {PERSONAL[kind].placeholder}, please."


@pytest.mark.parametrize("text", INNOCENT)
def test_what_only_looks_private_stays(text: str) -> None:
    assert private_kinds(text, PERSONAL) == private_kinds(text, SECRETS) == {}
    assert mask(text) == text


@pytest.mark.parametrize("token", TOKENS)
def test_tokens_are_found_and_masked(token: str) -> None:
    assert list(private_kinds(f"key={token}.", SECRETS)) == ["token"]
    assert mask(f"key={token}.") == "key=[SECRET]."


def test_keys_and_passwords_in_addresses() -> None:
    key = "-----BEGIN RSA PRIVATE " + "KEY-----\nabc\ndef\n-----END RSA PRIVATE " + "KEY-----"
    assert mask(f"a\n{key}\nb") == "a\n[PRIVATE KEY]\nb"
    cut = "-----BEGIN PRIVATE " + "KEY-----\nabc"
    assert private_kinds(cut, SECRETS) == {"private key": 1}
    assert mask("see https://u:" + "p@host/x") == "see https://[USER:PASSWORD]@host/x"


def test_findings_count_rows_and_print_nothing_private() -> None:
    canary = "canary@example.org"
    rows = [
        *clean(2),
        sft(2, "Who?", f"Write to {canary} or {canary}."),
        sft(3, "Who?", f"Use {TOKENS[0]}, {TOKENS[1]}"),
    ]
    found = only(personal_data(subject(rows)))
    assert (lines(found), found.severity, found.shown[0].note) == ([3], "warning", "2 e-mail addresses")
    assert found.fix == "tunesmith data fix rows.jsonl --mask -o rows.clean.jsonl"
    secret = only(secrets(subject(rows)))
    assert (lines(secret), secret.severity, secret.shown[0].note) == ([4], "blocker", "2 access tokens")
    for word in (canary, *TOKENS):
        assert word not in str(found) + str(secret)
    assert personal_data(subject(clean(3))) == secrets(subject(clean(3))) == []


def test_private_text_in_the_system_message_and_in_rejected_answers_counts() -> None:
    rows = [sft(0, "?", "Yes.", system="Mail a@b.org"), pair(1, "?", "Yes.", "Ask c@d.org")]
    assert lines(only(personal_data(subject(rows)))) == [1, 2]


def test_searches_are_fast_on_hostile_text() -> None:
    start = time.process_time()
    for text in ("1" * 50_000, "a." * 25_000 + "@", "AA00 " * 10_000, ":" * 50_000, "+1 " * 16_000, "{" * 50_000):
        mask(text)
        PLACEHOLDERS.search(text)
        MOJIBAKE.search(text)
    assert time.process_time() - start < 5


@pytest.mark.parametrize(
    "answer",
    [
        "As an AI language model, I cannot feel.",
        "Well, as a large language model I do not eat.",
        "I’m just an AI, so no.",
        "I'm sorry, but I can't do that.",
        "I am an AI language model trained by OpenAI.",
    ],
)
def test_stock_phrases(answer: str) -> None:
    assert stock_phrases(sft(0, "?", answer))


@pytest.mark.parametrize("answer", ["Sorry to hear that! Rest well.", "As an AIR force pilot I fly.", "I can't swim."])
def test_ordinary_answers_are_no_stock_phrases(answer: str) -> None:
    assert stock_phrases(sft(0, "?", answer)) == []


def test_boilerplate_is_looked_for_where_it_would_be_learnt() -> None:
    stock = "As an AI language model, I cannot say."
    rows = [pair(0, "?", "Yes.", stock), pair(1, "?", stock, "Yes."), labeled(2, "?", stock, False)]
    found = only(boilerplate(subject(rows)))
    assert (lines(found), found.severity) == ([2], "warning")
    late = sft(0, "?", "word " * 100 + stock)  # a quotation in a long answer
    assert boilerplate(subject([late])) == []


def test_empty_answers_and_rows_dropped_as_empty() -> None:
    rows = [*clean(2), sft(2, "Why?", " ... "), sft(3, "为什么？", "因为")]
    lost = [Lost("rows.jsonl:9", "empty answer", "rows.jsonl")]
    assert only(empty_answers(Subject(rows, lost=lost))).ids == ("rows.jsonl:9", "rows.jsonl:3")
    assert empty_answers(subject(clean(2))) == []


@pytest.mark.parametrize(
    "text",
    ["I am {{name}}.", "By {{ author }}", "Dear [Your Name],", "<INSERT NAME HERE>", "<your-address>", "Hi {name}!",
     "At [Company Name]", "[insert date]", "Dear [Customer's Name]"],
)  # fmt: skip
def test_placeholders_are_found(text: str) -> None:
    assert placeholder(sft(0, "?", text))
    assert placeholder(sft(0, text, "Yes."))


@pytest.mark.parametrize(
    "text",
    ["f'{name}' and {'name': 1}", "${{ secrets.TOKEN }}", "[title](http://x)", "{x}", "a <b> c", "[1] [citation]",
     "call [PHONE] or [EMAIL]",      "print(f\"{user}\")", "{}", "\\frac{date}{2}"],
)  # fmt: skip
def test_code_and_links_are_no_placeholders(text: str) -> None:
    assert placeholder(sft(0, "?", text)) == ""


def test_placeholder_finding() -> None:
    found = only(placeholders(subject([*clean(3), sft(3, "?", "I am {{name}}.")])))
    assert (lines(found), found.shown[0].note, found.severity) == ([4], "I am {{name}}.", "warning")
    assert placeholders(subject(clean(3))) == []


@pytest.mark.parametrize("text", ["café", "naïve — “quoted”", "Straße", "£5 € 7", "emoji 🙂", "\ufffd"])
def test_wrong_decodings_are_found_and_right_ones_are_not(text: str) -> None:
    right = sft(0, "?", text)
    assert bool(broken_characters(right)) == (text == "\ufffd")
    wrong = text.encode().decode("cp1252", errors="replace")
    assert broken_characters(sft(0, "?", wrong)), wrong


def test_portuguese_capitals_are_no_mojibake() -> None:
    assert broken_characters(sft(0, "?", "AÇÃO, NÃO, Ângela, “Ã”")) == ""
    assert mojibake(subject(clean(3))) == []
    found = only(mojibake(subject([*clean(3), sft(3, "?", "Ã©")])))
    assert lines(found) == [4]


def test_toxic_words() -> None:
    rows = [*clean(3), sft(3, "?", "You BASTARD."), pair(4, "?", "Kind.", "You bastard."), sft(5, "?", "Scunthorpe")]
    found = only(toxic(subject(rows)))
    assert (lines(found), found.shown[0].note) == ([4], "insult")
    assert toxic(subject(clean(3))) == []


@pytest.mark.parametrize(
    "text",
    [
        *"fucking motherfuckers shitty cunts cocksucker bullshit assholes bitches bastard whores slut dickhead".split(),
        *"wanker retarded niggas faggot kikes chink spics gook trannies ragheads kys".split(),
        *("kill yourself", "i'll kill you", "you deserve to die"),
    ],
)
def test_the_quick_search_misses_no_toxic_word(text: str) -> None:
    assert any(words.search(text) for words in TOXIC.values())
    assert TOXIC_SIGN.search(text)
