"""Examples as plain texts: what the checks read.

In: an example. Out: its prompt, its answers and both together, as strings, without the system message.
Must not know: checks, files, tokenizers.
"""

from __future__ import annotations

import hashlib

from tunesmith.data.types import Conversation, Example, Message


def message_text(message: Message) -> str:
    """What a turn says: reasoning, content and tool calls."""
    calls = [f"{call.name} {call.arguments}" for call in message.calls]
    return "\n".join(part for part in (message.reasoning, message.content, *calls) if part)


def answer_text(answer: Conversation | str) -> str:
    """One answer as a string; of several turns only the assistant's, since only they are trained."""
    if isinstance(answer, str):
        return answer
    return "\n".join(message_text(message) for message in answer if message.role == "assistant")


def prompt_text(example: Example) -> str:
    """The prompt as a string, without the system message: it is often the same in every row."""
    if isinstance(example.prompt, str):
        return example.prompt
    return "\n".join(message_text(message) for message in example.prompt if message.role != "system")


def last_question(example: Example) -> str:
    """The last turn of the prompt: what the answer answers."""
    if isinstance(example.prompt, str):
        return example.prompt
    return message_text(example.prompt[-1]) if example.prompt else ""


def best_answer(example: Example) -> str:
    """The answer that is learnt from: the only one, the chosen one, or that with the highest score."""
    place = max(range(len(example.scores)), key=example.scores.__getitem__) if example.scores else 0
    return answer_text(example.answers[place])


def answers_text(example: Example) -> str:
    """All answers, one after another."""
    return "\n".join(answer_text(answer) for answer in example.answers)


def body_text(example: Example) -> str:
    """Prompt and answers, for comparing whole rows."""
    return f"{prompt_text(example)}\n{answers_text(example)}"


def every_text(example: Example) -> str:
    """All that a row says, with its system message and its later turns, for searches of any text."""
    parts = [example.prompt] if isinstance(example.prompt, str) else [message_text(turn) for turn in example.prompt]
    for answer in example.answers:
        parts += [answer] if isinstance(answer, str) else [message_text(turn) for turn in answer]
    return "\n".join(parts)


def text_key(text: str) -> str:
    """Equal for texts that differ only in white space and case."""
    return hashlib.sha256(" ".join(text.split()).casefold().encode()).hexdigest()


def prompt_key(example: Example) -> str:
    """Equal for examples with the same prompt, system message and tools included; the text itself where it is empty."""
    if isinstance(example.prompt, str):
        return text_key(example.prompt or answers_text(example))
    turns = [f"{message.role}\x1f{message_text(message)}" for message in example.prompt]
    return text_key("\x1e".join([*turns, example.tools]))
