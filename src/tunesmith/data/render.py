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

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Literal

from tunesmith.data.branches import (
    MERGED,
    RAW_CONTROL,
    SPELLED,
    Draft,
    Notices,
    Rendered,
    check_drafts,
    checked,
    draft_of,
    text_tree,
    texts_of,
    to_tree,
    turn_by_turn,
    with_prompt,
)
from tunesmith.data.calls import CallShape, probe_calls
from tunesmith.data.conversation import CallForm, marked_json, marked_message, to_dicts, tool_list
from tunesmith.data.ending import at_end
from tunesmith.data.layout import Layout, Part, Scribe, chat_layouts, needed_renders
from tunesmith.data.sandbox import Sandbox
from tunesmith.data.template import ChatTemplate, TurnShape, control_tokens, probe_turn
from tunesmith.data.tokens import MARK, Codec, Encoded
from tunesmith.data.trim import split_ids, without_last_turns, without_oldest_turns
from tunesmith.data.turns import Chosen, TrainOn, choose_turns
from tunesmith.data.types import Conversation, Example, Message, RowError, Tree
from tunesmith.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TooLong = Literal["drop", "truncate_prompt_start", "truncate_answer", "split", "stop"]
CHUNK = 256  # examples tokenized in one call: enough to fill the tokenizer's threads, little memory
SURELY_LONGER = 4  # a text whose lower bound is this many times over the limit is not tokenized at all

__all__ = ["MERGED", "NO_BOS", "RAW_CONTROL", "SPELLED", "SPLIT", "Rendered", "Renderer"]

SPLIT = "the template rewrites earlier turns: the conversation became one tree for each answer"
NO_BOS = "the template writes no BOS token, though the tokenizer's own call does: inference sees none either"


@dataclass(frozen=True, slots=True)
class _Row:
    """An example on its way: its turns (None for raw text), marked tools, layouts."""

    example: Example
    chosen: Chosen | None
    tools: str
    layouts: list[Layout]
    huge: bool


_Renders = dict[tuple[Conversation, str, bool], str | ModelError]


