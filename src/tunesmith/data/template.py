"""The chat template: which one is used, and what it writes around a turn.

In: a tokenizer and the recipe's choice. Out: a template, the text it renders, and the shape of an
assistant turn (what comes before the answer, after it, and which token ends it).
Must not know: rows, token masks, models.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tunesmith.data.conversation import CallForm, to_dicts
from tunesmith.data.sandbox import Sandbox
from tunesmith.data.types import Conversation, Message
from tunesmith.errors import ModelError
from tunesmith.runs.bounded import read_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Text markers only, so that no token has to be added and trained. `BOS` is filled in with {{ bos_token }}
# for tokenizers that begin every text with it. The newline before an answer keeps its first token apart.
PLAIN = """\
BOS{%- for message in messages -%}
{%- if message['role'] == 'assistant' -%}
{{ '### Assistant:\\n' + message['content'] + eos_token + '\\n\\n' }}
{%- else -%}
{{ '### ' + message['role'] | capitalize + ':\\n' + message['content'] + '\\n\\n' }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '### Assistant:\\n' }}{%- endif -%}
"""
CHATML_TOKENS = ("<|im_start|>", "<|im_end|>")
# A system message is written only where the row has one; every turn ends with a token of its own.
CHATML = """\
BOS{%- for message in messages -%}
{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}
"""
MAX_BYTES = 2**20  # of a template's file: the longest have 30,000
PROBE_QUESTION = "probe question"
PROBE_ANSWER = "probe answer"


@dataclass(frozen=True, slots=True)
class ChatTemplate:
    """A Jinja template, where it came from, and what a run should say about it."""

    name: str
    source: str
    note: str = ""

    @property
    def sha(self) -> str:
        """sha256 of the source; goes into manifests and cache keys."""
        return hashlib.sha256(self.source.encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class TurnShape:
    """What the template writes around an answer: prompt render + `lead` + answer + `tail`.

    `lead` is not part of the prompt that inference renders, so the model has to produce it and it is
    trained (Qwen3's empty think block). `ending`, the head of the tail up to the token `stop_id`, is trained.
    `extra` is the other way round: part of the inference prompt that is left out once the answer is there
    (the think block of DeepSeek-R1); answers are trained after it, as inference sees them.
    """

    lead: str
    tail: str
    ending: str
    stop_id: int
    extra: str = ""


def choose_template(tokenizer: PreTrainedTokenizerBase, chat_template: str | None) -> ChatTemplate:
    """The recipe's Jinja file, `plain` or `chatml`; else the model's own; else a built-in one, with a note.

    `chatml` where the tokenizer holds its tokens, `plain` where not.

    Raises ModelError where the file cannot be read.
    """
    if chat_template == "plain":
        return plain_template(tokenizer)
    if chat_template == "chatml":
        return chatml_template(tokenizer)
    if chat_template is not None:
        return ChatTemplate(name=chat_template, source=_read(chat_template))
    own = tokenizer.chat_template
    if isinstance(own, dict):  # some models carry several, by name
        own = own.get("default")
    if own:
        return ChatTemplate(name="the model's own", source=own)
    if not set(CHATML_TOKENS) - set(tokenizer.get_added_vocab()):
        note = "The model has no chat template: the built-in `chatml` one is used (its tokens are in the tokenizer)."
        return ChatTemplate("chatml", chatml_template(tokenizer).source, note)
    plain = plain_template(tokenizer)
    note = "The model has no chat template: the built-in `plain` one is used (text markers, no new tokens)."
    return ChatTemplate(plain.name, plain.source, note)


def plain_template(tokenizer: PreTrainedTokenizerBase) -> ChatTemplate:
    """The built-in template without tokens of its own; begins with BOS exactly where the tokenizer's own call does."""
    return ChatTemplate("plain", _with_bos(PLAIN, tokenizer))


def chatml_template(tokenizer: PreTrainedTokenizerBase) -> ChatTemplate:
    """The built-in ChatML; the tokenizer must hold `CHATML_TOKENS` by the time that it is used."""
    return ChatTemplate("chatml", _with_bos(CHATML, tokenizer))


def needed_tokens(chat_template: str | None, tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """Tokens that the recipe's choice of template needs and the tokenizer lacks: to be added and trained."""
    if chat_template != "chatml":
        return ()
    return tuple(token for token in CHATML_TOKENS if token not in tokenizer.get_added_vocab())


def _with_bos(source: str, tokenizer: PreTrainedTokenizerBase) -> str:
    ids = tokenizer("a")["input_ids"]
    begins = tokenizer.bos_token_id is not None and list(ids)[:1] == [tokenizer.bos_token_id]
    return source.replace("BOS", "{{ bos_token }}" if begins else "", 1)


def _read(name: str) -> str:
    try:
        text = read_bytes(Path(name), max_bytes=MAX_BYTES).decode("utf-8").replace("\r\n", "\n")
    except (OSError, ValueError) as error:
        raise ModelError(
            f"the chat template cannot be read: {error}",
            where=name,
            remedy="`chat_template` is a Jinja file, `plain`, `chatml`, or null for the model's own.",
        ) from error
    if not text.strip():
        raise ModelError("the chat template is empty", where=name)
    return text


def render_text(
    tokenizer: PreTrainedTokenizerBase,
    template: ChatTemplate,
    messages: Conversation,
    *,
    add_generation_prompt: bool,
) -> str:
    """The text of a conversation. Raises ModelError with the template's own words where it refuses."""
    sandbox = Sandbox(tokenizer, template.name, template.source)
    return sandbox.text(to_dicts(messages, CallForm()), None, add_generation_prompt=add_generation_prompt)


def probe_turn(tokenizer: PreTrainedTokenizerBase, template: ChatTemplate) -> TurnShape:
    """The shape of an assistant turn, read off a render of one question and one answer.

    Raises ModelError where the template cannot be trained on as inference uses it: it raises, changes or
    drops the answer, its generation prompt does not precede answers, or no token ends the turn.
    """
    question = (Message("user", PROBE_QUESTION),)
    prompt = render_text(tokenizer, template, question, add_generation_prompt=True)
    full = render_text(
        tokenizer, template, (*question, Message("assistant", PROBE_ANSWER)), add_generation_prompt=False
    )
    head, found, tail = full.rpartition(PROBE_ANSWER)
    if not found:
        raise ModelError("the answer is not in the rendered conversation", where=template.name)
    if not head.startswith(prompt) and not prompt.startswith(head):
        raise ModelError(
            f"the generation prompt is not what stands before an answer: inference would see "
            f"{prompt[-60:]!r}, a trained answer stands after {head[-60:]!r}",
            where=template.name,
            remedy="Give a `chat_template` file whose generation prompt is the head of an assistant turn.",
        )
    lead, extra = head[len(prompt) :], prompt[len(head) :]
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    if tokenizer.bos_token_id is not None and list(ids)[:2] == [tokenizer.bos_token_id] * 2:
        raise ModelError("the template writes the BOS token twice", where=template.name)
    ending, stop_id = _ending(tokenizer, template, tail)
    return TurnShape(lead, tail, ending, stop_id, extra)


def control_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """The tokenizer's added and special tokens, with their ids."""
    named = zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True)
    return {token: token_id for token, token_id in (*tokenizer.get_added_vocab().items(), *named) if token}


def _ending(tokenizer: PreTrainedTokenizerBase, template: ChatTemplate, tail: str) -> tuple[str, int]:
    """The head of the tail up to its first control token, and that token: the one that ends generation."""
    control = control_tokens(tokenizer)
    places = [(tail.find(token), -len(token), token) for token in control if token in tail]
    if not places:
        written = f"only {tail!r}, which holds none of the tokenizer's control tokens" if tail.strip() else "nothing"
        raise ModelError(
            f"nothing would teach the model to stop: after an answer the template writes {written}",
            where=template.name,
            remedy="End the turn with {{ eos_token }} in a `chat_template` file, or use `chat_template: plain`.",
        )
    start, _, token = min(places)
    return tail[: start + len(token)], control[token]
