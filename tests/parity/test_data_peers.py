"""Defects of other tools that are alive today (PEERS), under the real templates: each is a test that the peer fails.

Skipped where ../shared/data is absent.
"""

from __future__ import annotations

import pytest

from tests.parity.test_data_templates import (
    REFUSED,
    SHARED,
    TEMPLATES,
    applied,
    assistant,
    render,
    spans,
    template,
    tokenizer,
    user,
)
from tunesmith.data.render import MERGED, Renderer
from tunesmith.data.types import Conversation, Example

pytestmark = pytest.mark.skipif(not SHARED.exists(), reason="needs the real templates in ../shared/data")
NAMES = [name for name in TEMPLATES if name not in REFUSED]
PAIRABLE = {"Qwen-Qwen2.5-7B-Instruct", "meta-llama-Llama-3.2-3B-Instruct", "zephyr", "google-gemma-2-2b-it", "phi-3"}


def made(name: str, **knobs: object) -> Renderer:
    limit = int(str(knobs.pop("max_length", 4096)))
    return Renderer(tokenizer("qwen2_hf", extended=True), template(name), limit, **knobs)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", NAMES)
def test_peers_2_short_and_spaced_answers_are_not_cut_out_of_the_text(name: str) -> None:
    """PEERS 2 (Axolotl): an answer with white space became ">" or "", one that is also in a header took the header."""
    r = made(name)
    for answer in ("assistant", "user", "model", ">", "<", "\n yes \n", "  x", "x  ", "</", "AI"):
        rendered = render(r, (user("assistant user model AI?"),), (assistant(answer),), (assistant("another one"),))
        assert rendered.error is None, answer
        first, second = spans(r, rendered)
        assert first.startswith(r.shape.lead)
        assert first.endswith(r.shape.ending)
        middle = first.removeprefix(r.shape.lead).removesuffix(r.shape.ending)
        assert middle in answer  # a template may strip white space: what inference writes has none either
        assert middle.strip() == answer.strip()
        assert second == r.shape.lead + "another one" + r.shape.ending


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("too_long", ["drop", "truncate_prompt_start", "truncate_answer"])
def test_peers_4_no_question_header_or_terminator_is_lost_to_length(name: str, too_long: str) -> None:
    """PEERS 4 (LLaMA-Factory): over-long samples lost the end of the prompt, header included, or the terminator."""
    prompt = (user("an old question " * 6), assistant("an old answer " * 6), user("What is the newest question?"))
    answer = (assistant("first reply"), user("and more " * 12), assistant("second reply"))
    whole = render(made(name), prompt, answer)
    assert whole.error is None
    for share in (0.5, 0.8):
        r = made(name, max_length=int(max(tree.num_tokens for tree in whole.trees) * share), too_long=too_long)
        rendered = render(r, prompt, answer)
        if rendered.error is not None:
            assert rendered.error.what.startswith("longer than max_length: ")
            continue
        assert too_long != "drop"
        for tree in rendered.trees:
            text = r.tokenizer.decode(tree.prompt_ids.tolist())
            assert "What is the newest question?" in text or "and more" in text
            assert tree.branches[0].ids[-1] == r.shape.stop_id
            assert tree.branches[0].trained[-1]
        assert set(spans(r, rendered)) <= {
            r.shape.lead + text + r.shape.ending for text in ("first reply", "second reply")
        }


@pytest.mark.parametrize("name", NAMES)
def test_peers_5_pairs_that_truncation_makes_equal_do_not_stay(name: str) -> None:
    """PEERS 5 (TRL): they stayed, with a gradient of zero."""
    talk = (assistant("the same"), user("go on " * 30))
    chosen, rejected = (*talk, assistant("good")), (*talk, assistant("bad"))
    alone = render(made(name), (user("q"),), (assistant("the same"),))
    limit = alone.trees[0].num_tokens + 5
    rendered = render(made(name, max_length=limit, too_long="truncate_answer"), (user("q"),), chosen, rejected)
    assert rendered.error is not None
    assert (
        rendered.error.what == "chosen equals rejected after truncation"
        or "rewrites earlier turns" in rendered.error.what
    )


@pytest.mark.parametrize("name", NAMES)
def test_peers_6_user_turns_in_preference_answers_are_not_trained(name: str) -> None:
    """PEERS 6 (TRL): the user's turns in a multi-turn answer were scored as answer tokens."""
    r = made(name)
    chosen = (assistant("well"), user("SAID BY THE USER"), assistant("good"))
    rejected = (assistant("hm"), user("SAID BY THE USER"), assistant("bad"))
    rendered = render(r, (user("q"),), chosen, rejected)
    if rendered.error is not None:
        assert "the template rewrites earlier turns: a pair that goes on" in rendered.error.what
        assert name not in PAIRABLE
        return
    lead, ending = r.shape.lead, r.shape.ending
    assert spans(r, rendered) == [lead + text + ending for text in ("well", "good", "hm", "bad")]


@pytest.mark.parametrize("name", NAMES)
def test_peers_11_what_is_trained_is_the_models_own_template(name: str) -> None:
    """PEERS 11 (LLaMA-Factory): templates written anew by hand differed from the models' own."""
    r = made(name)
    talk: Conversation = (user("q one"), assistant("a one"), user("q two"))
    rendered = render(r, talk, (assistant("a two"),))
    (tree,) = rendered.trees
    assert tree.prompt_ids.tolist() == applied(r, talk, add_generation_prompt=True)
    whole = [*tree.prompt_ids.tolist(), *tree.branches[0].ids.tolist()]
    theirs = applied(r, (*talk, assistant("a two")))
    if (
        MERGED not in rendered.notices
        and not r.shape.extra
        and theirs[: len(tree.prompt_ids)] == tree.prompt_ids.tolist()
    ):
        assert whole == theirs[: len(whole)]
    assert r.prompt_ids(talk) == tree.prompt_ids.tolist()


def test_rows_of_many_kinds_render_alike_alone_and_in_a_batch() -> None:
    """Batches, caches and shared stretches change nothing: every row as if it were the only one."""
    r = made("Qwen-Qwen3-0.6B")
    rows = [
        Example(f"f:{n}", "", (user(f"q {n % 7}"),), ((assistant(f"a {n % 5}"), user("so"), assistant(f"b {n}")),))
        for n in range(300)
    ]
    together = r.render_many(rows)
    for row, rendered in list(zip(rows, together, strict=True))[::37]:
        alone = made("Qwen-Qwen3-0.6B").trees(row)
        assert [tree.sha() for tree in alone] == [tree.sha() for tree in rendered.trees]
