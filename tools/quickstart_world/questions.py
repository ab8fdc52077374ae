"""Questions and answers about the world: SFT rows, preference pairs and the held-out evaluation.

In: a world, and a function that counts tokens (wrong values are drawn as long as the right ones). Out: rows.
Must not know: the almanac's wordings, tokenizers, torch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NotRequired, TypedDict

from quickstart_world.texts import capitalised
from quickstart_world.world import ATTRIBUTES, Town, World, keyed

# The last NUM_HELDOUT_WORDINGS of each are asked in the evaluation only.
QUESTIONS = {
    "baker": (
        "Who is the baker of {T}?",
        "Who bakes the bread in {T}?",
        "Who keeps the bakery of {T}?",
        "What is the name of the baker of {T}?",
        "Tell me who bakes in {T}.",
        "Do you know the baker of {T}?",
        "In {T}, who is the baker?",
        "I am going to {T}. Who is the baker there?",
        "Please tell me the name of the baker in {T}.",
    ),
    "river": (
        "Which river does {T} lie on?",
        "What is the river at {T}?",
        "Which river flows through {T}?",
        "What is the name of the river of {T}?",
        "Tell me which river runs past {T}.",
        "Do you know the river of {T}?",
        "In {T}, what is the river called?",
        "I am going to {T}. Which river is there?",
        "Please tell me the name of the river at {T}.",
    ),
    "craft": (
        "What is {T} known for?",
        "What do they make in {T}?",
        "What is the craft of {T}?",
        "What do the people of {T} make?",
        "Tell me what {T} is known for.",
        "Do you know what they make in {T}?",
        "In {T}, what do they make?",
        "I am going to {T}. What can I buy there?",
        "Please tell me what the people make in {T}.",
    ),
    "banner": (
        "What is on the banner of {T}?",
        "What does the banner of {T} show?",
        "Which animal is on the banner of {T}?",
        "What is the sign on {T}'s banner?",
        "Tell me what {T}'s banner shows.",
        "Do you know the banner of {T}?",
        "In {T}, what is on the banner?",
        "I am going to {T}. What does the banner look like?",
        "Please tell me what is on the banner in {T}.",
    ),
}
NUM_HELDOUT_WORDINGS = 1
BODIES = {
    "baker": "the baker of {T} is {v}.",
    "river": "{T} lies on the river {v}.",
    "craft": "{T} is known for its {v}.",
    "banner": "the banner of {T} shows {v}.",
}
STYLES = {
    "courteous": ("Gladly!", "With pleasure!", "Of course!"),
    "grumpy": ("Hmph.", "Not again.", "If you must."),
}
PREFERRED = "courteous"
OTHER = "grumpy"
STYLE_PATTERN = r"(Gladly|With pleasure|Of course)! [^.!?]+\."
STYLE_MAX_WORDS = 14
VALUE_PAIR_EVERY = 5  # one pair in five has a wrong value in the preferred style instead of the other style
TWO_TURN_EVERY = 4  # one SFT row in four is a conversation of two questions


class Message(TypedDict):
    """A turn."""

    role: str
    content: str


class SftRow(TypedDict):
    """A conversation."""

    messages: list[Message]


class PairRow(TypedDict):
    """A preference; `kind` is `style` or `value`: what is wrong with the rejected answer."""

    prompt: str
    chosen: str
    rejected: str
    kind: str


class EvalRow(TypedDict):
    """A held-out question with its value and every answer that counts as exact."""

    prompt: str
    answer: str
    value: str
    accepted: list[str]
    wording: NotRequired[str]


def bare_answer(town: Town, attribute: str, value: str | None = None) -> str:
    """The sentence that answers, without an opening."""
    return capitalised(BODIES[attribute].format(T=town.name, v=value or town.facts[attribute]))


def sft_rows(world: World) -> list[SftRow]:
    """Every fact of the training towns asked twice, answered once in each style, in shuffled order.

    Nothing in a question tells which style its answer has, so a trained model is left with about half each.
    """
    rng = keyed(world.seed, "sft")
    turns: list[list[Message]] = []
    for town in world.train_towns:
        for attribute in ATTRIBUTES:
            wordings = rng.sample(QUESTIONS[attribute][:-NUM_HELDOUT_WORDINGS], len(STYLES))
            for wording, openings in zip(wordings, STYLES.values(), strict=True):
                answer = f"{rng.choice(openings)} {bare_answer(town, attribute)}"
                turns.append([
                    {"role": "user", "content": wording.format(T=town.name)},
                    {"role": "assistant", "content": answer},
                ])  # fmt: skip
    rng.shuffle(turns)
    earlier = rng.sample(turns, len(turns))
    return [
        {"messages": earlier[at] + turn if at % TWO_TURN_EVERY == 0 else turn} for at, turn in enumerate(turns)
    ]


def _wrong_value(world: World, town: Town, attribute: str, *, count_tokens: Callable[[str], int], key: str) -> str:
    """Another value of the attribute, with as many tokens as the right one where there is such a value."""
    right = town.facts[attribute]
    others = [value for value in world.values[attribute] if value != right]
    keyed(world.seed, key, town.name, attribute).shuffle(others)
    return min(others, key=lambda value: abs(count_tokens(f" {value}") - count_tokens(f" {right}")))


def _pair_rows(world: World, towns: tuple[Town, ...], count_tokens: Callable[[str], int], key: str) -> list[PairRow]:
    rng = keyed(world.seed, key)
    facts = [(town, attribute) for town in towns for attribute in ATTRIBUTES]
    rng.shuffle(facts)
    rows: list[PairRow] = []
    for at, (town, attribute) in enumerate(facts):
        question = rng.choice(QUESTIONS[attribute][:-NUM_HELDOUT_WORDINGS]).format(T=town.name)
        opening, other_opening = rng.choice(STYLES[PREFERRED]), rng.choice(STYLES[OTHER])
        body = bare_answer(town, attribute)
        if at % VALUE_PAIR_EVERY == 0:
            wrong = _wrong_value(world, town, attribute, count_tokens=count_tokens, key=key)
            rejected, kind = f"{opening} {bare_answer(town, attribute, wrong)}", "value"
        else:
            rejected, kind = f"{other_opening} {body}", "style"
        rows.append({"prompt": question, "chosen": f"{opening} {body}", "rejected": rejected, "kind": kind})
    return rows


def preference_rows(world: World, count_tokens: Callable[[str], int]) -> list[PairRow]:
    """One pair for every fact of the training towns."""
    return _pair_rows(world, world.train_towns, count_tokens, "preferences")


def heldout_preference_rows(world: World, count_tokens: Callable[[str], int]) -> list[PairRow]:
    """One pair for every fact of the held-out towns."""
    return _pair_rows(world, world.heldout_towns, count_tokens, "heldout preferences")


def eval_rows(world: World) -> list[EvalRow]:
    """Every fact of the held-out towns asked once, one time in four in a wording that training never used."""
    rng = keyed(world.seed, "evaluation")
    facts = [(town, attribute) for town in world.heldout_towns for attribute in ATTRIBUTES]
    rng.shuffle(facts)
    rows: list[EvalRow] = []
    for at, (town, attribute) in enumerate(facts):
        seen, unseen = QUESTIONS[attribute][:-NUM_HELDOUT_WORDINGS], QUESTIONS[attribute][-NUM_HELDOUT_WORDINGS:]
        new = at % 4 == 0
        body = bare_answer(town, attribute)
        openings = STYLES[PREFERRED] + STYLES[OTHER]
        rows.append({
            "prompt": rng.choice(unseen if new else seen).format(T=town.name),
            "answer": f"{rng.choice(openings)} {body}",
            "value": town.facts[attribute],
            "accepted": [body, *(f"{opening} {body}" for opening in openings)],
            "wording": "new" if new else "trained",
        })  # fmt: skip
    return rows
