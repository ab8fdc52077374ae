from __future__ import annotations

from pathlib import Path

import pytest

from tests.unit.data.build import CHATML, GEMMA, LLAMA2, THINKING, byte_tokenizer, space_tokenizer, turns
from tunesmith.data.template import (
    CHATML_TOKENS,
    ChatTemplate,
    TurnShape,
    choose_template,
    needed_tokens,
    plain_template,
    probe_turn,
    render_text,
)
from tunesmith.errors import ModelError


def test_the_choice_is_the_recipe_then_the_model_then_plain(tmp_path: Path) -> None:
    path = tmp_path / "t.jinja"
    path.write_text(GEMMA)
    tokenizer = byte_tokenizer(template=CHATML)
    assert choose_template(tokenizer, str(path)) == ChatTemplate(str(path), GEMMA)
    assert choose_template(tokenizer, None).source == CHATML
    assert choose_template(tokenizer, None).note == ""
    assert choose_template(tokenizer, "plain").name == "plain"
    fallback = choose_template(space_tokenizer(), None)
    assert fallback.name == "plain"
    assert fallback.note.startswith("The model has no chat template: the built-in `plain` one is used")


def test_the_default_of_several_templates_is_taken() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = {"tool_use": "x", "default": CHATML}
    assert choose_template(tokenizer, None).source == CHATML


def test_chatml_is_taken_where_the_tokenizer_holds_its_tokens_or_by_name() -> None:
    fallback = choose_template(byte_tokenizer(), None)
    assert (fallback.name, needed_tokens(None, byte_tokenizer())) == ("chatml", ())
    assert fallback.note.startswith("The model has no chat template: the built-in `chatml` one is used")
    assert choose_template(space_tokenizer(), "chatml").name == "chatml"
    assert needed_tokens("chatml", space_tokenizer()) == CHATML_TOKENS
    assert needed_tokens("chatml", byte_tokenizer()) == needed_tokens("plain", space_tokenizer()) == ()
    assert render_text(byte_tokenizer(), fallback, turns("q", "a", "r"), add_generation_prompt=True) == (
        "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\na<|im_end|>\n<|im_start|>user\nr<|im_end|>\n<|im_start|>assistant\n"
    )


def test_a_template_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="the chat template cannot be read"):
        choose_template(byte_tokenizer(), str(tmp_path / "none.jinja"))
    (tmp_path / "empty.jinja").write_text(" \n")
    with pytest.raises(ModelError, match="the chat template is empty"):
        choose_template(byte_tokenizer(), str(tmp_path / "empty.jinja"))


def test_plain_by_hand() -> None:
    tokenizer = byte_tokenizer()
    text = render_text(
        tokenizer, plain_template(tokenizer), turns("q", "a", "r", system="s"), add_generation_prompt=True
    )
    assert text == ("### System:\ns\n\n### User:\nq\n\n### Assistant:\na</s>\n\n### User:\nr\n\n### Assistant:\n")


def test_plain_begins_with_bos_where_the_tokenizer_does() -> None:
    for tokenizer in (byte_tokenizer(adds_bos=True), space_tokenizer()):
        assert render_text(tokenizer, plain_template(tokenizer), turns("q"), add_generation_prompt=True).startswith(
            "<s>### User:\nq"
        )


def shape(source: str) -> TurnShape:
    return probe_turn(byte_tokenizer(), ChatTemplate("test", source))


def test_turn_shapes_by_hand() -> None:
    ids = byte_tokenizer().get_vocab()
    assert shape(CHATML) == TurnShape("", "<|im_end|>\n", "<|im_end|>", ids["<|im_end|>"])
    assert shape(GEMMA) == TurnShape("", "<end_of_turn>\n", "<end_of_turn>", ids["<end_of_turn>"])
    assert shape(LLAMA2) == TurnShape(" ", " </s>", " </s>", ids["</s>"])
    assert shape(THINKING) == TurnShape("<think>\n\n</think>\n\n", "<|im_end|>\n", "<|im_end|>", ids["<|im_end|>"])
    forced = CHATML.replace("assistant\\n' }}{% endif", "assistant\\n<think>' }}{% endif")
    assert shape(forced) == TurnShape("", "<|im_end|>\n", "<|im_end|>", ids["<|im_end|>"], extra="<think>")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            CHATML.replace("<|im_end|>", ""),
            "nothing would teach the model to stop: after an answer the template writes ",
        ),
        (CHATML.replace("<|im_end|>", "<|end|>"), "holds none of the tokenizer's control tokens"),
        (CHATML.replace("assistant\\n' }}{% endif", "bot\\n' }}{% endif"), "the generation prompt is not what stands"),
        (CHATML.replace("m['content']", "'x'"), "the answer is not in the rendered conversation"),
        ("{{ bos_token }}{{ bos_token }}" + CHATML, "the template writes the BOS token twice"),
        ("{{ raise_exception('not today') }}", "refuses the conversation: not today"),
        ("{% for %}", "refuses the conversation: "),
        ("{{ nothing.at.all }}", "refuses the conversation: 'nothing' is undefined"),
        ("{{ ''.__class__.__mro__ }}", "was stopped: it reaches for Python's internals, __class__"),
    ],
)
def test_templates_that_cannot_be_trained_on_are_refused(source: str, message: str) -> None:
    with pytest.raises(ModelError) as error:
        shape(source)
    assert message in str(error.value)


def test_the_sha_follows_the_source() -> None:
    assert ChatTemplate("a", CHATML).sha == ChatTemplate("b", CHATML).sha
    assert ChatTemplate("a", CHATML).sha != ChatTemplate("a", CHATML + " ").sha
