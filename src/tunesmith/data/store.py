"""Trees on disk: written in a stream, read as a sequence without being loaded.

In: trees, or a folder that a writer filled. Out: a `Sequence[Tree]` over memory-mapped files, so that the rows of
a stage may be larger than memory; sizes of any sequence of trees. Must not know: rows, files of the user, torch.

Layout of a folder: `tokens.i32` every tree's prompt and branches one after another; `trained.u8` one byte a token;
`edges.i64` for every tree its start, the end of its prompt, the end of every branch; `first_edge.i64` where a tree's
edges begin; `shas.bin` 32 bytes a tree; `ids.txt` with `id_edges.i64`; `order.i64` which trees are read, in order;
`figures.f64` for every tree its label (nan for none), its weight, and the score of every branch (nan for none), at
places that follow from `first_edge`; `weights.f32` one number a token, empty where every trained token counts 1.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import BinaryIO, TypeVar, overload

import numpy as np
import numpy.typing as npt

from tunesmith.data.types import Branch, Tree

Array = npt.NDArray[np.int64]
Length = TypeVar("Length", int, Array)
SHA_BYTES = 32
COUNTED_TREES = 1 << 10  # trees whose masks are summed at a time: a few MB
FILES = ("tokens.i32", "trained.u8", "edges.i64", "first_edge.i64", "shas.bin", "ids.txt", "id_edges.i64", "order.i64")
FIGURES = ("figures.f64", "weights.f32")


@dataclass(frozen=True, slots=True, eq=False)
class Packed:
    """Trees in flat arrays: what a worker process sends and a writer appends. Edges count from the first token."""

    tokens: npt.NDArray[np.int32]
    trained: npt.NDArray[np.uint8]
    edges: Array
    num_edges: Array
    ids: list[str]
    shas: bytes
    figures: npt.NDArray[np.float64]  # as many as edges: label, weight, scores
    weights: npt.NDArray[np.float32] | None


@dataclass(frozen=True, slots=True, eq=False)
class Sizes:
    """Of every tree: tokens computed, tokens trained, tokens without prefix sharing, its longest row, and the
    (query, key) pairs that attend: every prompt token once, every branch token to the prompt and its own branch.
    """

    num_tokens: Array
    num_trained: Array
    num_unshared: Array
    longest_row: Array
    num_pairs: Array


def pack(trees: Sequence[Tree]) -> Packed:
    """Trees to flat arrays."""
    pieces: list[npt.NDArray[np.int32]] = []
    masks: list[npt.NDArray[np.uint8]] = []
    edges: list[int] = []
    place = 0
    for tree in trees:
        edges.append(place)
        place += len(tree.prompt_ids)
        edges.append(place)
        pieces.append(tree.prompt_ids)
        masks.append(np.zeros(len(tree.prompt_ids), np.uint8))
        for branch in tree.branches:
            place += len(branch.ids)
            edges.append(place)
            pieces.append(branch.ids)
            masks.append(branch.trained.astype(np.uint8))
    return Packed(
        tokens=np.concatenate(pieces, dtype=np.int32) if pieces else np.zeros(0, np.int32),
        trained=np.concatenate(masks) if masks else np.zeros(0, np.uint8),
        edges=np.array(edges, np.int64),
        num_edges=np.array([2 + len(tree.branches) for tree in trees], np.int64),
        ids=[tree.id for tree in trees],
        shas=b"".join(bytes.fromhex(tree.sha()) for tree in trees),
        figures=np.array([figure for tree in trees for figure in _figures(tree)], np.float64),
        weights=_weights(trees),
    )


def _figures(tree: Tree) -> list[float]:
    """Label, weight and a score for every branch: as many numbers as the tree has edges."""
    scores = tree.scores or (np.nan,) * len(tree.branches)
    assert len(scores) == len(tree.branches), "a score for every branch, or none"
    return [np.nan if tree.label is None else float(tree.label), tree.weight, *scores]


def _weights(trees: Sequence[Tree]) -> npt.NDArray[np.float32] | None:
    """The weight of every token, prompts included; None where no tree has any."""
    if all(branch.weights is None for tree in trees for branch in tree.branches):
        return None
    parts: list[npt.NDArray[np.generic]] = []
    for tree in trees:
        parts.append(np.zeros(len(tree.prompt_ids), np.float32))
        parts += [branch.trained if branch.weights is None else branch.weights for branch in tree.branches]
    return np.concatenate(parts, dtype=np.float32)


def take(packed: Packed, chosen: npt.NDArray[np.bool_]) -> Packed:
    """The chosen trees of a pack."""
    if chosen.all():
        return packed
    last = np.cumsum(packed.num_edges) - 1
    num_tokens = packed.edges[last] - packed.edges[last - packed.num_edges + 1]
    of_tokens, of_edges = np.repeat(chosen, num_tokens), np.repeat(chosen, packed.num_edges)
    kept_tokens = np.where(chosen, num_tokens, 0)
    shift = packed.edges[last - packed.num_edges + 1] - (np.cumsum(kept_tokens) - kept_tokens)
    edges = (packed.edges - np.repeat(shift, packed.num_edges))[of_edges]
    places = np.flatnonzero(chosen).tolist()
    shas = b"".join(packed.shas[SHA_BYTES * place : SHA_BYTES * (place + 1)] for place in places)
    return Packed(
        tokens=packed.tokens[of_tokens],
        trained=packed.trained[of_tokens],
        edges=edges,
        num_edges=packed.num_edges[chosen],
        ids=[packed.ids[place] for place in places],
        shas=shas,
        figures=packed.figures[of_edges],
        weights=None if packed.weights is None else packed.weights[of_tokens],
    )


class StoreWriter:
    """Appends packed trees to the files of a folder."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        self._files: dict[str, BinaryIO] = {name: (folder / name).open("wb") for name in (*FILES, *FIGURES)}
        self._is_weighted = False
        self.num_trees = 0
        self._num_tokens = 0
        self._num_edges = 0
        self._num_id_bytes = 0

    def append(self, packed: Packed) -> None:
        """Adds the trees behind those that are there."""
        self._write("tokens.i32", packed.tokens.astype("<i4"))
        self._write("trained.u8", packed.trained)
        self._write("edges.i64", (packed.edges + self._num_tokens).astype("<i8"))
        starts = np.cumsum(packed.num_edges) - packed.num_edges + self._num_edges
        self._write("first_edge.i64", starts.astype("<i8"))
        names = [name.encode() for name in packed.ids]
        ends = np.cumsum([len(name) for name in names], dtype=np.int64) + self._num_id_bytes
        self._write("id_edges.i64", ends.astype("<i8"))
        self._files["ids.txt"].write(b"".join(names))
        self._files["shas.bin"].write(packed.shas)
        self._write("figures.f64", packed.figures.astype("<f8"))
        self._write_weights(packed)
        self.num_trees += len(names)
        self._num_tokens += len(packed.tokens)
        self._num_edges += len(packed.edges)
        self._num_id_bytes = int(ends[-1]) if names else self._num_id_bytes

    def _write_weights(self, packed: Packed) -> None:
        """Weights from the first tree that has any on; the tokens before it count as they are trained."""
        if packed.weights is not None and not self._is_weighted:
            self._is_weighted = True
            self._files["trained.u8"].flush()
            before = np.fromfile(self._files["trained.u8"].name, "u1", count=self._num_tokens)
            self._write("weights.f32", before.astype("<f4"))
        if self._is_weighted:
            weights = packed.trained if packed.weights is None else packed.weights
            self._write("weights.f32", weights.astype("<f4"))

    def close(self, order: Array | None = None) -> None:
        """Writes the order (all trees as they came, where None) and closes the files."""
        chosen = np.arange(self.num_trees) if order is None else order
        self._write("order.i64", chosen.astype("<i8"))
        self._write("first_edge.i64", np.array([self._num_edges], "<i8"))
        self.abandon()

    def abandon(self) -> None:
        """Closes the files as they are."""
        for file in self._files.values():
            file.close()

    def _write(self, name: str, values: npt.NDArray[np.generic]) -> None:
        self._files[name].write(values.tobytes())


