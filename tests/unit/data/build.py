"""Tiny tokenizers and templates for the data tests: nothing from outside, built in milliseconds."""

from __future__ import annotations

import gzip
import json
from functools import cache
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from tunesmith.data.render import Renderer
from tunesmith.data.template import ChatTemplate, choose_template
from tunesmith.data.types import Conversation, Example, Json, Message, Row
from tunesmith.recipe.models import Source

CORPUS = [
    "the world is round and the town of the world is small",
    "hello world, what is the name of the town? The name is good.",
    "user assistant system question answer one two three four",
] * 4
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
LLAMA2 = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + m['content'] | trim + ' [/INST]' }}"
    "{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'] | trim + ' ' + eos_token }}"
    "{% else %}{{ raise_exception('Only user and assistant') }}{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}"
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\\n'"
    " + m['content'] | trim + '<end_of_turn>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
)
# As Qwen3: the last answer gets an empty think block, earlier ones lose it.
THINKING = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' }}"
    "{% if m['role'] == 'assistant' and loop.last %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}"
    "{{ m['content'] + '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
CONTROLS = ("<|im_start|>", "<|im_end|>", "<start_of_turn>", "<end_of_turn>")


@cache
def _trained() -> str:
    """A byte-level BPE in which ` world` is one token, so that "hello " + "world" merges across the edge."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<s>", "</s>", *CONTROLS],
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return str(tokenizer.to_str())


def byte_tokenizer(*, adds_bos: bool = False, template: str | None = None) -> PreTrainedTokenizerFast:
    """The byte-level tokenizer; `adds_bos`: its own call begins with <s>."""
    inner = Tokenizer.from_str(_trained())
    if adds_bos:
        inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = template
    return tokenizer


def space_tokenizer() -> PreTrainedTokenizerFast:
    """As Llama 2's: every text begins with a space that decoding takes away; unknown characters become bytes."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abcdehlnorstw", "▁w", "▁wo"]
    vocab = {piece: index for index, piece in enumerate(pieces)}
    model = models.BPE(vocab, [("▁", "w"), ("▁w", "o")], unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    inner = Tokenizer(model)
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    inner.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def renderer(template: str | None = CHATML, *, max_length: int = 4096, adds_bos: bool = False) -> Renderer:
    """A renderer over the byte-level tokenizer; None takes the built-in plain template."""
    tokenizer = byte_tokenizer(adds_bos=adds_bos)
    choice = choose_template(tokenizer, "plain") if template is None else ChatTemplate("test", template)
    return Renderer(tokenizer, choice, max_length)


def turns(*contents: str, system: str = "") -> Conversation:
    """User and assistant in turn, user first."""
    roles = ("user", "assistant")
    head = (Message("system", system),) if system else ()
    return (*head, *(Message(roles[index % 2], content) for index, content in enumerate(contents)))


def replies(*contents: str) -> Conversation:
    """Assistant and user in turn, assistant first."""
    return turns("", *contents)[1:]


def example(prompt: Conversation | str, *answers: Conversation | str) -> Example:
    """An example named `f:1`."""
    return Example(id="f:1", sha="", prompt=prompt, answers=answers)  # type: ignore[arg-type]


def row(**fields: Json) -> Row:
    """A row named `f:1`."""
    return Row(id="f:1", fields=fields, sha="")


def rows(*fields: dict[str, Json]) -> list[Row]:
    """Rows named `f:1`, `f:2`, ..."""
    return [Row(id=f"f:{number}", fields=values, sha=str(number)) for number, values in enumerate(fields, start=1)]


def source(path: Path | str = "f", **knobs: object) -> Source:
    """A source of a recipe."""
    return Source.model_validate({"path": str(path), **knobs})


def write_jsonl(path: Path, *values: Json) -> Path:
    """A .jsonl or .jsonl.gz file."""
    data = "".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path
