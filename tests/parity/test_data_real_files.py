"""The real files load in the right format, with the dirt that is known to be in them.

Skipped where ../shared/data is absent.
"""

from __future__ import annotations

from collections import Counter
from functools import cache
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from tunesmith.data.formats import Decoded
from tunesmith.data.formats.transcripts import JOINED
from tunesmith.data.prepare import prepare_stage, read_examples
from tunesmith.data.render import Renderer
from tunesmith.data.sources import read_rows
from tunesmith.data.template import choose_template
from tunesmith.errors import DataError
from tunesmith.recipe.models import DpoStage, SftStage, Source

SHARED = Path(__file__).parents[2] / ".." / "shared" / "data"
pytestmark = pytest.mark.skipif(not SHARED.exists(), reason="needs the real files in ../shared/data")


@cache
def read(name: str) -> Decoded:
    return read_examples(Source(path=str(SHARED / name)))


@pytest.mark.parametrize(
    ("name", "format_name", "num_rows", "num_dropped"),
    [
        ("sft/alpaca_en_demo.json", "alpaca", 999, 0),
        ("sft/identity.json", "alpaca", 91, 0),
        ("sft/v1_sft_demo.jsonl", "messages", 500, 0),
        ("sft/c4_demo.jsonl", "text", 300, 0),
        ("sft/gsm8k_test.jsonl", "question_answer", 1319, 0),
        ("sft/sharegpt_original_5.json", "sharegpt", 5, 0),
        ("pref/hh_rlhf_harmless_test.jsonl.gz", "transcripts", 2312, 4),
        ("pref/dpo_en_demo.json", "preference", 300, 0),
        ("pref/orca_dpo_openai_format.jsonl", "preferred_output", 284, 0),
        ("pref/alpaca_style_preference_1100.json", "preference", 1100, 6),
    ],
)
def test_format_and_counts(name: str, format_name: str, num_rows: int, num_dropped: int) -> None:
    decoded = read(name)
    assert decoded.format == format_name
    assert not decoded.bad
    assert len(decoded.dropped) == num_dropped
    assert len(decoded.examples) + len(decoded.dropped) == num_rows


def test_known_dirt_is_found() -> None:
    reasons = Counter(row.reason for row in read("pref/alpaca_style_preference_1100.json").dropped)
    assert reasons == {"chosen equals rejected": 6}
    assert Counter(row.reason for row in read("pref/hh_rlhf_harmless_test.jsonl.gz").dropped) == {"empty answer": 4}


def test_five_transcripts_part_before_the_last_marker() -> None:
    """In all five the assistant speaks twice in a row, having spoken for the person: its turns are joined."""
    path = str(SHARED / "pref/hh_rlhf_harmless_test.jsonl.gz")
    marker = "\n\nAssistant:"
    parted = set()
    for row in read_rows(Source(path=path)):
        chosen, rejected = str(row.fields["chosen"]), str(row.fields["rejected"])
        if chosen[: chosen.rfind(marker)] != rejected[: rejected.rfind(marker)]:
            parted.add(row.id)
    assert len(parted) == 5
    examples = {example.id: example for example in read("pref/hh_rlhf_harmless_test.jsonl.gz").examples}
    joined = {name for name, example in examples.items() if JOINED in example.tags}
    assert parted & set(examples) < joined
    for example in examples.values():
        assert isinstance(example.prompt, tuple)
        assert example.prompt[-1].role == "user"
        assert all(len(answer) == 1 for answer in example.answers)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("sft/glaive_toolcall_en_demo.json", "191 of 300 rows have a `tools` column"),
        ("sft/openai_toolcall.jsonl", "86 of 86 rows have a `tools` column"),
        ("pref/kto_en_demo.json", "300 of 300 rows have a `label` column"),
    ],
)
def test_what_is_not_supported_yet_is_refused(name: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read(name)


def renderer(path: str, max_length: int = 2048) -> Renderer:
    tokenizer = AutoTokenizer.from_pretrained(SHARED / path)
    return Renderer(tokenizer, choose_template(tokenizer, None), max_length)


@pytest.mark.parametrize("model", ["models/stories260K", "tokenizers/qwen2_hf"])
def test_alpaca_is_prepared_whole_with_its_duplicates_reported(model: str) -> None:
    stage = SftStage(name="sft", train=[Source(path=str(SHARED / "sft/alpaca_en_demo.json"))])
    prepared = prepare_stage(stage, renderer(model))
    assert len(prepared.train) == len(prepared.ledger) == 999
    assert "14 of 999 training rows repeat an earlier one; all are trained." in prepared.notes


@pytest.mark.parametrize("model", ["models/stories260K", "tokenizers/qwen2_hf", "tokenizers/llama3_hf"])
@pytest.mark.parametrize("name", ["hh_rlhf_harmless_test.jsonl.gz", "dpo_en_demo.json", "orca_dpo_openai_format.jsonl"])
def test_pairs_are_prepared_and_counted(model: str, name: str) -> None:
    stage = DpoStage(name="dpo", train=[Source(path=str(SHARED / "pref" / name), limit=100)])
    prepared = prepare_stage(stage, renderer(model))
    assert len(prepared.ledger) == 100
    assert Counter(entry.outcome for entry in prepared.ledger)["kept"] == len(prepared.train) > 40
    assert all(len(tree.branches) == 2 and tree.num_trained > 2 for tree in prepared.train)
