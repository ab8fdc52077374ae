"""Every real chat template with every real tokenizer: what is trained is what inference would see and write.

Skipped where ../shared/data is absent.
"""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from tunesmith.data.render import MERGED, SPLIT, Rendered, Renderer
from tunesmith.data.template import ChatTemplate, choose_template
from tunesmith.data.types import Conversation, Example, Message, ToolCall
from tunesmith.errors import ModelError

SHARED = Path(__file__).parents[2] / ".." / "shared" / "data"
pytestmark = pytest.mark.skipif(not SHARED.exists(), reason="needs the real templates in ../shared/data")
TEMPLATES = sorted(path.stem for path in SHARED.glob("templates/*.jinja"))
TOKENIZERS = ("qwen2_hf", "gpt2_hf", "llama3_hf")
CONTROL = re.compile(
    r"<\|[A-Za-z_]+\|>|<｜[^｜]+｜>|<(?:start|end)_of_turn>|\[/?INST\]|</?s>|<\|?turn\|?>|<bos>"
    r"|<\|tool_(?:call|response)>|<tool_(?:call|response)\|>|\[TOOL_CALLS\]"
)
REFUSED = {
    "CohereForAI-c4ai-command-r7b-12-2024-tool_use": "the generation prompt is not what stands before an answer",
    "GLM-4.6": "nothing would teach the model to stop",
    "NousResearch-Hermes-3-Llama-3.1-8B-tool_use": "the chat template refuses the conversation",
}
NO_SYSTEM = {"google-gemma-2-2b-it", "llama-2-chat"}


def user(text: str) -> Message:
    return Message("user", text)


def assistant(text: str) -> Message:
    return Message("assistant", text)


def template(name: str) -> ChatTemplate:
    """The template; those of the chat_templates collection are indented and say to be flattened before use."""
    text = (SHARED / "templates" / f"{name}.jinja").read_text()
    indented = "\n    {{" in text and "{%-" not in text
    return ChatTemplate(name, text.replace("    ", "").replace("\n", "") if indented else text)


@cache
def tokenizer(name: str, *, extended: bool) -> PreTrainedTokenizerBase:
    """A real tokenizer; extended: with the control tokens of all templates."""
    loaded = AutoTokenizer.from_pretrained(SHARED / "tokenizers" / name)
    if extended:
        sources = "".join(template(each).source for each in TEMPLATES)
        loaded.add_tokens(sorted(set(CONTROL.findall(sources))), special_tokens=True)
        loaded.bos_token = loaded.bos_token or "<s>"
    return loaded


def render(renderer: Renderer, prompt: Conversation, *answers: Conversation) -> Rendered:
    (rendered,) = renderer.render_many([Example("f:1", "", prompt, answers)])
    return rendered


def applied(renderer: Renderer, messages: Conversation, *, add_generation_prompt: bool = False) -> list[int]:
    """Transformers' own render and tokens."""
    talk = [{"role": message.role, "content": message.content} for message in messages]
    ids = renderer.tokenizer.apply_chat_template(
        talk,
        chat_template=renderer.template.source,
        add_generation_prompt=add_generation_prompt,
        tokenize=True,
        return_dict=False,
    )
    return list(ids)


def spans(renderer: Renderer, rendered: Rendered) -> list[str]:
    """The text of each run of trained tokens, over all trees and branches."""
    found = []
    for branch in (branch for tree in rendered.trees for branch in tree.branches):
        run: list[int] = []
        for token_id, trained in [*zip(branch.ids.tolist(), branch.trained.tolist(), strict=True), (0, False)]:
            if trained:
                run.append(token_id)
            elif run:
                found.append(renderer.tokenizer.decode(run))
                run = []
    return found


@cache
def made_once(name: str, tokens: str) -> Renderer:
    return Renderer(tokenizer(tokens, extended=True), template(name), 4096)


@pytest.fixture(params=[f"{name}:{each}" for each in TOKENIZERS for name in TEMPLATES])
def renderer(request: pytest.FixtureRequest) -> Renderer:
    name, tokens = str(request.param).split(":")
    made = made_once(name, tokens)
    if name in REFUSED:
        with pytest.raises(ModelError, match=REFUSED[name]):
            _ = made.shape
        pytest.skip(f"refused, as it should be: {REFUSED[name]}")
    return made


def test_single_turn(renderer: Renderer) -> None:
    """TRAPS 14, 16, 21, 22."""
    prompt, answer = (user("What is it?"),), (assistant("It is a\nsmall  town. \U0001f600"),)
    rendered = render(renderer, prompt, answer)
    assert rendered.error is None
    (tree,) = rendered.trees
    shape = renderer.shape
    assert spans(renderer, rendered) == [shape.lead + answer[0].content + shape.ending]
    assert tree.prompt_ids.tolist() == applied(renderer, prompt, add_generation_prompt=True)
    whole = [*tree.prompt_ids.tolist(), *tree.branches[0].ids.tolist()]
    if MERGED not in rendered.notices and not shape.extra:
        assert whole == applied(renderer, (*prompt, *answer))[: len(whole)]
    assert whole[-1] == shape.stop_id
    assert shape.stop_id in renderer.stop_ids
    assert whole[:2] != [renderer.tokenizer.bos_token_id] * 2


