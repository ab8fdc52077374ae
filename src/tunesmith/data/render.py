"""Examples to trees: the one place that tokenizes.

In: examples, a tokenizer, a template, the longest length. Out: trees whose prompt ids are what inference
would feed and whose trained ids decode to the answers with their ends; or the reason why not.
Must not know: files, formats, stages, models.

The trained mask is found in two ways that must agree: by the character offsets of the whole render, and by
the ids of its prefixes. Where they do not (a token reaches across the end of the prompt, say), the parts
are tokenized one by one, so that the prompt stays what inference sees. Either way each trained part is
decoded and compared with its text.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING

import numpy as np

from tunesmith.data.layout import Layout, Part, chat_layouts
from tunesmith.data.template import ChatTemplate, TurnShape, probe_turn, render_text
from tunesmith.data.tokens import MARK, Codec, Encoded
from tunesmith.data.types import Branch, Conversation, Example, Message, RowError, Tree
from tunesmith.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHUNK = 256  # examples tokenized in one call: enough to fill the tokenizer's threads, little memory
SURELY_LONGER = 4  # a text whose lower bound is this many times over the limit is not tokenized at all

MERGED = "a token would reach across a turn's edge: its parts were tokenized one by one"
SPLIT = "the template rewrites earlier turns: the conversation became one tree for each answer"
SPELLED = "a message spells control tokens: they were tokenized as ordinary text"
RAW_CONTROL = "raw text spells control tokens: they were tokenized as such, as the tokenizer's own call does"


@dataclass(frozen=True, slots=True)
class Rendered:
    """An example's trees, or the error that it gave; and what was noticed on the way."""

    trees: tuple[Tree, ...] = ()
    error: RowError | None = None
    notices: tuple[str, ...] = ()


