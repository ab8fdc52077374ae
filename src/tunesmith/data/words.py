"""The tokenizer's results, remembered word by word.

In: texts, a tokenizer. Out: each text's ids, as the tokenizer itself gives them, and where a character's token begins.
Must not know: control tokens, templates, rows.

A byte-level BPE cuts a text into words by a regular expression and tokenizes every word by itself. Rows repeat words
far more than texts: so the cutting is done here, with the tokenizer's own expression, and every distinct word goes
through the tokenizer once. That is done only where it cannot differ: for tokenizers that declare exactly this
pipeline, on ASCII text (on which no two engines of regular expressions disagree about letters, digits and space), and
after a trial. Everything else goes through the tokenizer whole.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, groupby
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer
    from tokenizers.normalizers import Normalizer
    from tokenizers.pre_tokenizers import PreTokenizer

# What `ByteLevel` with `use_regex` cuts by (GPT-2, Radford et al. 2019).
GPT2_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
PLAIN = re.compile(r"[\t\n\r -~]*")
# Between two words of ASCII letters one space apart every known expression cuts: there a text may be taken apart.
SAFE = re.compile(r"(?<=[A-Za-z])(?= [A-Za-z])")
MAX_WORDS = 100_000  # remembered at a time: some 25 MB
MAX_WORD_CHARS = 64  # longer ones are rarely met again
TRIAL = (
    "It's 3.5 o'clock;  we'LL see\n\n\tthe 1,234 words -- don't they'd  (re)read?\r\nx=y[0]+'a' ",
    "    def f(x):\n        return  x ** 2  # ok!!\n\n\n   \n",
    " \n \t\r\n  a  \n",
    "http://a.b/c?d=e&f=100%25 <tag> {k: 'v'} ~`@#$^_|\\ ''' I'm I'M",
)


class Stretch(Protocol):
    """A text that was tokenized by itself."""

    @property
    def ids(self) -> list[int]:
        """Its ids."""
        ...

    def cut(self, place: int) -> int | None:
        """Number of tokens before a character, or None where a token covers both sides of it."""
        ...


@dataclass(frozen=True, slots=True)
class Whole:
    """A text that the tokenizer took whole. `width` characters and `num_skipped` tokens stand before it."""

    encoding: Encoding
    ids: list[int]
    width: int = 0
    num_skipped: int = 0

    def cut(self, place: int) -> int | None:
        """From the tokenizer's own offsets."""
        if place == 0:
            return 0
        place += self.width
        token = self.encoding.char_to_token(place)
        if token is not None:
            found = self.encoding.token_to_chars(token)
            return token - self.num_skipped if found is not None and found[0] == place else None
        ends = [end for start, end in self.encoding.offsets if start < place]  # a space that no token covers
        return None if ends and ends[-1] > place else len(ends) - self.num_skipped


@dataclass(frozen=True, slots=True)
class Joint:
    """A text whose words were looked up."""

    text: str
    ids: list[int]
    memo: WordMemo

    def cut(self, place: int) -> int | None:
        """Word by word up to the character."""
        return self.memo.cut(self.text, place)


class WordMemo:
    """A tokenizer with a memory for words."""

    def __init__(self, backend: Tokenizer) -> None:
        self._backend = backend
        self._known: dict[str, tuple[int, ...]] = {}

    @cached_property
    def _words(self) -> re.Pattern[str] | None:
        """The expression that cuts a text into words; None where texts must go through whole."""
        words = _ascii(word_pattern(self._backend))
        if words is None:
            return None
        wholes = self._encode(TRIAL)
        cuts = [words.findall(text) for text in TRIAL]
        if any("".join(cut) != text for cut, text in zip(cuts, TRIAL, strict=True)):
            return None
        self._learn(cuts)
        same = all(self._ids(cut) == whole.ids for cut, whole in zip(cuts, wholes, strict=True))
        return words if same else None

    def stretches(self, texts: Sequence[str]) -> list[Whole | Joint]:
        """Every text tokenized by itself, without special tokens."""
        words = self._words
        if words is None:
            return [Whole(encoding, encoding.ids) for encoding in self._encode(texts)]
        cuts = [words.findall(text) if PLAIN.fullmatch(text) else _taken_apart(text, words) for text in texts]
        ids = [self._recall(cut) for cut in cuts]
        long = self._learn(cut for cut, found in zip(cuts, ids, strict=True) if found is None)
        found: list[Whole | Joint] = [
            Joint(text, self._ids(cut) if each is None else each, self)
            for text, cut, each in zip(texts, cuts, ids, strict=True)
        ]
        for word in long:
            del self._known[word]
        if len(self._known) > MAX_WORDS:
            self._known = {}
        return found

    def cut(self, text: str, place: int) -> int | None:
        """Number of the text's tokens before a character, or None where a token covers both sides of it."""
        if place == 0:
            return 0
        head = text if PLAIN.fullmatch(text) else next(_parts(text))
        count = 0
        for word in self._words.finditer(head) if self._words and PLAIN.fullmatch(head) else ():
            known = self._known.get(word[0])
            if known is None or word.end() > place:
                break  # inside a word: only the tokenizer knows where its tokens part
            count += len(known)
            if word.end() == place:
                return count
        (encoding,) = self._encode([text])
        return Whole(encoding, []).cut(place)

    def _learn(self, cuts: Iterable[list[str]]) -> list[str]:
        """Tokenizes the words that are new; returns those that are too long to be kept."""
        known = self._known
        new = list(set(chain.from_iterable(cuts)) - known.keys())
        for word, encoding in zip(new, self._encode(new), strict=True):
            known[word] = tuple(encoding.ids)
        return [word for word in new if len(word) > MAX_WORD_CHARS]

    def _recall(self, words: list[str]) -> list[int] | None:
        """The ids of words, or None where one of them is new."""
        try:
            return self._ids(words)
        except KeyError:
            return None

    def _ids(self, words: list[str]) -> list[int]:
        known = self._known
        return list(chain.from_iterable([known[word] for word in words]))

    def _encode(self, texts: Sequence[str]) -> list[Encoding]:
        """The tokenizer's own work, without what its wrapper adds: no truncation, no padding, no special tokens."""
        return encode_batch(self._backend, texts)


