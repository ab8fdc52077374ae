"""Which stage comes before which.

In: a recipe's stages. Out: the number of the one that another starts from. Must not know: files, weights.
"""

from __future__ import annotations

from collections.abc import Sequence

from tunesmith.recipe.stages import StageBase


def previous_policy(stages: Sequence[StageBase], index: int) -> int | None:
    """What `start: previous` means for stage `index`: the nearest one before it that answers prompts; None: the base.

    A reward model answers none, so the stages behind it go on from what it started from.
    """
    return next((number for number in range(index - 1, -1, -1) if stages[number].makes_policy), None)
