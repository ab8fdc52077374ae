from __future__ import annotations

import pytest

from tests.unit.data.build import replies, row, rows, source, turns
from tunesmith.data.formats import FORMATS, Decoded, to_examples
from tunesmith.data.formats.fields import BadField, Degenerate
from tunesmith.data.types import Example, Json
from tunesmith.errors import DataError
from tunesmith.recipe.models import FormatName


def decode(name: FormatName, fields: dict[str, Json], *, chat: bool = True) -> Example:
    return FORMATS[name].decode(row(**fields), chat=chat)


def bad(name: FormatName, fields: dict[str, Json], *, chat: bool = True) -> str:
    with pytest.raises(BadField) as error:
        decode(name, fields, chat=chat)
    return str(error.value)


def degenerate(name: FormatName, fields: dict[str, Json], *, chat: bool = True) -> str:
    with pytest.raises(Degenerate) as error:
        decode(name, fields, chat=chat)
    return str(error.value)


def said(*turns: tuple[str, Json]) -> list[Json]:
    return [{"role": role, "content": content} for role, content in turns]


# --- one answer


def test_messages_split_at_the_first_assistant_turn() -> None:
    messages = said(("developer", "s"), ("user", "q1"), ("assistant", "a1"), ("user", "q2"), ("assistant", "a2"))
    example = decode("messages", {"messages": messages})
    assert example.prompt == turns("q1", system="s")
    assert example.answers == (replies("a1", "q2", "a2"),)


def test_messages_accept_text_parts() -> None:
    parts: Json = [{"type": "text", "text": "a"}, {"type": "text", "value": "b"}]
    example = decode("messages", {"messages": said(("user", parts), ("assistant", "c"))})
    assert (example.prompt, example.answers) == (turns("ab"), (replies("c"),))


def test_a_system_column_stands_before_the_messages_once() -> None:
    fields: dict[str, Json] = {"system": "s", "messages": said(("user", "q"), ("assistant", "a"))}
    assert decode("messages", fields).prompt == turns("q", system="s")
    same: dict[str, Json] = {"system": "s", "messages": said(("system", "s"), ("user", "q"), ("assistant", "a"))}
    assert decode("messages", same).prompt == turns("q", system="s")
    assert "role system after system" in bad("messages", {**same, "system": "other"})


@pytest.mark.parametrize("user", ["human", "user", "Human", "prompter"])
@pytest.mark.parametrize("answerer", ["gpt", "assistant", "chatgpt", "bing", "bard", "model", "bot", "claude", "GPT-4"])
def test_sharegpt_knows_the_role_spellings(user: str, answerer: str) -> None:
    talk: Json = [{"from": user, "value": "q"}, {"from": answerer, "value": "a"}]
    example = decode("sharegpt", {"conversations": talk, "system": "s"})
    assert (example.prompt, example.answers) == (turns("q", system="s"), (replies("a"),))


def test_alpaca_joins_instruction_and_input() -> None:
    fields: dict[str, Json] = {"instruction": "i", "input": "x", "output": "o", "system": None}
    assert decode("alpaca", fields).prompt == turns("i\n\nx")
    assert decode("alpaca", {"instruction": "i", "input": "", "output": "o"}).prompt == turns("i")
    assert decode("alpaca", {"instruction": "i", "output": "o"}, chat=False).prompt == "i"
    dolly: dict[str, Json] = {"instruction": "i", "context": "x", "response": "o", "category": "c"}
    example = decode("alpaca", dolly)
    assert (example.prompt, example.answers) == (turns("i\n\nx"), (replies("o"),))


def test_alpaca_history_stands_before_the_instruction() -> None:
    fields: dict[str, Json] = {
        "instruction": "q3",
        "output": "a3",
        "history": [["q1", "a1"], ["q2", "a2"]],
        "system": "s",
    }
    example = decode("alpaca", fields)
    assert (example.prompt, example.answers) == (turns("q1", system="s"), (replies("a1", "q2", "a2", "q3", "a3"),))
    assert decode("alpaca", {**fields, "history": []}).prompt == turns("q3", system="s")
    assert '`history[0]`: found ["q1"]; wanted [question, answer]' in bad("alpaca", {**fields, "history": [["q1"]]})
    assert "`history`: found earlier turns; wanted none, since" in bad("alpaca", fields, chat=False)


