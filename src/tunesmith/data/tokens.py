"""Text to tokens and back, with the character offsets that masks are made from.

In: rendered text, in which a mark (`MARK`) stands inside every control token that a row's content spells,
so that content can never become one. Out: ids with offsets; ids of a text that continues another.
Must not know: templates, rows, trees.
"""

from __future__ import annotations

import re
import unicodedata
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from tunesmith.data.types import RowError
from tunesmith.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MARK = "\ufdd0"  # a Unicode noncharacter: never assigned, so no text means anything by it
ANCHORS = ("\n", "|", "0")  # texts to tokenize before a continuation where the tokenizer adds a space at every start


@dataclass(frozen=True, slots=True)
class Encoded:
    """Ids of a text with the characters that each covers; offsets count the marks in the text."""

    ids: list[int]
    starts: list[int]
    ends: list[int]

    def cut(self, place: int) -> int | None:
        """Number of tokens before a character, or None where a token covers both sides of it."""
        count = bisect_left(self.starts, place)
        return count if count == 0 or self.ends[count - 1] <= place else None


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
        # Tokens may be special without a name in the configuration: Llama 3 has 250 reserved ones.
        special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
        special |= {token for token in tokenizer.all_special_tokens if token}
        self._control = {token: token_id for token, token_id in tokenizer.get_added_vocab().items() if token}
        self._control |= dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
        self._control_ids = frozenset(self._control.values())
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

    def marked(self, content: str, *, special_only: bool) -> str:
        """The content with a mark inside every control token that it spells.

        `special_only` leaves added tokens that are not special (`<think>`): a model writes those itself.
        Raises RowError for a text that holds the mark, or spells a control token of one character.
        """
        if MARK in content:
            raise RowError("the text holds U+FDD0, which is not a character", fatal=True)
        finder = self._special_controls if special_only else self._all_controls
        if any(single in content for single in self._single_controls):
            raise RowError("the text holds a control token of a single character", fatal=True)
        return finder.sub(lambda found: found[0] + MARK, content)

    def num_controls_spelled(self, text: str) -> int:
        """How many control tokens a (marked) text spells: the most that its tokens may hold."""
        return len(self._all_controls.findall(text))

    def num_controls(self, ids: Sequence[int]) -> int:
        """How many of the ids are control tokens."""
        return sum(1 for token_id in ids if token_id in self._control_ids)

    # --- encoding

    def encode_many(self, texts: Sequence[str]) -> list[Encoded]:
        """Each (marked) text by itself, as inference would tokenize it."""
        plain = [text for text in texts if MARK not in text]
        results = iter(self._encode_plain(plain))
        return [next(results) if MARK not in text else self._encode_marked(text) for text in texts]

    def encode(self, text: str) -> Encoded:
        """One (marked) text by itself."""
        return self.encode_many([text])[0]

    def continuation(self, text: str) -> list[int]:
        """Ids of a (marked) text that stands after another: no space that the tokenizer would add at a start."""
        return [token_id for piece in text.split(MARK) for token_id in self._continue(piece)]

    def _encode_plain(self, texts: Sequence[str]) -> list[Encoded]:
        if not texts:
            return []
        batch = self.tokenizer(
            list(texts),
            add_special_tokens=False,
            return_offsets_mapping=True,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        return [
            Encoded(list(ids), [start for start, _ in offsets], [end for _, end in offsets])
            for ids, offsets in zip(batch["input_ids"], batch["offset_mapping"], strict=True)
        ]

    def _encode_marked(self, text: str) -> Encoded:
        """Pieces between marks, each by itself, so that no token reaches across a mark."""
        ids: list[int] = []
        starts: list[int] = []
        ends: list[int] = []
        place = 0
        for index, piece in enumerate(text.split(MARK)):
            encoded = self._encode_plain([piece])[0] if index == 0 else self._continue_with_offsets(piece)
            ids += encoded.ids
            starts += [place + start for start in encoded.starts]
            ends += [place + end for end in encoded.ends]
            place += len(piece) + 1
        return Encoded(ids, starts, ends)

    def _continue(self, text: str) -> list[int]:
        return self._continue_with_offsets(text).ids

    def _continue_with_offsets(self, text: str) -> Encoded:
        if not text:
            return Encoded([], [], [])
        if self.additive:
            return self._encode_plain([text])[0]
        for anchor in ANCHORS:
            head, whole = self._encode_plain([anchor, anchor + text])
            count, width = len(head.ids), len(anchor)
            if whole.ids[:count] == head.ids and whole.cut(width) == count:
                starts, ends = whole.starts[count:], whole.ends[count:]
                return Encoded(whole.ids[count:], [s - width for s in starts], [e - width for e in ends])
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
        decoded = self.decode(ids, continues=continues)
        wanted = text.replace(MARK, "")
        return decoded == wanted or any(decoded == unicodedata.normalize(form, wanted) for form in ("NFC", "NFKC"))

    def decode(self, ids: Sequence[int], *, continues: bool = True) -> str:
        """The text of the ids, special tokens included; `continues`: as they stand after others."""
        if self.additive or not continues:
            return self._decode(list(ids))
        anchor, width = self._anchor
        return self._decode([*anchor, *ids])[width:]

    @cached_property
    def _anchor(self) -> tuple[list[int], int]:
        """Ids to decode before a continuation, and the length of their text."""
        ids = self._ids(ANCHORS[0])
        return ids, len(self._decode(ids))

    def _decode(self, ids: list[int]) -> str:
        text = self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text

    # --- length

    def min_tokens(self, num_chars: int) -> int:
        """A lower bound of the tokens of so many characters, without tokenizing."""
        return num_chars // self._longest_token

    @cached_property
    def _longest_token(self) -> int:
        return max(len(token) for token in self.tokenizer.get_vocab())


def _finder(tokens: Iterable[str]) -> re.Pattern[str]:
    """Finds the first character of each control token that a text spells, overlapping ones included.

    One alternative for each first character, the rest looked ahead at: the search skips to those
    characters, which matters for tokenizers with hundreds of reserved tokens.
    """
    by_first: dict[str, list[str]] = {}
    for token in sorted(set(tokens)):
        by_first.setdefault(token[0], []).append(re.escape(token[1:]))
    return re.compile("|".join(f"{re.escape(a)}(?={'|'.join(rest)})" for a, rest in by_first.items()) or r"(?!)")
