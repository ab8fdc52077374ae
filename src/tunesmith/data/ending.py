"""Where a reward model reads: at the last token of each answer.

In: a tree whose answers' tokens are all marked. Out: the same with one mark an answer, at its end.
Must not know: tokenizers, models.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from tunesmith.data.types import RowError, Tree


def at_end(tree: Tree) -> Tree:
    """The tree with the last token of each branch marked and no other: what ends the answer, and all that it saw.

    Raises RowError where a branch is one token without a prompt: a score needs something to judge.
    """
    branches = []
    for branch in tree.branches:
        if len(tree.prompt_ids) + len(branch.ids) < 2:
            raise RowError("an answer of one token without a prompt has nothing to score")
        marked = np.zeros(len(branch.ids), dtype=np.bool_)
        marked[-1] = True
        branches.append(replace(branch, trained=marked, weights=None))
    return replace(tree, branches=tuple(branches))
