"""The real files load in the right format, with the dirt that is known to be in them.

Skipped where ../shared/data is absent.
"""

from __future__ import annotations

import json
from collections import Counter
from functools import cache
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from tunesmith.data.formats import Decoded, feedback_of, plan_format
from tunesmith.data.formats.transcripts import JOINED
from tunesmith.data.prepare import prepare_stage, read_examples
from tunesmith.data.render import Renderer
from tunesmith.data.sources import read_rows
from tunesmith.data.template import choose_template
from tunesmith.data.types import Conversation, Example, Message
from tunesmith.recipe.models import DpoStage, SftStage, Source

SHARED = Path(__file__).parents[2] / ".." / "shared" / "data"
pytestmark = pytest.mark.skipif(not SHARED.exists(), reason="needs the real files in ../shared/data")
HH = "pref/hh_rlhf_harmless_test.jsonl.gz"


@cache
def read(name: str) -> Decoded:
    return read_examples(Source(path=str(SHARED / name)))


@pytest.mark.parametrize(
    ("name", "format_name", "num_rows", "num_dropped", "num_answers"),
    [
        ("sft/alpaca_en_demo.json", "alpaca", 999, 0, 1),
        ("sft/identity.json", "alpaca", 91, 0, 1),
        ("sft/v1_sft_demo.jsonl", "messages", 500, 0, 1),
        ("sft/c4_demo.jsonl", "text", 300, 0, 1),
        ("sft/gsm8k_train.jsonl.gz", "question_answer", 7473, 0, 1),
        ("sft/gsm8k_test.jsonl", "question_answer", 1319, 0, 1),
        ("sft/sharegpt_original_5.json", "sharegpt", 5, 0, 1),
        ("sft/glaive_toolcall_en_demo.json", "sharegpt", 300, 0, 1),
        ("sft/openai_toolcall.jsonl", "messages", 86, 0, 1),
        (HH, "transcripts", 2312, 4, 2),
        ("pref/dpo_en_demo.json", "preference", 300, 0, 2),
        ("pref/orca_dpo_openai_format.jsonl", "preferred_output", 284, 0, 2),
        ("pref/alpaca_style_preference_1100.json", "preference", 1100, 6, 2),
        ("pref/kto_en_demo.json", "labeled", 300, 0, 1),
    ],
)
def test_format_and_counts(name: str, format_name: str, num_rows: int, num_dropped: int, num_answers: int) -> None:
    decoded = read(name)
    assert (decoded.format, decoded.num_answers) == (format_name, num_answers)
    assert not decoded.bad
    assert len(decoded.dropped) == num_dropped
    assert len(decoded.examples) + len(decoded.dropped) == num_rows
    assert decoded.reason.startswith(f"{num_rows} of {num_rows} rows have `")


def test_the_first_rows_give_the_plan_of_the_whole_file() -> None:
    for file in (*(SHARED / "sft").iterdir(), *(SHARED / "pref").iterdir()):
        source = Source(path=str(file))
        whole = read(f"{file.parent.name}/{file.name}")
        assert plan_format(read_rows(source.model_copy(update={"limit": 5})), source).format == whole.format


def test_known_dirt_is_found() -> None:
    reasons = Counter(row.reason for row in read("pref/alpaca_style_preference_1100.json").dropped)
    assert reasons == {"chosen equals rejected": 6}
    assert Counter(row.reason for row in read(HH).dropped) == {"empty answer": 4}
    hashes = Counter(example.sha for example in read("sft/alpaca_en_demo.json").examples)
    assert sum(count - 1 for count in hashes.values()) == 14
    prompts = Counter(example.prompt for example in read("pref/dpo_en_demo.json").examples)
    assert sum(count - 1 for count in prompts.values()) == 5
    placeholders = [example for example in read("sft/identity.json").examples if "{{name}}" in str(example.answers)]
    assert len(placeholders) > 50


def test_five_transcripts_part_before_the_last_marker() -> None:
    """In all five the assistant speaks twice in a row, having spoken for the person: its turns are joined."""
    marker = "\n\nAssistant:"
    parted = set()
    for row in read_rows(Source(path=str(SHARED / HH))):
        chosen, rejected = str(row.fields["chosen"]), str(row.fields["rejected"])
        if chosen[: chosen.rfind(marker)] != rejected[: rejected.rfind(marker)]:
            parted.add(row.id)
    assert len(parted) == 5
    examples = {example.id: example for example in read(HH).examples}
    joined = {name for name, example in examples.items() if JOINED in example.tags}
    assert parted & set(examples) < joined
    for example in examples.values():
        assert isinstance(example.prompt, tuple)
        assert example.prompt[-1].role == "user"
        assert all(len(answer) == 1 for answer in example.answers)


def answer_of(example: Example) -> Conversation:
    (answer,) = example.answers
    assert isinstance(answer, tuple)
    return answer