class Renderer:
    """A tokenizer with a chat template. `too_long` says what becomes of rows of more than `max_length` tokens;
    `reads_end`: for a reward model, only the last token of each answer is marked."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        template: ChatTemplate,
        max_length: int,
        *,
        too_long: TooLong = "drop",
        train_on: TrainOn = "assistant",
        reads_end: bool = False,
    ) -> None:
        self.tokenizer = tokenizer
        self.template = template
        self.max_length = max_length
        self.too_long = too_long
        self.train_on = train_on
        self.reads_end = reads_end
        self.codec = Codec(tokenizer)
        self._sandbox = Sandbox(tokenizer, template.name, template.source)

    @cached_property
    def shape(self) -> TurnShape:
        """What the template writes around an answer. Raises ModelError where it cannot be trained on."""
        return probe_turn(self.tokenizer, self.template)

    @cached_property
    def call_shape(self) -> CallShape:
        """What the template makes of tools and tool calls, or why it can make nothing of them."""
        return probe_calls(self._sandbox, control_tokens(self.tokenizer), self.shape.stop_id)

    @cached_property
    def stop_ids(self) -> tuple[int, ...]:
        """Ids at which generation stops: the ends of an assistant's turn, and the tokenizer's end of text.

        Under a template that cannot be trained on, only raw text can be used, and its end alone is here:
        everything that needs the template raises ModelError.
        """
        try:
            ends = {self.shape.stop_id}
        except ModelError:
            return (self.codec.eos_id,)
        if not self.call_shape.refused:
            ends.add(self.call_shape.stop_id)
        return tuple(sorted(ends | {self.codec.eos_id}))

    def prompt_ids(self, prompt: Conversation | str, tools: str = "", *, sanitize: bool = True) -> list[int]:
        """What inference feeds: the render with generation prompt, or the tokenizer's own call on raw text.

        Raises ModelError for messages under a template that cannot be trained on: nothing would end the answer.
        """
        if isinstance(prompt, str):
            return [*self.codec.head_ids, *self.codec.encode(prompt).ids]
        _ = self.shape
        if sanitize:
            prompt, tools = self._marked(prompt), self._marked_tools(tools)
        return self.codec.encode(self._render({}, prompt, tools, True)).ids

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

    def render_many(self, examples: Sequence[Example], *, sanitize: bool = True) -> list[Rendered]:
        """Every example's trees or error, tokenized in batches.

        `sanitize`: control tokens that a row's text spells become ordinary text; without it they are control tokens.
        """
        chunks = (examples[start : start + CHUNK] for start in range(0, len(examples), CHUNK))
        return [rendered for chunk in chunks for rendered in self._render_chunk(chunk, sanitize)]

    # --- text

    def _render_chunk(self, examples: Sequence[Example], sanitize: bool) -> list[Rendered]:
        """Turns first, then all their renders, then one tokenizer call for all texts, then the trees."""
        chosen = [self._chosen(example, sanitize) for example in examples]
        renders = self._prefill([row for row in chosen if not isinstance(row, RowError)])
        rows = [
            each if isinstance(each, RowError) else self._row(example, each[0], each[1], renders)
            for example, each in zip(examples, chosen, strict=True)
        ]
        encoded = self._encode(
            [layout for row in rows if isinstance(row, _Row) and not row.huge for layout in row.layouts]
        )
        drafts = [self._drafts(row, encoded) if isinstance(row, _Row) else row for row in rows]
        good = [draft for row in drafts if isinstance(row, list) for draft in row]
        check_drafts(self.codec, good)
        results = []
        for row, draft in zip(rows, drafts, strict=True):
            if isinstance(row, RowError):
                results.append(Rendered(error=row, num_tokens=row.num_tokens))
            elif isinstance(draft, RowError):
                results.append(Rendered(error=draft))
            else:
                results.append(self._rendered(row, draft, renders, sanitize))
        return results

    def _chosen(self, example: Example, sanitize: bool) -> tuple[Chosen | None, str] | RowError:
        """The example's turns and tools, marked; None for raw text."""
        try:
            if isinstance(example.prompt, str):
                texts = (example.prompt, *map(str, example.answers))
                if any(MARK in text for text in texts):
                    raise RowError("the text holds U+FDD0, which is not a character", fatal=True)
                if self.train_on == "weights" and example.prompt:
                    raise RowError("`train_on: weights` needs weights, and raw text has none", fatal=True)
                return None, ""
            chosen = choose_turns(example, self.train_on)
            if not sanitize:
                return chosen, example.tools
            answers = tuple(self._marked(answer) for answer in chosen.answers)
            return replace(chosen, prompt=self._marked(chosen.prompt), answers=answers), self._marked_tools(
                example.tools
            )
        except RowError as error:
            return error

    def _marked(self, messages: Conversation) -> Conversation:
        codec = self.codec
        return tuple(
            marked_message(message, codec.mark_special if message.role == "assistant" else codec.mark_all)
            for message in messages
        )

    def _marked_tools(self, tools: str) -> str:
        return marked_json(list(tool_list(tools) or []), self.codec.mark_all) if tools else ""

    def _prefill(self, rows: Sequence[tuple[Chosen | None, str]]) -> _Renders:
        """The renders that the rows surely need, a batch for each list of tools."""
        renders: _Renders = {}
        groups: dict[tuple[str, bool], dict[Conversation, None]] = {}
        for chosen, tools in rows:
            if chosen is not None and not any(m.calls for answer in chosen.answers for m in answer):
                for messages, generation in needed_renders(chosen):
                    groups.setdefault((tools, generation), {})[messages] = None
        if groups:
            _ = self.shape  # a template that cannot be trained on is told before any row is
        for (tools, generation), conversations in groups.items():
            form = self._form([message for messages in conversations for message in messages])
            dicts = [to_dicts(messages, form) for messages in conversations]
            texts = self._sandbox.texts(dicts, tool_list(tools), add_generation_prompt=generation)
            renders |= {(key, tools, generation): text for key, text in zip(conversations, texts, strict=True)}
        return renders

    def _form(self, messages: Sequence[Message]) -> CallForm:
        return self.call_shape.form if any(m.calls or m.role == "tool" for m in messages) else CallForm()

    def _render(self, renders: _Renders, messages: Conversation, tools: str, generation: bool) -> str:
        text = renders.get((messages, tools, generation))
        if text is None:
            dicts = to_dicts(messages, self._form(messages))
            (text,) = self._sandbox.texts([dicts], tool_list(tools), add_generation_prompt=generation)
            renders[messages, tools, generation] = text
        if isinstance(text, ModelError):
            raise RowError(text.what, fatal=True)
        return text

    def _row(self, example: Example, chosen: Chosen | None, tools: str, renders: _Renders) -> _Row | RowError:
        try:
            layouts = self._layouts(example, chosen, tools, renders)
        except RowError as error:
            return error
        num_tokens = max(self._least_tokens(layout) for layout in layouts)
        huge = num_tokens > SURELY_LONGER * self.max_length
        if huge and self.too_long in ("drop", "stop"):
            return self._too_long(num_tokens, "at least ")
        return _Row(example, chosen, tools, layouts, huge)

    def _layouts(self, example: Example, chosen: Chosen | None, tools: str, renders: _Renders) -> list[Layout]:
        if chosen is not None:
            return chat_layouts(self._scribe(tools, renders), chosen)
        branches = tuple((Part(str(answer), 1.0),) for answer in example.answers)
        return [Layout(str(example.prompt), branches, raw=True, whole=self.train_on == "all")]

    def _scribe(self, tools: str, renders: _Renders) -> Scribe:
        def render(messages: Conversation, generation: bool) -> str:
            return self._render(renders, messages, tools, generation)

        return Scribe(render, self.shape, lambda: self.call_shape, tools)

    def _least_tokens(self, layout: Layout) -> int:
        longest = max(sum(len(part.text) for part in parts) for parts in layout.branches)
        num_chars = len(layout.prompt) + longest
        surely_fewer = num_chars <= SURELY_LONGER * self.max_length  # a token is a character or more
        return 0 if surely_fewer else self.codec.min_tokens(num_chars)

    # --- tokens

    def _encode(self, layouts: Sequence[Layout]) -> dict[str, Encoded]:
        texts = list(dict.fromkeys(text for layout in layouts for text in texts_of(layout)))
        return dict(zip(texts, self.codec.encode_many(texts), strict=True))

    def _drafts(self, row: _Row, encoded: dict[str, Encoded]) -> list[Draft] | RowError:
        if row.huge:
            return []
        several = len(row.layouts) > 1
        names = [f"{row.example.id}#turn{n}" if several else row.example.id for n in range(1, len(row.layouts) + 1)]
        try:
            return [
                draft_of(self.codec, name, layout, encoded) for name, layout in zip(names, row.layouts, strict=True)
            ]
        except RowError as error:
            return error

    def _rendered(self, row: _Row, drafts: list[Draft], renders: _Renders, sanitize: bool) -> Rendered:
        """The trees of a row, shortened where they are too long and may be."""
        notices: Notices = {SPLIT} if len(row.layouts) > 1 else set()
        num_tokens = max((draft.num_tokens for draft in drafts), default=0)
        try:
            if row.huge or num_tokens > self.max_length:
                num_tokens = num_tokens or max(self._least_tokens(layout) for layout in row.layouts)
                return self._shortened(row, num_tokens, renders, sanitize, notices)
            trees = tuple(checked(self._tree(draft, sanitize, notices)) for draft in drafts)
        except RowError as error:
            return Rendered(error=error, notices=tuple(sorted(notices)), num_tokens=num_tokens)
        self._notice_bos(row, trees, notices)
        return Rendered(trees, notices=tuple(sorted(notices)), num_tokens=num_tokens)

    def _tree(self, draft: Draft, sanitize: bool, notices: Notices) -> Tree:
        tree = to_tree(self.codec, draft, sanitize, notices, self._ends)
        return at_end(tree) if self.reads_end else tree

    def _ends(self, token_id: int) -> bool:
        """Whether generation stops at this token; turns of calls may end by one of their own."""
        return token_id == self.shape.stop_id or token_id in self.stop_ids

    def _notice_bos(self, row: _Row, trees: Sequence[Tree], notices: Notices) -> None:
        head = self.codec.head_ids
        if (
            head
            and row.chosen is not None
            and any([*tree.prompt_ids[:1], *tree.branches[0].ids][:1] != head for tree in trees)
        ):
            notices.add(NO_BOS)

    # --- over-long rows

    def _shortened(self, row: _Row, num_tokens: int, renders: _Renders, sanitize: bool, notices: Notices) -> Rendered:
        """The row with turns (of raw text: tokens) left out. RowError: none may be, or it is still too long."""
        if self.too_long in ("drop", "stop"):
            raise self._too_long(num_tokens)
        if row.chosen is None:
            trees, trimmed = self._shortened_raw(row, num_tokens, sanitize, notices)
        elif self.too_long == "split":
            raise self._too_long(num_tokens, note=", and only plain text can be split")
        else:
            trees, trimmed = self._shortened_chat(row, row.chosen, num_tokens, renders, sanitize, notices)
        for tree in trees:
            checked(tree, " after truncation")
            length = len(tree.prompt_ids) + max(len(branch.ids) for branch in tree.branches)
            assert length <= self.max_length, "what was left out was counted on the same tokens"
        return Rendered(tuple(trees), notices=tuple(sorted(notices)), trimmed=trimmed, num_tokens=num_tokens)

    def _shortened_chat(
        self, row: _Row, chosen: Chosen, num_tokens: int, renders: _Renders, sanitize: bool, notices: Notices
    ) -> tuple[list[Tree], str]:
        def drafts(part: Chosen) -> list[Draft]:
            layouts = chat_layouts(self._scribe(row.tools, renders), part)
            found = self._drafts(replace(row, layouts=layouts, huge=False), self._encode(layouts))
            if isinstance(found, RowError):
                raise found
            return found

        def count(part: Chosen) -> int:
            layouts = chat_layouts(self._scribe(row.tools, renders), part)
            least = max(self._least_tokens(layout) for layout in layouts)
            return least if least > self.max_length else max(draft.num_tokens for draft in drafts(part))

        oldest = self.too_long == "truncate_prompt_start"
        shorten = without_oldest_turns if oldest else without_last_turns
        parts = turn_by_turn(chosen) if oldest and len(row.layouts) > 1 else [chosen]
        trees, most = [], 0
        for number, part in enumerate(parts, start=1):
            found = (part, 0) if len(parts) > 1 and count(part) <= self.max_length else None
            found = found or shorten(part, count, self.max_length)
            if found is None:
                raise self._too_long(
                    num_tokens, note=f", and no turn that may be left out ({self.too_long}) makes it fit"
                )
            made = drafts(found[0])
            check_drafts(self.codec, made)
            if len(parts) > 1:
                made = [replace(draft, tree_id=f"{row.example.id}#turn{number}") for draft in made]
            trees += [self._tree(draft, sanitize, notices) for draft in made]
            most = max(most, found[1])
        return trees, f"{'oldest turns of the prompt' if oldest else 'last turns of the answer'} left out: {most}"

    def _shortened_raw(self, row: _Row, num_tokens: int, sanitize: bool, notices: Notices) -> tuple[list[Tree], str]:
        if self.too_long == "truncate_answer":
            raise self._too_long(num_tokens, note=", and raw text would lose its end")
        encoded = self._encode(row.layouts)
        (draft,) = [draft_of(self.codec, row.example.id, layout, encoded) for layout in row.layouts]
        check_drafts(self.codec, [draft])
        whole = self._tree(draft, sanitize, notices)
        head = self.codec.head_ids
        room = self.max_length - len(head)
        if self.too_long == "split":
            if row.example.prompt or len(whole.branches) > 1:
                raise self._too_long(num_tokens, note=", and only plain text can be split")
            if room < (1 if head else 3):  # a part without a BOS needs two tokens, and lends one to the next
                raise self._too_long(num_tokens, note=", and max_length leaves no room for parts")
            pieces = split_ids(whole.branches[0].ids.tolist(), room=room, least=1 if head else 2)
            trees = [text_tree(f"{row.example.id}#part{n}", head, piece) for n, piece in enumerate(pieces, start=1)]
            return trees, f"split into parts: {len(trees)}"
        room -= max(len(branch.ids) for branch in whole.branches)
        if self.train_on == "all" or room < 1 or len(whole.prompt_ids) <= len(head) + room:
            raise self._too_long(num_tokens, note=", and leaving out the prompt's start does not make it fit")
        left_out = len(whole.prompt_ids) - len(head) - room
        kept = whole.prompt_ids[len(whole.prompt_ids) - room :].tolist()
        tree = with_prompt(whole, [*head, *kept])
        return [tree], f"first tokens of the raw prompt left out: {left_out}"

    def _too_long(self, num_tokens: int, bound: str = "", note: str = "") -> RowError:
        reason = f"longer than max_length: {bound}{num_tokens} > {self.max_length} tokens{note}"
        return RowError(reason, num_tokens=num_tokens, fatal=self.too_long == "stop")