@pytest.mark.parametrize(
    "fields",
    [
        {"question": "q", "response": "a"},
        {"query": "q", "response": "a"},
        {"prompt": "q", "response": "a"},
        {"problem": "q", "solution": "a", "answer": "7"},
        {"input": "q", "output": "a"},
        {"question": "q", "answer": "a", "response": "another"},
    ],
)
def test_spellings_of_question_and_answer(fields: dict[str, Json]) -> None:
    example = decode("question_answer", fields)
    assert (example.prompt, example.answers) == (turns("q"), (replies("a"),))


def test_open_orca_and_a_context_beside_the_question() -> None:
    orca: dict[str, Json] = {"system_prompt": "s", "question": "q", "response": "a"}
    assert decode("question_answer", orca).prompt == turns("q", system="s")
    assert decode("question_answer", {**orca, "context": "c"}).prompt == turns("q\n\nc", system="s")


def test_question_answer_reads_prompt_and_the_comparison_columns() -> None:
    fields: dict[str, Json] = {"prompt": "q", "answer": "a", "value": "7", "accepted": ["a", "b"], "kind": "k"}
    example = decode("question_answer", fields)
    assert (example.prompt, example.answers, example.value) == (turns("q"), (replies("a"),), "7")
    assert (example.accepted, example.tags) == (("a", "b"), {"kind": "k"})


def test_prompt_completion_as_text_as_chat_and_as_messages() -> None:
    strings: dict[str, Json] = {"prompt": "p ", "completion": "c"}
    assert decode("prompt_completion", strings, chat=False).prompt == "p "
    assert decode("prompt_completion", strings, chat=False).answers == ("c",)
    assert decode("prompt_completion", strings).answers == (replies("c"),)
    lists: dict[str, Json] = {"prompt": said(("user", "q")), "completion": said(("assistant", "a"))}
    for completion in (said(("assistant", "a")), "a", {"role": "assistant", "content": "a"}):
        example = decode("prompt_completion", {**lists, "completion": completion})
        assert (example.prompt, example.answers) == (turns("q"), (replies("a"),))


def test_text_has_an_empty_prompt() -> None:
    example = decode("text", {"text": " as it stands\n"}, chat=False)
    assert (example.prompt, example.answers) == ("", (" as it stands\n",))


# --- pairs


def test_preference_of_strings() -> None:
    fields: dict[str, Json] = {"prompt": "q", "chosen": "good", "rejected": "bad"}
    example = decode("preference", fields)
    assert (example.prompt, example.answers) == (turns("q"), (replies("good"), replies("bad")))
    raw = decode("preference", fields, chat=False)
    assert (raw.prompt, raw.answers) == ("q", ("good", "bad"))


def test_orca_and_alpaca_spellings_of_the_prompt() -> None:
    orca: dict[str, Json] = {"system": "s", "question": "q", "chosen": "a", "rejected": "b"}
    assert decode("preference", orca).prompt == turns("q", system="s")
    alpaca: dict[str, Json] = {"instruction": "i", "input": "x", "output": "unread", "chosen": "a", "rejected": "b"}
    assert decode("preference", alpaca).prompt == turns("i\n\nx")


def test_message_lists_may_repeat_the_prompt_or_be_the_only_prompt() -> None:
    good, worse = said(("user", "q"), ("assistant", "a")), said(("user", "q"), ("assistant", "b"))
    expected = (turns("q"), (replies("a"), replies("b")))
    for fields in (
        {"prompt": "q", "chosen": good, "rejected": worse},
        {"prompt": said(("user", "q")), "chosen": good, "rejected": worse},
        {"prompt": said(("user", "q")), "chosen": good[1:], "rejected": worse[1:]},
        {"prompt": "q", "chosen": good[1], "rejected": worse[1]},
        {"chosen": good, "rejected": worse},
    ):
        example = decode("preference", fields)
        assert (example.prompt, example.answers) == expected


