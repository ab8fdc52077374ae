"""Several answers to one prompt, with scores, ratings or ranks (listwise feedback).

In: a row with a prompt and `responses`, `completions`, `answers` or `candidates`: strings with a list of numbers in a
column beside them, or objects that hold both (openbmb/UltraFeedback, Nectar).
Out: an example whose answers stand in the file's order; in its scores higher is better, so ranks are negated.
Must not know: templates, tokenizers.
"""

from __future__ import annotations

from dataclasses import replace

from tunesmith.data.formats.examples import chat_example, string_example
from tunesmith.data.formats.fields import BadField, Degenerate, Fields, number, present, shown, system_text
from tunesmith.data.formats.prompts import NAMES, head_of, is_plain, read_prompt
from tunesmith.data.formats.turns import conversation, ordered
from tunesmith.data.types import Conversation, Example, Json, Message, Row

LISTS = ("responses", "completions", "answers", "candidates")
SCORE_LISTS = ("scores", "ratings", "rewards", "ranks")
TEXTS = ("response", "text", "content", "answer", "completion", "output")
SCORES = ("overall_score", "score", "rating", "reward", "fine-grained_score", "rank")
LOWER_IS_BETTER = frozenset({"ranks", "rank"})
KEYS = frozenset({*NAMES, *LISTS, *SCORE_LISTS, "context", "history"})


def shows_ranks(fields: Fields) -> bool:
    """Whether a list of answers comes with numbers: in a list beside it, or in its first object."""
    name = _list_name(fields)
    if name is None:
        return False
    value = fields[name]
    first = value[0] if isinstance(value, list) and value else None
    if isinstance(first, dict):
        return present(first, SCORES) is not None or present(fields, SCORE_LISTS) is not None
    return isinstance(first, str) and isinstance(fields.get(present(fields, SCORE_LISTS) or ""), list)


def to_example(row: Row, *, chat: bool) -> Example:
    """Raises Degenerate for fewer than two answers and for scores that are all equal: they rank nothing."""
    fields = row.fields
    name = _list_name(fields)
    value = fields[name] if name else None
    if name is None or not isinstance(value, list):
        raise BadField(name or LISTS[0], shown(value) if name else "no such key", "a list of answers")
    if len(value) < 2:
        raise Degenerate("fewer than two answers")
    texts = [_text(item, f"{name}[{index}]") for index, item in enumerate(value)]
    scores = _scores(fields, value, name)
    prompt = read_prompt(fields)
    if prompt is None:
        raise BadField("prompt", "no such key", "a prompt: a string or a list of messages")
    example = _example(row, prompt, texts, chat=chat)
    if len(set(scores)) == 1:
        raise Degenerate("all scores are equal")
    return replace(example, scores=scores)


def _example(row: Row, prompt: str | Conversation, texts: list[str], *, chat: bool) -> Example:
    fields = row.fields
    if isinstance(prompt, str) and (not chat or is_plain(fields, prompt)):
        return string_example(row, prompt, tuple(texts), chat=chat, system=system_text(fields))
    if not chat:
        raise BadField("prompt", "messages", "a string, since the recipe says `render: text`")
    head = head_of(fields, prompt)
    whole = ordered((*head, Message("assistant", texts[0])), "prompt")
    answers = tuple((Message("assistant", text),) for text in texts)
    return chat_example(row, whole[:-1], answers)


def _list_name(fields: Fields) -> str | None:
    """The column of answers: a list, where several of the names are there."""
    lists = (name for name in LISTS if isinstance(fields.get(name), list))
    return next(lists, None) or present(fields, LISTS)


def _text(value: Json, field: str) -> str:
    """An answer: a string, or an object that holds one, or one assistant's message."""
    if isinstance(value, dict):
        key = present(value, TEXTS)
        if key is None:
            raise BadField(field, shown(value), f"an answer in {', '.join(f'`{name}`' for name in TEXTS)}")
        value, field = value[key], f"{field}.{key}"
    if isinstance(value, list) and value:
        turns = conversation(value, field)
        if len(turns) == 1 and turns[0].role == "assistant" and not turns[0].calls:
            return turns[0].content
    if not isinstance(value, str):
        raise BadField(field, shown(value), "a string")
    return value


def _scores(fields: Fields, answers: list[Json], name: str) -> tuple[float, ...]:
    """One number an answer, from the list beside the answers or from the objects; higher is better."""
    beside = present(fields, SCORE_LISTS)
    if beside is not None:
        values = fields[beside]
        if not isinstance(values, list) or len(values) != len(answers):
            raise BadField(beside, shown(values), f"a list of {len(answers)} numbers, one for each of `{name}`")
        numbers = [number(value, f"{beside}[{index}]") for index, value in enumerate(values)]
        return tuple(-value if beside in LOWER_IS_BETTER else value for value in numbers)
    objects = [answer for answer in answers if isinstance(answer, dict)]
    key = next((key for key in SCORES if any(item.get(key) is not None for item in objects)), None)
    if key is None:
        wanted = f"a list of numbers beside `{name}`, or {', '.join(f'`{score}`' for score in SCORES)} in its objects"
        raise BadField(SCORE_LISTS[0], "no such key", wanted)
    found = [answer.get(key) if isinstance(answer, dict) else None for answer in answers]
    numbers = [number(value, f"{name}[{index}].{key}") for index, value in enumerate(found)]
    return tuple(-value if key in LOWER_IS_BETTER else value for value in numbers)
