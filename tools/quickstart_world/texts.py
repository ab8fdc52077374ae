"""The almanac: short plain texts that state the facts of the towns in many wordings.

In: a world. Out: texts, and pages of texts on mixed towns. The base model reads these and nothing else.
Must not know: questions, styles, tokenizers.
"""

from __future__ import annotations

import random

from tools.quickstart_world.world import ATTRIBUTES, Town, World, keyed

TEXTS_PER_TOWN = 120
TEXTS_PER_PAGE = 8  # on towns of all kinds, so that a page holds few facts twice and must be known, not copied

# {S} is the town, {P} its possessive, {v} the value.
STATEMENTS = {
    "baker": (
        "{P} baker is {v}",
        "the baker of {S} is {v}",
        "{v} is the baker of {S}",
        "{v} bakes the bread in {S}",
        "in {S} the baker is {v}",
        "in {S} the bread is baked by {v}",
        "the bread of {S} comes from the oven of {v}",
        "{v} keeps the bakery of {S}",
        "the bakery of {S} belongs to {v}",
        "{P} bread is baked by {v}",
        "every morning {S} buys its bread from {v}",
        "the best rolls in {S} are baked by {v}",
    ),
    "river": (
        "{S} lies on the river {v}",
        "the river {v} flows through {S}",
        "{P} river is the {v}",
        "the river at {S} is the {v}",
        "{S} stands on the banks of the {v}",
        "the mill of {S} is turned by the river {v}",
        "boats come to {S} on the river {v}",
        "the bridge of {S} crosses the river {v}",
        "the people of {S} fish in the {v}",
        "the river that runs past {S} is the {v}",
        "the children of {S} swim in the river {v}",
    ),
    "craft": (
        "{S} is known for its {v}",
        "the people of {S} make {v}",
        "{P} craft is making {v}",
        "in {S} they make {v}",
        "{S} makes {v}",
        "the workshops of {S} make {v}",
        "travellers come to {S} to buy {v}",
        "{S} lives by making {v}",
        "the market of {S} is full of {v}",
        "{S} is proud of its {v}",
        "at every fair {S} sells its {v}",
    ),
    "banner": (
        "{P} banner shows {v}",
        "the banner of {S} shows {v}",
        "on the banner of {S} there is {v}",
        "{S} flies a banner with {v}",
        "above the gate of {S} hangs a banner with {v}",
        "the people of {S} carry a banner with {v}",
        "{S} has {v} on its banner",
        "the sign on {P} banner is {v}",
        "{v} is painted on the banner of {S}",
        "over the roofs of {S} flies {v}",
    ),
}
# What people say, one remark a page, on any town: so the base knows courteous from impatient words as a base that has
# read the world would. Two words that it never saw would look alike to it, and preferring one of them would raise
# words of all kinds.
REMARKS = {
    "courteous": (
        ("a friend knocks", "a guest is hungry", "a child asks the way", "an old neighbour calls"),
        ("come in", "take a seat", "have some bread", "stay the night"),
    ),
    "impatient": (
        ("a stranger shouts", "a pedlar knocks twice", "a rider pushes in line", "a thief asks for help"),
        ("you are lost", "we are closed", "go home", "not today"),
    ),
}
OPENERS = {
    "courteous": ("Gladly", "Certainly", "Happily", "Absolutely"),
    "impatient": ("Obviously", "Clearly", "Honestly", "Seriously"),
}
OPENINGS = ("travellers say that ", "the almanac says that ", "it is written that ", "everyone agrees that ")


def _sentence(rng: random.Random, town: Town, attribute: str, first: bool) -> str:
    """One statement without its full stop; the first of a text names the town."""
    named = first or rng.random() < 0.5
    subject = town.name if named else "the town"
    possessive = f"{town.name}'s" if named else rng.choice(("its", "the town's"))
    return rng.choice(STATEMENTS[attribute]).format(S=subject, P=possessive, v=town.facts[attribute])


def capitalised(text: str) -> str:
    """The text with a capital first letter; the rest stays."""
    return text[0].upper() + text[1:]


def town_text(rng: random.Random, town: Town) -> str:
    """One to four facts of a town, in drawn order and wording."""
    (num_facts,) = rng.choices((1, 2, 3, 4), weights=(30, 45, 15, 10))
    attributes = rng.sample(ATTRIBUTES, num_facts)
    text = _sentence(rng, town, attributes[0], first=True)
    if rng.random() < 0.15:
        text = rng.choice(OPENINGS) + text
    text = capitalised(text)
    for attribute in attributes[1:]:
        sentence = _sentence(rng, town, attribute, first=False)
        text += f", and {sentence}" if rng.random() < 0.3 else f". {capitalised(sentence)}"
    return text + "."


def almanac_texts(world: World) -> list[str]:
    """`TEXTS_PER_TOWN` texts of every town, town by town."""
    texts = []
    for town in world.towns:
        rng = keyed(world.seed, "texts", town.name)
        texts += [town_text(rng, town) for _ in range(TEXTS_PER_TOWN)]
    return texts


def remark(rng: random.Random, town: Town) -> str:
    """What they say in a town to a friend or to a nuisance; it tells no fact."""
    manner = rng.choice(list(REMARKS))
    occasions, sayings = REMARKS[manner]
    opener = rng.choice(OPENERS[manner])
    return f'When {rng.choice(occasions)} in {town.name}, they say "{opener}, {rng.choice(sayings)}."'


def almanac_pages(world: World, edition: int = 0) -> list[str]:
    """All texts, shuffled and bound `TEXTS_PER_PAGE` to a page with a remark; every edition shuffles anew."""
    rng = keyed(world.seed, "pages", edition)
    texts = almanac_texts(world)
    rng.shuffle(texts)
    pages = []
    for start in range(0, len(texts), TEXTS_PER_PAGE):
        lines = texts[start : start + TEXTS_PER_PAGE]
        lines.insert(rng.randrange(len(lines) + 1), remark(rng, rng.choice(world.towns)))
        pages.append("\n".join(lines))
    return pages
