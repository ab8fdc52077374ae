"""Mismatched answers: every tree gets a second branch, another row's answer on its own prompt (KTO's drift).

In: a side's trees of one branch. Out: the same trees with two, written in place of the first; notes.
Must not know: rows, tokenizers, losses.

Which answer it is follows from the trees alone, not from steps or seeds, so a reference is scored once. It is the next
row's in the order of the file that has another prompt and another answer and fits behind the prompt; where none fits,
the shortest other one, cut to what fits.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from tunesmith.data.store import StoreWriter, TreeStore, pack
from tunesmith.data.types import Branch, Tree
from tunesmith.errors import DataError

Array = npt.NDArray[np.int64]
SEARCHED_ROWS = 64
"""Rows behind a tree that are looked at first; the few trees without a partner there look at all rows."""
PACKED_TREES = 256  # trees that are written at a time

PARTNERS = "an answer of another row was set beside each, to measure the drift on"


def mismatch(folder: Path, *, max_length: int) -> list[str]:
    """Rewrites a store so that every tree has a mismatched branch; returns notes.

    Raises DataError where no row has another prompt and another answer.
    """
    store = TreeStore(folder)
    if not len(store):
        return []
    partner_G, is_cut_G = partners(store, max_length=max_length)
    if (partner_G < 0).any():
        place = int(np.flatnonzero(partner_G < 0)[0])
        raise DataError(
            f"no row has another prompt and another answer than this one, among {len(store)} of the {folder.name} side",
            where=store[place].id,
            remedy="KTO compares with answers to other prompts: give more rows, or use `method: bco_unpaired`.",
        )
    beside = folder.with_name(f"{folder.name}-mismatched")
    writer = StoreWriter(beside)
    for start in range(0, len(store), PACKED_TREES):
        places = range(start, min(start + PACKED_TREES, len(store)))
        writer.append(pack([with_answer(store[i], store[int(partner_G[i])], max_length=max_length) for i in places]))
    writer.close()
    del store  # its files are mapped
    shutil.rmtree(folder)
    beside.rename(folder)
    num_cut = int(is_cut_G.sum())
    if not num_cut:
        return []
    return [f"WARNING: {num_cut} {folder.name} rows leave no room for another row's answer: KTO's drift reads a part."]


def with_answer(tree: Tree, other: Tree, *, max_length: int) -> Tree:
    """The tree with the other's answer behind its own, cut where it would be longer than `max_length`."""
    (own,), room = tree.branches, max_length - len(tree.prompt_ids)
    taken = other.branches[0]
    assert room > 0, "the tree's own answer fits"
    return replace(tree, branches=(own, Branch(taken.ids[:room], taken.trained[:room])))


def partners(trees: Sequence[Tree], *, max_length: int) -> tuple[Array, npt.NDArray[np.bool_]]:
    """For each tree the place of the tree whose answer it gets, -1 for none; and whether that must be cut."""
    count = len(trees)
    prompt_G, answer_G = np.zeros(count, np.int64), np.zeros(count, np.int64)
    room_G, length_G, begin_G = np.zeros(count, np.int64), np.zeros(count, np.int64), np.zeros(count, np.int64)
    for place in range(count):
        tree = trees[place]
        branch = tree.branches[0]
        prompt_G[place], answer_G[place] = _key(tree.prompt_ids), _key(branch.ids)
        room_G[place], length_G[place] = max_length - len(tree.prompt_ids), len(branch.ids)
        begin_G[place] = int(branch.trained.argmax())  # what is cut keeps a token that is read
    partner_G = np.full(count, -1, np.int64)
    here_G = np.arange(count)
    for step in range(1, min(SEARCHED_ROWS, count - 1) + 1):
        open_G = np.flatnonzero(partner_G < 0)
        other_G = (here_G[open_G] + step) % count
        fits_G = (prompt_G[other_G] != prompt_G[open_G]) & (answer_G[other_G] != answer_G[open_G])
        fits_G &= length_G[other_G] <= room_G[open_G]
        partner_G[open_G[fits_G]] = other_G[fits_G]
    is_cut_G = np.zeros(count, np.bool_)
    for place in np.flatnonzero(partner_G < 0).tolist():
        other_G = np.flatnonzero(
            (prompt_G != prompt_G[place]) & (answer_G != answer_G[place]) & (begin_G < room_G[place])
        )
        if len(other_G):
            partner_G[place] = other_G[length_G[other_G].argmin()]
            is_cut_G[place] = length_G[partner_G[place]] > room_G[place]
    return partner_G, is_cut_G


def _key(ids: npt.NDArray[np.int32]) -> int:
    """64 bits of the tokens' hash."""
    digest = hashlib.blake2b(ids.astype("<i4").tobytes(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)