def encode_batch(backend: Tokenizer, texts: Sequence[str]) -> list[Encoding]:
    """The tokenizer's own work, without what its wrapper adds: no truncation, no padding, no special tokens."""
    if not texts:
        return []
    if backend.truncation is not None:
        backend.no_truncation()
    if backend.padding is not None:
        backend.no_padding()
    backend.encode_special_tokens = False
    return list(backend.encode_batch(list(texts), add_special_tokens=False))


def word_pattern(backend: Tokenizer) -> str | None:
    """The regular expression of a byte-level BPE that cuts by one expression and does nothing else; None for others."""
    from tokenizers import models

    model = backend.model
    if not isinstance(model, models.BPE) or model.dropout or model.continuing_subword_prefix:
        return None
    if model.end_of_word_suffix or _settings(backend.normalizer) not in (None, {"type": "NFC"}):
        return None
    added = backend.get_added_tokens_decoder().values()
    if any(token.lstrip or token.rstrip or token.single_word or token.normalized for token in added):
        return None
    cutter = _settings(backend.pre_tokenizer) or {}
    steps = cutter["pretokenizers"] if cutter.get("type") == "Sequence" else [cutter]
    last = steps[-1]
    if last.get("type") != "ByteLevel" or last.get("add_prefix_space"):
        return None
    if len(steps) == 1:
        return GPT2_WORDS if last.get("use_regex", True) else None
    first = steps[0]
    alone = len(steps) == 2 and first.get("type") == "Split" and first["behavior"] == "Isolated"
    if not alone or first["invert"] or last.get("use_regex", True):
        return None
    pattern = first["pattern"].get("Regex")
    return pattern if isinstance(pattern, str) else None


def _ascii(pattern: str | None) -> re.Pattern[str] | None:
    """The expression for ASCII text, in Python's dialect; None for one that asks for more than letters and digits."""
    if pattern is None or "(?<" in pattern:  # what looks back cannot be asked about a part of a text
        return None
    out: list[str] = []
    in_class = False
    for token in re.findall(r"\\p\{\w+\}|\\.|.", pattern, re.DOTALL):
        if token.startswith("\\p"):
            members = {"\\p{L}": "A-Za-z", "\\p{N}": "0-9"}.get(token)
            if members is None:
                return None
            out.append(members if in_class else f"[{members}]")
            continue
        if token in "[]":
            in_class = token == "["
        out.append(token)
    try:
        return re.compile("".join(out), re.ASCII)
    except re.error:
        return None


def _settings(part: Normalizer | PreTokenizer | None) -> dict[str, Any] | None:
    """What tokenizer.json says of a part of the pipeline."""
    if part is None:
        return None
    settings: dict[str, Any] = json.loads(part.__getstate__())
    return settings


def _parts(text: str) -> Iterator[str]:
    """A text at its safe places: the longest plain parts, and between them single words that are not plain."""
    for plain, group in groupby(SAFE.split(text), key=lambda word: PLAIN.fullmatch(word) is not None):
        words = list(group)
        yield from ["".join(words)] if plain else words


def _taken_apart(text: str, words: re.Pattern[str]) -> list[str]:
    """The words of a text that is not plain; what is not plain of it goes through the tokenizer by itself."""
    cuts = (words.findall(part) if PLAIN.fullmatch(part) else [part] for part in _parts(text))
    return list(chain.from_iterable(cuts))
