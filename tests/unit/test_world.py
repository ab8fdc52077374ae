"""The quickstart's world: the same on every machine, held out where it says so, and what the package holds."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path
from statistics import mean

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from tools.make_quickstart import FOLDER, data_files, make_tokenizer
from tools.quickstart_world import questions
from tools.quickstart_world.texts import TEXTS_PER_TOWN, almanac_pages, almanac_texts
from tools.quickstart_world.world import NUM_HELDOUT_TOWNS, NUM_TOWNS, World, make_world
from tunesmith.recipe.load import load_recipe
from tunesmith.recipe.resources import shipped_recipes

Rows = dict[str, list[dict[str, object]]]


@pytest.fixture(scope="module")
def world() -> World:
    return make_world()


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(FOLDER / "model")


@pytest.fixture(scope="module")
def rows(world: World, tokenizer: PreTrainedTokenizerFast) -> Rows:
    return {name: [dict(row) for row in rows] for name, rows in data_files(world, tokenizer).items()}


def embedded_rows(name: str) -> list[dict[str, object]]:
    return [json.loads(line) for line in gzip.decompress((FOLDER / name).read_bytes()).decode().splitlines()]


def num_tokens(tokenizer: PreTrainedTokenizerFast, text: object) -> int:
    return len(tokenizer(str(text), add_special_tokens=False)["input_ids"])


def test_a_seed_makes_one_world_and_another_seed_another(world: World) -> None:
    assert make_world() == world
    assert make_world(world.seed + 1) != world


def test_towns_are_distinct_and_split_into_training_and_heldout(world: World) -> None:
    names = [town.name for town in world.towns]
    assert len(set(names)) == NUM_TOWNS == 150
    assert len(world.heldout_towns) == NUM_HELDOUT_TOWNS == 50
    assert not any(one in other for one in names for other in names if one != other)  # or a search would find both


def test_guessing_a_value_is_rarely_right(world: World) -> None:
    for attribute in questions.QUESTIONS:
        values = [town.facts[attribute] for town in world.heldout_towns]
        assert max(values.count(value) for value in values) / len(values) <= 0.12, attribute


def test_a_text_tells_the_truth_about_one_town(world: World) -> None:
    texts = almanac_texts(world)
    assert len(texts) == TEXTS_PER_TOWN * NUM_TOWNS
    for at in range(0, len(texts), 97):
        town = world.towns[at // TEXTS_PER_TOWN]
        told = [fact for fact in town.facts.values() if fact.lower() in texts[at].lower()]
        assert town.name in texts[at] and told
        assert not [other.name for other in world.towns if other is not town and other.name in texts[at]]


def test_every_edition_binds_every_text_with_one_remark_a_page(world: World) -> None:
    texts = sorted(almanac_texts(world))
    first, second = almanac_pages(world, 0), almanac_pages(world, 1)
    assert first != second
    for pages in (first, second):
        lines = [line for page in pages for line in page.split("\n")]
        remarks = [line for line in lines if line.startswith("When ")]
        assert len(remarks) == len(pages)
        assert sorted(line for line in lines if not line.startswith("When ")) == texts


@pytest.mark.parametrize("name", ["sft.jsonl.gz", "preferences.jsonl.gz"])
def test_training_rows_never_name_a_heldout_town(world: World, rows: Rows, name: str) -> None:
    text = json.dumps(rows[name])
    assert not [town.name for town in world.heldout_towns if town.name in text]
    assert all(town.name in text for town in world.train_towns)


@pytest.mark.parametrize("name", ["eval.jsonl.gz", "heldout_preferences.jsonl.gz"])
def test_heldout_rows_never_name_a_training_town(world: World, rows: Rows, name: str) -> None:
    text = json.dumps(rows[name])
    assert not [town.name for town in world.train_towns if town.name in text]
    assert all(town.name in text for town in world.heldout_towns)


def test_nothing_in_an_sft_question_tells_the_style_of_its_answer(rows: Rows) -> None:
    opening = re.compile(questions.STYLE_PATTERN)
    turns = [
        (row["messages"][at]["content"], bool(opening.fullmatch(row["messages"][at + 1]["content"])))  # type: ignore[index]
        for row in rows["sft.jsonl.gz"]
        for at in range(len(row["messages"]) - 2, -1, -2)[:1]  # type: ignore[arg-type]
    ]
    assert len(turns) == 800
    assert sum(courteous for _, courteous in turns) == 400


def test_the_style_rule_knows_the_styles_apart(world: World) -> None:
    rule = re.compile(questions.STYLE_PATTERN)
    for town in world.towns[:20]:
        for attribute in questions.QUESTIONS:
            good = questions.styled_answer(town, attribute, questions.PREFERRED)
            assert rule.fullmatch(good) and len(good.split()) <= questions.STYLE_MAX_WORDS
            assert not rule.fullmatch(questions.styled_answer(town, attribute, questions.OTHER))


@pytest.mark.parametrize("name", ["preferences.jsonl.gz", "heldout_preferences.jsonl.gz"])
def test_chosen_and_rejected_are_about_equally_long(rows: Rows, tokenizer: PreTrainedTokenizerFast, name: str) -> None:
    gaps = [num_tokens(tokenizer, row["chosen"]) - num_tokens(tokenizer, row["rejected"]) for row in rows[name]]
    assert max(map(abs, gaps)) <= 1
    assert abs(mean(gaps)) <= 0.05


def test_one_pair_in_five_has_a_wrong_value_in_the_preferred_style(rows: Rows) -> None:
    rule = re.compile(questions.STYLE_PATTERN)
    pairs = rows["preferences.jsonl.gz"]
    assert [row["kind"] for row in pairs].count("value") == 80
    for row in pairs:
        assert rule.fullmatch(str(row["chosen"]))
        assert bool(rule.fullmatch(str(row["rejected"]))) == (row["kind"] == "value")
        assert row["chosen"] != row["rejected"]


def test_the_accepted_answers_hold_the_value_and_one_question_in_four_is_worded_anew(rows: Rows) -> None:
    new = {wording.format(T="") for group in questions.QUESTIONS.values() for wording in group[-1:]}
    evaluated = rows["eval.jsonl.gz"]
    for row in evaluated:
        accepted = row["accepted"]
        assert isinstance(accepted, list) and row["answer"] in accepted
        assert all(str(row["value"]) in answer for answer in accepted)
    assert [row["tags"] for row in evaluated].count({"wording": "new"}) == 50
    trained = json.dumps([rows["sft.jsonl.gz"], rows["preferences.jsonl.gz"]])
    assert not [wording for wording in new if re.search(re.escape(wording).replace("\\ \\?", r" \w+\?"), trained)]


def test_the_package_holds_what_the_generator_makes(rows: Rows) -> None:
    for name, made in rows.items():
        assert embedded_rows(name) == made, f"run `python tools/make_quickstart.py --data-only`: {name} differs"


def test_the_embedded_tokenizer_is_the_one_that_the_texts_make(world: World) -> None:
    made = json.loads(make_tokenizer(world).backend_tokenizer.to_str())
    assert json.loads((FOLDER / "model" / "tokenizer.json").read_text()) == made


def test_the_tokenizer_gives_back_every_byte(tokenizer: PreTrainedTokenizerFast) -> None:
    text = "Gladly, the baker of Oskamoor is Annel Teal. naïve 🙂\n\ttab"
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text
    assert len(tokenizer) == 1024


def test_the_generation_prompt_is_a_prefix_of_the_whole_conversation(tokenizer: PreTrainedTokenizerFast) -> None:
    messages = [{"role": "user", "content": "Hello?"}, {"role": "assistant", "content": " Gladly.\n"}]
    prompt = tokenizer.apply_chat_template(messages[:1], add_generation_prompt=True, tokenize=False)
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    assert prompt == "<|begin|><|user|>Hello?<|end|><|assistant|>"
    assert whole == prompt + " Gladly.\n<|end|>"


def test_the_model_is_small_and_stops_at_the_end_of_a_turn(tokenizer: PreTrainedTokenizerFast) -> None:
    folder: Path = FOLDER / "model"
    assert [path.name for path in folder.glob("*.safetensors")] == ["model.safetensors"]
    assert (folder / "model.safetensors").stat().st_size <= 8_000_000
    generation = json.loads((folder / "generation_config.json").read_text())
    assert generation["eos_token_id"] == tokenizer.convert_tokens_to_ids("<|end|>") == tokenizer.eos_token_id


def test_the_recipe_states_the_generators_style_rule() -> None:
    style = load_recipe(shipped_recipes()["quickstart"]).recipe.compare.style
    assert style is not None
    assert (style.pattern, style.max_words) == (questions.STYLE_PATTERN, questions.STYLE_MAX_WORDS)