def test_glaive_calls_and_results_are_all_there() -> None:
    """211 calls and as many results stand in the file; 109 of its 300 rows offer no tools."""
    examples = read("sft/glaive_toolcall_en_demo.json").examples
    answers = [turn for example in examples for turn in answer_of(example)]
    assert sum(len(turn.calls) for turn in answers) == 211
    assert sum(turn.role == "tool" for turn in answers) == 211
    assert all(turn.name for turn in answers if turn.role == "tool")
    assert sum(example.tools == "" for example in examples) == 109


def test_openai_calls_are_all_there() -> None:
    examples = read("sft/openai_toolcall.jsonl").examples
    calls = [call for example in examples for turn in answer_of(example) for call in turn.calls]
    assert len(calls) == 36
    assert all(call.id and isinstance(json.loads(call.arguments), dict) for call in calls)
    assert all(json.loads(example.tools)[0]["type"] == "function" for example in examples)


def test_weights_and_labels_are_all_there() -> None:
    examples = read("sft/v1_sft_demo.jsonl").examples
    assert {turn.weight for example in examples for turn in answer_of(example)} == {1.0}
    assert {turn.weight for example in examples for turn in example.prompt if isinstance(turn, Message)} == {0.0}
    feedback = feedback_of(read("pref/kto_en_demo.json").examples)
    assert (feedback.num_desirable, feedback.num_undesirable, feedback.notes()) == (150, 150, [])


TOOL_TEMPLATES = (
    "Qwen-Qwen2.5-7B-Instruct",
    "Qwen-Qwen3-0.6B",
    "meta-llama-Llama-3.1-8B-Instruct",
    "mistralai-Mistral-Nemo-Instruct-2407",
    "NousResearch-Hermes-3-Llama-3.1-8B-tool_use",
    "deepseek-ai-DeepSeek-V3.1",
    "openai-gpt-oss-120b",
)


def as_hugging_face(turn: Message) -> dict[str, object]:
    """A message as transformers documents it. Some templates want ids of nine characters, which glaive has none of."""
    message: dict[str, object] = {"role": turn.role, "content": turn.content}
    if turn.calls:
        functions = [{"name": call.name, "arguments": json.loads(call.arguments)} for call in turn.calls]
        message["tool_calls"] = [{"id": "abcdefghi", "type": "function", "function": each} for each in functions]
    if turn.role == "tool":
        message |= {"name": turn.name, "tool_call_id": "abcdefghi"}
    return message


@pytest.mark.parametrize("name", TOOL_TEMPLATES)
def test_hugging_face_templates_write_what_the_messages_hold(name: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(SHARED / "tokenizers/qwen2_hf")
    template = (SHARED / "templates" / f"{name}.jinja").read_text()
    examples = [example for example in read("sft/glaive_toolcall_en_demo.json").examples if example.tools][:20]
    for example in examples:
        turns = [turn for turn in (*example.prompt, *answer_of(example)) if isinstance(turn, Message)]
        text = tokenizer.apply_chat_template(
            [as_hugging_face(turn) for turn in turns],
            tools=json.loads(example.tools),
            chat_template=template,
            tokenize=False,
        )
        for turn in answer_of(example):
            assert turn.content.strip() in text or json.dumps(turn.content)[1:-1] in text
            assert all(call.name in text for call in turn.calls)


@cache
def renderer(path: str) -> Renderer:
    tokenizer = AutoTokenizer.from_pretrained(SHARED / path)
    return Renderer(tokenizer, choose_template(tokenizer, None), 2048)


@pytest.mark.parametrize("model", ["models/stories260K", "tokenizers/qwen2_hf"])
def test_alpaca_is_prepared_whole_with_its_duplicates_reported(model: str, tmp_path: Path) -> None:
    stage = SftStage(name="sft", train=[Source(path=str(SHARED / "sft/alpaca_en_demo.json"))])
    prepared = prepare_stage(stage, renderer(model), workers=1, cache_folder=tmp_path)
    assert len(prepared.train) == len(prepared.ledger) == 999
    assert any("14 of 999 training rows repeat an earlier one" in note for note in prepared.notes)


@pytest.mark.parametrize("model", ["models/stories260K", "tokenizers/qwen2_hf", "tokenizers/llama3_hf"])
@pytest.mark.parametrize("name", ["hh_rlhf_harmless_test.jsonl.gz", "dpo_en_demo.json", "orca_dpo_openai_format.jsonl"])
def test_pairs_are_prepared_and_counted(model: str, name: str, tmp_path: Path) -> None:
    stage = DpoStage(name="dpo", train=[Source(path=str(SHARED / "pref" / name), limit=100)])
    prepared = prepare_stage(stage, renderer(model), workers=1, cache_folder=tmp_path)
    assert len(prepared.ledger) == 100
    assert Counter(entry.outcome for entry in prepared.ledger)["kept"] == len(prepared.train) > 40
    assert all(len(tree.branches) == 2 and tree.num_trained > 2 for tree in prepared.train)
