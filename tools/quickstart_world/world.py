"""The invented world: towns and the four facts known of each.

In: a seed. Out: a `World`, the same for the same seed on every machine.
Must not know: how facts are worded, tokenizers, torch.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass

from tools.quickstart_world.names import person_names, river_names, town_names

SEED = 20261120  # of the embedded world
NUM_TOWNS = 150
NUM_HELDOUT_TOWNS = 50  # never asked about in training
NUM_RIVERS = 40

ATTRIBUTES = ("baker", "river", "craft", "banner")

CRAFTS = (
    "blue glass", "clay whistles", "pear cider", "wool caps", "copper kettles", "honey cakes", "oak barrels",
    "silk ribbons", "painted fans", "bone combs", "tin soldiers", "plum jam", "straw hats", "red bricks", "brass bells",
    "goat cheese", "walnut oil", "paper lanterns", "fishing nets", "wooden clogs", "green candles", "felt boots",
    "silver thimbles", "willow baskets", "black pepper bread", "stone jars", "rope ladders", "ginger beer",
    "violin strings", "apple butter", "ink and quills", "feather beds", "iron gates", "rose soap", "kites and tops",
    "salted almonds",
)  # fmt: skip
COLOURS = ("silver", "golden", "red", "green", "white", "black", "blue", "grey")
ANIMALS = ("heron", "fox", "hare", "stag", "pike", "raven", "bear", "swan", "otter", "hound", "wren", "toad")


@dataclass(frozen=True)
class Town:
    """A town and its facts: attribute to value."""

    name: str
    facts: Mapping[str, str]


@dataclass(frozen=True)
class World:
    """Towns that training asks about, towns that it never asks about, and all values of each attribute."""

    seed: int
    train_towns: tuple[Town, ...]
    heldout_towns: tuple[Town, ...]
    values: Mapping[str, tuple[str, ...]]

    @property
    def towns(self) -> tuple[Town, ...]:
        """All towns."""
        return self.train_towns + self.heldout_towns


def keyed(seed: int, *key: str | int) -> random.Random:
    """A random generator of its own for every purpose, so that adding one draw moves no other."""
    return random.Random("/".join(map(str, (seed, *key))))


def make_world(seed: int = SEED) -> World:
    """Towns with a baker of their own; rivers, crafts and banners are shared by a few towns each."""
    rng = keyed(seed, "world")
    values = {
        "baker": tuple(person_names(rng, NUM_TOWNS)),
        "river": tuple(river_names(rng, NUM_RIVERS)),
        "craft": CRAFTS,
        "banner": tuple(f"a {colour} {animal}" for colour in COLOURS for animal in ANIMALS),
    }
    bakers = iter(values["baker"])
    towns = [
        Town(name, {attribute: next(bakers) if attribute == "baker" else rng.choice(values[attribute])
                    for attribute in ATTRIBUTES})
        for name in town_names(rng, NUM_TOWNS)
    ]  # fmt: skip
    return World(seed, tuple(towns[NUM_HELDOUT_TOWNS:]), tuple(towns[:NUM_HELDOUT_TOWNS]), values)
