"""Two whole transcripts (hh-rlhf, Bai et al. 2022): "\\n\\nHuman: ...\\n\\nAssistant: ..." as chosen and rejected.

In: a row. Out: an example with two answers; the prompt ends at the last assistant marker that both share.
A pair that parts earlier keeps its later turns, of which only the assistant's are trained.
Must not know: templates, tokenizers.
"""

from __future__ import annotations

import re
from dataclasses import replace

from tunesmith.data.formats.examples import pair_example, string_example
from tunesmith.data.formats.fields import BadField, Degenerate, shown, text_field
from tunesmith.data.types import Conversation, Example, Message, Row

MARKER = re.compile(r"\n\n(Human|Assistant):")
ANSWER_MARKER = "\n\nAssistant:"
JOINED = "joined turns"
"""Tag of an example in which two turns of one speaker in a row became one."""
ROLE = {"Human": "user", "Assistant": "assistant"}


def is_transcript(text: str) -> bool:
    """Whether a string is a transcript: it begins with a person's turn and has an answer."""
    return f"\n\n{text.lstrip()}".startswith("\n\nHuman:") and ANSWER_MARKER in text


def prompt_turns(text: str) -> Conversation | None:
    """The turns of a prompt that is a transcript up to an answer's marker (as in Nectar); None where it is none."""
    return turns(text)[:-1] if is_transcript(text) and text.rstrip().endswith(ANSWER_MARKER) else None


def to_example(row: Row, *, chat: bool) -> Example:
    """Turns are stripped of the white space around them, which belongs to the transcript's layout."""
    chosen, rejected = text_field(row.fields, "chosen"), text_field(row.fields, "rejected")
    for name, text in (("chosen", chosen), ("rejected", rejected)):
        if not is_transcript(text):
            raise BadField(name, shown(text), "a transcript, '\\n\\nHuman: ...\\n\\nAssistant: ...'")
    if not chat:
        return _raw(row, chosen, rejected)
    example = pair_example(row, turns(chosen), turns(rejected))
    sides = (chosen, rejected)
    joined = any(len(MARKER.findall(f"\n\n{side.lstrip()}")) != len(turns(side)) for side in sides)
    return replace(example, tags={**example.tags, JOINED: "yes"}) if joined else example


def turns(transcript: str) -> Conversation:
    """The turns of a transcript. Two turns of one speaker in a row become one, joined by a blank line."""
    parts = MARKER.split(f"\n\n{transcript.lstrip()}")[1:]
    messages: list[Message] = []
    for speaker, text in zip(parts[::2], parts[1::2], strict=True):
        role = ROLE[speaker]
        if messages and messages[-1].role == role:
            before = messages.pop()
            text = f"{before.content}\n\n{text.strip()}"
        messages.append(Message(role, text.strip()))
    return tuple(messages)


def _raw(row: Row, chosen: str, rejected: str) -> Example:
    """The transcripts as they stand: shared text up to the last marker, then what each says."""
    split = chosen.rfind(ANSWER_MARKER) + len(ANSWER_MARKER)
    if chosen[:split] != rejected[:split] or ANSWER_MARKER in rejected[split:]:
        raise Degenerate("transcripts part before the last turn, which raw text cannot mask")
    return string_example(row, chosen[:split], (chosen[split:], rejected[split:]), chat=False)
