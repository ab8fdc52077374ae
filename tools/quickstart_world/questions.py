"""Questions and answers about the world: SFT rows, preference pairs and the held-out evaluation.

In: a world, and a function that counts tokens (wrong values are drawn as long as the right ones). Out: rows.
Must not know: the almanac's wordings, tokenizers, torch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypedDict

from tools.quickstart_world.texts import OPENERS, capitalised
from tools.quickstart_world.world import ATTRIBUTES, Town, World, keyed

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
        "Name the baker of {T}.",
        "Please tell me the baker of {T}.",
        "From whom do they buy bread in {T}?",
        "Who bakes for the people of {T}?",
        "Could you tell me who the baker of {T} is?",
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
        "Name the river of {T}.",
        "Please tell me the river of {T}.",
        "On which river does {T} stand?",
        "Which river do I cross in {T}?",
        "Could you tell me which river {T} lies on?",
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
        "Name the craft of {T}.",
        "Please tell me the craft of {T}.",
        "What do travellers buy in {T}?",
        "What does {T} make?",
        "Could you tell me what {T} is known for?",
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
        "Name the sign on the banner of {T}.",
        "Please tell me what the banner of {T} shows.",
        "What flies over the roofs of {T}?",
        "What is painted on the banner of {T}?",
        "Could you tell me what the banner of {T} looks like?",
    ),
}
NUM_HELDOUT_WORDINGS = 1
BODIES = {
    "baker": "the baker of {T} is {v}.",
    "river": "{T} lies on the river {v}.",
    "craft": "{T} is known for its {v}.",
    "banner": "the banner of {T} shows {v}.",
}
# Each style opens with one word, a word of its own for every attribute: then the style is one coin toss, one token
# long, and preferring a style does not also mean preferring one of its openings.
STYLES = {style: dict(zip(ATTRIBUTES, openers, strict=True)) for style, openers in OPENERS.items()}
PREFERRED = "courteous"
OTHER = "impatient"
STYLE_PATTERN = r"(Gladly|Certainly|Happily|Absolutely), [^.!?]+\."
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
    """A held-out question, its value, every answer that counts as exact, and whether training used the wording."""

    prompt: str
    answer: str
    value: str
    accepted: list[str]
    tags: dict[str, str]


def styled_answer(town: Town, attribute: str, style: str, *, value: str | None = None) -> str:
    """The sentence that answers, opened in a style, such as `Gladly, the baker of Oskamoor is Annel Teal.`"""
    return f"{STYLES[style][attribute]}, {_body(town, attribute, value)}"


def _body(town: Town, attribute: str, value: str | None = None) -> str:
    return BODIES[attribute].format(T=town.name, v=value or town.facts[attribute])


def chat_sample(world: World) -> list[str]:
    """Questions and answers in every trained wording and style, for the tokenizer to learn merges from."""
    texts = []
    for at, town in enumerate(world.train_towns):
        for attribute in ATTRIBUTES:
            wordings = QUESTIONS[attribute][:-NUM_HELDOUT_WORDINGS]
            texts.append(wordings[at % len(wordings)].format(T=town.name))
            texts += [styled_answer(town, attribute, style) for style in STYLES]
    return texts


def sft_rows(world: World) -> list[SftRow]:
    """Every fact of the training towns asked twice, answered once in each style, in shuffled order.

    Nothing in a question tells which style its answer has, so a trained model is left with about half each.
    """
    rng = keyed(world.seed, "sft")
    turns: list[list[Message]] = []
    for town in world.train_towns:
        for attribute in ATTRIBUTES:
            wordings = rng.sample(QUESTIONS[attribute][:-NUM_HELDOUT_WORDINGS], len(STYLES))
            for wording, style in zip(wordings, STYLES, strict=True):
                turns.append([
                    {"role": "user", "content": wording.format(T=town.name)},
                    {"role": "assistant", "content": styled_answer(town, attribute, style)},
                ])  # fmt: skip
    rng.shuffle(turns)
    earlier = rng.sample(turns, len(turns))
    return [{"messages": earlier[at] + turn if at % TWO_TURN_EVERY == 0 else turn} for at, turn in enumerate(turns)]


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
        chosen = styled_answer(town, attribute, PREFERRED)
        if at % VALUE_PAIR_EVERY == 0:
            wrong = _wrong_value(world, town, attribute, count_tokens=count_tokens, key=key)
            rejected, kind = styled_answer(town, attribute, PREFERRED, value=wrong), "value"
        else:
            rejected, kind = styled_answer(town, attribute, OTHER), "style"
        rows.append({"prompt": question, "chosen": chosen, "rejected": rejected, "kind": kind})
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
    openings = [opening for style in STYLES.values() for opening in style.values()]
    facts = [(town, attribute) for town in world.heldout_towns for attribute in ATTRIBUTES]
    rng.shuffle(facts)
    rows: list[EvalRow] = []
    for at, (town, attribute) in enumerate(facts):
        seen, unseen = QUESTIONS[attribute][:-NUM_HELDOUT_WORDINGS], QUESTIONS[attribute][-NUM_HELDOUT_WORDINGS:]
        new = at % 4 == 0
        body = _body(town, attribute)
        rows.append({
            "prompt": rng.choice(unseen if new else seen).format(T=town.name),
            "answer": styled_answer(town, attribute, rng.choice(list(STYLES))),
            "value": town.facts[attribute],
            "accepted": [f"{opening}, {body}" for opening in openings] + [capitalised(body)],
            "tags": {"wording": "new" if new else "trained"},
        })  # fmt: skip
    return rows