class Renderer:
    """A tokenizer with a chat template. Rows longer than `max_length` tokens are refused, never cut."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: ChatTemplate, max_length: int) -> None:
        self.tokenizer = tokenizer
        self.template = template
        self.max_length = max_length
        self.codec = Codec(tokenizer)

    @cached_property
    def shape(self) -> TurnShape:
        """What the template writes around an answer. Raises ModelError where it cannot be trained on."""
        return probe_turn(self.tokenizer, self.template)

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Ids at which generation stops: the end of an assistant's turn, and the tokenizer's end of text."""
        return tuple(sorted({self.shape.stop_id, self.codec.eos_id}))

    def prompt_ids(self, prompt: Conversation | str) -> list[int]:
        """What inference feeds: the render with generation prompt, or the tokenizer's own call on raw text."""
        if isinstance(prompt, str):
            return [*self.codec.head_ids, *self.codec.encode(prompt).ids]
        text = self._render(self._marked(prompt), True)
        return self.codec.encode(text).ids

    def tree(self, example: Example) -> Tree:
        """The example's one tree. Raises RowError where it has none, or needs several (`trees`)."""
        trees = self.trees(example)
        if len(trees) > 1:
            raise RowError(f"the template rewrites earlier turns: {len(trees)} trees are needed", where=example.id)
        return trees[0]

    def trees(self, example: Example) -> list[Tree]:
        """The example's trees, nearly always one. Raises RowError: too long, not what was written, ..."""
        rendered = self.render_many([example])[0]
        if rendered.error is not None:
            raise RowError(rendered.error.what, where=example.id, fatal=rendered.error.fatal)
        return list(rendered.trees)

    def render_many(self, examples: Sequence[Example]) -> list[Rendered]:
        """Every example's trees or error, tokenized in batches."""
        chunks = (examples[start : start + CHUNK] for start in range(0, len(examples), CHUNK))
        return [rendered for chunk in chunks for rendered in self._render_chunk(chunk)]

    # --- text

    def _render_chunk(self, examples: Sequence[Example]) -> list[Rendered]:
        """Layouts first, then one tokenizer call for all their texts, then the trees."""
        layouts: list[list[Layout] | RowError] = []
        for example in examples:
            try:
                layouts.append(self._layouts(example))
            except RowError as error:
                layouts.append(error)
        texts = list(dict.fromkeys(text for row in layouts if isinstance(row, list) for text in self._texts(row)))
        encoded = dict(zip(texts, self.codec.encode_many(texts), strict=True))
        return [
            self._rendered(example, row, encoded) if isinstance(row, list) else Rendered(error=row)
            for example, row in zip(examples, layouts, strict=True)
        ]

    def _layouts(self, example: Example) -> list[Layout]:
        if isinstance(example.prompt, str):
            answers = [str(answer) for answer in example.answers]
            if any(MARK in text for text in (example.prompt, *answers)):
                raise RowError("the text holds U+FDD0, which is not a character", fatal=True)
            layouts = [Layout(example.prompt, tuple((Part(answer, True),) for answer in answers), raw=True)]
        else:
            prompt = self._marked(example.prompt)
            branches = tuple(self._marked(answer) for answer in example.answers if isinstance(answer, tuple))
            layouts = chat_layouts(self._render, self.shape, prompt, branches)
        for layout in layouts:
            longest = max(sum(len(part.text) for part in parts) for parts in layout.branches)
            num_chars = len(layout.prompt) + longest
            limit = SURELY_LONGER * self.max_length
            if num_chars > limit and self.codec.min_tokens(num_chars) > limit:
                raise self._too_long(self.codec.min_tokens(num_chars), "at least ")
        return layouts

    def _texts(self, layouts: list[Layout]) -> Iterator[str]:
        """Every text that the trees of an example are tokenized from."""
        for layout in layouts:
            yield layout.prompt
            for parts in layout.branches:
                yield from (part.text for part in parts) if layout.raw else _prefixes(layout.prompt, parts)

    def _render(self, messages: Conversation, add_generation_prompt: bool) -> str:
        try:
            return render_text(self.tokenizer, self.template, messages, add_generation_prompt=add_generation_prompt)
        except ModelError as error:
            raise RowError(error.what, fatal=True) from error

    def _marked(self, messages: Conversation) -> Conversation:
        codec = self.codec
        return tuple(
            Message(message.role, codec.marked(message.content, special_only=message.role == "assistant"))
            for message in messages
        )

    # --- tokens

    def _rendered(self, example: Example, layouts: list[Layout], encoded: dict[str, Encoded]) -> Rendered:
        notices = {SPLIT} if len(layouts) > 1 else set()
        build = self._raw_tree if layouts[0].raw else self._chat_tree
        try:
            trees = []
            for number, layout in enumerate(layouts, start=1):
                tree_id = f"{example.id}#turn{number}" if len(layouts) > 1 else example.id
                trees.append(self._checked(build(tree_id, layout, encoded, notices)))
        except RowError as error:
            return Rendered(error=error, notices=tuple(sorted(notices)))
        return Rendered(trees=tuple(trees), notices=tuple(sorted(notices)))

    def _chat_tree(self, tree_id: str, layout: Layout, encoded: dict[str, Encoded], notices: set[str]) -> Tree:
        prompt = encoded[layout.prompt]
        branches = [self._chat_branch(layout.prompt, parts, encoded, notices) for parts in layout.branches]
        for parts, branch in zip(layout.branches, branches, strict=True):
            text = layout.prompt + "".join(part.text for part in parts)
            if MARK in text:
                notices.add(SPELLED)
            if self.codec.num_controls([*prompt.ids, *branch.ids]) > self.codec.num_controls_spelled(text):
                raise RowError("the text becomes a control token when the tokenizer normalizes it", fatal=True)
        return Tree(tree_id, np.array(prompt.ids, dtype=np.int32), tuple(branches))

    def _chat_branch(
        self, prompt: str, parts: tuple[Part, ...], encoded: dict[str, Encoded], notices: set[str]
    ) -> Branch:
        prefixes = [encoded[text] for text in _prefixes(prompt, parts)]
        pieces = _pieces_of_whole(prompt, parts, prefixes)
        if pieces is None or not self._writes(pieces, parts):
            notices.add(MERGED)
            pieces = [self.codec.continuation(part.text) for part in parts]
            if not self._writes(pieces, parts):
                raise self._not_written(pieces, parts)
        ids = [token_id for piece in pieces for token_id in piece]
        trained = [part.trained for part, piece in zip(parts, pieces, strict=True) for _ in piece]
        return Branch(np.array(ids, dtype=np.int32), np.array(trained, dtype=np.bool_))

    def _raw_tree(self, tree_id: str, layout: Layout, encoded: dict[str, Encoded], notices: set[str]) -> Tree:
        """Raw text: prompt and answers each by itself, the end-of-text token after every answer."""
        codec = self.codec
        prompt_ids = [*codec.head_ids, *encoded[layout.prompt].ids]
        branches = []
        for (part,) in layout.branches:
            alone = codec.additive or not layout.prompt
            ids = encoded[part.text].ids if alone else codec.continuation(part.text)
            if not codec.writes(ids, part.text, continues=bool(layout.prompt)):
                raise self._not_written([ids], (part,))
            ids = ids if ids[-1] == codec.eos_id else [*ids, codec.eos_id]
            trained = np.ones(len(ids), dtype=np.bool_)
            trained[0] = bool(prompt_ids)  # nothing predicts the very first token of a text
            branches.append(Branch(np.array(ids, dtype=np.int32), trained))
            if codec.head_ids and [*prompt_ids, *ids][:2] == codec.head_ids * 2:
                raise RowError("the text begins with the BOS token, and the tokenizer adds another", fatal=True)
            if codec.spells_control(layout.prompt) or codec.spells_control(part.text):
                notices.add(RAW_CONTROL)
        return Tree(tree_id, np.array(prompt_ids, dtype=np.int32), tuple(branches))

    # --- checks

    def _checked(self, tree: Tree) -> Tree:
        length = len(tree.prompt_ids) + max(len(branch.ids) for branch in tree.branches)
        if length > self.max_length:
            raise self._too_long(length)
        if any(not branch.trained.any() for branch in tree.branches):
            raise RowError("no trained token")
        first, *others = tree.branches
        if others and all(np.array_equal(first.ids, other.ids) for other in others):
            raise RowError("chosen equals rejected")
        return tree

    def _too_long(self, num_tokens: int, bound: str = "") -> RowError:
        reason = f"longer than max_length: {bound}{num_tokens} > {self.max_length} tokens"
        return RowError(reason, num_tokens=num_tokens)

    def _writes(self, pieces: list[list[int]], parts: tuple[Part, ...]) -> bool:
        pairs = zip(pieces, parts, strict=True)
        return all(self.codec.writes(piece, part.text) for piece, part in pairs if part.trained)

    def _not_written(self, pieces: list[list[int]], parts: tuple[Part, ...]) -> RowError:
        for piece, part in zip(pieces, parts, strict=True):
            if part.trained and not self.codec.writes(piece, part.text):
                found, wanted = self.codec.decode(piece), part.text.replace(MARK, "")
                place = next((i for i, (a, b) in enumerate(zip(found, wanted, strict=False)) if a != b), 0)
                around = slice(max(0, place - 10), place + 20)
                return RowError(
                    f"the tokenizer cannot write the answer: {wanted[around]!r} comes back as {found[around]!r}"
                )
        raise AssertionError("called only where a part is not written")


def _prefixes(prompt: str, parts: tuple[Part, ...]) -> list[str]:
    """The render up to the end of the prompt, and to the end of every part; the last is the whole."""
    return list(accumulate((part.text for part in parts), initial=prompt))


def _pieces_of_whole(prompt: str, parts: tuple[Part, ...], prefixes: list[Encoded]) -> list[list[int]] | None:
    """The ids of each part within the whole render, where both ways of finding the edges agree; else None."""
    whole = prefixes[-1].ids
    places = list(accumulate((len(part.text) for part in parts), initial=len(prompt)))
    by_offsets = [*(prefixes[-1].cut(place) for place in places[:-1]), len(whole)]
    by_prefixes = [len(prefix.ids) if whole[: len(prefix.ids)] == prefix.ids else None for prefix in prefixes]
    if by_offsets != by_prefixes or None in by_offsets:
        return None
    edges = [edge for edge in by_offsets if edge is not None]
    return [whole[start:end] for start, end in pairwise(edges)]
