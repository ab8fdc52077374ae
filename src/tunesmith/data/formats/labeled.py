"""Unpaired feedback (KTO, Ethayarajh et al. 2024): a conversation or a prompt and answer, with a label, good or bad.

In: a row of a format with one answer, and `label` (`kto_tag` in LLaMA-Factory). Out: an example of one answer, the
last assistant turn: that is what the label judges, so the turns before it are the prompt.
Must not know: templates, tokenizers.
"""

from __future__ import annotations

from dataclasses import replace

from tunesmith.data.formats import alpaca, messages, prompt_completion, question_answer, sharegpt
from tunesmith.data.formats.examples import check_text_render, turns_example
from tunesmith.data.formats.fields import BadField, Fields, fitting, present, shown
from tunesmith.data.types import Example, Json, Row

LABELS = ("label", "kto_tag")
SPELLINGS: dict[str, bool] = dict.fromkeys(("true", "1", "+1", "1.0", "thumbs up", "good", "desirable", "👍"), True) | (
    dict.fromkeys(("false", "0", "-1", "0.0", "-1.0", "thumbs down", "bad", "undesirable", "👎"), False)
)
QUESTIONS = (("prompt", "completion"), *question_answer.SPELLINGS)


def to_example(row: Row, *, chat: bool) -> Example:
    """The example of the row without its label, and the label."""
    label = read_label(row.fields)
    return replace(_unlabeled(row, chat=chat), label=label)


def read_label(fields: Fields) -> bool:
    """Whether the answer is desirable. Raises BadField for anything that is not clearly yes or no."""
    name = present(fields, LABELS)
    if name is None:
        raise BadField(LABELS[0], "null" if LABELS[0] in fields else "no such key", "true or false")
    label = as_label(fields[name])
    if label is None:
        raise BadField(name, shown(fields[name]), "true or false, 1 or 0, +1 or -1, thumbs up or down, good or bad")
    return label


def as_label(value: Json) -> bool | None:
    """A bool, 0, 1, -1 or a word for them; None for anything else."""
    if isinstance(value, bool):
        return value
    if isinstance(value, int | float):
        return value == 1 if value in (0, 1, -1) else None
    if isinstance(value, str):
        return SPELLINGS.get(value.strip().lower().replace("_", " ").replace("-up", " up").replace("-down", " down"))
    return None


def _unlabeled(row: Row, *, chat: bool) -> Example:
    fields = row.fields
    if fields.get("messages") is not None:
        check_text_render(fields, chat=chat)
        return turns_example(row, messages.turns(fields), "messages", last_only=True)
    if present(fields, sharegpt.NAMES):
        check_text_render(fields, chat=chat)
        return turns_example(row, sharegpt.turns(fields), "conversations", last_only=True)
    if fields.get("instruction") is not None:
        return alpaca.to_example(row, chat=chat)
    if fitting(fields, QUESTIONS) == QUESTIONS[0]:
        return prompt_completion.to_example(row, chat=chat)
    return question_answer.to_example(row, chat=chat)
