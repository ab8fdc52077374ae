"""Damage to bytes and to JSON values, drawn from a generator: the same draw gives the same damage.

In: what is whole, a seeded generator. Out: what is not. Must not know: what the bytes mean.
"""

from __future__ import annotations

import copy
import json
import random
from typing import Any

Json = Any

GARBAGE = [
    b"\x00",
    b"\xff\xfe",
    b"\xef\xbb\xbf",
    b"\r\n\r\n",
    b"[" * 3000,
    b'{"a":' * 3000,
    b"9" * 5000,
    b"1e999999",
    b"-0",
    b"NaN",
    b"Infinity",
    b"\\ud83d",
    b'"',
    b"'",
    b",",
    b"}",
    b"]",
    b":",
    b"- ",
    b"\t",
    b"&a *a",
    b"!!python/object/apply:os.system",
    b"{{ 9**9**9 }}",
    b"../../../etc/passwd",
    b"\xe2\x80\xa8",
    b"A" * 100_000,
]
NAMES = [*"a role content __class__ path name null true kind files step id .. / \u202e text prompt chosen".split(), ""]
VALUES: list[Json] = [
    None,
    True,
    False,
    0,
    -1,
    1,
    2**31,
    2**63,
    -(2**64),
    10**300,
    0.5,
    -0.0,
    1e308,
    "",
    " ",
    "x",
    "0",
    "null",
    "\u0000",
    "\ud800",
    "é\u0301 ‮ 😀",
    "../../x",
    "/etc/passwd",
    "A" * 50_000,
    [],
    {},
    [[]],
    {"a": {}},
    [None] * 50,
    {"role": "assistant", "content": 3},
]


def damage_bytes(data: bytes, draw: random.Random) -> bytes:
    """One to three changes of the bytes."""
    for _ in range(draw.choice((1, 1, 2, 3))):
        data = draw.choice(_CHANGES)(data, draw)
    return data


def _flip(data: bytes, draw: random.Random) -> bytes:
    if not data:
        return b"\x00"
    changed = bytearray(data)
    changed[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    return bytes(changed)


def _cut(data: bytes, draw: random.Random) -> bytes:
    return data[: int(len(data) * draw.choice((0.0, draw.random(), 0.99)))]


def _remove(data: bytes, draw: random.Random) -> bytes:
    start, end = _span(data, draw)
    return data[:start] + data[end:]


def _repeat(data: bytes, draw: random.Random) -> bytes:
    start, end = _span(data, draw)
    return data[:end] + data[start:end] * draw.choice((1, 1, 20)) + data[end:]


def _insert(data: bytes, draw: random.Random) -> bytes:
    place = draw.randrange(len(data) + 1)
    return data[:place] + draw.choice(GARBAGE) + data[place:]


def _overwrite(data: bytes, draw: random.Random) -> bytes:
    start, end = _span(data, draw)
    return data[:start] + draw.randbytes(end - start) + data[end:]


def _append(data: bytes, draw: random.Random) -> bytes:
    return data + draw.choice((draw.randbytes(draw.randrange(1, 200)), draw.choice(GARBAGE), data))


def _span(data: bytes, draw: random.Random) -> tuple[int, int]:
    start = draw.randrange(len(data) + 1)
    return start, min(len(data), start + draw.choice((1, 2, 8, 64, 400)))


_CHANGES = (_flip, _flip, _cut, _remove, _repeat, _insert, _insert, _overwrite, _append)


def damage_value(value: Json, draw: random.Random) -> Json:
    """One to three changes somewhere in a copy of the value."""
    value = copy.deepcopy(value)
    for _ in range(draw.choice((1, 1, 2, 3))):
        value = _change(value, draw)
    return value


def _change(value: Json, draw: random.Random) -> Json:
    """Goes down a drawn way and changes what is there."""
    inner = list(value) if isinstance(value, dict) else list(range(len(value))) if isinstance(value, list) else []
    if not inner or draw.random() < 0.15:
        return _replaced(value, draw)
    key = draw.choice(inner)
    what = draw.random()
    if what < 0.6:
        value[key] = _change(value[key], draw)
    elif what < 0.75:
        del value[key]
    elif isinstance(value, list):
        value.insert(draw.randrange(len(value) + 1), copy.deepcopy(draw.choice([value[key], draw.choice(VALUES)])))
    elif what < 0.85:
        value[draw.choice(NAMES)] = value.pop(key)
    else:
        value[draw.choice(NAMES)] = copy.deepcopy(draw.choice(VALUES))
    return value


def _replaced(value: Json, draw: random.Random) -> Json:
    kind = draw.random()
    if kind < 0.1:
        deep: Json = value
        for _ in range(draw.choice((1, 70, 120))):
            deep = [deep] if draw.random() < 0.5 else {"a": deep}
        return deep
    if kind < 0.25 and isinstance(value, str):
        place = draw.randrange(len(value) + 1)
        return value[:place] + draw.choice(["\u0000", "{{ x }}", "<|im_end|>", "\n", "..", "\ud800"]) + value[place:]
    if kind < 0.4 and isinstance(value, int | float) and not isinstance(value, bool):
        return draw.choice([-value, value + 1, value * 1000, str(value), float(value), 0])
    return copy.deepcopy(draw.choice(VALUES))


def damage_json(data: bytes, draw: random.Random) -> bytes:
    """A JSON file's bytes with its value changed (most often), or its bytes."""
    if draw.random() < 0.3:
        return damage_bytes(data, draw)
    return dumps(damage_value(json.loads(data), draw))


def dumps(value: Json) -> bytes:
    """As bytes; half of a surrogate pair is written as JSON escapes it."""
    return json.dumps(value).encode()