def test_llama_factory_pairs() -> None:
    fields: dict[str, Json] = {
        "conversations": [{"from": "system", "value": "s"}, {"from": "human", "value": "q"}],
        "chosen": {"from": "gpt", "value": "a"},
        "rejected": {"from": "gpt", "value": "b"},
    }
    example = decode("preference", fields)
    assert (example.prompt, example.answers) == (turns("q", system="s"), (replies("a"), replies("b")))


def test_conversations_that_share_their_head_split_at_the_last_shared_assistant_turn() -> None:
    chosen = said(("user", "q1"), ("assistant", "a1"), ("user", "q2"), ("assistant", "good"))
    rejected = said(("user", "q1"), ("assistant", "a1"), ("user", "q2"), ("assistant", "bad"))
    example = decode("preference", {"chosen": chosen, "rejected": rejected})
    assert (example.prompt, example.answers) == (turns("q1", "a1", "q2"), (replies("good"), replies("bad")))


def test_conversations_that_part_in_a_user_turn_split_before_the_answer_to_it() -> None:
    chosen = said(("user", "q1"), ("assistant", "a1"), ("user", "x"), ("assistant", "good"))
    rejected = said(("user", "q1"), ("assistant", "a1"), ("user", "y"), ("assistant", "bad"))
    example = decode("preference", {"chosen": chosen, "rejected": rejected})
    assert example.prompt == turns("q1")
    assert example.answers == (replies("a1", "x", "good"), replies("a1", "y", "bad"))


def test_one_conversation_that_goes_on_after_the_other_ended() -> None:
    chosen = said(("user", "q1"), ("assistant", "a1"))
    rejected = said(("user", "q1"), ("assistant", "a1"), ("user", "y"), ("assistant", "bad"))
    example = decode("preference", {"chosen": chosen, "rejected": rejected})
    assert (example.prompt, example.answers) == (turns("q1"), (replies("a1"), replies("a1", "y", "bad")))


def test_preferred_output() -> None:
    fields: dict[str, Json] = {
        "input": {"messages": said(("system", "s"), ("user", "q"))},
        "preferred_output": said(("assistant", "a")),
        "non_preferred_output": said(("assistant", "b")),
    }
    example = decode("preferred_output", fields)
    assert (example.prompt, example.answers) == (turns("q", system="s"), (replies("a"), replies("b")))


FOUR_TURNS = "\n\nHuman: q1\n\nAssistant: a1\n\nHuman: q2\n\nAssistant:"


def test_transcripts_end_the_prompt_at_the_last_shared_assistant_marker() -> None:
    fields: dict[str, Json] = {"chosen": FOUR_TURNS + " good", "rejected": FOUR_TURNS + " bad"}
    example = decode("transcripts", fields)
    assert (example.prompt, example.answers) == (turns("q1", "a1", "q2"), (replies("good"), replies("bad")))
    raw = decode("transcripts", fields, chat=False)
    assert (raw.prompt, raw.answers) == (FOUR_TURNS, (" good", " bad"))


def test_transcripts_that_part_early_keep_their_later_turns_as_turns() -> None:
    chosen = "\n\nHuman: q1\n\nAssistant: a1\n\nHuman: x\n\nAssistant: good"
    rejected = "\n\nHuman: q1\n\nAssistant: other\n\nHuman: y\n\nAssistant: bad"
    example = decode("transcripts", {"chosen": chosen, "rejected": rejected})
    assert example.prompt == turns("q1")
    assert example.answers == (replies("a1", "x", "good"), replies("other", "y", "bad"))
    assert "part before the last turn" in degenerate(
        "transcripts", {"chosen": chosen, "rejected": rejected}, chat=False
    )


def test_two_assistant_turns_in_a_row_of_a_transcript_become_one() -> None:
    head = "\n\nHuman: q1\n\nAssistant: a1\n\nAssistant: more\n\nHuman: q2\n\nAssistant:"
    example = decode("transcripts", {"chosen": head + " good", "rejected": head + " bad"})
    assert example.prompt == turns("q1", "a1\n\nmore", "q2")