class TreeStore(Sequence[Tree]):
    """The trees of a folder, in the order in which they are trained; each is read when it is asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._tokens = _mapped(folder / "tokens.i32", "<i4")
        self._trained = _mapped(folder / "trained.u8", "u1")
        self._edges = _mapped(folder / "edges.i64", "<i8")
        self._first_edge = _mapped(folder / "first_edge.i64", "<i8")
        self._shas = _mapped(folder / "shas.bin", "u1").reshape(-1, SHA_BYTES)
        self._ids = _mapped(folder / "ids.txt", "u1")
        self._id_edges = _mapped(folder / "id_edges.i64", "<i8")
        self._order = _mapped(folder / "order.i64", "<i8")
        self._figures = _mapped(folder / "figures.f64", "<f8")
        self._weights = _mapped(folder / "weights.f32", "<f4")

    def __len__(self) -> int:
        return len(self._order)

    @overload
    def __getitem__(self, index: int) -> Tree: ...

    @overload
    def __getitem__(self, index: slice) -> list[Tree]: ...

    def __getitem__(self, index: int | slice) -> Tree | list[Tree]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        number = int(self._order[index])
        edges = self._edges[self._first_edge[number] : self._first_edge[number + 1]].tolist()
        prompt = np.array(self._tokens[edges[0] : edges[1]], np.int32)
        branches = tuple(self._branch(start, end) for start, end in pairwise(edges[1:]))
        start = int(self._id_edges[number - 1]) if number else 0
        name = self._ids[start : int(self._id_edges[number])].tobytes().decode()
        figures = self._figures[self._first_edge[number] : self._first_edge[number + 1]].tolist()
        label, weight, *scores = figures
        is_scored = not np.isnan(scores).any()
        given = None if np.isnan(label) else label == 1
        return Tree(name, prompt, branches, tuple(scores) if is_scored else (), given, weight)

    def _branch(self, start: int, end: int) -> Branch:
        ids, trained = np.array(self._tokens[start:end], np.int32), np.array(self._trained[start:end], np.bool_)
        weights = np.array(self._weights[start:end], np.float32) if len(self._weights) else None
        return Branch(ids, trained, None if weights is None or np.array_equal(weights, trained) else weights)

    def labels(self) -> npt.NDArray[np.float64]:
        """Every tree's label: 1 desirable, 0 not, nan where it has none."""
        first = np.asarray(self._first_edge)[np.asarray(self._order)]
        return np.asarray(self._figures)[first] if len(first) else np.zeros(0)

    def digest(self) -> str:
        """sha256 over the trees' own hashes, in order."""
        digest = hashlib.sha256()
        for start in range(0, len(self), 1 << 16):
            digest.update(np.ascontiguousarray(self._shas[self._order[start : start + (1 << 16)]]).tobytes())
        return digest.hexdigest()

    def sizes(self) -> Sizes:
        """Every tree's sizes, without making the trees."""
        first = np.asarray(self._first_edge)
        edges = np.asarray(self._edges)
        starts, ends = edges[first[:-1]], edges[first[1:] - 1]
        prompts = edges[first[:-1] + 1] - starts
        num_branches = np.diff(first) - 2
        is_branch = np.ones(max(len(edges) - 1, 0), np.bool_)
        is_branch[first[:-1]] = False  # from a tree's start to the end of its prompt
        is_branch[first[1:-1] - 1] = False  # from the end of one tree to the start of the next
        branch_lengths = np.diff(edges)[is_branch]
        longest = (
            np.maximum.reduceat(branch_lengths, np.cumsum(num_branches) - num_branches) if len(prompts) else prompts
        )
        in_branches = (
            np.add.reduceat(_triangle(branch_lengths), np.cumsum(num_branches) - num_branches)
            if len(prompts)
            else prompts
        )
        pairs = _triangle(prompts) + prompts * (ends - starts - prompts) + in_branches
        order = np.asarray(self._order)
        return Sizes(
            num_tokens=(ends - starts)[order],
            num_trained=self._num_trained(starts, ends)[order],
            num_unshared=(ends - starts + (num_branches - 1) * prompts)[order],
            longest_row=(prompts + longest)[order],
            num_pairs=pairs[order],
        )

    def _num_trained(self, starts: Array, ends: Array) -> Array:
        """Trained tokens between two places, counted a block at a time so that the mask never lies in memory whole."""
        counts = np.zeros(len(starts), np.int64)
        for first in range(0, len(starts), COUNTED_TREES):
            block = slice(first, first + COUNTED_TREES)
            base, last = int(starts[block][0]), int(ends[block][-1])
            sums = np.concatenate(([0], np.cumsum(self._trained[base:last], dtype=np.int64)))
            counts[block] = sums[ends[block] - base] - sums[starts[block] - base]
        return counts


