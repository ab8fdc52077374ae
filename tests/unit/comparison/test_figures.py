"""Figures from raw records, with numbers that can be checked in the head."""

from __future__ import annotations

import pytest

from tests.unit.comparison.build import pair, question, record
from tunesmith.comparison.figures import (
    FIGURES,
    Sampling,
    Values,
    all_estimates,
    compare_values,
    estimate,
    has_value,
    is_exact,
    pair_facts,
    stage_values,
    style_rule,
    win,
)
from tunesmith.comparison.rows import Rows
from tunesmith.recipe.models import Compare, Style

SAMPLING = Sampling(200, 0)


def test_exact_means_equal_after_stripping() -> None:
    asked = question("a", accepted=("The Glande.", "It is the Glande."))
    assert is_exact("  The Glande.\n", asked)
    assert not is_exact("the Glande.", asked)
    assert not is_exact("The Glande. Surely.", asked)


@pytest.mark.parametrize(
    ("text", "value", "found"),
    [
        ("the river Glande.", "Glande", True),
        ("1200 men", "12", False),
        ("12, not 1200", "12", True),
        ("Glanders", "Glande", False),
        ("it costs $5 (five)", "$5", True),
        ("a.b", "axb", False),
    ],
)
def test_a_value_is_a_whole_word(text: str, value: str, found: bool) -> None:
    assert has_value(text, value) is found


def test_a_style_rule_reads_the_whole_answer() -> None:
    keeps = style_rule(Style(description="", pattern=r"(Gladly|Surely)! .+", max_words=3))
    assert keeps(" Gladly! Two words\n")
    assert not keeps("Gladly! Now three words")
    assert not keeps("Hm. Gladly! Yes")
    assert not keeps("Gladly! two\nlines")  # the dot stops at a line's end unless the rule says otherwise


def test_shares_of_answers() -> None:
    rows = Rows([question("a"), question("b", value="12"), question("c", accepted=(), value="7")], [])
    values = stage_values(record("sft", ["yes", "it is 12", "17"]), None, rows, Compare())
    assert values["exact_accuracy"].values == [1.0, 0.0]  # the third prompt has no accepted answer
    assert values["value_accuracy"].values == [1.0, 0.0]  # the first has no bare value
    assert values["answer_tokens"].values == [1.0, 2.0, 3.0]
    assert values["style_share"].reason == "the recipe has no `compare.style`"


def test_pairs_are_judged_against_the_reference_and_wrong_answers_apart() -> None:
    rows = Rows([], [pair("a"), pair("b"), pair("c", kind="value"), pair("d", kind="style")])
    reference = record("sft", [], pairs=[(-10, -8), (-5, -5), (-3, -9), (-4, -6)])
    policy = record("dpo", [], pairs=[(-9, -12), (-6, -6), (-4, -9), (-6, -5)])
    values = stage_values(policy, reference, rows, Compare())
    # margins: (1) - (-4) = 5; (-1) - (-1) = 0, a tie; c: (-1) - (0) = -1; d: (-2) - (1) = -3
    assert values["preference_accuracy"].values == [1.0, 0.5, 0.0]
    assert values["preference_accuracy_wrong_answer"].values == [0.0]
    assert values["logprob_accuracy"].values == [1.0, 0.5, 1.0, 0.0]


def test_the_reference_has_half_by_definition() -> None:
    rows = Rows([question("a")], [pair("a"), pair("b", kind="value")])
    reference = record("sft", ["yes"], own=[-3.0], reference=[-3.0], pairs=[(-10, -8), (-5, -5)])
    figures = all_estimates(stage_values(reference, reference, rows, Compare()), SAMPLING)
    half = figures["preference_accuracy"]
    assert (half.value, half.low, half.high, half.num, half.method) == (0.5, 0.5, 0.5, 1, "exact")
    assert (figures["kl"].value, figures["kl"].method) == (0.0, "exact")


def test_kl_is_the_mean_log_ratio_of_a_stages_own_samples() -> None:
    rows = Rows([question("a"), question("b")], [])
    reference = record("sft", ["x", "x"])
    stage = record("dpo", ["x", "x"], own=[-10.0, -12.0], reference=[-11.0, -12.5])
    values = stage_values(stage, reference, rows, Compare())["kl"]
    assert values.values == [1.0, 0.5]
    assert estimate("kl", values, SAMPLING).value == 0.75


def test_what_cannot_be_computed_is_null_with_a_reason() -> None:
    rows = Rows([], [], no_questions="no prompts here", no_pairs="no pairs here")
    figures = all_estimates(stage_values(record("sft", []), None, rows, Compare()), SAMPLING)
    assert set(figures) == {figure.key for figure in FIGURES}
    assert all(figure.value is None and figure.reason for figure in figures.values())
    assert figures["exact_accuracy"].reason == "no prompts here"
    assert figures["preference_accuracy"].reason == "no pairs here"


def test_differences_to_a_figure_that_holds_by_definition() -> None:
    clusters = [f"p{n}" for n in range(40)]
    measured = Values([1.0] * 40, clusters)
    defined = Values([0.5] * 40, clusters, "this stage is the reference", 0.5)
    after = compare_values("preference_accuracy", measured, defined, SAMPLING)
    assert (after.value, after.high) == (0.5, 0.5)
    assert after.low == pytest.approx(0.5 - 3.841459 / 43.841459, abs=1e-6)  # Wilson's low end of 40 of 40, less 0.5
    before = compare_values("preference_accuracy", defined, measured, SAMPLING)
    assert (before.value, before.low, before.high) == (-0.5, -0.5, pytest.approx(-after.low))


def test_facts_about_pairs() -> None:
    facts = pair_facts(
        [pair("a", lengths=(3, 2)), pair("b", lengths=(2, 2)), pair("c", cluster="b", kind="value", lengths=(1, 5))],
        SAMPLING,
    )
    assert (facts.tokens_chosen, facts.tokens_rejected, facts.num_prompts) == (2.0, 3.0, 2)
    assert facts.chosen_longer.value == 0.5  # longer, equal, shorter
    assert facts.kinds == {"untagged": 2, "value": 1}


def test_a_tie_is_half_a_win() -> None:
    assert (win(0.1), win(0.0), win(-0.1)) == (1.0, 0.5, 0.0)