def test_three_turns_give_three_spans_after_the_history_of_inference(renderer: Renderer) -> None:
    """TRAPS 23, 24."""
    talk = tuple(role(f"{word} {n}") for n in ("one", "two", "three") for role, word in ((user, "q"), (assistant, "a")))
    rendered = render(renderer, talk[:1], talk[1:])
    assert rendered.error is None
    shape = renderer.shape
    assert spans(renderer, rendered) == [f"{shape.lead}a {n}{shape.ending}" for n in ("one", "two", "three")]
    if SPLIT in rendered.notices:
        for tree, place in zip(rendered.trees, (1, 3, 5), strict=True):
            assert tree.prompt_ids.tolist() == applied(renderer, talk[:place], add_generation_prompt=True)
        return
    (tree,) = rendered.trees
    whole = [*tree.prompt_ids.tolist(), *tree.branches[0].ids.tolist()]
    ends = [place + 1 for place in range(len(whole)) if place >= len(tree.prompt_ids) and whole[place] == shape.stop_id]
    if MERGED not in rendered.notices:
        for place, end in zip((3, 5), ends, strict=False):
            history = applied(renderer, talk[:place], add_generation_prompt=True)
            assert history[:end] == whole[:end]
            assert whole[: len(history)] == history


def test_system_message_and_pair(renderer: Renderer) -> None:
    prompt = (Message("system", "Be very brief."), user("q one"), assistant("a one"), user("q two"))
    rendered = render(renderer, prompt, (assistant("good one"),), (assistant("bad"),))
    if renderer.template.name in NO_SYSTEM and rendered.error is not None:
        assert rendered.error.fatal
        assert "System role not supported" in rendered.error.what
        return
    assert rendered.error is None
    (tree,) = rendered.trees
    assert "Be very brief." in renderer.tokenizer.decode(tree.prompt_ids.tolist())
    assert tree.prompt_ids.tolist() == applied(renderer, prompt, add_generation_prompt=True)
    shape = renderer.shape
    assert spans(renderer, rendered) == [f"{shape.lead}{text}{shape.ending}" for text in ("good one", "bad")]


def test_white_space_around_answers(renderer: Renderer) -> None:
    rendered = render(renderer, (user(" q \n"),), (assistant(" \n both ends \n "),))
    assert rendered.error is None
    (text,) = spans(renderer, rendered)
    shape = renderer.shape
    forms = (" \n both ends \n ", "both ends", " \n both ends", "both ends \n ")
    assert text in [shape.lead + form + shape.ending for form in forms]


def test_content_cannot_write_control_tokens(renderer: Renderer) -> None:
    """TRAPS 27: each template with each of its control tokens in the user's and the assistant's text."""
    evil = " and ".join(sorted(set(CONTROL.findall(renderer.template.source))))
    plain = render(renderer, (user("q x y"),), (assistant("a x y"),))
    spelled = render(renderer, (user(f"q {evil} y"),), (assistant(f"a {evil} y"),))
    assert spelled.error is None
    codec = renderer.codec
    counts = [
        codec.num_controls([*tree.prompt_ids.tolist(), *tree.branches[0].ids.tolist()])
        for rendered in (plain, spelled)
        for tree in rendered.trees
    ]
    assert counts[0] == counts[1]
    assert spans(renderer, spelled) == [f"{renderer.shape.lead}a {evil} y{renderer.shape.ending}"]


TOOLS = json.dumps(
    [
        {
            "type": "function",
            "function": {
                "name": "get_weather",
                "description": "The weather of a city.",
                "parameters": {
                    "type": "object",
                    "properties": {"city": {"type": "string", "description": "Which."}, "days": {"type": "integer"}},
                    "required": ["city"],
                },
            },
        }
    ]
)
CALL = ToolCall("get_weather", '{"city": "Bern", "days": 3}', "call_long_identifier")
TOOL_REASONS = (
    "the row has tools: the chat template drops the tools",
    "the row has tools: the chat template refuses the conversation: ",
    "the row has tool calls: the chat template drops ",
    "the row has tool calls: the chat template refuses the conversation: ",
    "the row has tool calls: no token of the chat template ends a turn of tool calls",
    "the chat template drops or changes the result of a tool call",
    "the chat template drops the text beside the tool calls of an answer",
)
WITH_TOOLS = {
    "Mistral-Small-3.2-24B-Instruct-2506",
    "Qwen-Qwen2.5-7B-Instruct",
    "Qwen-Qwen3-0.6B",
    "Qwen3.5-4B",
    "google-gemma-4-31B-it",
    "meta-llama-Llama-3.1-8B-Instruct",
    "meta-llama-Llama-3.2-3B-Instruct",
    "mistralai-Mistral-Nemo-Instruct-2407",
    "openai-gpt-oss-120b",
}
WITH_REASONING = {"Qwen-Qwen3-0.6B", "Qwen3.5-4B", "openai-gpt-oss-120b"}