class Joined(Sequence[Tree]):
    """Several sequences of trees as one, without copying."""

    def __init__(self, *parts: Sequence[Tree]) -> None:
        self.parts = tuple(part for part in parts if len(part))
        self._ends = np.cumsum([len(part) for part in self.parts], dtype=np.int64)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    @overload
    def __getitem__(self, index: int) -> Tree: ...

    @overload
    def __getitem__(self, index: slice) -> list[Tree]: ...

    def __getitem__(self, index: int | slice) -> Tree | list[Tree]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        number = index + len(self) if index < 0 else index
        if not 0 <= number < len(self):
            raise IndexError(index)
        part = int(np.searchsorted(self._ends, number, side="right"))
        return self.parts[part][number - (int(self._ends[part - 1]) if part else 0)]


class Chosen(Sequence[Tree]):
    """Some of a sequence's trees, in the order of `indices`, without copying."""

    def __init__(self, trees: Sequence[Tree], indices: Sequence[int]) -> None:
        self.trees = trees
        self.indices = np.asarray(indices, np.int64)

    def __len__(self) -> int:
        return len(self.indices)

    @overload
    def __getitem__(self, index: int) -> Tree: ...

    @overload
    def __getitem__(self, index: slice) -> list[Tree]: ...

    def __getitem__(self, index: int | slice) -> Tree | list[Tree]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        return self.trees[int(self.indices[index])]


