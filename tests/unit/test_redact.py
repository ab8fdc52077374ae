"""What is hidden in a text, and what is not."""

from __future__ import annotations

from pathlib import Path

import pytest

from tunesmith.errors import DataError
from tunesmith.redact import find_secret, redact, secret_spans

# Put together here, so that no scanner takes this file for a leak.
HF = "hf_" + "aB3dE6gH9jK2mN5pQ8sT1vW4"
SK = "sk-" + "proj-aB3dE6gH9jK2mN5p"


@pytest.mark.parametrize(
    ("text", "hidden"),
    [
        (f"token {HF} here", "token [SECRET] here"),
        (f"'a\\n{HF}'", "'a\\n[SECRET]'"),  # as a traceback writes a line break
        (f"key={SK}.", "key=[SECRET]."),
        (f"No such option '--{HF}'", "No such option '--[SECRET]'"),
        ("ghp_" + "a1B2c3D4e5F6g7H8i9J0", "[SECRET]"),
        ("AKIA" + "ABCDEFGHIJKLMNOP", "[SECRET]"),
        ("https://user:pass@host/x?y", "https://[USER:PASSWORD]@host/x?y"),
        ("https://" + "0123456789abcdef0@host/x", "https://[SECRET]@host/x"),
        ("Authorization: Bearer abcdefghij12", "Authorization: Bearer [SECRET]"),
        ("{'authorization': 'Basic dXNlcjpwYXNz'}", "{'authorization': 'Basic [SECRET]'}"),
        ("https://cdn/x?X-Amz-Signature=0a1b2c3d&n=1", "https://cdn/x?X-Amz-Signature=[SECRET]&n=1"),
        ('"password": "correcthorse"', '"password": "[SECRET]"'),
        ("aws_secret_access_key = wJalrXUtnFEMI/K7MDENG", "aws_secret_access_key = [SECRET]"),
    ],
)
def test_secrets_are_hidden(text: str, hidden: str) -> None:
    assert redact(text) == hidden


@pytest.mark.parametrize(
    "text",
    [
        "step 12345678/99999999  loss 0.5  num_tokens=123456789  max_tokens: 4096",
        "stop token: answers end in '<|im_end|>', generation stops at <|im_end|> (151645)",
        "the bearer responsibilities are many; a risk-averse-task-based-approach",
        "sha256 8f14e45fceea167a5a36dedd4bea2543, commit 0123456789abcdef0123456789abcdef01234567",
        "https://huggingface.co/org/model at main; ssh://git@host/x; mail me@example.org",
        "hf_transfer, api_key is not set, password:",
    ],
)
def test_ordinary_texts_stay(text: str) -> None:
    assert redact(text) == text


def test_values_of_secret_variables_are_hidden_in_every_spelling(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_SERVICE_PASSWORD", 'open "sesame"/1')
    found = redact('raw open "sesame"/1, json open \\"sesame\\"/1, address open%20%22sesame%22%2F1')
    name = "[value of MY_SERVICE_PASSWORD]"
    assert found == f"raw {name}, json {name}, address {name}"
    assert find_secret('x open "sesame"/1') == "the value of the environment variable MY_SERVICE_PASSWORD"


def test_short_values_and_paths_are_no_secrets(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path))
    assert redact(f"false {tmp_path}") == f"false {tmp_path}"


def test_spans_do_not_overlap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", HF)
    assert [span[:2] for span in secret_spans(f"a {HF} b {HF}")] == [(2, 2 + len(HF)), (5 + len(HF), 5 + 2 * len(HF))]


def test_no_error_prints_a_secret() -> None:
    error = DataError(f"got {HF}", where=f"https://u:p@h/{SK}", remedy=f"try {HF}")
    assert str(error) == "https://[USER:PASSWORD]@h/[SECRET]: got [SECRET]\n  try [SECRET]"


def test_a_long_text_is_read_quickly() -> None:
    text = "password " + "a" * 200_000 + " https://" + "b:" * 50_000 + "bearer " * 20_000
    assert len(redact(text)) <= len(text)
