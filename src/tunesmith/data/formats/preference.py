"""Pairs: a prompt with a chosen and a rejected answer, in the spellings that are in use.

In: a row. The prompt is `prompt` (string or messages), `question` with `system` (orca_dpo_pairs), `instruction` with
`input` (Alpaca style; its `output` is not read), `conversations` (LLaMA-Factory) or `messages`; or it is missing, and
chosen and rejected are whole conversations with a shared head (UltraFeedback). Stack Exchange's `response_j` is the
better of its two. Scores (`score_chosen`, ...) or a `margin` beside the answers are kept.
Out: an example with two answers, chosen first. Must not know: templates, tokenizers.
"""

from __future__ import annotations

from dataclasses import replace

from tunesmith.data.formats.examples import pair_example, string_example
from tunesmith.data.formats.fields import BadField, Fields, fitting, number, present, shown, system_text
from tunesmith.data.formats.prompts import NAMES, head_of, is_plain, read_prompt, whole
from tunesmith.data.formats.turns import conversation
from tunesmith.data.types import Conversation, Example, Row

SIDES = (("chosen", "rejected"), ("response_j", "response_k"))
SCORES = (
    ("score_chosen", "score_rejected"),
    ("chosen_score", "rejected_score"),
    ("chosen-rating", "rejected-rating"),
    ("chosen_rating", "rejected_rating"),
)
KEYS = frozenset(key for names in (*SIDES, *SCORES) for key in names) | {*NAMES, "context", "margin", "history"}


def to_example(row: Row, *, chat: bool) -> Example:
    """Strings give one turn a side; message lists may repeat the prompt and may go on for several turns."""
    example = _pair(row, chat=chat)
    scores = _scores(row.fields)
    return replace(example, scores=scores) if scores else example


def _pair(row: Row, *, chat: bool) -> Example:
    fields = row.fields
    names = fitting(fields, SIDES)[0], fitting(fields, SIDES)[1]
    chosen, rejected = _side(fields, names[0]), _side(fields, names[1])
    # A conversation that brings its own prompt needs no `messages`, which in UltraFeedback is `chosen` once more.
    brings_own = isinstance(chosen, tuple) and chosen[0].role != "assistant"
    prompt = read_prompt(fields, NAMES[:-1] if brings_own else NAMES)
    if isinstance(chosen, str) and isinstance(rejected, str) and isinstance(prompt, str):
        if not chat or is_plain(fields, prompt):
            return string_example(row, prompt, (chosen, rejected), chat=chat, system=system_text(fields))
        chosen, rejected = chosen.strip(), rejected.strip()  # the white space after a transcript's marker is layout
    if not chat:
        raise BadField("prompt", "messages", "strings, since the recipe says `render: text`")
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise BadField(names[1], shown(fields[names[1]]), f"the same form as `{names[0]}`: both strings or messages")
    head = head_of(fields, prompt)
    return pair_example(row, whole(head, chosen, names[0]), whole(head, rejected, names[1]), names=names)


def _side(fields: Fields, name: str) -> str | Conversation:
    value = fields.get(name)
    if value is None:
        raise BadField(name, "null" if name in fields else "no such key", "an answer: a string or a list of messages")
    return value if isinstance(value, str) else conversation(value, name)


def _scores(fields: Fields) -> tuple[float, ...]:
    """The two answers' scores, or (margin, 0) where the file gives their difference only; () where it gives none."""
    names = fitting(fields, SCORES)
    if present(fields, names) is not None:
        return tuple(number(fields.get(name), name) for name in names)
    return (number(fields["margin"], "margin"), 0.0) if fields.get("margin") is not None else ()