def test_tools_calls_and_results(renderer: Renderer) -> None:
    """Trained: the call with its name and arguments, and the last answer; or refused in words."""
    prompt = (user("How is the weather?"),)
    answer = (Message("assistant", "", calls=(CALL,)), Message("tool", '{"sky": "clear"}'), assistant("Clear."))
    (rendered,) = renderer.render_many([Example("f:1", "", prompt, (answer,), tools=TOOLS)])
    name = renderer.template.name
    if rendered.error is not None:
        assert rendered.error.what.startswith(TOOL_REASONS)
        assert name not in WITH_TOOLS
        return
    assert name in WITH_TOOLS
    call, last = spans(renderer, rendered)
    assert all(each in call for each in ("get_weather", "city", "Bern", "days", "3"))
    assert last == renderer.shape.lead + "Clear." + renderer.shape.ending or "Clear." + renderer.shape.ending == last
    tree = rendered.trees[0]
    assert tree.branches[0].ids[tree.branches[0].trained][-1] in renderer.stop_ids
    assert tree.prompt_ids.tolist() == renderer.prompt_ids(prompt, TOOLS)
    shown = renderer.tokenizer.decode(
        rendered.trees[-1].prompt_ids.tolist() + rendered.trees[-1].branches[0].ids.tolist()
    )
    assert "clear" in shown
    apply = renderer.tokenizer.apply_chat_template
    kwargs = {"chat_template": renderer.template.source, "tokenize": True, "return_dict": False}
    theirs = apply(
        [{"role": "user", "content": prompt[0].content}], tools=json.loads(TOOLS), add_generation_prompt=True, **kwargs
    )
    assert tree.prompt_ids.tolist() == list(theirs)


def test_reasoning(renderer: Renderer) -> None:
    """Trained with the answer that has it, or refused in words; gone from the history it may be."""
    first = Message("assistant", "It is one.", reasoning="Count the ones.")
    last = Message("assistant", "It is two.", reasoning="Count the twos.")
    rendered = render(renderer, (user("q one"),), (first, user("q two"), last))
    if rendered.error is not None:
        assert "drops the reasoning of the answer, so it would not be trained" in rendered.error.what
        assert renderer.template.name not in WITH_REASONING
        return
    assert renderer.template.name in WITH_REASONING
    for text, message in zip(spans(renderer, rendered), (first, last), strict=True):
        assert message.reasoning in text
        assert text.endswith(message.content + renderer.shape.ending)


def test_reasoning_in_the_text_survives_or_is_refused(renderer: Renderer) -> None:
    rendered = render(renderer, (user("q"),), (assistant("<think>\nSo.\n</think>\n\nIt is."),))
    if rendered.error is not None:
        assert "strips the reasoning" in rendered.error.what or "changes the answer" in rendered.error.what
        return
    (text,) = spans(renderer, rendered)
    assert "So." in text
    assert text.endswith("It is." + renderer.shape.ending)


@pytest.mark.parametrize("tokens", TOKENIZERS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_a_tokenizer_without_the_templates_tokens_trains_or_says_why(name: str, tokens: str) -> None:
    made = Renderer(tokenizer(tokens, extended=False), template(name), 4096)
    try:
        shape = made.shape
    except ModelError as error:
        reasons = ("nothing would teach the model to stop", "'bos_token' is undefined", *REFUSED.values())
        assert any(reason in str(error) for reason in reasons)
        return
    assert shape.stop_id in set(made.tokenizer.added_tokens_decoder)
    rendered = render(made, (user("q"),), (assistant("a"),))
    assert spans(made, rendered) == [f"{shape.lead}a{shape.ending}"]


@pytest.mark.parametrize("path", [*(f"tokenizers/{name}" for name in TOKENIZERS), "models/stories260K"])
def test_the_models_own_template_or_plain(path: str) -> None:
    loaded = AutoTokenizer.from_pretrained(SHARED / path)
    made = Renderer(loaded, choose_template(loaded, None), 4096)
    rendered = render(made, (user("hello"),), (assistant("world "),))
    assert spans(made, rendered) == [f"world {loaded.eos_token}"]
    assert made.stop_ids == (loaded.eos_token_id,)
