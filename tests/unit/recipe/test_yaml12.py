"""YAML 1.2's core schema, with places; everything that a recipe does not need is refused at once."""

from __future__ import annotations

import time

import pytest

from tunesmith.errors import RecipeError
from tunesmith.recipe.yaml12 import MAX_BYTES, MAX_NODES, Place, Value, decode, format_path, read, scalar


def refusal(text: str) -> str:
    with pytest.raises(RecipeError) as caught:
        read(text, where="r.yaml")
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("5E3", 5000.0),
        (".5", 0.5),
        ("1.", 1.0),
        ("-0.25", -0.25),
        ("12", 12),
        ("+3", 3),
        ("010", 10),  # YAML 1.1 would read 8
        ("0o10", 8),
        ("0x1F", 31),
        ("-.inf", float("-inf")),
        ("true", True),
        ("False", False),
        ("null", None),
        ("~", None),
        ("", None),
        ("no", "no"),
        ("on", "on"),
        ("yes", "yes"),
        ("2026-11-20", "2026-11-20"),
        ("1_000", "1_000"),
        ("12:30:45", "12:30:45"),
        ("1e", "1e"),
        ("-", "-"),
        (".", "."),
    ],
)
def test_scalars(text: str, value: Value) -> None:
    assert scalar(text) == value
    assert type(scalar(text)) is type(value)


def test_not_a_number_is_a_number() -> None:
    assert scalar(".nan") != scalar(".nan")


def test_quotes_and_blocks_are_text() -> None:
    assert read("a: '3'\nb: \"null\"\nc: |\n  1\n", where="r").value == {"a": "3", "b": "null", "c": "1\n"}


def test_places_of_keys_and_values() -> None:
    document = read("name: x\nstages:\n  - name: sft\n    beta:\n", where="r.yaml")
    assert document.value == {"name": "x", "stages": [{"name": "sft", "beta": None}]}
    assert document.keys[("stages", 0, "name")] == Place(3, 5)
    assert document.values[("stages", 0, "name")] == Place(3, 11)
    assert document.values[("stages", 0, "beta")] == Place(4, 5)  # nothing is written there: the key's own place


def test_keys_are_words() -> None:
    assert read("1: a\nno: b\n", where="r").value == {"1": "a", "no": "b"}


def test_empty_text_is_null() -> None:
    assert read("# only a comment\n", where="r").value is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3\n", "r.yaml:3:1: a: the key stands twice, first in line 1\n  Remove one of the two."),
        (
            "s:\n  - {x: 1,\n     x: 2}\n",
            "r.yaml:3:6: s[0].x: the key stands twice, first in line 2\n  Remove one of the two.",
        ),
        ("a: &x 1\nb: *x\n", "r.yaml:1:4: &x: anchors and aliases are refused\n  Write the value out."),
        ("b: *x\n", "r.yaml:1:4: *x: anchors and aliases are refused\n  Write the value out."),
        (
            "a: !!python/object/apply:os.system [ls]\n",
            "r.yaml:1:4: the tag !!python/object/apply:os.system is refused\n"
            "  Write plain values; quote a string that needs it.",
        ),
        (
            "a: !!str 3\n",
            "r.yaml:1:4: the tag !!str is refused\n  Write plain values; quote a string that needs it.",
        ),
        ("a: 1\n---\nb: 2\n", "r.yaml:2:1: a second YAML document starts here\n  Keep one recipe in a file."),
        ("? [a]\n: b\n", "r.yaml:1:3: a key must be a word, not a list or mapping"),
        ("[" * 25 + "]" * 25, "r.yaml:1:25: nested more than 24 deep"),
        (f"a: {'9' * 5000}\n", "r.yaml:1:4: a number of 5000 digits"),
        ("a: 1\nb: \x07\n", "r.yaml:2: the character U+0007 is not allowed"),
        ("a: b: c\n", "r.yaml:1:5: not YAML: mapping values are not allowed here"),
        (
            "a: [1,\nb: 2\n",
            "r.yaml:3:1: not YAML: while parsing a flow sequence expected ',' or ']', but got '<stream end>'",
        ),
    ],
)
def test_refusals(text: str, message: str) -> None:
    assert refusal(text) == message


def test_billion_laughs_end_in_less_than_a_second() -> None:
    lines = ["a0: &a0 [lol, lol, lol, lol, lol, lol, lol, lol, lol]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 10)]
    start = time.process_time()
    assert "anchors and aliases are refused" in refusal("\n".join(lines))
    assert time.process_time() - start < 1


def test_deep_nesting_ends_in_less_than_a_second() -> None:
    start = time.process_time()
    assert "nested more than 24 deep" in refusal("[" * 100_000)
    assert time.process_time() - start < 1


def test_many_nodes_are_refused() -> None:
    assert refusal("\n".join(["- 1"] * (MAX_NODES + 1))) == "r.yaml:20000:3: more than 20,000 keys and values"


def test_bytes_that_are_not_utf8() -> None:
    with pytest.raises(RecipeError) as caught:
        decode(b"name: a\nb: caf\xe9\n", where="r.yaml")
    assert str(caught.value) == "r.yaml:2: not UTF-8: byte 0xe9 at offset 14\n  Save the file as UTF-8."


def test_a_byte_order_mark_is_dropped() -> None:
    assert decode(b"\xef\xbb\xbfname: a", where="r.yaml") == "name: a"


def test_a_large_file_is_refused() -> None:
    with pytest.raises(RecipeError) as caught:
        decode(b" " * (MAX_BYTES + 1), where="r.yaml")
    assert str(caught.value) == "r.yaml: 1,048,577 bytes; a recipe has at most 1,048,576"


def test_format_path() -> None:
    assert format_path(("stages", 1, "train", 0, "path")) == "stages[1].train[0].path"
    assert format_path(()) == ""