# --- refusals


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        (None, "`messages`: found null; wanted a list of messages"),
        ("hi", '`messages`: found "hi"; wanted a list of messages'),
        ([], "`messages`: found []; wanted a list of messages"),
        ([3], "`messages[0]`: found 3; wanted an object with role and content"),
        ([{"content": "x"}], "`messages[0].role`: found no such key; wanted a role"),
        ([{"role": "user"}], "`messages[0].content`: found no such key; wanted a string"),
        (said(("user", 3)), "`messages[0].content`: found 3; wanted a string"),
        (said(("user", None)), "`messages[0].content`: found null; wanted a string"),
        (said(("alien", "x")), '`messages[0].role`: found "alien"; wanted system, user, assistant or tool'),
        (said(("user", [{"type": "image"}])), '`messages[0].content[0]`: found {"type": "image"}; wanted a text part'),
        (said(("user", "a"), ("user", "b")), "`messages[1]`: found role user after user; wanted assistant"),
        (said(("assistant", "a")), "`messages[0]`: found role assistant first; wanted system or user"),
        (said(("user", "a"), ("system", "b")), "`messages[1]`: found role system after user; wanted assistant"),
        (
            said(("user", "a"), ("assistant", "b"), ("user", "c")),
            "`messages`: found the last message is from user, so nothing would be trained on it",
        ),
        (said(("user", "a")), "found the last message is from user"),
        (
            [{"role": "user", "content": "a", "images": ["x.png"]}],
            '`messages[0].images`: found ["x.png"]; wanted text only',
        ),
    ],
)
def test_a_bad_conversation_names_the_field(messages: Json, message: str) -> None:
    assert message in bad("messages", {"messages": messages})


def test_missing_keys_and_wrong_types_name_the_field() -> None:
    assert bad("messages", {}) == "`messages`: found no such key; wanted a list of messages"
    assert "`conversations`: found no such key" in bad("sharegpt", {})
    assert bad("alpaca", {"instruction": "i"}) == "`output`: found no such key; wanted a string"
    assert bad("alpaca", {"instruction": "i", "output": 3}) == "`output`: found 3; wanted a string"
    assert "`question`: found null" in bad("question_answer", {"question": None, "answer": "a"})
    assert "`completion`: found no such key" in bad("prompt_completion", {"prompt": "p"})
    assert "`prompt`: found no such key" in bad("prompt_completion", {"completion": "p"})
    assert "`rejected`: found no such key" in bad("preference", {"prompt": "p", "chosen": "c"})
    assert "`chosen`: found null" in bad("preference", {"prompt": "p", "chosen": None, "rejected": "c"})
    assert "the same form as `chosen`" in bad("preference", {"chosen": said(("assistant", "a")), "rejected": "b"})
    answer = said(("assistant", "a"))
    assert "`prompt`: found no such key" in bad("preference", {"chosen": answer, "rejected": answer})
    assert "`prompt`: found no such key" in bad("preference", {"chosen": "a", "rejected": "b"})
    assert "`input`: found no such key" in bad("preferred_output", {"preferred_output": [], "non_preferred_output": []})
    assert "wanted a transcript" in bad("transcripts", {"chosen": "hello", "rejected": "world"})
    assert '`accepted`: found "a"; wanted a list of strings' in bad(
        "question_answer", {"question": "q", "answer": "a", "accepted": "a"}
    )


def test_pairs_with_different_prompts_are_refused() -> None:
    good, other = said(("user", "q"), ("assistant", "a")), said(("user", "z"), ("assistant", "b"))
    assert "`rejected`: found messages that begin with another prompt" in bad(
        "preference", {"prompt": "q", "chosen": good, "rejected": other}
    )
    assert "`rejected`: found a conversation that begins differently" in bad(
        "preference", {"chosen": good, "rejected": other}
    )


def test_render_text_needs_strings_and_plain_text_has_no_turns() -> None:
    messages = said(("user", "q"), ("assistant", "a"))
    assert "`render`: found text" in bad("messages", {"messages": messages}, chat=False)
    assert "`render`: found text" in bad("sharegpt", {"conversations": messages}, chat=False)
    assert "render: text" in bad("preference", {"chosen": messages, "rejected": messages}, chat=False)
    assert "`render`: found chat" in bad("text", {"text": "t"})


