"""Conversations to text: a chat template run in the sandbox of transformers, within limits.

In: a template's source, dicts of messages, tools. Out: text, or ModelError with the template's own words.
Must not know: tokens, rows, what a text is for.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from tunesmith.data.conversation import Dicts
from tunesmith.data.guard import OverLimit, Watch, check_length, try_in_child
from tunesmith.data.types import Json
from tunesmith.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_TRIED: dict[str, str] = {}  # by the hash of a template: why it was stopped, or ""
_INTERNALS = re.compile(r"__\w+__")  # the sandbox gives none of them out; a template that asks is not an honest one
_CALL: Json = [{"type": "function", "id": "call00000", "function": {"name": "f", "arguments": {"a": "b"}}}]
_TOOLS: Dicts = [{"type": "function", "function": {"name": "f", "description": "d", "parameters": {}}}]
_TRIALS: tuple[tuple[Dicts, Dicts | None], ...] = (
    ([{"role": "user", "content": "q"}], None),
    ([{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}], None),
    (
        [
            {"role": "system", "content": "s"},
            {"role": "user", "content": "q"},
            {"role": "assistant", "content": "", "reasoning_content": "r", "tool_calls": _CALL},
            {"role": "tool", "content": "t", "name": "f", "tool_call_id": "call00000"},
        ],
        _TOOLS,
    ),
)


class Sandbox:
    """One template with one tokenizer's special tokens."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, name: str, source: str) -> None:
        self._name = name
        self._source = source
        self._special = {key: str(value) for key, value in tokenizer.special_tokens_map.items() if value}
        self._ready = False

    def text(self, messages: Dicts, tools: Dicts | None, *, add_generation_prompt: bool) -> str:
        """One conversation's text, as `apply_chat_template` renders it. Raises ModelError."""
        (found,) = self.texts([messages], tools, add_generation_prompt=add_generation_prompt)
        if isinstance(found, ModelError):
            raise found
        return found

    def texts(
        self, conversations: Sequence[Dicts], tools: Dicts | None, *, add_generation_prompt: bool
    ) -> list[str | ModelError]:
        """Several conversations' texts or refusals. Raises ModelError where a limit is passed: such a template is
        not asked again."""
        self._try()
        with Watch() as watch:
            try:
                return list(self._render(conversations, tools, add_generation_prompt, watch))
            except (OverLimit, MemoryError) as error:
                raise self._stopped(error) from error
            except Exception:  # one of them: which one, is found by taking them one by one
                return [self._text_or_error(each, tools, add_generation_prompt, watch) for each in conversations]

    def _text_or_error(
        self, messages: Dicts, tools: Dicts | None, add_generation_prompt: bool, watch: Watch
    ) -> str | ModelError:
        try:
            return self._render([messages], tools, add_generation_prompt, watch)[0]
        except (OverLimit, MemoryError) as error:
            raise self._stopped(error) from error
        except Exception as error:  # a template is a program: whatever it raises is its message to the user
            return ModelError(
                f"the chat template refuses the conversation: {error}",
                where=self._name,
                remedy="Change the row, or give another `chat_template`.",
            )

    def _render(
        self, conversations: Sequence[Dicts], tools: Dicts | None, add_generation_prompt: bool, watch: Watch
    ) -> list[str]:
        from transformers.utils.chat_template_utils import render_jinja_template

        def each() -> Iterator[Dicts]:
            for messages in conversations:
                watch.start()
                yield messages

        # It asks for a list and goes through it once: a generator tells the watch where one render ends.
        rendered = render_jinja_template(
            conversations=each(),  # type: ignore[arg-type]
            tools=tools,  # type: ignore[arg-type]
            chat_template=self._source,
            add_generation_prompt=add_generation_prompt,
            **self._special,  # type: ignore[arg-type]
        )
        watch.stop()
        texts = list(rendered[0])  # annotated as one text, it is a list of them
        size = _size(tools)
        return [check_length(text, size + _size(each)) for text, each in zip(texts, conversations, strict=True)]

    def _try(self) -> None:
        """The first use of a template: in a child that can be killed."""
        if self._ready:
            return
        key = hashlib.sha256(self._source.encode()).hexdigest()
        internals = _INTERNALS.search(self._source)
        if internals is not None:
            raise self._stopped(OverLimit(f"it reaches for Python's internals, {internals[0]}"))
        if key not in _TRIED:
            _TRIED[key] = try_in_child(self._trial)
        if _TRIED[key]:
            raise self._stopped(OverLimit(_TRIED[key]))
        self._ready = True

    def _trial(self) -> str:
        """Why the template was stopped, or ""; what it refuses in its own words is no matter here."""
        watch = Watch()
        for messages, tools in _TRIALS:
            for add_generation_prompt in (True, False):
                try:
                    self._render([messages], tools, add_generation_prompt, watch)
                except (OverLimit, MemoryError) as error:
                    return str(error) or "it takes too much memory"
                except Exception:  # its own refusal, told where a real conversation meets it
                    continue
        return ""

    def _stopped(self, error: OverLimit | MemoryError) -> ModelError:
        return ModelError(
            f"the chat template was stopped: {str(error) or 'it takes too much memory'}",
            where=self._name,
            remedy="Do not use this template: look at what it does, and give another `chat_template`.",
        )


def _size(value: Json | Dicts | dict[str, Json]) -> int:
    """Characters of a conversation, with a hundred for every message or other object."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, list):
        return sum(_size(item) for item in value)
    if isinstance(value, dict):
        return 100 + sum(len(key) + _size(item) for key, item in value.items())
    return 10