def sizes_of(trees: Sequence[Tree]) -> Sizes:
    """The sizes of any sequence of trees; those on disk are not read for it."""
    if isinstance(trees, TreeStore):
        return trees.sizes()
    if isinstance(trees, Chosen):
        whole, indices = sizes_of(trees.trees), trees.indices
        return Sizes(
            whole.num_tokens[indices],
            whole.num_trained[indices],
            whole.num_unshared[indices],
            whole.longest_row[indices],
            whole.num_pairs[indices],
        )
    if isinstance(trees, Joined) and trees.parts:
        parts = [sizes_of(part) for part in trees.parts]
        return Sizes(
            np.concatenate([part.num_tokens for part in parts]),
            np.concatenate([part.num_trained for part in parts]),
            np.concatenate([part.num_unshared for part in parts]),
            np.concatenate([part.longest_row for part in parts]),
            np.concatenate([part.num_pairs for part in parts]),
        )
    rows = [len(tree.prompt_ids) + max(len(branch.ids) for branch in tree.branches) for tree in trees]
    pairs = [
        _triangle(len(tree.prompt_ids))
        + sum(len(tree.prompt_ids) * len(branch.ids) + _triangle(len(branch.ids)) for branch in tree.branches)
        for tree in trees
    ]
    return Sizes(
        np.array([tree.num_tokens for tree in trees], np.int64),
        np.array([tree.num_trained for tree in trees], np.int64),
        np.array([tree.num_unshared for tree in trees], np.int64),
        np.array(rows, np.int64),
        np.array(pairs, np.int64),
    )


def _triangle(length: Length) -> Length:
    """Pairs of `length` tokens that attend causally to themselves."""
    return length * (length + 1) // 2


def digest_of(trees: Sequence[Tree]) -> str:
    """sha256 over the trees' own hashes, in order: equal for equal trees, wherever they lie."""
    if isinstance(trees, TreeStore):
        return trees.digest()
    return hashlib.sha256(b"".join(bytes.fromhex(tree.sha()) for tree in trees)).hexdigest()


def _mapped(path: Path, kind: str) -> npt.NDArray[np.generic]:
    """A file as an array that is read where it is touched; an empty file cannot be mapped."""
    if path.stat().st_size == 0:
        return np.zeros(0, kind)
    return np.memmap(path, dtype=kind, mode="r")
