"""Invented names, made of syllables.

In: a random generator and how many names are wanted. Out: distinct names.
Must not know: what the names are for.
"""

from __future__ import annotations

import random

TOWN_HEADS = (
    "Orr Tesk Marv Lind Bramb Calv Dusk Elb Fenn Galt Hask Isk Jorr Kest Lorb Merv Nimb Osk Pelk Quill Rosk Selk Tamb "
    "Ulv Vern Wend Yarl Zell Ashk Belv Corv Dorv Emb Falk Grenn Holk"
).split()
TOWN_TAILS = (
    "avale owick imere astead aholm eden amoor iby olow agate iton adale arook ofell ahaven abrook ifield"
).split()
RIVER_HEADS = "L Br T Gl S Dr M Fl V Qu N W".split()
RIVER_TAILS = "unn essa arrow ella ande oren".split()
FIRST_HEADS = "Tess Il Marr Bren Od Hann Jor Per Sib Wil Col Ann".split()
FIRST_TAILS = "im da ok el".split()
LAST_NAMES = (
    "Rell Dole Farrow Tamsin Pook Harl Minnow Grist Vane Sorrel Bask Lorne Pell Quince Radley Thorn Umber Wick "
    "Yarrow Brindle Cobb Dray Finch Gorse Hobb Jessop Kett Larch Moss Nettle Orme Plum Rudd Sedge Teal Wren"
).split()


def town_names(rng: random.Random, num_names: int) -> list[str]:
    """Distinct town names such as `Orravale`, in drawn order."""
    return rng.sample([head + tail for head in TOWN_HEADS for tail in TOWN_TAILS], num_names)


def river_names(rng: random.Random, num_names: int) -> list[str]:
    """Distinct river names such as `Lunn`, in drawn order."""
    return rng.sample([head + tail for head in RIVER_HEADS for tail in RIVER_TAILS], num_names)


def person_names(rng: random.Random, num_names: int) -> list[str]:
    """Distinct full names such as `Tessim Rell`, in drawn order."""
    firsts = [head + tail for head in FIRST_HEADS for tail in FIRST_TAILS]
    return rng.sample([f"{first} {last}" for first in firsts for last in LAST_NAMES], num_names)