def test_rows_that_teach_nothing_are_degenerate() -> None:
    assert degenerate("alpaca", {"instruction": "i", "output": " \n"}) == "empty answer"
    assert degenerate("alpaca", {"instruction": " ", "output": "o"}) == "empty prompt"
    assert degenerate("text", {"text": "\n"}, chat=False) == "empty text"
    assert degenerate("prompt_completion", {"prompt": "p", "completion": ""}, chat=False) == "empty answer"
    same: dict[str, Json] = {"prompt": "p", "chosen": "c", "rejected": "c"}
    assert degenerate("preference", same) == "chosen equals rejected"
    assert degenerate("preference", same, chat=False) == "chosen equals rejected"
    messages = said(("user", "q"), ("assistant", "a"))
    assert degenerate("preference", {"chosen": messages, "rejected": messages}) == "chosen equals rejected"
    assert degenerate("transcripts", {"chosen": FOUR_TURNS, "rejected": FOUR_TURNS + " a"}) == "empty answer"


# --- files


def decoded(*fields: dict[str, Json], **knobs: object) -> Decoded:
    return to_examples(rows(*fields), source(**knobs))


def test_render_auto_is_raw_text_for_texts_and_prompt_completion_strings() -> None:
    assert isinstance(decoded({"prompt": "p", "completion": "c"}).examples[0].prompt, str)
    assert isinstance(decoded({"text": "t"}).examples[0].prompt, str)
    assert isinstance(decoded({"question": "q", "answer": "a"}).examples[0].prompt, tuple)
    assert isinstance(decoded({"prompt": "p", "completion": "c"}, render="chat").examples[0].prompt, tuple)
    assert isinstance(decoded({"question": "q", "answer": "a"}, render="text").examples[0].prompt, str)
    lists: dict[str, Json] = {"prompt": said(("user", "q")), "completion": said(("assistant", "a"))}
    assert isinstance(decoded(lists).examples[0].prompt, tuple)


def test_bad_and_degenerate_rows_are_collected_apart() -> None:
    result = decoded({"text": "fine"}, {"text": 3}, {"text": " "}, {"other": "x", "text": "fine"})
    assert [example.id for example in result.examples] == ["f:1", "f:4"]
    assert [(bad.id, bad.field, bad.found) for bad in result.bad] == [("f:2", "text", "3")]
    assert [(dropped.row.id, dropped.reason) for dropped in result.dropped] == [("f:3", "empty text")]
    assert result.unread == ["other"]


def test_at_most_twenty_bad_rows_are_shown_and_the_rest_counted() -> None:
    result = decoded({"text": "fine"}, *({"text": number} for number in range(25)))
    with pytest.raises(DataError) as error:
        result.raise_bad("f")
    lines = str(error.value).splitlines()
    assert lines[0].startswith("f: 25 of 26 rows do not fit the format text (26 of 26 rows have `text`)")
    assert lines[1] == "  f:2: text: found 0; wanted a string"
    assert lines[20] == "  f:21: text: found 19; wanted a string"
    assert lines[21] == "  ... and 5 more"


def test_columns_whose_meaning_would_be_lost_are_refused() -> None:
    with pytest.raises(DataError, match=r"1 of 2 rows have a `tools` column.*\n.*unused_tools: tools"):
        decoded({"text": "a", "tools": "[]"}, {"text": "a", "tools": "[{}]"})
    with pytest.raises(DataError, match="1 of 1 rows have a `label` column"):
        decoded({"text": "a", "label": False})
    with pytest.raises(DataError, match="2 of 2 rows have a `images` column"):
        decoded(*({"messages": said(("user", "q"), ("assistant", "a")), "images": ["x.png"]} for _ in range(2)))
    with pytest.raises(DataError, match="1 of 1 rows have a `history` column"):
        decoded({"question": "q", "answer": "a", "history": [["q", "a"]]})
