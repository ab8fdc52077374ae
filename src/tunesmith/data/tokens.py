"""Text to tokens and back, with the character offsets that masks are made from.

In: rendered text, in which a mark (`MARK`) stands inside every control token that a row's content spells,
so that content can never become one. Out: ids with offsets; ids of a text that continues another.
Must not know: templates, rows, trees.
"""

from __future__ import annotations

import re
import unicodedata
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from tunesmith.data.types import RowError
from tunesmith.data.words import Stretch, Whole, WordMemo, encode_batch
from tunesmith.errors import ModelError

if TYPE_CHECKING:
    from tokenizers import Encoding
    from transformers import PreTrainedTokenizerBase

MARK = "\ufdd0"  # a Unicode noncharacter: never assigned, so no text means anything by it
KEPT = 512  # stretches remembered from chunk to chunk: system prompts, tools, headers of turns
KEPT_CHARS = 4_000
ANCHORS = ("\n", "|", "0")  # texts to tokenize before a continuation where the tokenizer adds a space at every start


_LONGEST: WeakKeyDictionary[PreTrainedTokenizerBase, int] = WeakKeyDictionary()  # characters of the longest token


@dataclass(frozen=True, slots=True)
class Span:
    """A stretch of a text that was tokenized by itself: where it starts, and how many ids stand before it."""

    start: int
    num_before: int
    stretch: Stretch | None  # None: a control token, or a mark, which no token reaches into

    def cut(self, place: int) -> int | None:
        """Number of this stretch's tokens before a character of it, or None where a token covers both sides."""
        if place == 0:
            return 0
        return None if self.stretch is None else self.stretch.cut(place)


@dataclass(frozen=True, slots=True)
class Encoded:
    """Ids of a text, and the stretches that were tokenized; places in the text count its marks."""

    ids: list[int]
    spans: tuple[Span, ...]
    length: int

    def cut(self, place: int) -> int | None:
        """Number of tokens before a character, or None where a token covers both sides of it."""
        if place >= self.length:
            return len(self.ids)
        span = self.spans[bisect_right(self.spans, place, key=_start_of) - 1]
        count = span.cut(place - span.start)
        return None if count is None else span.num_before + count


def _start_of(span: Span) -> int:
    return span.start


class Codec:
    """A tokenizer as the renderer uses it: no special tokens added, no truncation, exact offsets."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        if not tokenizer.is_fast:
            raise ModelError(
                "the tokenizer has no character offsets, which the check of trained tokens needs",
                where=type(tokenizer).__name__,
                remedy="Use a model with a fast tokenizer (a tokenizer.json).",
            )
        if tokenizer.eos_token_id is None:
            raise ModelError(
                "the tokenizer has no end-of-sequence token, so nothing could teach the model to stop",
                where=type(tokenizer).__name__,
                remedy="Set `eos_token` in tokenizer_config.json to the token that ends a text.",
            )
        self.tokenizer = tokenizer
        self.eos_id = int(tokenizer.eos_token_id)
        self.eos_text = str(tokenizer.eos_token)
        self.bos_id = None if tokenizer.bos_token_id is None else int(tokenizer.bos_token_id)
        # Tokens may be special without a name in the configuration: Llama 3 has 250 reserved ones.
        special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
        special |= {token for token in tokenizer.all_special_tokens if token}
        self._control = {token: token_id for token, token_id in tokenizer.get_added_vocab().items() if token}
        self._control |= dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
        self._control_ids = frozenset(self._control.values())
        self._backend = tokenizer.backend_tokenizer
        self._words = WordMemo(self._backend)
        self._cutter = self._find_cutter()
        self._kept: dict[str, Stretch] = {}
        self._all_controls = _finder(self._control)
        self._special_controls = _finder(special)
        self._single_controls = [token for token in self._control if len(token) == 1]
        own, bare = self._ids("a", special=True), self._ids("a")
        place = next((i for i in range(len(own)) if own[i : i + len(bare)] == bare), 0)
        self.head_ids = own[:place]
        """What the tokenizer's own call puts before a text: [bos], or nothing."""

    # --- content that spells control tokens

    def spells_control(self, text: str) -> bool:
        """Whether the text holds a control token's spelling."""
        return self._all_controls.search(text) is not None

    def mark_all(self, content: str) -> str:
        """`marked`, every control token: for what the model reads."""
        return self.marked(content, special_only=False)

    def mark_special(self, content: str) -> str:
        """`marked`, special tokens only: for what the model writes."""
        return self.marked(content, special_only=True)

    def marked(self, content: str, *, special_only: bool) -> str:
        """The content with a mark inside every control token that it spells.

        `special_only` leaves added tokens that are not special (`<think>`): a model writes those itself.
        Raises RowError for a text that holds the mark, or spells a control token of one character.
        """
        if MARK in content:
            raise RowError("the text holds U+FDD0, which is not a character", fatal=True)
        if not content:
            return content
        finder = self._special_controls if special_only else self._all_controls
        if any(single in content for single in self._single_controls):
            raise RowError("the text holds a control token of a single character", fatal=True)
        return finder.sub(lambda found: found[0] + MARK, content)

    def num_controls_spelled(self, text: str) -> int:
        """How many control tokens a (marked) text spells: the most that its tokens may hold."""
        return len(self._all_controls.findall(text))

    def num_controls(self, ids: Sequence[int]) -> int:
        """How many of the ids are control tokens."""
        return sum(map(self._control_ids.__contains__, ids))

    # --- encoding

    def encode_many(self, texts: Sequence[str]) -> list[Encoded]:
        """Each (marked) text by itself, as inference would tokenize it.

        The tokenizer cuts a text at its control tokens and goes through each stretch between them by itself.
        Doing the cutting here, for tokenizers of which that is the whole truth, lets a stretch that stands in
        many texts (a system prompt, the header of a turn, the question before and after its answer) be tokenized once.
        """
        if self._cutter is None:
            return [self._encode_whole(text) for text in texts]
        pieces = [self._cutter.split(text) for text in texts]
        counts: dict[str, int] = {}
        for row in pieces:
            for piece in row[::2]:
                counts[piece] = counts.get(piece, 0) + 1
        new = [piece for piece in counts if piece and piece not in self._kept]
        known = self._kept | dict(zip(new, self._words.stretches(new), strict=True))
        self._keep({piece: known[piece] for piece in new if counts[piece] > 2 and len(piece) <= KEPT_CHARS})
        return [self._joined(row, known) for row in pieces]

    def encode(self, text: str) -> Encoded:
        """One (marked) text by itself."""
        return self.encode_many([text])[0]

    def continuation(self, text: str) -> list[int]:
        """Ids of a (marked) text that stands after another: no space that the tokenizer would add at a start."""
        if self._cutter is not None:
            return self.encode(text).ids
        return [token_id for piece in text.split(MARK) for token_id in self._continue(piece).ids]

    def _find_cutter(self) -> re.Pattern[str] | None:
        """Finds the tokens (and marks) at which a text may be cut; None where that could change its ids."""
        added = self.tokenizer.added_tokens_decoder.values()
        plain = [token.content for token in added if not token.normalized]
        if not self.additive or any(token.lstrip or token.rstrip or token.single_word for token in added):
            return None
        longest_first = sorted((token for token in plain if token), key=len, reverse=True)
        by_first: dict[str, list[str]] = {}
        for token in longest_first:
            by_first.setdefault(token[0], []).append(re.escape(token[1:]))
        options = [f"{re.escape(first)}(?:{'|'.join(rest)})" for first, rest in by_first.items()]
        cutter = re.compile(f"({'|'.join([MARK, *options])})")
        sample = "a b".join(["", *longest_first[:50], " \n"]) + "".join(longest_first[:5])
        pieces = cutter.split(sample)
        known = {
            piece: Whole(each, each.ids) for piece, each in zip(pieces[::2], self._batch(pieces[::2]), strict=True)
        }
        return cutter if self._joined(pieces, known).ids == self._ids(sample) else None

    def _joined(self, pieces: list[str], known: Mapping[str, Stretch]) -> Encoded:
        """The ids of a text from those of its stretches (even places) and of the tokens between them (odd ones)."""
        ids: list[int] = []
        spans: list[Span] = []
        start = 0
        for place, piece in enumerate(pieces):
            if not piece:
                continue
            if place % 2 == 0:
                stretch = known[piece]
                spans.append(Span(start, len(ids), stretch))
                ids += stretch.ids
            else:
                spans.append(Span(start, len(ids), None))
                if piece != MARK:
                    ids.append(self._control[piece])
            start += len(piece)
        return Encoded(ids, tuple(spans), start)

    def _keep(self, pieces: dict[str, Stretch]) -> None:
        if len(self._kept) + len(pieces) > KEPT:
            self._kept = {}
        self._kept.update(list(pieces.items())[:KEPT])

    def _batch(self, texts: Sequence[str]) -> list[Encoding]:
        return encode_batch(self._backend, texts)

    def _encode_whole(self, text: str) -> Encoded:
        """Pieces between marks, each by itself, so that no token reaches across a mark; control tokens within."""
        ids: list[int] = []
        spans: list[Span] = []
        start = 0
        for index, piece in enumerate(text.split(MARK)):
            if index:
                spans.append(Span(start, len(ids), None))
                start += 1
            if not piece:
                continue
            if index == 0:
                (encoding,) = self._batch([piece])
                stretch = Whole(encoding, encoding.ids)
            else:
                stretch = self._continue(piece)
            spans.append(Span(start, len(ids), stretch))
            ids += stretch.ids
            start += len(piece)
        return Encoded(ids, tuple(spans), start)

    def _continue(self, text: str) -> Whole:
        """A text after another, as a part of the encoding of an anchor and the text."""
        for anchor in ANCHORS if text else ():
            head, whole = self._batch([anchor, anchor + text])
            count, width = len(head.ids), len(anchor)
            if whole.ids[:count] == head.ids and Whole(whole, []).cut(width) == count:
                return Whole(whole, whole.ids[count:], width, count)
        if not text:
            (empty,) = self._batch([""])
            return Whole(empty, [])
        raise RowError("the tokenizer cannot write the text as a continuation of another")

    @cached_property
    def additive(self) -> bool:
        """Whether a text has the same ids at a start as elsewhere; false where a space is put before every text."""
        return self._ids("\na") == self._ids("\n") + self._ids("a")

    def _ids(self, text: str, *, special: bool = False) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])

    # --- decoding

    def writes(self, ids: Sequence[int], text: str, *, continues: bool = True) -> bool:
        """Whether the ids decode to the text, or to the Unicode normal form of it that the tokenizer makes."""
        return says(self.decode(ids, continues=continues), text)

    def decode(self, ids: Sequence[int], *, continues: bool = True) -> str:
        """The text of the ids, special tokens included; `continues`: as they stand after others."""
        return self.decode_many([ids], continues=continues)[0]

    def decode_many(self, rows: Sequence[Sequence[int]], *, continues: bool = True) -> list[str]:
        """The text of each row of ids."""
        if not rows:
            return []
        if self.additive or not continues:
            return list(self._backend.decode_batch(list(rows), skip_special_tokens=False))
        anchor, width = self._anchor
        found = self._backend.decode_batch([[*anchor, *ids] for ids in rows], skip_special_tokens=False)
        return [text[width:] for text in found]

    def spell(self, ids: Sequence[int], place: int) -> list[str]:
        """The tokens around a character of the ids' text, for an error message."""
        count = next((i for i in range(len(ids)) if len(self.decode(ids[: i + 1])) > place), len(ids))
        around = list(ids[max(0, count - 2) : count + 3])
        return [
            f"{token!r} ({each})"
            for token, each in zip(self.tokenizer.convert_ids_to_tokens(around), around, strict=True)
        ]

    @cached_property
    def _anchor(self) -> tuple[list[int], int]:
        """Ids to decode before a continuation, and the length of their text."""
        ids = self._ids(ANCHORS[0])
        return ids, len(self.decode_many([ids], continues=False)[0])

    # --- length

    def min_tokens(self, num_chars: int) -> int:
        """A lower bound of the tokens of so many characters, without tokenizing."""
        return num_chars // self._longest_token

    @cached_property
    def _longest_token(self) -> int:
        if self.tokenizer not in _LONGEST:
            _LONGEST[self.tokenizer] = max(map(len, self.tokenizer.get_vocab()))
        return _LONGEST[self.tokenizer]


def says(decoded: str, text: str) -> bool:
    """Whether a decoded text is the (marked) text, or the Unicode normal form of it that a tokenizer makes."""
    wanted = text.replace(MARK, "")
    return decoded == wanted or any(decoded == unicodedata.normalize(form, wanted) for form in ("NFC", "NFKC"))


def _finder(tokens: Iterable[str]) -> re.Pattern[str]:
    """Finds the first character of each control token that a text spells, overlapping ones included.

    One alternative for each first character, the rest looked ahead at: the search skips to those
    characters, which matters for tokenizers with hundreds of reserved tokens.
    """
    by_first: dict[str, list[str]] = {}
    for token in sorted(set(tokens)):
        by_first.setdefault(token[0], []).append(re.escape(token[1:]))
    return re.compile("|".join(f"{re.escape(a)}(?={'|'.join(rest)})" for a, rest in by_first.items()) or r"(?!)")
